"""`TracInWECallback` on live Trainers: what it records, and that training does not notice."""

import copy
import json
import random
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from hf_doge.artifacts.influence import IndexReader
from hf_doge.tracing.callback import TracInWECallback
from hf_doge.tracing.models import content_hash, model_fingerprint
from hf_doge.tracing.settings import RecordingOptions, RecordingSettings
from tests.reference_tracin_we import dense_gradient
from tests.tiny import tiny_bert, tiny_classifier, tiny_gpt2, tiny_llama, tiny_t5
from tests.tracing.recorded_training import (
    arguments,
    assert_rows_are_autograd,
    causal_collator,
    classification_data,
    language_data,
    make_trainer,
    segments,
    seq2seq_collator,
    train,
    translation_data,
)


def config(folder):
    return json.loads((folder / "index" / "config.json").read_text())


# Any Trainer


def test_a_language_model_in_a_plain_trainer(tmp_path, tokenizer):
    model, data = tiny_gpt2(dropout=0.3), language_data()
    reader = train(tmp_path, tokenizer=tokenizer, model=model, dataset=data, collator=causal_collator(tokenizer))
    assert_rows_are_autograd(reader, 1, model, data, causal=True)


def test_seq2seq_trainer(tmp_path, tokenizer):
    model, data = tiny_t5(), translation_data()
    callback = TracInWECallback(tmp_path / "index", dtype="float32")
    options = arguments(tmp_path / "run").to_dict()
    args = Seq2SeqTrainingArguments(
        **{name: options[name] for name in ("output_dir", "max_steps", "save_steps", "use_cpu", "disable_tqdm")},
        predict_with_generate=True,
        report_to=[],
    )
    Seq2SeqTrainer(
        model,
        args,
        train_dataset=data,
        data_collator=seq2seq_collator(tokenizer),
        processing_class=tokenizer,
        callbacks=[callback],
    ).train()
    assert_rows_are_autograd(IndexReader.open(tmp_path / "index"), 1, model, data)


