"""`record="online"`: rows caught in the training backward, compared with a recorder that reruns every step."""

import copy
import json
import os
from functools import partial

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_doge.artifacts.influence import IndexReader
from hf_doge.functional.tracin_we import batch_token_gradient_rows
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing.online import PARTIAL, OnlineRecording
from hf_doge.tracing.online_identity import EXAMPLE_IDS, IdentifiedBatches
from hf_doge.tracing.online_spill import RowSpill, merged_rows, read_segments
from hf_doge.tracing.settings import RecordingSettings
from tests.tiny import VOCAB, tiny_classifier, tiny_gpt2, tiny_llama, tiny_t5

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")

NUM_EXAMPLES = 12


class Online(TrainerCallback):
    def __init__(self, folder, dataset, tokenizer=None, **options):
        self.recording = OnlineRecording(
            folder,
            dataset=dataset,
            options=RecordingSettings(record="online", dtype="float32", **options),
            tokenizer=tokenizer,
        )
        self.learning_rates = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.recording.start(
            model=kwargs["model"], train_dataloader=kwargs["train_dataloader"], args=args, state=state
        )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        learning_rate = kwargs["optimizer"].param_groups[0]["lr"]
        self.learning_rates.append(learning_rate)
        self.recording.before_optimizer_step(learning_rate=learning_rate, state=state)

    def on_save(self, args, state, control, **kwargs):
        name = f"checkpoint-{state.global_step}"
        self.recording.save(
            model=kwargs["model"],
            name=name,
            step=state.global_step,
            epoch=state.epoch,
            learning_rate=self.learning_rates[-1],
            path=os.path.join(args.output_dir, name),
        )

    def on_train_end(self, args, state, control, **kwargs):
        self.recording.stop()


def texts(*, seed=0, lengths=(3, 9), num_examples=NUM_EXAMPLES):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(*lengths, (num_examples,), generator=generator).tolist()
    return [torch.randint(1, VOCAB, (size,), generator=generator).tolist() for size in sizes]


def classifier_dataset(**kwargs):
    ids = texts(**kwargs)
    return Dataset.from_dict({"input_ids": ids, "labels": [sum(line) % 3 for line in ids]})


def language_dataset(*, masked=2, **kwargs):
    ids = texts(**kwargs)
    return Dataset.from_dict(
        {"input_ids": ids, "labels": [[-100] * (i % masked) + line[i % masked :] for i, line in enumerate(ids)]}
    )


def pad(features):
    """Padded on the right, labels -100 there."""
    longest = max(len(feature["input_ids"]) for feature in features)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for feature in features:
        ids, rest = feature["input_ids"], longest - len(feature["input_ids"])
        batch["input_ids"].append(ids + [0] * rest)
        batch["attention_mask"].append([1] * len(ids) + [0] * rest)
        labels = feature["labels"]
        batch["labels"].append(labels + [-100] * (longest - len(labels)) if isinstance(labels, list) else labels)
    return {name: torch.tensor(value) for name, value in batch.items()}


def arguments(folder, **kwargs):
    defaults = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=0.05,
        lr_scheduler_type="linear",
        optim="sgd",
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        logging_strategy="no",
    )
    return TrainingArguments(**{**defaults, **kwargs})


def train(model, dataset, folder, *, callbacks=(), resume=None, collator=pad, trainer_class=Trainer, **kwargs):
    trainer = trainer_class(
        model, arguments(folder, **kwargs), train_dataset=dataset, data_collator=collator, callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def record(model, dataset, folder, *, resume=None, options=None, callbacks=(), **kwargs):
    online = Online(folder / "index", dataset, **(options or {}))
    trainer = train(model, dataset, folder / "out", callbacks=[online, *callbacks], resume=resume, **kwargs)
    return online, trainer


def index_rows(folder, *, checkpoint=0):
    reader = IndexReader.open(folder / "index", cache_dir=folder / "cache")
    rows = reader.example_rows(checkpoint, range(reader.num_examples))
    return [dense(torch.as_tensor(tokens), torch.as_tensor(values), reader.width) for tokens, values in rows]


def dense(tokens, rows, width):
    matrix = torch.zeros(VOCAB, width, dtype=torch.float64)
    matrix.index_add_(0, tokens.long(), rows.double())
    return matrix


class Watch(TrainerCallback):
    """Learns from outside which examples each step used: a collator that notes them, and the weights before each step."""

    def __init__(self, collator=pad):
        self.collator, self.collated, self.weights, self.rates = collator, [], [], []

    def __call__(self, features):
        self.collated.append([feature["input_ids"] for feature in features])
        return self.collator(features)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.weights.append(copy.deepcopy(kwargs["model"].state_dict()))
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


def replayed(model, dataset, watch, *, accumulation=1, collator=pad, **options):
    """Each example's rows at the step that used it, one at a time through the recorder in evaluation mode."""
    width = model.get_input_embeddings().weight.shape[1]
    sums = [torch.zeros(VOCAB, width, dtype=torch.float64) for _ in range(len(dataset))]
    lines = dataset["input_ids"]
    for step, (weights, rate) in enumerate(zip(watch.weights, watch.rates, strict=True)):
        model.load_state_dict(weights)
        for batch in watch.collated[step * accumulation : (step + 1) * accumulation]:
            for line in batch:
                example = lines.index(line)
                with EmbeddingGradientRecorder(model, **options) as recorder:
                    ((tokens, rows),) = recorder.record(collator([dataset[example]]))
                sums[example] += rate * dense(tokens, rows, width)
    return sums


def assert_rows(found, expected, *, rtol=1e-4):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-6 * float(torch.stack(expected).abs().max()))


