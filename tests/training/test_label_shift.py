"""Whether the first label of a row counts is what the loss does, not what the class of the model is called."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CTRLConfig,
    CTRLLMHeadModel,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)
from transformers.modeling_outputs import CausalLMOutput

from hf_doge.training.config import DoGEConfig
from hf_doge.training.domain_loss import DomainLoss, are_labels_shifted
from hf_doge.training.loss_watch import LossWatch
from hf_doge.training.step_gradients import MicroBatch, count_items
from hf_doge.training.trainer import DoGETrainer
from tests.one_layer import tiny_bert, tiny_gpt2, tiny_llama
from tests.tiny import VOCAB, tiny_t5

LENGTHS = {"short": 3, "long": 12}  # so that a label too much weighs more in one of the domains


def rows(name, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (24, LENGTHS[name]), generator=generator).tolist()


def domains(label):
    """Domains of rows of tokens, with labels made of them."""
    tokens = {name: rows(name, seed) for seed, name in enumerate(LENGTHS)}
    return {
        name: Dataset.from_dict({"input_ids": some, "labels": [label(row) for row in some]})
        for name, some in tokens.items()
    }


def collate(features):
    """Pad to the longest."""
    longest = max(len(feature["input_ids"]) for feature in features)
    padded = {
        "input_ids": [f["input_ids"] + [0] * (longest - len(f["input_ids"])) for f in features],
        "attention_mask": [[1] * len(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features],
        "labels": [f["labels"] + [-100] * (longest - len(f["labels"])) for f in features],
    }
    return {name: torch.tensor(value) for name, value in padded.items()}


OPTIONS = {
    "per_device_train_batch_size": 12,
    "max_steps": 4,
    "mu": 0.1,
    "optim": "sgd",
    "alignment": "per_domain",
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def learn(folder, model, label, loss_func=None):
    args = DoGEConfig(str(folder), **OPTIONS)
    trainer = DoGETrainer(
        model, args, train_dataset=domains(label), data_collator=collate, compute_loss_func=loss_func
    )
    trainer.train()
    return torch.tensor([*trainer.domain_weights.last.values()]), trainer


class OwnShift(nn.Module):
    """A causal model that transformers does not know, with a loss of its own."""

    def __init__(self, *, is_mean):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.is_mean = is_mean

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        logits = self.head(self.embed(input_ids).cumsum(dim=1))
        predicted, expected = logits[:, :-1].flatten(end_dim=1), labels[:, 1:].flatten()
        if self.is_mean:
            loss = F.cross_entropy(predicted, expected)
        else:
            loss = F.cross_entropy(predicted, expected, reduction="sum") / kwargs["num_items_in_batch"]
        return CausalLMOutput(loss=loss, logits=logits)


MODELS = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "own, a mean": lambda: OwnShift(is_mean=True),
    "own, divided": lambda: OwnShift(is_mean=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_rows_whose_first_label_is_left_out(tmp_path, name):
    found, trainer = learn(tmp_path / "all", MODELS[name](), lambda row: row)
    expected, _ = learn(tmp_path / "masked", MODELS[name](), lambda row: [-100, *row[1:]])
    assert trainer._learner._loss.labels_are_shifted
    assert (expected - 0.5).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)


def in_place(outputs, labels, num_items_in_batch=None):
    """A loss of labels that the data have shifted already."""
    losses = F.cross_entropy(outputs.logits.flatten(end_dim=1), labels.flatten(), reduction="sum")
    return losses / num_items_in_batch


def test_labels_shifted_by_the_data_are_all_counted(tmp_path):
    found, trainer = learn(tmp_path / "data", tiny_llama(), lambda row: [*row[1:], -100], in_place)
    expected, _ = learn(tmp_path / "model", tiny_llama(), lambda row: row)
    assert not trainer._learner._loss.labels_are_shifted
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)


class Confident(nn.Module):
    """Labels in place, divided; sure of the first of each row, so that leaving it out changes no loss that is made louder."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        logits = self.head(self.embed(input_ids))
        logits[:, 0, 1] += 20
        loss = F.cross_entropy(logits.flatten(end_dim=1), labels.flatten(), reduction="sum")
        return CausalLMOutput(loss=loss / kwargs["num_items_in_batch"], logits=logits)


