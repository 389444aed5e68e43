"""What the recorder spares itself, padding and the model's own cross-entropy, changes no row."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from hf_doge.gradients.batches import Layout, split_by_length, tokens_per_call
from hf_doge.gradients.embedding import EmbeddingGradientRecorder

V, PAD, WIDTH = 40, 1, 64
LENGTHS = 3 * (60, 3, 4, 64, 5, 62, 3, 4)  # some long texts among short ones


def bert():
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=256,
        num_labels=3, pad_token_id=PAD, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=64, n_embd=WIDTH, n_layer=1, n_head=2, initializer_range=0.3, bos_token_id=2,
        eos_token_id=3,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def build(make):
    torch.manual_seed(0)
    return make()


def batch_of(make, *, lengths=LENGTHS, side="right", seed=0):
    """Random texts of these lengths, padded."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(4, V, (len(lengths), max(lengths)), generator=generator)
    places = torch.arange(max(lengths))
    gaps = max(lengths) - torch.tensor(lengths)[:, None]
    mask = places < max(lengths) - gaps if side == "right" else places >= gaps
    batch = {"input_ids": input_ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}
    if make is bert:
        return {**batch, "labels": torch.randint(3, (len(lengths),), generator=generator)}
    positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return {**batch, "position_ids": positions, "labels": input_ids.masked_fill(~mask, -100)}


def watch(model):
    """Shape of the ids and keys of each forward to come."""
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((tuple(kwargs["input_ids"].shape), set(kwargs))), with_kwargs=True
    )
    return seen


def record(model, *batches, **options):
    with EmbeddingGradientRecorder(model, **options) as recorder:
        return [recorder.record(batch) for batch in batches]


def assert_same(rows, others):
    assert torch.equal(rows.offsets, others.offsets)
    assert torch.equal(rows.tokens, others.tokens)
    assert (rows.rows - others.rows).norm() <= 1e-5 * others.rows.norm()


# Padding


@pytest.mark.parametrize(
    ("make", "side", "tied"),
    [
        (bert, "right", "input"),
        (gpt2, "right", "input"),
        (gpt2, "left", "input"),
        (gpt2, "left", "own"),
        (gpt2, "right", "full"),
    ],
)
def test_a_batch_run_in_groups_gives_the_rows_of_the_whole_batch_in_its_order(make, side, tied):
    model, batch = build(make), batch_of(make, side=side)
    for top_k in ({}, {"top_k": 3, "top_k_unit": "position" if tied == "input" else "token"}):
        (whole,) = record(model, batch, verify=False, tied=tied, **top_k)
        (recorded,) = record(model, batch, tied=tied, **top_k)
        assert_same(recorded, whole)


@pytest.mark.parametrize(("make", "tied"), [(bert, "input"), (gpt2, "input"), (gpt2, "own")])
def test_groups_leave_out_the_padding_that_they_do_not_need(make, tied):
    model, batch = build(make), batch_of(make)
    with EmbeddingGradientRecorder(model, tied=tied) as recorder:
        recorder.record(batch)
        seen = watch(model)
        recorder.record(batch)
    assert [shape for shape, _ in seen] == [(15, 5), (9, 64)]


def test_how_a_batch_is_run_does_not_depend_on_what_was_recorded_before():
    model, batch, other = build(bert), batch_of(bert), batch_of(bert, seed=1)
    (first,) = record(model, batch)
    _, second = record(model, other, batch)
    assert torch.equal(first.rows, second.rows)


def test_padding_that_comes_late_is_compared_as_well():
    """GPT-2 counts positions from the left of the batch, unless told."""
    model, full, padded = build(gpt2), batch_of(gpt2, lengths=(9, 9)), batch_of(gpt2, lengths=(9, 5), side="left")
    del full["position_ids"], padded["position_ids"]
    with pytest.raises(ValueError, match="Padding must not change an example's gradient, but example 1 of the batch"):
        record(model, full, padded)


def test_labels_at_padding_are_never_left_out():
    model, batch = build(gpt2), batch_of(gpt2)
    odd = {**batch, "labels": batch["labels"].clone()}
    odd["labels"][1, 40] = 7  # text 1 has 3 tokens
    _, recorded = record(model, batch, odd)
    (whole,) = record(model, odd, verify=False)
    assert_same(recorded, whole)


def test_a_batch_of_another_layout_is_run_whole():
    model, batch = build(bert), batch_of(bert)
    with EmbeddingGradientRecorder(model) as recorder:
        recorder.record(batch)
        seen = watch(model)
        recorder.record({**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])})
    assert [shape for shape, _ in seen] == [(24, 64)]