MODELS = {
    "classifier": (tiny_classifier, classifier_dataset),
    "gpt2": (tiny_gpt2, language_dataset),
    "llama": (tiny_llama, language_dataset),
    "t5": (tiny_t5, partial(language_dataset, masked=1)),
}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_each_example_alone_at_the_step_that_used_it(tmp_path, name, reduction):
    make_model, make_dataset = MODELS[name]
    model, dataset, watch = make_model(), make_dataset(), Watch()
    accumulation, batch_size = 2, 5  # 12 examples: batches of 5, 5 and 2, steps of two and one of them
    record(
        model,
        dataset,
        tmp_path,
        callbacks=[watch],
        collator=watch,
        options={"loss_reduction": reduction},
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )
    expected = replayed(make_model(), dataset, watch, accumulation=accumulation, loss_reduction=reduction)
    assert all(rows.abs().max() > 0 for rows in expected)
    assert_rows(index_rows(tmp_path), expected)


class Still(torch.optim.SGD):
    """An optimizer that moves nothing: every step sees the same weights."""

    def step(self, closure=None):
        return None


def still(model, lr=0.5):
    schedule = {"optimizers": (Still(model.parameters(), lr=lr), None)}

    class StillTrainer(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, **schedule)

    return {"trainer_class": StillTrainer, "lr_scheduler_type": "constant"}


@pytest.mark.parametrize("name", MODELS)
def test_rows_do_not_depend_on_batch_size_or_accumulation(tmp_path, name):
    make_model, make_dataset = MODELS[name]
    found = []
    for number, (batch_size, accumulation) in enumerate([(1, 1), (8, 1), (2, 3), (5, 2)]):
        model = make_model()
        folder = tmp_path / str(number)
        record(
            model,
            make_dataset(),
            folder,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            **still(model),
        )
        found.append(index_rows(folder))
    for other in found[1:]:
        assert_rows(other, found[0], rtol=1e-5)


def test_uses_in_several_epochs_add_up(tmp_path):
    found = []
    for epochs in (1, 3):
        model = tiny_classifier()
        folder = tmp_path / str(epochs)
        options = {"num_train_epochs": epochs, "save_strategy": "steps", "save_steps": 1000}
        record(model, classifier_dataset(), folder, **options, **still(model))
        found.append(index_rows(folder))
    assert_rows(found[1], [3 * rows for rows in found[0]], rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2_dropout", *MODELS])
def test_training_is_the_same_bit_for_bit(tmp_path, name):
    make_model, make_dataset = {**MODELS, "gpt2_dropout": (partial(tiny_gpt2, dropout=0.2), language_dataset)}[name]
    runs = []
    for folder, watched in (("with", True), ("without", False)):
        model, dataset = make_model(), make_dataset()
        run = record if watched else train
        result = run(
            model,
            dataset,
            tmp_path / folder,
            optim="adamw_torch",
            logging_strategy="steps",
            logging_steps=1,
            eval_strategy="no",
            gradient_accumulation_steps=2,
            num_train_epochs=2,
        )
        trainer = result[1] if watched else result
        runs.append((model.state_dict(), [entry.get("loss") for entry in trainer.state.log_history], torch.rand(1)))
    (weights, losses, draw), (other_weights, other_losses, other_draw) = runs
    assert losses == other_losses
    assert draw == other_draw
    for key, value in weights.items():
        assert torch.equal(value, other_weights[key]), key


def all_hooks(model):
    return [
        dict(hooks)
        for module in model.modules()
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._forward_pre_hooks_with_kwargs,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
        )
        if hooks
    ]


