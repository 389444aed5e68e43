"""What the callback records is what the Trainer trains, and `hf-doge index` takes the same; else it says so."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import BertForQuestionAnswering, BertForSequenceClassification, DataCollatorWithPadding, Trainer
from transformers.trainer_utils import set_seed

from hf_doge.artifacts.influence import IndexReader
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.callback import TracInWECallback
from hf_doge.tracing.examples import padding_collator
from hf_doge.tracing.index import InfluenceIndex
from tests.tiny import tiny_classifier, tiny_llama, tiny_t5, tiny_tokenizer
from tests.tracing.recorded_training import (
    causal_collator,
    classification_data,
    language_data,
    make_trainer,
    seq2seq_collator,
    train,
    translation_data,
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


# The loss


class Weighted(Trainer):
    """As in the documentation of transformers."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 2.0, 3.0]))
        return (loss, outputs) if return_outputs else loss


class FromItsLogits(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return F.cross_entropy(outputs.logits, inputs["labels"], label_smoothing=0.2)


class Penalised(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return outputs.loss + (outputs.logits - 1).square().mean()


class Halved(Trainer):
    """A multiple of the loss pushes in the same direction; the learning rate can do so too."""

    def compute_loss(self, *args, **kwargs):
        return 0.5 * super().compute_loss(*args, **kwargs)


class Regularised(Trainer):
    """Its logits get the gradient of the model's loss alone."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, output_hidden_states=True)
        return outputs.loss + 0.1 * outputs.hidden_states[1].square().mean()


class Twice(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss + model(**{**inputs, "input_ids": inputs["input_ids"].flip(0)}).loss


class Inside(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return F.cross_entropy(model.classifier(model.bert(**inputs).pooler_output), labels)


class Beside(Trainer):
    """The model's loss is in what is logged, not in what is trained."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return outputs.loss.detach() + F.cross_entropy(outputs.logits, inputs["labels"])


class Later(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return outputs.loss + (outputs.logits.square().mean() if self.state.global_step > 1 else 0)


class Teacher(Trainer):
    """Another run of the model, of which nothing is trained."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model(**inputs)
        return model(**inputs, output_hidden_states=True).loss


def own_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 2.0, 3.0]))


OTHERS = {
    "overridden": {"trainer_class": Weighted},
    "from logits": {"trainer_class": FromItsLogits},
    "penalised": {"trainer_class": Penalised},
    "accumulated": {"trainer_class": Penalised, "gradient_accumulation_steps": 2},
    "hidden states": {"trainer_class": Regularised},
    "two runs": {"trainer_class": Twice},
    "a part of the model": {"trainer_class": Inside},
    "detached": {"trainer_class": Beside},
    "later": {"trainer_class": Later},
    "label smoothing": {"label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_training_of_another_loss_than_the_models_own_is_told(tmp_path, tokenizer, name):
    with pytest.warns(UserWarning, match=r"Recorded is the loss that the model returns.*`loss_fn"):
        train(tmp_path, tokenizer=tokenizer, **OTHERS[name])


def test_a_loss_function_of_the_trainer_is_told_unless_it_is_the_recorded_one(tmp_path, tokenizer):
    def per_example(outputs, batch):
        return F.cross_entropy(outputs.logits, batch["labels"], reduction="none")

    for loss_fn in (None, per_example):
        callback = TracInWECallback(tmp_path / str(loss_fn is None), loss_fn=loss_fn)
        trainer = make_trainer(tmp_path / "run", callback, tokenizer=tokenizer)
        trainer.compute_loss_func = own_loss
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        told = [str(one.message) for one in caught if "Recorded is the loss" in str(one.message)]
        assert len(told) == (loss_fn is None)
    query = [{"input_ids": [5, 6, 7], "label": 1}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of another loss
        index = InfluenceIndex.from_pretrained(tmp_path / "False", loss_fn=per_example)
        expected = index.scores(query, cosine=False)
    index = InfluenceIndex.from_pretrained(tmp_path / "False", loss_fn=lambda *args: 2 * per_example(*args))
    with pytest.warns(
        UserWarning, match=r"recorded with the loss .*per_example, but `loss_fn` is .*<lambda>\. If they"
    ):
        np.testing.assert_allclose(index.scores(query, cosine=False), 2 * expected, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trainer_class": Halved},
        {"trainer_class": Teacher},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
    ],
)
def test_multiples_of_the_models_own_loss_are_nothing_to_tell(tmp_path, tokenizer, options):
    train(tmp_path, tokenizer=tokenizer, **options)  # a warning of ours would be an error


# What the model is given, and what it counts


class MasksPrompts(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"].clone()
        labels[:, :1] = -100
        return model(**{**inputs, "labels": labels}).loss


class MasksInPlace(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["labels"][:, :1] = -100
        return model(**inputs).loss


class Prepares(Trainer):
    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        return {**inputs, "labels": (inputs["labels"] + 1) % 3}


class Steps(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs["labels"] = torch.zeros_like(inputs["labels"])
        return super().training_step(model, inputs, num_items_in_batch)


class DropsWords(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"].clone()
        ids[:, 0] = 5
        return model(ids, **{name: value for name, value in inputs.items() if name != "input_ids"}).loss


class CutsPadding(Trainer):
    """To the longest text of half the batch, whose order it turns."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        longest = int(inputs["attention_mask"].sum(dim=1).max())
        cut = {name: value[:, :longest] if value.ndim > 1 else value for name, value in inputs.items()}
        return model(**{name: value.flip(0) for name, value in cut.items()}).loss


def padded_to(length, tokenizer):
    pad = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=length)
    return lambda rows: pad([{name: row[name] for name in ("input_ids", "attention_mask", "label")} for row in rows])


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("trainer_class", "name"), [(MasksPrompts, "labels"), (MasksInPlace, "labels"), (Prepares, "labels"),
                                (Steps, "labels"), (DropsWords, "input_ids")],
)  # fmt: skip
def test_a_training_on_other_labels_or_tokens_than_the_collator_makes_is_told(
    tmp_path, tokenizer, trainer_class, name, num_workers
):
    options = {"dataloader_num_workers": num_workers, "trainer_class": trainer_class}
    if trainer_class in (MasksPrompts, MasksInPlace):
        options |= {"model": tiny_llama(), "dataset": language_data(), "collator": causal_collator(tokenizer)}
    with pytest.warns(UserWarning, match=rf"trained with other `{name}` than the collator makes"):
        train(tmp_path, tokenizer=tokenizer, **options)


def test_the_collators_batches_are_nothing_to_tell_however_they_are_cut(tmp_path, tokenizer):
    train(tmp_path / "cut", tokenizer=tokenizer, trainer_class=CutsPadding, collator=padded_to(12, tokenizer))
    options = {"model": tiny_t5(), "dataset": translation_data(), "collator": seq2seq_collator(tokenizer)}
    train(tmp_path / "from text to text", tokenizer=tokenizer, gradient_accumulation_steps=2, **options)


class ByExample(Trainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * (1 + args[1]["labels"].sum())


class ByStep(Trainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * (1.0 if self.state.global_step < 2 else 100.0)


class Summed(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss * (inputs["labels"][:, 1:] != -100).sum()


class OverTheStep(Trainer):
    """A mean over all micro-batches, by the Trainer's count: before transformers 5.10 it has the first label of a row too."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:] if hasattr(self, "_loss_shifts_labels") else inputs["labels"]
        return model(**inputs).loss * (labels != -100).sum() / num_items_in_batch


UNEVEN = {
    "one example at a time": {"trainer_class": ByExample, "per_device_train_batch_size": 1, "max_steps": 8},
    "steps": {"trainer_class": ByStep},
    "accumulated": {"trainer_class": ByStep, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.parametrize("record", ["checkpoint", "online"])
def test_a_training_that_weighs_steps_unequally_is_told(tmp_path, tokenizer, name, record):
    told = "at different steps, so examples do not weigh the same"
    with pytest.warns(UserWarning, match=told):
        train(tmp_path, tokenizer=tokenizer, recording={"record": record}, **UNEVEN[name])


@pytest.mark.parametrize("trainer_class", [Trainer, Summed, OverTheStep])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_mean_or_a_sum_over_tokens_weighs_all_alike(tmp_path, tokenizer, trainer_class, accumulation):
    train(
        tmp_path, tokenizer=tokenizer, trainer_class=trainer_class, gradient_accumulation_steps=accumulation,
        model=tiny_llama(), dataset=language_data(), collator=causal_collator(tokenizer), max_steps=5,
    )  # fmt: skip


def test_looking_on_changes_no_bit_of_the_training_and_leaves_nothing_behind(tmp_path, tokenizer):
    weights = []
    for callback in (None, TracInWECallback(tmp_path / "index")):
        set_seed(0)
        model = tiny_classifier()
        make_trainer(tmp_path / "run", callback, tokenizer=tokenizer, model=model).train()
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
        assert not model._forward_hooks
    assert torch.equal(*weights)


# The learning rate


def longer_classifier():
    """With fewer words than positions, so that shapes tell their embeddings apart."""
    config = tiny_classifier().config
    config.max_position_embeddings = 40
    return BertForSequenceClassification(config)


def optimizers(model, kind=torch.optim.AdamW, **options):
    """The embeddings in a group of their own, as some train them."""
    matrix = model.get_input_embeddings().weight
    others = [parameter for parameter in model.parameters() if parameter is not matrix]
    optimizer = kind([{"params": others, "lr": 1e-2}, {"params": [matrix], "lr": 1e-4}], **options)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)


def test_embeddings_of_a_group_of_their_own_have_its_rate_in_training_and_after(tmp_path, tokenizer):
    model = longer_classifier()
    reader = train(tmp_path, tokenizer=tokenizer, model=model, optimizers=optimizers(model))
    expected = [entry["learning_rate"] for entry in reader.checkpoints]
    assert expected == pytest.approx([0.9e-4, 0.7e-4])
    saved = [tmp_path / "run" / f"checkpoint-{step}" for step in (2, 4)]
    data = classification_data()
    record_dataset(tmp_path / "after", saved, data, tokenizer=tokenizer, progress=False)
    found = [entry["learning_rate"] for entry in IndexReader.open(tmp_path / "after").checkpoints]
    assert found == pytest.approx(expected, rel=1e-12)
    # resumed from a checkpoint that was saved but not recorded: its rate is from the log
    model = longer_classifier()
    again = TracInWECallback(tmp_path / "resumed", dtype="float32")
    trainer = make_trainer(tmp_path / "run", again, tokenizer=tokenizer, model=model, optimizers=optimizers(model))
    trainer.train(resume_from_checkpoint=str(saved[0]))
    found = [entry["learning_rate"] for entry in IndexReader.open(tmp_path / "resumed").checkpoints]
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_rate_that_no_file_tells_is_refused(tmp_path, tokenizer):
    model = tiny_classifier()
    train(tmp_path, tokenizer=tokenizer, model=model, optimizers=optimizers(model, torch.optim.SGD))
    saved, data = [tmp_path / "run" / "checkpoint-2"], classification_data()
    with pytest.raises(
        ValueError, match=r"learning rate of the input embeddings at .*several .*Pass `learning_rates`"
    ):
        record_dataset(tmp_path / "after", saved, data, tokenizer=tokenizer, progress=False)
    record_dataset(tmp_path / "after", saved, data, tokenizer=tokenizer, progress=False, learning_rates=[1e-4])


# The weights


@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
def test_weights_that_the_trainer_saved_are_not_copied(tmp_path, tokenizer, strategy):
    options = {
        "steps": {"save_steps": 3},
        "epoch": {"save_strategy": "epoch"},
        "best": {
            "save_strategy": "best", "eval_strategy": "epoch", "metric_for_best_model": "loss",
        },
    }[strategy]  # fmt: skip

    class Evaluating(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, eval_dataset=classification_data(), **kwargs)

    reader = train(
        tmp_path, tokenizer=tokenizer, trainer_class=Evaluating, max_steps=6, recording={"record_steps": 1}, **options
    )
    assert [entry["step"] for entry in reader.checkpoints] == [1, 2, 3, 4, 5, 6]
    copied = sorted(path.name for path in (tmp_path / "index" / "models").iterdir())
    saved = {int(path.name.partition("-")[2]) for path in (tmp_path / "run").iterdir()}
    assert 3 in saved
    # of the last step nothing is awaited: what comes next may load other weights
    assert copied == [
        f"step-{step}" for step in range(1, 7) if step not in saved or (step == 6 and strategy == "best")
    ]
    model = tiny_classifier()
    for entry in reader.checkpoints:
        place = tmp_path / "index" / entry["path"] if not entry["path"].startswith("/") else entry["path"]
        assert type(model).from_pretrained(place).config.num_labels == 3


# What the Trainer takes


class Own(BertForSequenceClassification):
    form = dict

    def forward(self, input_ids, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask=attention_mask, labels=labels)
        if self.form is dict:
            return {"loss": outputs.loss, "logits": outputs.logits}
        return (outputs.logits,) if labels is None else (outputs.loss, outputs.logits)


@pytest.mark.parametrize("record", ["checkpoint", "online"])
def test_models_that_return_a_dictionary_or_a_tuple_are_recorded_as_others(tmp_path, tokenizer, record):
    found = []
    for form in (None, dict, tuple):
        model = tiny_classifier() if form is None else Own(tiny_classifier().config)
        model.load_state_dict(tiny_classifier().state_dict())
        model.form = form
        reader = train(
            tmp_path / str(form), tokenizer=tokenizer, model=model, recording={"record": record, "dtype": "float32"}
        )
        found.append([segment["sha256"] for entry in reader.config["checkpoints"] for segment in entry["files"]])
    assert found[0] == found[1] == found[2]


def several_labels():
    data = classification_data().remove_columns("label")
    return data.add_column("labels", [[float(i % 2), 1.0, float(i % 3 == 0)] for i in range(len(data))])


def test_several_labels_are_inferred_by_the_training_and_searched(tmp_path, tokenizer):
    model = tiny_classifier()
    seen = []

    class Watching(Trainer):
        def training_step(self, *args, **kwargs):
            seen.append(self.model.config.problem_type)
            return super().training_step(*args, **kwargs)

    train(tmp_path, tokenizer=tokenizer, model=model, dataset=several_labels(), trainer_class=Watching)
    assert seen == [None, *["multi_label_classification"] * 3]
    index = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps")
    scores = index.scores(several_labels().remove_columns(["text", "domain"]).select(range(4)), recipe="paper")
    squares = index.self_influence()
    own = dict(zip(squares["example_id"], squares["score"], strict=True))
    assert [scores[i, i] for i in range(4)] == pytest.approx([own[i] for i in range(4)], rel=1e-3)
    assert len(index.search("w3 w5 w7", top_k=1)) >= 1


def question_answering(**options):
    config = tiny_classifier().config
    config.num_labels = 2
    model = BertForQuestionAnswering(config)
    ids = [[5, 6, 7, 8], [9, 4, 11, 12], [5, 9, 13, 7], [8, 8, 6, 4]]
    columns = {"input_ids": ids, "start_positions": [1, 0, 1, 0], "end_positions": [2, 1, 3, 2], **options}
    return model, Dataset.from_dict(columns)


def test_answers_are_recorded_and_searched(tmp_path, tokenizer):
    model, data = question_answering()
    train(tmp_path, tokenizer=tokenizer, model=model, dataset=data)
    index = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps")
    scores, squares = index.scores(data, recipe="paper"), index.self_influence()
    own = dict(zip(squares["example_id"], squares["score"], strict=True))
    assert [scores[i, i] for i in range(4)] == pytest.approx([own[i] for i in range(4)], rel=1e-3)
    assert len(index.search(["w3 w5", "w7 w7 w4 w9"], top_k=1)) >= 2  # for the answers that the model finds
    _, data = question_answering(end_positions=[2, 1, 4, 2])
    with pytest.raises(ValueError, match="must have its answer among its tokens, but `end_positions`"):
        train(tmp_path / "outside", tokenizer=tokenizer, model=model, dataset=data)


def test_some_trained_tokens_of_an_embedding_are_refused_in_words(tmp_path, tokenizer):
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(target_modules=["query"], trainable_token_indices=[5, 6], task_type="SEQ_CLS")
    for record in ("checkpoint", "online"):
        model = peft.get_peft_model(tiny_classifier(), options)
        with pytest.raises(ValueError, match="trained as a whole or not at all"):
            train(tmp_path / record, tokenizer=tokenizer, model=model, recording={"record": record})


def test_an_example_without_tokens_does_not_decide_how_labels_are_padded():
    examples = [{"input_ids": [], "labels": []}, {"input_ids": [1, 2], "labels": [1, 2]}]
    assert padding_collator(tiny_tokenizer())(examples)["labels"].tolist() == [[-100, -100], [1, 2]]