def test_groups_cost_the_least_that_any_borders_cost():
    lengths = (2, 9, 3, 9, 4, 9, 2)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    batch = {"input_ids": torch.arange(63).reshape(7, 9), "attention_mask": mask.long(), "labels": torch.arange(7)}
    layout = Layout.of(batch)
    for cost, sizes in ((0.0, [2, 1, 1, 3]), (5.0, [4, 3]), (100.0, [7]), (float("inf"), [7])):
        groups = split_by_length(batch, mask, layout=layout, cost=cost)
        assert [len(group.examples) for group in groups] == sizes
        assert sorted(torch.cat([group.examples for group in groups]).tolist()) == list(range(7))
        for group in groups:
            assert torch.equal(group.batch["input_ids"], batch["input_ids"][group.examples][:, group.positions])
            assert torch.equal(group.batch["labels"], group.examples)
            assert not mask[group.examples][:, [p for p in range(9) if p not in group.positions.tolist()]].any()


def test_a_call_of_a_model_with_more_to_multiply_costs_fewer_tokens():
    small, large = build(bert), build(gpt2)
    large.transformer.h[0].mlp.c_fc.weight = nn.Parameter(torch.zeros(WIDTH, 10**6))
    assert tokens_per_call(large) < tokens_per_call(small)


# The model's own cross-entropy


def test_a_language_model_is_not_asked_for_its_loss_once_its_logits_are_known_to_give_it():
    model, batch = build(gpt2), batch_of(gpt2)
    with EmbeddingGradientRecorder(model) as recorder:
        recorder.record(batch)
        seen = watch(model)
        recorder.record(batch)
    assert seen
    assert all("labels" not in keys for _, keys in seen)


def test_a_check_refuses_what_recording_would_and_never_runs_the_whole_batch():
    model, batch = build(gpt2), batch_of(gpt2, lengths=(9, 5, 7, 6, 8), side="left")
    seen = watch(model)
    with EmbeddingGradientRecorder(model) as recorder:
        recorder.check({key: value[:2] for key, value in batch.items()})
        assert {shape[0] for shape, _ in seen} == {1, 2}
        del batch["position_ids"]
        with pytest.raises(ValueError, match="Padding must not change an example's gradient"):
            recorder.check(batch)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("tied", ["input", "output", "full", "own"])
def test_rows_from_logits_are_those_of_the_loss(reduction, tied):
    model, batch = build(gpt2), batch_of(gpt2, lengths=(9, 4, 7))
    batch["labels"][0, 2:5] = -100
    options = {"loss_reduction": reduction, "tied": tied}
    assert_same(record(model, batch, **options)[0], record(model, batch, verify=False, **options)[0])


def test_rows_from_logits_are_those_of_the_loss_in_half_precision():
    model, batch = build(gpt2).to(torch.bfloat16), batch_of(gpt2, lengths=(9, 4, 7))
    (from_logits,), (from_loss,) = record(model, batch), record(model, batch, verify=False)
    assert from_logits.rows.dtype == from_loss.rows.dtype
    assert (from_logits.rows - from_loss.rows).norm() <= 0.03 * from_loss.rows.norm()


class Own(nn.Module):
    """A language model of one's own: a loss from its logits, or something else without labels."""

    def __init__(self, *, without_labels):
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, 8), nn.Linear(8, V)
        self.without_labels = without_labels

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.embedding(input_ids).tanh())
        if labels is None:
            return self.without_labels(logits)
        loss = F.cross_entropy(logits.flatten(end_dim=1), labels.flatten())
        return SimpleNamespace(loss=loss, logits=logits)


@pytest.mark.parametrize(
    "without_labels",
    [
        lambda logits: SimpleNamespace(logits=None),
        lambda logits: SimpleNamespace(logits=logits[:, -1:]),
        lambda logits: SimpleNamespace(logits=2 * logits),
    ],
    ids=["none", "the last", "others"],
)
def test_a_model_that_returns_other_logits_without_labels_is_asked_for_its_loss(without_labels):
    torch.manual_seed(0)
    model = Own(without_labels=without_labels)
    batch = batch_of(gpt2, lengths=(6, 4, 5))
    del batch["position_ids"]
    assert_same(record(model, batch)[0], record(model, batch, verify=False)[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused_in_any_batch(value):
    model, batch = build(gpt2), batch_of(gpt2)
    with EmbeddingGradientRecorder(model) as recorder:
        recorder.record(batch)
        model.transformer.ln_f.bias.data[0] = value
        with pytest.raises(ValueError, match="The loss of a batch must be finite"):
            recorder.record(batch)


def test_a_label_that_is_no_token_is_refused_in_any_batch():
    model, batch = build(gpt2), batch_of(gpt2)
    odd = {**batch, "labels": batch["labels"].clone()}
    odd["labels"][0, 5] = -1
    with warnings.catch_warnings(), pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        record(model, batch, odd)