def test_everything_is_put_back(tmp_path):
    model, dataset = tiny_gpt2(), language_dataset()
    features, fingerprint = dict(dataset.features), dataset._fingerprint
    loaders = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            loaders.append(kwargs["train_dataloader"])

    online, trainer = record(model, dataset, tmp_path, callbacks=[Look()])
    assert trainer.train_dataset is dataset
    assert trainer.data_collator is pad
    assert (dict(dataset.features), dataset._fingerprint) == (features, fingerprint)
    assert loaders[0].dataset.column_names == dataset.column_names
    assert loaders[0].collate_fn is pad
    assert all_hooks(model) == []
    assert EXAMPLE_IDS not in next(iter(loaders[0]))
    assert not (tmp_path / "index" / PARTIAL).exists()


def test_equal_examples_stay_apart(tmp_path):
    lines = [[5, 6, 7], [5, 6, 7], [8, 9], [5, 6, 7]]
    dataset = Dataset.from_dict({"input_ids": lines, "labels": [0, 0, 1, 0]})
    model = tiny_classifier()
    record(model, dataset, tmp_path, per_device_train_batch_size=2, **still(model))
    rows = index_rows(tmp_path)
    assert_rows([rows[1], rows[3]], [rows[0], rows[0]], rtol=1e-5)
    assert rows[0][5].abs().max() > 0


def test_learning_rates_are_in_the_rows_and_the_checkpoint_weighs_one(tmp_path):
    model, watch = tiny_classifier(), Watch()
    dataset = classifier_dataset()
    online, _ = record(model, dataset, tmp_path, callbacks=[watch], collator=watch, warmup_steps=2)
    config = json.loads((tmp_path / "index" / "config.json").read_text())
    assert [checkpoint["learning_rate"] for checkpoint in config["checkpoints"]] == [1.0]
    assert online.learning_rates[0] == 0.0
    assert len(set(online.learning_rates)) == 3
    rows = index_rows(tmp_path)
    for line in watch.collated[0]:
        assert rows[dataset["input_ids"].index(line)].abs().max() == 0
    assert_rows(rows, replayed(tiny_classifier(), dataset, watch))


def test_frozen_embeddings_are_recorded_as_virtual(tmp_path):
    model, watch = tiny_classifier(), Watch()
    model.get_input_embeddings().weight.requires_grad_(False)
    dataset = classifier_dataset()
    with pytest.warns(UserWarning, match="frozen"):
        record(model, dataset, tmp_path, callbacks=[watch], collator=watch)
    rows = index_rows(tmp_path)
    assert all(row.abs().max() > 0 for row in rows)
    assert_rows(rows, replayed(tiny_classifier(), dataset, watch))


@pytest.mark.parametrize("unit", ["position", "token"])
def test_top_k_truncates_each_step(tmp_path, unit):
    model = tiny_classifier()
    options = {"top_k_tokens": 2, "top_k_unit": unit}
    record(model, classifier_dataset(), tmp_path / "top", options=options, **still(model, lr=1.0))
    with EmbeddingGradientRecorder(tiny_classifier(), top_k=2, top_k_unit=unit) as recorder:
        expected = [dense(*recorder.record(pad([example]))[0], 16) for example in classifier_dataset()]
    assert_rows(index_rows(tmp_path / "top"), expected)
    assert all(0 < int((row != 0).any(dim=1).sum()) <= 2 for row in index_rows(tmp_path / "top"))


def test_special_tokens_are_dropped_on_request(tmp_path, tokenizer):
    found = {}
    for special_tokens in ("count", "drop"):
        model, dataset = tiny_classifier(), classifier_dataset()
        online = Online(tmp_path / special_tokens / "index", dataset, tokenizer, special_tokens=special_tokens)
        train(model, dataset, tmp_path / special_tokens / "out", callbacks=[online], **still(model))
        found[special_tokens] = index_rows(tmp_path / special_tokens)
    special = list(tokenizer.all_special_ids)
    assert sum(rows[special].abs().sum() for rows in found["count"]) > 0
    for rows in found["count"]:
        rows[special] = 0
    assert_rows(found["drop"], found["count"], rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"dataloader_num_workers": 2},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
        {"gradient_checkpointing": True},
        {"neftune_noise_alpha": None, "max_grad_norm": 0.01},
    ],
    ids=["workers", "persistent", "drop_last", "checkpointing", "clipping"],
)
def test_rows_of_unusual_trainings(tmp_path, settings):
    model, dataset = tiny_gpt2(), language_dataset()
    record(model, dataset, tmp_path, **{**settings, **still(model, lr=1.0)})
    with EmbeddingGradientRecorder(tiny_gpt2()) as recorder:
        expected = [dense(*recorder.record(pad([example]))[0], 16) for example in dataset]
    rows = index_rows(tmp_path)
    used = [i for i, row in enumerate(rows) if row.abs().max() > 0]
    assert len(used) == (10 if "dataloader_drop_last" in settings else 12)
    assert_rows([rows[i] for i in used], [expected[i] for i in used])