def test_a_first_label_that_is_foreseen_is_counted_all_the_same(tmp_path):
    _, trainer = learn(tmp_path, Confident(), lambda row: [1, *row[1:]])
    assert not trainer._learner._loss.labels_are_shifted
    assert trainer._learner.state.num_tokens.tolist() == [24 * 3, 24 * 12]


NUM_BOOKS = 3


class Codebooks(nn.Module):
    """Several labels at each position, as models of audio have them; `axis` says along which the loss shifts them, if it does."""

    def __init__(self, axis):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, NUM_BOOKS * VOCAB)
        self.axis = axis

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        logits = self.head(self.embed(input_ids).cumsum(dim=1)).unflatten(-1, (NUM_BOOKS, VOCAB))
        if self.axis == 2:  # where the positions of the labels are
            labels = labels.movedim(2, 1)
        if self.axis is not None:
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss = F.cross_entropy(logits.flatten(end_dim=2), labels.flatten(), reduction="sum")
        return CausalLMOutput(loss=loss / kwargs["num_items_in_batch"], logits=logits)


def collate_books(features):
    labels = collate([{**feature, "labels": []} for feature in features])
    longest = labels["input_ids"].shape[1]
    ignored = [[-100] * NUM_BOOKS]
    padded = [feature["labels"] + ignored * (longest - len(feature["labels"])) for feature in features]
    return labels | {"labels": torch.tensor(padded)}


def several(row, first=None):
    """Labels of each position of a row, with other ones at the first if need be."""
    labels = [[(token * (book + 1)) % VOCAB for book in range(NUM_BOOKS)] for token in row]
    return labels if first is None else [[first] * NUM_BOOKS, *labels[1:]]


def learn_books(folder, axis, label, *, transposed=False):
    def together(features):
        inputs = collate_books(features)
        return inputs | {"labels": inputs["labels"].movedim(1, 2)} if transposed else inputs

    trainer = DoGETrainer(
        Codebooks(axis), DoGEConfig(str(folder), **OPTIONS), train_dataset=domains(label), data_collator=together
    )
    trainer.train()
    return torch.tensor([*trainer.domain_weights.last.values()]), trainer


def test_of_several_labels_at_a_position_those_of_the_first_position_are_left_out(tmp_path):
    found, trainer = learn_books(tmp_path / "all", 1, several)
    expected, _ = learn_books(tmp_path / "masked", 1, lambda row: several(row, first=-100))
    assert trainer._learner.state.num_tokens.tolist() == [24 * 2 * NUM_BOOKS, 24 * 11 * NUM_BOOKS]
    assert (expected - 0.5).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)


def test_all_of_several_labels_at_a_position_count_where_nothing_is_shifted(tmp_path):
    _, trainer = learn_books(tmp_path, None, several)
    assert trainer._learner.state.num_tokens.tolist() == [24 * 3 * NUM_BOOKS, 24 * 12 * NUM_BOOKS]


def test_labels_whose_positions_are_on_another_axis_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"positions on axis 1, .* along axis 2, .*`labels\.movedim\(2, 1\)`"):
        learn_books(tmp_path, 2, several, transposed=True)


@pytest.mark.parametrize(("shape", "counted"), [((2, 4, 3), 18), ((2, 4), 6), ((2,), 2), ((2, 1), 0)])
def test_labels_of_a_loss_that_is_not_seen_are_counted_as_the_steps_count_them(shape, counted):
    inputs = {"input_ids": torch.ones(2, 4).long(), "labels": torch.ones(shape).long()}
    watch = LossWatch(nn.Linear(1, 1))
    watch.begin(watch._model)
    watch.end()
    assert watch.seen(inputs, labels_are_shifted=True).counted.sum() == counted
    assert count_items(inputs, 2, labels_are_shifted=True).sum() == counted