def sft_trainer(folder, callback, data, tokenizer, **options):
    from trl import SFTConfig, SFTTrainer

    defaults = {"max_steps": 2, "save_steps": 2, "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
    args = SFTConfig(str(folder / "run"), **{**defaults, "gradient_checkpointing": False, **options})
    return SFTTrainer(
        tiny_llama(tied=False), args, train_dataset=data, processing_class=tokenizer, callbacks=[callback]
    )


def test_sft_trainer_tokenises_by_itself_and_only_completions_count(tmp_path, tokenizer):
    data = Dataset.from_list([{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w5 w{i}"} for i in range(7)])
    callback = TracInWECallback(tmp_path / "index", dtype="float32", dataset=data)
    trainer = sft_trainer(tmp_path, callback, data, tokenizer)
    trainer.train()
    reader = IndexReader.open(tmp_path / "index")
    assert reader.examples["completion"] == data["completion"]
    assert reader.examples["prompt"] == data["prompt"]
    assert not {"input_ids", "labels"} & set(reader.examples.column_names)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    for position, row in enumerate(trainer.train_dataset):
        ids = torch.tensor([row["input_ids"]])
        labels = trainer.data_collator([row])["labels"]  # older versions of trl keep a mask of the completion
        assert (labels == -100).any()
        terms = int((labels[:, 1:] != -100).sum())
        expected = dense_gradient(model, {"input_ids": ids, "labels": labels}, num_terms=terms)
        tokens, rows = reader.example_rows(0, [position])[0]
        np.testing.assert_allclose(rows, expected[torch.as_tensor(tokens)].numpy(), atol=1e-5)


@pytest.mark.parametrize("options", [{"packing": True, "max_length": 12}, {"padding_free": True, "max_length": None}])
def test_packed_sequences_are_refused_before_training(tmp_path, tokenizer, options):
    data = Dataset.from_list([{"text": f"w{i} w{i + 1} w3"} for i in range(12)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = sft_trainer(tmp_path, TracInWECallback(tmp_path / "index"), data, tokenizer, **options)
    with pytest.raises(ValueError, match="packed into one line"):
        trainer.train()
    assert trainer.state.global_step == 0


# Training does not notice


class Spy(TracInWECallback):
    """Compares everything of the user's before and after each call of ours."""

    num_saves = 0

    def _record(self, args, state, *, model, optimizer, train_dataloader, **kwargs):
        def look():
            return train_dataloader.dataset._fingerprint, {
                "modes": [module.training for module in model.modules()],
                "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
                "grads": [parameter.grad for parameter in model.parameters()],
                "weights": [parameter.detach().clone() for parameter in model.parameters()],
                "moments": copy.deepcopy(optimizer.state_dict()),
                "random": (*random.getstate()[1], *np.random.get_state()[1].tolist(), torch.get_rng_state()),
                "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
            }

        fingerprint, before = look()
        super()._record(args, state, model=model, optimizer=optimizer, train_dataloader=train_dataloader, **kwargs)
        assert look()[0] == fingerprint
        torch.testing.assert_close(look()[1], before, rtol=0, atol=0)
        self.num_saves += 1


def outcome(trainer):
    logs = [{key: log[key] for key in log if key in ("loss", "grad_norm")} for log in trainer.state.log_history]
    weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    return {"logs": logs, "weights": weights, "next": (random.random(), np.random.rand(), torch.rand(1))}


@pytest.mark.parametrize("masking", ["global", "seeded", None])
def test_training_is_the_same_to_the_bit(tmp_path, tokenizer, masking):
    """With dropout, shuffling, and a collator that masks at random from the global generator or one of its own."""
    outcomes = []
    for recorded in (False, True):
        folder = tmp_path / str(recorded)
        callback = Spy(folder / "index") if recorded else None
        if masking is None:
            model, collator = tiny_gpt2(dropout=0.3), causal_collator(tokenizer)
        else:
            model, seed = tiny_bert(), 7 if masking == "seeded" else None
            collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.9, seed=seed)
        trainer = make_trainer(
            folder / "run", callback, tokenizer=tokenizer, model=model, dataset=language_data(), collator=collator
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of random masks
            trainer.train()
        outcomes.append(outcome(trainer))
    assert callback.num_saves == 2
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=0, atol=0)


def test_a_collator_that_masks_at_random_draws_the_same_at_every_checkpoint_and_is_warned_of(tmp_path, tokenizer):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.9)
    recorded = []
    for batch_size in (2, 8):  # of training
        with pytest.warns(UserWarning, match=r"draws at random.*`seed=5`"):
            reader = train(
                tmp_path / str(batch_size),
                tokenizer=tokenizer,
                model=tiny_bert(),
                dataset=language_data(),
                collator=collator,
                learning_rate=0.0,
                per_device_train_batch_size=batch_size,
                recording={"seed": 5, "batch_size": 4},
            )
        recorded += [reader.example_rows(position, range(9)) for position in (0, 1)]
    for rows in recorded[1:]:
        for (tokens, values), (other_tokens, other_values) in zip(rows, recorded[0], strict=True):
            np.testing.assert_array_equal(tokens, other_tokens)
            np.testing.assert_array_equal(values, other_values)


def test_a_collator_of_ones_own_replaces_that_of_training(tmp_path, tokenizer):
    model, data = tiny_bert(), language_data()

    def unmasked(examples):
        batch = DataCollatorWithPadding(tokenizer)(examples)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    reader = train(
        tmp_path,
        tokenizer=tokenizer,
        model=model,
        dataset=data,
        collator=DataCollatorForLanguageModeling(tokenizer),
        recording={"collator": unmasked},
    )
    assert_rows_are_autograd(reader, 1, model, data)


def test_mixed_precision_training_is_recorded_in_the_precision_of_the_weights(tmp_path, tokenizer):
    model = tiny_classifier()
    reader = train(tmp_path, tokenizer=tokenizer, model=model, bf16=True)
    assert "_original_forward" in vars(model)  # the Trainer did put autocast around it
    assert_rows_are_autograd(
        reader,
        1,
        BertForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-4"),
        classification_data(),
    )


@pytest.mark.parametrize("record_steps", [None, 3])
def test_online_rows_are_recorded_by_the_same_callback(tmp_path, tokenizer, record_steps):
    data = classification_data()
    options = {"record": "online", "dataset": data, "record_steps": record_steps}
    model = tiny_classifier()
    reader = train(tmp_path, tokenizer=tokenizer, model=model, max_steps=6, recording=options)
    assert [checkpoint["step"] for checkpoint in reader.checkpoints] == ([2, 4, 6] if record_steps is None else [3, 6])
    assert reader.config["record"] == "online"
    assert reader.examples["text"] == data["text"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# When


@pytest.mark.parametrize(("record_steps", "expected"), [(3, [3, 6]), ([1, 4, 6], [1, 4, 6]), ((2,), [2])])
def test_steps_that_are_asked_for_are_recorded_with_weights_to_search_by(tmp_path, tokenizer, record_steps, expected):
    """Every fourth step is saved by the Trainer; the weights of the others lie in the index."""
    reader = train(tmp_path, tokenizer=tokenizer, max_steps=6, save_steps=4, recording={"record_steps": record_steps})
    assert [checkpoint["step"] for checkpoint in reader.checkpoints] == expected
    for position, checkpoint in enumerate(reader.checkpoints):
        step = checkpoint["step"]
        own = step not in (4, 6)  # the Trainer saves at the end, too
        assert checkpoint["path"] == (f"models/step-{step}" if own else str(tmp_path / "run" / f"checkpoint-{step}"))
        assert (tmp_path / "index" / "models" / f"step-{step}").exists() == own
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "index" / checkpoint["path"])
        assert model_fingerprint(model) == checkpoint["fingerprint"]
        assert_rows_are_autograd(reader, position, model, classification_data())
    assert not list((tmp_path / "index").rglob("*.partial"))


def test_weights_that_the_trainer_deletes_are_kept(tmp_path, tokenizer):
    reader = train(tmp_path, tokenizer=tokenizer, max_steps=6, save_total_limit=1)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-6"]
    for checkpoint in reader.checkpoints:
        model = BertForSequenceClassification.from_pretrained(tmp_path / "index" / checkpoint["path"])
        assert model_fingerprint(model) == checkpoint["fingerprint"]


def test_deletion_is_warned_of_where_weights_are_not_to_be_kept(tmp_path, tokenizer):
    with pytest.warns(UserWarning, match=r"save_total_limit=1.*Leave `save_weights` out"):
        train(tmp_path, tokenizer=tokenizer, save_total_limit=1, recording={"save_weights": False})


def test_the_best_checkpoints_alone_are_recorded_if_they_alone_are_saved(tmp_path, tokenizer):
    callback = TracInWECallback(tmp_path / "index", record_steps=[2, 4])
    trainer = Trainer(
        tiny_classifier(),
        arguments(
            tmp_path / "run", save_strategy="best", eval_strategy="steps", eval_steps=2, metric_for_best_model="loss"
        ),
        train_dataset=classification_data(),
        eval_dataset=classification_data(5, seed=1),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    assert [checkpoint["step"] for checkpoint in config(tmp_path)["checkpoints"]] == [2, 4]


def test_a_save_that_another_callback_calls_off_does_not_lose_the_step(tmp_path, tokenizer):
    class NoSave(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = False

    callback = TracInWECallback(tmp_path / "index", record_steps=2)
    trainer = make_trainer(tmp_path / "run", callback, tokenizer=tokenizer)
    trainer.add_callback(NoSave())
    trainer.train()
    assert [checkpoint["path"] for checkpoint in config(tmp_path)["checkpoints"]] == ["models/step-2", "models/step-4"]


# What


def test_the_readable_columns_of_a_dataset_are_kept(tmp_path, tokenizer):
    data = classification_data().add_column("note", [None, *["x"] * 10])
    reader = train(tmp_path, tokenizer=tokenizer, dataset=data, recording={"dataset": data})
    examples = reader.examples
    assert examples["text"] == data["text"]
    assert examples["domain"] == data["domain"]
    assert examples["label"] == data["label"]
    assert examples["label_name"][:4] == ["sport", "world", "trade", "sport"]
    assert examples["note"] == data["note"]
    assert "input_ids" not in examples.column_names


def test_a_domain_is_no_text_and_the_tokens_are_kept_beside_it(tmp_path, tokenizer):
    data = classification_data().remove_columns("text")
    examples = train(tmp_path, tokenizer=tokenizer, dataset=data, recording={"dataset": data}).examples
    assert examples["domain"] == data["domain"]
    assert examples["input_ids"] == data["input_ids"]


def test_without_text_the_tokens_are_kept_without_padding(tmp_path, tokenizer):
    padded = {
        "input_ids": [[*row, *[0] * (8 - len(row))] for row in classification_data()["input_ids"]],
        "attention_mask": [[1] * len(row) + [0] * (8 - len(row)) for row in classification_data()["input_ids"]],
        "label": classification_data()["label"],
    }
    hashes = []
    for name, data in (("padded", Dataset.from_dict(padded)), ("bare", classification_data())):
        reader = train(tmp_path / name, tokenizer=tokenizer, dataset=data)
        assert reader.examples["input_ids"] == classification_data()["input_ids"]
        hashes.append(reader.examples["content_hash"])
    assert hashes[0] == hashes[1]
    first = classification_data()[0]
    assert hashes[0][0] == content_hash(np.array(first["input_ids"]), np.array(first["label"]))


def test_another_dataset_can_be_recorded(tmp_path, tokenizer):
    other = classification_data(5, seed=9)
    reader = train(tmp_path, tokenizer=tokenizer, recording={"dataset": other})
    assert reader.num_examples == 5
    model = BertForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert_rows_are_autograd(reader, 0, model, other)


def test_a_plain_list_of_examples_is_recorded(tmp_path, tokenizer):
    data = classification_data()
    items = [{key: row[key] for key in ("input_ids", "attention_mask", "label")} for row in data]
    reader = train(tmp_path, tokenizer=tokenizer, dataset=items)
    model = BertForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert_rows_are_autograd(reader, 1, model, data)
    assert reader.examples["label"] == data["label"]


def test_a_stream_is_recorded_by_a_dataset_of_known_length(tmp_path, tokenizer):
    data = classification_data()
    stream = data.remove_columns(["text", "domain"]).to_iterable_dataset()
    reader = train(tmp_path, tokenizer=tokenizer, dataset=stream, recording={"dataset": data})
    assert reader.examples["text"] == data["text"]
    model = BertForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert_rows_are_autograd(reader, 1, model, data)


def test_a_dict_of_datasets_by_domain_is_refused_with_how_to_join_them(tmp_path, tokenizer):
    by_domain = {"news": classification_data(), "web": classification_data()}
    with pytest.raises(TypeError, match=r"one dataset, but got a dict of \['news', 'web'\].*concatenate_datasets"):
        train(tmp_path, tokenizer=tokenizer, recording={"dataset": by_domain})


def test_memory_is_bounded_by_segments(tmp_path, tokenizer):
    reader = train(tmp_path, tokenizer=tokenizer, recording={"max_segment_bytes": 10 * 16 * 4, "batch_size": 3})
    files = config(tmp_path)["checkpoints"][0]["files"]
    assert len(files) > 3
    assert sum(file["num_examples"] for file in files) == 11
    assert all(file["num_rows"] < 10 + 8 for file in files)
    model = BertForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert_rows_are_autograd(reader, 0, model, classification_data())


class KeepMoments(TrainerCallback):
    """What AdamW knows of the embeddings at each save."""

    def __init__(self):
        self.moments = []

    def on_save(self, args, state, control, *, model, optimizer, **kwargs):
        state = optimizer.state[model.get_input_embeddings().weight]
        self.moments.append((state["exp_avg_sq"].clone(), int(state["step"])))


def test_second_moments_divide_the_rows(tmp_path, tokenizer):
    options = {"adam_beta2": 0.9}
    plain = train(tmp_path / "plain", tokenizer=tokenizer, **options)
    callback = TracInWECallback(tmp_path / "index", dtype="float32", metric="optimizer")
    trainer = make_trainer(tmp_path / "run", callback, tokenizer=tokenizer, **options)
    keep = KeepMoments()
    trainer.add_callback(keep)
    trainer.train()
    scaled = IndexReader.open(tmp_path / "index")
    assert scaled.config["second_moment"] is True
    assert [step for _, step in keep.moments] == [2, 4]
    for position, (average, step) in enumerate(keep.moments):
        metric = ((average / (1 - 0.9**step)).sqrt() + 1e-8).sqrt()  # on both sides of an inner product
        for example in range(11):
            tokens, rows = plain.example_rows(position, [example])[0]
            _, divided = scaled.example_rows(position, [example])[0]
            np.testing.assert_allclose(divided, rows / metric[torch.as_tensor(tokens)].numpy(), rtol=1e-5)


def test_dropped_special_tokens_have_no_row_and_take_no_place_of_the_top_k(tmp_path, tokenizer):
    ids = [[2, 7, 8, 7, 2], [2, 9, 10, 11, 2]]
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 5] * 2, "label": [0, 1]})
    kept = {}
    for special_tokens in ("count", "drop"):
        for top_k in (None, 2):
            reader = train(
                tmp_path / f"{special_tokens}-{top_k}",
                tokenizer=tokenizer,
                dataset=data,
                max_steps=2,
                recording={"special_tokens": special_tokens, "top_k_tokens": top_k, "top_k_unit": "token"},
            )
            kept[special_tokens, top_k] = [tokens.tolist() for tokens, _ in reader.example_rows(0, [0, 1])]
            assert reader.config["special_token_ids"] == [0, 1, 2, 3]
            assert reader.config["special_tokens"] == special_tokens
    assert kept["count", None] == [[2, 7, 8], [2, 9, 10, 11]]
    assert kept["drop", None] == [[7, 8], [9, 10, 11]]
    assert kept["drop", 2][0] == [7, 8]
    assert len(kept["drop", 2][1]) == 2
    assert 2 not in kept["drop", 2][1]


@pytest.mark.parametrize("tied", ["full", "own"])
def test_a_tied_matrix_is_recorded_by_its_output_use_too(tmp_path, tokenizer, tied):
    model, data = tiny_gpt2(), language_data()
    reader = train(
        tmp_path,
        tokenizer=tokenizer,
        model=model,
        dataset=data,
        collator=causal_collator(tokenizer),
        recording={"tied": tied},
    )
    tokens, rows = reader.example_rows(1, [0])[0]
    ids = torch.tensor([data[0]["input_ids"]])
    expected = dense_gradient(model, {"input_ids": ids, "labels": ids}, part=tied, num_terms=ids.shape[1] - 1)
    assert tokens.tolist() == (list(range(32)) if tied == "full" else ids.unique().tolist())
    np.testing.assert_allclose(rows, expected[tokens].numpy(), atol=1e-5)


# Errors at train begin


def refused(tmp_path, tokenizer, match, *, recording=None, error=ValueError, **options):
    callback = TracInWECallback(tmp_path / "index", **(recording or {}))
    trainer = make_trainer(tmp_path / "run", callback, tokenizer=tokenizer, **options)
    with pytest.raises(error, match=match):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_without_input_embeddings_is_refused(tmp_path, tokenizer):
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def forward(self, input_ids, labels=None, attention_mask=None):
            return {"loss": self.layer(input_ids[:, :3].float()).mean()}

    refused(tmp_path, tokenizer, "must have input embeddings", model=Linear())


def test_a_stream_without_a_dataset_is_refused(tmp_path, tokenizer):
    stream = classification_data().remove_columns(["text", "domain"]).to_iterable_dataset()
    refused(tmp_path, tokenizer, "trains on a stream", dataset=stream)


@pytest.mark.parametrize(
    ("dataset", "match"),
    [
        (classification_data(0), "it is empty"),
        (classification_data(3).remove_columns("input_ids"), "it has 3 rows, not 11"),
        (classification_data().remove_columns("label"), r"\['label'\] are missing"),
        (classification_data().add_column("example_id", [0, 1, 2, 3, 4, 4, 6, 7, 8, 9, 10]), r"\[4\] more than once"),
        (classification_data().add_column("example_id", list(range(1, 12))), "other values"),
    ],
)
def test_datasets_that_do_not_fit_are_refused(tmp_path, tokenizer, dataset, match):
    refused(tmp_path, tokenizer, match, recording={"dataset": dataset})


def test_labels_that_no_loss_counts_are_refused_by_position(tmp_path, tokenizer):
    labels = [
        [-100] * len(row) if position in (4, 6) else row for position, row in enumerate(translation_data()["labels"])
    ]
    data = translation_data().remove_columns("labels").add_column("labels", labels)
    refused(
        tmp_path,
        tokenizer,
        r"examples \[4, 6\] \(2 in all\)",
        model=tiny_t5(),
        dataset=data,
        collator=seq2seq_collator(tokenizer),
    )


def test_tokens_out_of_the_vocabulary_are_refused_by_position(tmp_path, tokenizer):
    data = classification_data().map(
        lambda row, i: {"input_ids": [5, 40] if i == 3 else row["input_ids"]}, with_indices=True
    )
    refused(tmp_path, tokenizer, "Example 3 must have tokens from 0 to 31", dataset=data)


def test_what_the_model_has_no_room_or_class_for_is_refused_by_position(tmp_path, tokenizer):
    data = classification_data()
    long = data.map(
        lambda row, i: {"input_ids": [5] * 33, "attention_mask": [1] * 33} if i == 9 else row, with_indices=True
    )
    refused(tmp_path, tokenizer, r"Example 9 .* has 33 tokens and the model has positions for 32", dataset=long)
    labels = [3 if position == 9 else label for position, label in enumerate(data["label"])]
    other = data.remove_columns("label").add_column("label", labels)
    refused(tmp_path, tokenizer, "label of example 9 must be a whole number from 0 to 2.* got 3", dataset=other)


def test_a_model_whose_examples_depend_on_each_other_is_refused_before_training(tmp_path, tokenizer):
    class Mixing(BertForSequenceClassification):
        def forward(self, input_ids, labels=None, attention_mask=None, **kwargs):
            outputs = super().forward(input_ids, attention_mask=attention_mask)
            logits = outputs.logits + 5 * outputs.logits.mean(dim=0)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Output(dict):
        __getattr__ = dict.get

    model = Mixing(tiny_classifier().config)
    forward = model.forward
    model.forward = lambda **batch: Output(forward(**batch))
    refused(
        tmp_path, tokenizer, "must not depend on its batch", model=model, dataset=classification_data(), remove_unused_columns=False,
        collator=lambda rows: DataCollatorWithPadding(tokenizer)([{k: r[k] for k in ("input_ids", "attention_mask", "label")} for r in rows]),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "recording", "match"),
    [
        ({"save_strategy": "no"}, {}, "`save_strategy` is 'no'"),
        ({}, {"record_steps": [2, 9]}, "9 is beyond its end: it makes 4"),
        ({}, {"record_steps": 5}, "5 is beyond its end"),
        ({}, {"projection_width": 17}, "`projection_width` must be in"),
    ],
)
def test_trainings_that_would_record_nothing_or_fail_are_refused(tmp_path, tokenizer, options, recording, match):
    refused(tmp_path, tokenizer, match, recording=recording, **options)


def test_a_folder_of_another_training_is_refused_and_kept(tmp_path, tokenizer):
    reader = train(tmp_path, tokenizer=tokenizer)
    expected = segments(reader)
    same = {"recording": {"dtype": "float32"}}
    refused(
        tmp_path, tokenizer, r"holds checkpoints \['checkpoint-2', 'checkpoint-4'\] of an earlier training", **same
    )
    refused(tmp_path, tokenizer, "`num_examples` is 11, not 5", dataset=classification_data(5), **same)
    refused(tmp_path, tokenizer, "`dataset` is", dataset=classification_data(seed=4), **same)
    refused(tmp_path, tokenizer, "`dtype` is 'float32', not 'float16'")
    refused(tmp_path, tokenizer, "`top_k` is None, not 3", recording={"dtype": "float32", "top_k_tokens": 3})
    wider = BertForSequenceClassification(
        type(tiny_classifier().config)(**{**tiny_classifier().config.to_dict(), "hidden_size": 32})
    )
    refused(tmp_path, tokenizer, "`width` is 16, not 32", model=wider, **same)
    assert segments(IndexReader.open(tmp_path / "index")) == expected


def test_embeddings_that_are_resized_between_checkpoints_are_refused_and_the_first_is_kept(tmp_path, tokenizer):
    class Resize(TrainerCallback):
        def on_step_end(self, args, state, control, *, model, **kwargs):
            if state.global_step == 3:
                model.resize_token_embeddings(40, mean_resizing=False)

    callback = TracInWECallback(tmp_path / "index")
    trainer = make_trainer(tmp_path / "run", callback, tokenizer=tokenizer, optim="sgd")  # without state to resize
    trainer.add_callback(Resize())
    with pytest.raises(ValueError, match=r"one shape of embeddings, \(32, 16\) here, but .* has \(40, 16\)"):
        trainer.train()
    assert [checkpoint["name"] for checkpoint in config(tmp_path)["checkpoints"]] == ["checkpoint-2"]


class SignDescent(torch.optim.Optimizer):
    """Has the settings of Adam, and keeps nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad.sign()


@pytest.mark.filterwarnings("ignore:`metric='optimizer'` takes what SignDescent keeps")
def test_second_moments_need_adam_and_trained_embeddings(tmp_path, tokenizer):
    frozen = tiny_classifier()
    frozen.get_input_embeddings().weight.requires_grad_(False)
    refused(
        tmp_path, tokenizer, "needs input embeddings that are trained", model=frozen, recording={"metric": "optimizer"}
    )
    for make, step in ((torch.optim.Adamax, 0), (SignDescent, 1)):  # what is not known tells by its first step
        callback, model = TracInWECallback(tmp_path / "other", metric="optimizer"), tiny_classifier()
        options = {"tokenizer": tokenizer, "model": model, "optimizers": (make(model.parameters()), None)}
        trainer = make_trainer(tmp_path / "run", callback, **options)
        with pytest.raises(ValueError, match="needs an optimizer that keeps `exp_avg_sq`"):
            trainer.train()
        assert trainer.state.global_step == step


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "bfloat16"}, "`dtype` must be one of"),
        ({"special_tokens": "hide"}, "`special_tokens` must be one of"),
        ({"tied": "both"}, "`tied` must be one of"),
        ({"record": "epoch"}, "`record` must be one of"),
        ({"loss_reduction": "max"}, "`loss_reduction` must be one of"),
        ({"top_k_tokens": 0}, "`top_k_tokens` must be at least 1"),
        ({"top_k_unit": "word"}, "`top_k_unit` must be one of"),
        ({"tied": "full", "top_k_tokens": 5}, "`top_k_unit` must be 'token'"),
        ({"tied": "own", "top_k_tokens": 5}, "`top_k_unit` must be 'token'"),
        ({"projection_width": -1}, "`projection_width` must be at least 1"),
        ({"max_segment_bytes": None}, "`max_segment_bytes` must be a whole number"),
        ({"metric": "optimizer", "record": "online"}, "`metric='optimizer'` needs `record='checkpoint'`"),
        ({"loss_fn": 3}, "`loss_fn` must be a function"),
        ({"record_steps": 0}, "`record_steps` must be at least 1"),
        ({"record_steps": []}, "`record_steps` must be a step or several"),
        ({"record_steps": [1, 2.5]}, "`record_steps` must be a whole number, but got 2.5"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"seed": "x"}, "`seed` must be a whole number, but got 'x'"),
        ({"save_weights": "no"}, "`save_weights` must be True or False, but got 'no'"),
        ({"metric": "adam"}, r"`metric` must be one of \['auto', 'optimizer', 'gradient'\], but got 'adam'"),
        (
            {"metric": "optimizer", "second_moment": False},
            "`second_moment=False` says other than `metric='optimizer'`",
        ),
        ({"second_moment": "text"}, "`second_moment` must be True or False, but got 'text'"),
        ({"redact_text": "no"}, "`redact_text` must be True or False"),
        ({"tied": "own", "record": "online"}, "catches the input part only, but `tied` is 'own'"),
        ({"collator": len, "record": "online"}, "but got another `collator`"),
        ({"hub_index_id": "a b"}, "`hub_index_id` must be like 'user/name'"),
    ],
)
def test_options_out_of_range_are_refused_at_once(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        TracInWECallback(tmp_path, **options)


@pytest.mark.parametrize(("given", "metric"), [(True, "optimizer"), (False, "gradient")])
def test_second_moment_is_an_older_name_of_the_metric(tmp_path, given, metric):
    with pytest.warns(FutureWarning, match=f"is called `metric='{metric}'` now"):
        settings = TracInWECallback(tmp_path, second_moment=given).settings
    assert settings == RecordingSettings(metric=metric)


def test_a_callback_touches_no_disk_before_training(tmp_path):
    TracInWECallback(tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_a_training_that_never_saves_is_warned_of(tmp_path, tokenizer):
    class NoSave(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = False

    trainer = make_trainer(tmp_path / "run", TracInWECallback(tmp_path / "index"), tokenizer=tokenizer)
    trainer.add_callback(NoSave())
    with pytest.warns(UserWarning, match="Nothing was recorded"):
        trainer.train()


def test_the_keywords_of_a_recording_are_the_fields_of_its_settings():
    from typing import get_type_hints

    options, settings = get_type_hints(RecordingOptions), get_type_hints(RecordingSettings)
    assert options.pop("layers") == str | Sequence[str] | None  # of which a list is made
    assert settings.pop("layers") == list[str] | None
    assert options == settings
    with pytest.raises(TypeError, match="unexpected keyword argument 'top_k'"):
        TracInWECallback("influence", top_k=3)