def test_evaluations_during_training_leave_no_rows(tmp_path):
    found = []
    for strategy in ("no", "steps"):
        model, dataset = tiny_gpt2(), language_dataset()

        class Evaluating(still(model)["trainer_class"]):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, eval_dataset=language_dataset(seed=1), **kwargs)

        options = {"trainer_class": Evaluating, "lr_scheduler_type": "constant", "eval_steps": 1}
        record(model, dataset, tmp_path / strategy, eval_strategy=strategy, **options)
        found.append(index_rows(tmp_path / strategy))
    assert_rows(*found)


def test_half_precision_agrees_up_to_its_rounding(tmp_path):
    model, dataset = tiny_gpt2(), language_dataset()
    record(model, dataset, tmp_path, bf16=True, **still(model, lr=1.0))
    with EmbeddingGradientRecorder(tiny_gpt2()) as recorder:
        expected = [dense(*recorder.record(pad([example]))[0], 16) for example in dataset]
    for found, row in zip(index_rows(tmp_path), expected, strict=True):
        assert (found - row).norm() < 0.05 * row.norm()


# Resuming


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


LONG = {
    "num_train_epochs": 3,  # 9 steps
    "save_strategy": "steps",
    "save_steps": 4,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
}


def gradient_files(folder):
    config = json.loads((folder / "index" / "config.json").read_text())
    facts = [{**checkpoint, "path": None} for checkpoint in config["checkpoints"]]
    return facts, {
        path.name: path.read_bytes() for path in sorted((folder / "index" / "gradients").rglob("*.parquet"))
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    record(tiny_gpt2(dropout=0.1), language_dataset(), folder, **LONG)
    return gradient_files(folder)


@pytest.mark.parametrize("step", [5, 7, 8])
def test_an_interrupted_and_resumed_training_leaves_the_same_index(tmp_path, uninterrupted, step):
    with pytest.raises(KeyboardInterrupt):
        record(tiny_gpt2(dropout=0.1), language_dataset(), tmp_path, callbacks=[Interrupt(step)], **LONG)
    record(tiny_gpt2(dropout=0.1, seed=1), language_dataset(), tmp_path, resume=True, **LONG)
    assert gradient_files(tmp_path) == uninterrupted
    assert not (tmp_path / "index" / PARTIAL).exists()


def test_a_save_that_failed_is_made_good_when_the_training_is_resumed(tmp_path, uninterrupted, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hf_doge.artifacts.influence.checkpoint_writer.write_atomically", full_disk)
        with pytest.raises(OSError, match="No space left"):
            record(tiny_gpt2(dropout=0.1), language_dataset(), tmp_path, **LONG)
    assert (tmp_path / "out" / "checkpoint-4").exists()
    assert json.loads((tmp_path / "index" / "config.json").read_text())["checkpoints"] == []
    record(tiny_gpt2(dropout=0.1, seed=1), language_dataset(), tmp_path, resume=True, **LONG)
    assert gradient_files(tmp_path) == uninterrupted


def test_going_back_to_an_older_checkpoint_records_nothing_twice(tmp_path, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        options = {**LONG, "callbacks": [Interrupt(9)]}
        record(tiny_gpt2(dropout=0.1), language_dataset(), tmp_path, **options)
    resume = str(tmp_path / "out" / "checkpoint-4")
    record(tiny_gpt2(dropout=0.1, seed=1), language_dataset(), tmp_path, resume=resume, **LONG)
    assert gradient_files(tmp_path) == uninterrupted


def test_steps_without_rows_are_told(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tiny_gpt2(), language_dataset(), tmp_path / "out", callbacks=[Interrupt(5)], **LONG)
    with pytest.warns(UserWarning, match="steps from 1 to 4 were trained without their rows"):
        record(tiny_gpt2(), language_dataset(), tmp_path, resume=True, **LONG)
    facts, _ = gradient_files(tmp_path)
    assert [checkpoint["step"] for checkpoint in facts] == [8, 9]


def test_steps_after_the_last_save_are_told(tmp_path):
    with pytest.warns(UserWarning, match="steps from 1 on were trained after the last save"):
        record(tiny_classifier(), classifier_dataset(), tmp_path, save_strategy="no")
    assert not (tmp_path / "index" / PARTIAL).exists()


def test_another_training_is_refused_in_the_same_folder(tmp_path):
    record(tiny_classifier(), classifier_dataset(), tmp_path)
    with pytest.raises(ValueError, match="has recorded a training up to step 3"):
        record(tiny_classifier(), classifier_dataset(), tmp_path)


# Identity and scale that cannot be known


def refuse(tmp_path, match, *, model=None, **kwargs):
    with pytest.raises(ValueError, match=match):
        record(model or tiny_gpt2(), language_dataset(), tmp_path, **kwargs)


def test_streams_are_refused(tmp_path):
    stream = language_dataset().to_iterable_dataset()
    online = Online(tmp_path / "index", language_dataset())
    with pytest.raises(ValueError, match="examples by position"):
        train(tiny_gpt2(), stream, tmp_path / "out", callbacks=[online], max_steps=2)


@pytest.mark.parametrize("other", [language_dataset(num_examples=5), language_dataset(seed=5)], ids=["size", "tokens"])
def test_another_dataset_is_refused(tmp_path, other):
    online = Online(tmp_path / "index", other)
    with pytest.raises(ValueError, match="Leave `dataset` out"):
        train(tiny_gpt2(), language_dataset(), tmp_path / "out", callbacks=[online])


def test_collators_that_pack_are_refused(tmp_path):
    def flatten(features):
        return {
            name: torch.tensor([sum((feature[name] for feature in features), [])]) for name in ("input_ids", "labels")
        }

    refuse(tmp_path, "one line per example", collator=flatten)


def test_collators_that_sort_are_refused(tmp_path):
    def longest_first(features):
        return pad(sorted(features, key=lambda feature: -len(feature["input_ids"])))

    refuse(tmp_path, "keep the order of examples", collator=longest_first)


def test_packing_is_refused(tmp_path):
    class PackingTrainer(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.args.packing = True

    refuse(tmp_path, "packed sequences", trainer_class=PackingTrainer)


def test_label_smoothing_is_refused(tmp_path):
    refuse(tmp_path, "label smoothing", label_smoothing_factor=0.1)


def with_loss(function):
    class LossTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = function(outputs, inputs)
            return (loss, outputs) if return_outputs else loss

    return LossTrainer


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda outputs, inputs: outputs.loss + outputs.logits.pow(2).mean(), "multiple of the loss"),
        (lambda outputs, inputs: outputs.logits.pow(2).mean(), "backward did not come through it"),
    ],
    ids=["more", "another"],
)
def test_losses_beside_the_models_own_are_refused(tmp_path, function, match):
    refuse(tmp_path, match, trainer_class=with_loss(function))


def test_a_multiple_of_the_models_loss_leaves_the_rows_as_they_are(tmp_path):
    dataset = classifier_dataset()
    model = tiny_classifier()
    record(model, dataset, tmp_path / "one", **still(model))

    class Halved(with_loss(lambda outputs, inputs: outputs.loss * 0.125), still(tiny_classifier())["trainer_class"]):
        pass

    record(tiny_classifier(), dataset, tmp_path / "other", trainer_class=Halved, learning_rate=0.5, max_steps=3)
    assert all(rows.abs().max() > 0 for rows in index_rows(tmp_path / "one"))


def test_a_loss_function_of_the_trainer_is_refused(tmp_path):
    class LossFunctionTrainer(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, compute_loss_func=lambda outputs, labels, **kw: outputs.logits.mean(), **kwargs)

    refuse(tmp_path, "cannot be recorded online.*must return a loss", trainer_class=LossFunctionTrainer)


def test_batches_that_lose_their_identity_are_refused(tmp_path):
    class PickingTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss

    refuse(tmp_path, "with all its keys", trainer_class=PickingTrainer)


def test_a_refused_training_leaves_the_model_as_it_was(tmp_path):
    for number, function in enumerate((lambda outputs, inputs: outputs.logits.mean(), lambda outputs, inputs: None)):
        model = tiny_gpt2()
        smoothing = {"label_smoothing_factor": 0.1} if number else {}
        refuse(tmp_path / str(number), "online", model=model, trainer_class=with_loss(function), **smoothing)
        assert all_hooks(model) == []
        assert model.training


def test_losses_that_mix_examples_are_refused(tmp_path):
    class Mixing(type(tiny_gpt2())):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.loss = outputs.loss**2
            return outputs

    refuse(tmp_path, "mean cross-entropy", model=Mixing(tiny_gpt2().config), remove_unused_columns=False)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"tied": "full"}, "input part only"), ({"loss_fn": lambda outputs, batch: None}, "got another as `loss_fn`")],
)
def test_options_without_a_meaning_online_are_refused(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        Online(tmp_path, language_dataset(), **options)


def test_gradients_that_are_not_finite_are_refused(tmp_path):
    refuse(
        tmp_path,
        "Gradients must be finite",
        trainer_class=with_loss(lambda outputs, inputs: outputs.loss * torch.inf),
        gradient_checkpointing=True,  # where the first backward is not compared
    )


# What lies between saves


def random_rows(generator, num_examples, *, width=3, vocabulary_size=7):
    ids = torch.randint(vocabulary_size, (num_examples, 5), generator=generator)
    grads = torch.randn(num_examples, 5, width, generator=generator)
    return TokenRows(*batch_token_gradient_rows(ids, grads), virtual=False)


@pytest.mark.parametrize("max_bytes", [1, 100, 400, 10**6])
def test_spilled_rows_are_summed_by_example_and_token(tmp_path, max_bytes):
    generator = torch.Generator().manual_seed(0)
    size = {"width": 3, "vocabulary_size": 7, "max_bytes": max_bytes}
    expected = torch.zeros(9, 7, 3, dtype=torch.float64)
    folders, spills = [tmp_path / "a", tmp_path / "b"], []
    for folder in folders:
        spill = RowSpill(folder, **size)
        for step in range(6):
            example_ids = torch.randint(1, 8, (3,), generator=generator)  # examples 0 and 8 are never used
            rows = random_rows(generator, 3)
            lengths = rows.offsets.diff()
            spill.add(example_ids.repeat_interleave(lengths), rows.tokens, (0.5 + step) * rows.rows)
            for example, (tokens, values) in zip(example_ids.tolist(), rows, strict=True):
                expected[example].index_add_(0, tokens, (0.5 + step) * values.double())
        spill.close({})
        spills.append(spill)
    for first in (0, 4):
        blocks = list(
            merged_rows(spills[0].read() + read_segments(folders[1]), num_examples=9, first_example=first, **size)
        )
        if max_bytes < 10**6:
            assert len(blocks) > 1
        found = [dense_rows for block in blocks for dense_rows in block]
        assert len(found) == 9 - first
        for (tokens, values), rows in zip(found, expected[first:], strict=True):
            assert (tokens.diff() > 0).all()
            torch.testing.assert_close(
                torch.zeros(7, 3, dtype=torch.float64).index_add_(0, tokens, values.double()),
                rows,
                rtol=1e-5,
                atol=1e-5,
            )


def test_small_segments_change_nothing(tmp_path):
    found = []
    for name, max_segment_bytes in (("small", 512), ("large", 2**26)):
        model = tiny_gpt2()
        options = {"max_segment_bytes": max_segment_bytes}
        record(model, language_dataset(), tmp_path / name, options=options, num_train_epochs=2, **still(model))
        found.append([index_rows(tmp_path / name, checkpoint=number) for number in (0, 1)])
    for one, other in zip(*found, strict=True):
        assert_rows(one, other, rtol=1e-6)


def test_identified_batches_need_examples_by_position():
    loader = torch.utils.data.DataLoader([1, 2, 3], batch_size=None)
    with pytest.raises(ValueError, match="no batch sampler"):
        IdentifiedBatches(loader)


def test_plain_datasets_and_negative_positions_are_identified():
    rows = [{"input_ids": [number], "labels": 0} for number in range(5)]
    loader = torch.utils.data.DataLoader(rows, batch_sampler=[[0, -1], [3, 2]], collate_fn=pad)
    with IdentifiedBatches(loader):
        found = [(batch[EXAMPLE_IDS].tolist(), batch["input_ids"].flatten().tolist()) for batch in loader]
    assert found == [([0, 4], [0, 4]), ([3, 2], [3, 2])]
    assert loader.dataset is rows
    assert loader.collate_fn is pad