@pytest.mark.parametrize(
    ("label", "loss"),
    [
        (lambda row: row[0], lambda logits, labels: F.cross_entropy(logits[:, -1], labels, reduction="sum")),
        (lambda row: [row[0]], lambda logits, labels: F.cross_entropy(logits[:, -1], labels[:, 0], reduction="sum")),
    ],
    ids=["(B,)", "(B, 1)"],
)
def test_one_label_for_each_row_of_a_causal_model_is_counted(tmp_path, label, loss):
    def of_outputs(outputs, labels, num_items_in_batch=None):
        return loss(outputs.logits, labels) / num_items_in_batch

    def together(features):
        labels = torch.tensor([feature["labels"] for feature in features])
        rest = collate([{**feature, "labels": []} for feature in features])
        return {**rest, "labels": labels}

    args = DoGEConfig(str(tmp_path), **OPTIONS)
    trainer = DoGETrainer(
        tiny_gpt2(), args, train_dataset=domains(label), data_collator=together, compute_loss_func=of_outputs
    )
    trainer.train()
    assert trainer._learner.state.num_tokens.tolist() == [24, 24]


def test_rows_with_a_first_label_that_come_later_are_tried_when_they_come(tmp_path):
    """Micro-batches of one: the first domain has no first label to tell by."""
    args = DoGEConfig(
        str(tmp_path),
        **{**OPTIONS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_steps": 1},
    )
    some = domains(lambda row: row)
    some["long"] = some["long"].map(lambda row: {"labels": [-100] * 9 + row["labels"][9:]})
    trainer = DoGETrainer(OwnShift(is_mean=False), args, train_dataset=some, data_collator=collate)
    trainer.train()
    assert trainer._learner.state.num_tokens.tolist() == [4 * 2, 4 * 3]


def test_a_resumed_run_counts_on_as_it_was_found(tmp_path):
    """Online, where nothing is tried before the next look."""
    options = {"mode": "online", "reweight_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    args = DoGEConfig(str(tmp_path), **{**OPTIONS, **options})
    counts = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        trainer = DoGETrainer(
            OwnShift(is_mean=True), args, train_dataset=domains(lambda row: row), data_collator=collate
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        counts.append((trainer._learner.state.num_tokens.tolist(), trainer._learner.state.num_examples.tolist()))
    assert counts[0] == counts[1]
    tokens, examples = counts[0]
    assert tokens == [examples[0] * 2, examples[1] * 11]


def tiny(cls, config, **options):
    torch.manual_seed(0)
    return cls(config(vocab_size=VOCAB, **options)).eval()


FAMILIES = {
    "Llama": tiny_llama,
    "GPT-2": tiny_gpt2,
    "OpenAI GPT": lambda: tiny(OpenAIGPTLMHeadModel, OpenAIGPTConfig, n_embd=8, n_layer=1, n_head=2),
    "CTRL": lambda: tiny(CTRLLMHeadModel, CTRLConfig, n_embd=8, dff=8, n_layer=1, n_head=2),
    "BERT as a decoder": lambda: tiny(
        BertLMHeadModel,
        BertConfig,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        is_decoder=True,
    ),
    "BERT": tiny_bert,
    "XLNet": lambda: tiny(XLNetLMHeadModel, XLNetConfig, d_model=8, d_inner=8, n_layer=1, n_head=2),
    "T5": tiny_t5,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_class_of_a_model_tells_is_what_its_loss_does(tmp_path, family):
    model = FAMILIES[family]()
    args = DoGEConfig(str(tmp_path), use_cpu=True, report_to="none")
    trainer = DoGETrainer(model, args, train_dataset=domains(lambda row: row), data_collator=collate)
    inputs = collate([{"input_ids": row, "labels": row} for row in rows("long", 3)[:4]])
    batch = MicroBatch(inputs, torch.zeros(4).long(), labels_are_shifted=are_labels_shifted(model))
    assert DomainLoss(trainer)._law([batch]).finds_shift() is are_labels_shifted(model)


def test_labels_that_cannot_tell_are_counted_as_the_class_says(tmp_path):
    """All first labels are left out by the data: either way of counting gives the same."""
    model = tiny_gpt2()
    args = DoGEConfig(str(tmp_path), use_cpu=True, report_to="none")
    trainer = DoGETrainer(model, args, train_dataset=domains(lambda row: row), data_collator=collate)
    inputs = collate([{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows("long", 3)[:4]])
    batch = MicroBatch(inputs, torch.zeros(4).long(), labels_are_shifted=True)
    assert DomainLoss(trainer)._law([batch]).finds_shift() is None
