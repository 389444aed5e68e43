"""Rows of an example are those it has alone, or the model is refused: whatever the order of the data hides at first."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.gradients.verification import has_stock_loss
from tests.tiny import VOCAB, tiny_gpt2

V, WIDTH, CLASSES = 24, 6, 3
REFUSED = "must not depend on its batch|must be the mean cross-entropy"
WEIGHTS = torch.tensor([1.0, 2.0, 20.0])


def terms(logits, labels):
    return F.cross_entropy(logits.flatten(end_dim=-2), labels.flatten(), reduction="none")


def weighted(logits, labels, mask):
    return F.cross_entropy(logits, labels, weight=WEIGHTS.to(logits.dtype))


def nearly_equal_weights(logits, labels, mask):
    return F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 1.0, 1.05], dtype=logits.dtype))


def focal_over_its_weights(logits, labels, mask):
    hard = WEIGHTS.to(logits.dtype)[labels] * (1 - logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]) ** 2
    return (hard * terms(logits, labels)).sum() / hard.detach().sum()


def summed(logits, labels, mask):
    return terms(logits, labels).sum()


def contrastive(logits, labels, mask):
    """Pulls examples of one class together: nothing to do where each has its own."""
    pairs = (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool)
    likeness = F.normalize(logits, dim=1) @ F.normalize(logits, dim=1).T
    return terms(logits, labels).mean() - (likeness * pairs).sum() / len(labels)


def pushed_apart(logits, labels, mask):
    """Nothing to do where all are of one class."""
    pairs = labels[:, None] != labels
    return terms(logits, labels).mean() + ((logits @ logits.T) * pairs).sum() / len(labels)


def weighted_by_length(logits, labels, mask):
    lengths = mask.sum(dim=1).to(logits.dtype)
    return (terms(logits, labels) * lengths).sum() / lengths.sum()


def mean_of_weighted(logits, labels, mask):
    return (WEIGHTS.to(logits.dtype)[labels] * terms(logits, labels)).mean()


def focal(logits, labels, mask):
    return ((1 - logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]) ** 2 * terms(logits, labels)).mean()


class Own(nn.Module):
    """A classifier of texts, or of tokens, with a loss of its own."""

    def __init__(self, loss, *, pooled=True, label="labels", mix=None):
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.loss, self.pooled, self.label, self.mix = loss, pooled, label, mix

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask, **batch):
        hidden = self.embedding(input_ids).tanh() * attention_mask[..., None]
        if self.pooled:
            hidden = hidden.sum(dim=1) / attention_mask.sum(dim=1, keepdim=True)
        if self.mix is not None:
            hidden = self.mix(hidden)
        logits = self.head(hidden)
        labels = batch.get(self.label)
        return SimpleNamespace(
            logits=logits, loss=None if labels is None else self.loss(logits, labels, attention_mask)
        )


def build(*arguments, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Own(*arguments, **options)
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    return model.to(dtype)


def batches(labels, *, name="labels", length=5, alike=False):
    """Batches of three or more examples with these labels, in order; `alike`: the first holds one text three times."""
    generator = torch.Generator().manual_seed(0)
    for number, own in enumerate(labels):
        ids = torch.randint(V, (len(own), length), generator=generator)
        if alike and number == 0:
            ids = ids[:1].expand_as(ids).clone()
        mask = torch.ones_like(ids)
        if number:
            mask[0, 3:] = 0
        yield {"input_ids": ids, "attention_mask": mask, name: torch.tensor(own)}


ORDERS = {"sorted": [[0, 0, 0], [1, 1, 1], [2, 2, 0]], "rare": [[0, 1, 0, 1], [1, 0, 1, 0], [0, 2, 1, 1]]}


def recorded(model, given, **options):
    with EmbeddingGradientRecorder(model, **options) as recorder:
        return [rows for batch in given for rows in recorder.record(batch)]


def assert_as_alone(model, given):
    given = list(given)
    single = [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in given
        for i in range(len(batch["input_ids"]))
    ]
    for (tokens, rows), (own_tokens, own_rows) in zip(recorded(model, given), recorded(model, single), strict=True):
        dense = torch.zeros(V, WIDTH).index_add_(0, tokens, rows) - torch.zeros(V, WIDTH).index_add_(
            0, own_tokens, own_rows
        )
        assert dense.norm() <= 1e-4 * own_rows.norm()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "loss",
    [weighted, nearly_equal_weights, focal_over_its_weights, summed, contrastive, pushed_apart, weighted_by_length],
)
def test_losses_that_mix_examples_are_refused_whatever_the_order(loss, order):
    with pytest.raises(ValueError, match=REFUSED):
        recorded(build(loss), batches(ORDERS[order]))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("loss", [mean_of_weighted, focal])
def test_losses_that_are_a_mean_over_examples_are_recorded_exactly(loss, order):
    assert_as_alone(build(loss), batches(ORDERS[order]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_class_weights_are_found_in_any_precision_and_its_rounding_is_none(dtype):
    with pytest.raises(ValueError, match=REFUSED):
        recorded(build(weighted, dtype=dtype), batches(ORDERS["sorted"]))
    model = build(lambda logits, labels, mask: F.cross_entropy(logits, labels), dtype=dtype)
    assert len(recorded(model, batches(ORDERS["rare"]))) == 12


def test_classes_that_logits_do_not_tell_of_are_asked_about_where_they_occur():
    model = build(weighted)
    forward = model.forward
    model.forward = lambda **batch: SimpleNamespace(loss=forward(**batch).loss)
    with pytest.raises(ValueError, match=REFUSED):
        recorded(model, batches(ORDERS["sorted"]))


def test_labels_of_another_name_are_asked_about():
    with pytest.raises(ValueError, match=REFUSED):
        recorded(build(weighted, label="targets"), batches(ORDERS["sorted"], name="targets"))


def test_a_batch_of_equal_texts_does_not_hide_a_norm_over_the_batch():
    def norm(hidden):
        return (hidden - hidden.mean(dim=0)) / (hidden.std(dim=0, correction=0) + 0.1)

    model = build(lambda logits, labels, mask: F.cross_entropy(logits, labels), mix=norm)
    with pytest.raises(ValueError, match=REFUSED):
        recorded(model, batches(ORDERS["sorted"], alike=True))


def test_all_classes_are_asked_about_before_a_training():
    (first, *_) = batches(ORDERS["rare"])
    with EmbeddingGradientRecorder(build(weighted)) as recorder, pytest.raises(ValueError, match=REFUSED):
        recorder.check(first)


def test_numbers_and_truth_values_are_asked_about():
    def by_number_of_positives(logits, labels, mask):
        return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum") / labels.sum().clamp(min=1)

    def mean(logits, labels, mask):
        return F.binary_cross_entropy_with_logits(logits, labels.float())

    for kind in (float, bool, int):
        several = [[[kind(1), kind(0), kind(0)]] * 3, [[kind(1), kind(1), kind(0)], [kind(0), kind(0), kind(1)]]]
        with pytest.raises(ValueError, match=REFUSED):
            recorded(build(by_number_of_positives), batches(several))
        assert_as_alone(build(mean), batches(several))


MISSING = {"nan": float("nan"), "minus one": -1.0, "minus a hundred": -100.0, "a whole number": -1}


def some_missing(value):
    """Several labels of each example: all, then all but one, then two missing of the first example."""
    full = [type(value)(1), type(value)(0), type(value)(0)]
    alike = [[value, *full[1:]]] * 4
    return [[full] * 4, alike, [[value, value, full[2]], *alike[1:]]]


def there(labels):
    return ~(labels.isnan() | (labels < 0))


@pytest.mark.parametrize("kind", MISSING)
def test_a_mean_over_the_labels_that_are_there_is_refused_as_soon_as_one_is_missing(kind):
    def over_those_there(logits, labels, mask):
        return ((logits - labels)[there(labels)] ** 2).mean()

    given = list(batches(some_missing(MISSING[kind])))
    for few in (given[:2], given[1:2]):  # where as many are missing of each example, these batches alone show nothing
        with pytest.raises(ValueError, match=REFUSED):
            recorded(build(over_those_there), few)
    recorded(build(over_those_there), given[:1])


@pytest.mark.parametrize("kind", MISSING)
def test_labels_that_each_example_leaves_out_for_itself_are_recorded_exactly(kind):
    def of_each(logits, labels, mask):
        kept = there(labels)
        return (((logits - labels.masked_fill(~kept, 0)) ** 2 * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)).mean()

    assert_as_alone(build(of_each), batches(some_missing(MISSING[kind])))


# Labels of tokens


def tagged(loss):
    return build(loss, pooled=False)


def plain(logits, labels, mask):
    return F.cross_entropy(logits.flatten(end_dim=1), labels.flatten())


def weighted_tokens(logits, labels, mask):
    return F.cross_entropy(logits.flatten(end_dim=1), labels.flatten(), weight=WEIGHTS)


def mean_of_texts(logits, labels, mask):
    counted = (labels != -100).sum(dim=1)
    return (terms(logits, labels).reshape(labels.shape).sum(dim=1) / counted).mean()


def over_the_mask(logits, labels, mask):
    return terms(logits, labels).sum() / mask.sum()


def over_the_texts(logits, labels, mask):
    return terms(logits, labels).sum() / (5 * len(labels))


def with_a_penalty(logits, labels, mask):
    return plain(logits, labels, mask) + 1e-6 * logits.square().mean()


TAGS = [[[0] * 5] * 3, [[1, 0, 2, -100, -100]] * 3]


@pytest.mark.parametrize(
    "loss",
    [weighted_tokens, mean_of_texts, over_the_mask, over_the_texts, with_a_penalty],
    ids=lambda loss: loss.__name__,
)
def test_losses_of_tokens_that_are_no_mean_over_labels_are_refused_whatever_the_first_labels(loss):
    with pytest.raises(ValueError, match=REFUSED):
        recorded(tagged(loss), batches(TAGS))
    assert_as_alone(tagged(plain), batches(TAGS))


def test_weights_of_tokens_are_refused_one_example_at_a_time_too():
    with pytest.raises(ValueError, match=REFUSED):
        recorded(tagged(weighted_tokens), batches([[[0] * 5], [[1, 0, 2, 1, 1]]]))


def rare_last(num_batches=6):
    """Batches whose tokens are new in each, the last tokens of the vocabulary in the last one."""
    ids = torch.arange(1, 1 + 5 * num_batches).reshape(num_batches, 1, 5).repeat(1, 2, 1)
    return [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one.clone()} for one in ids]


def test_stock_models_run_no_forward_for_each_new_token(monkeypatch):
    monkeypatch.setattr("hf_doge.gradients.verification._NUM_CLASSES", 1)
    runs = {}
    for name, model in {"stock": tiny_gpt2(), "own": tiny_gpt2()}.items():
        counted, calls = model.transformer.forward, []

        def count(*args, _counted=counted, _calls=calls, **kwargs):
            _calls.append(1)
            return _counted(*args, **kwargs)

        model.transformer.forward = count
        if name == "own":
            model.loss_function = lambda logits, labels, **options: F.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
        with EmbeddingGradientRecorder(model) as recorder:
            recorder.record(rare_last()[0])
            calls.clear()
            for batch in rare_last()[1:]:
                recorder.record(batch)
            runs[name] = len(calls)
    assert runs["stock"] == 5 < runs["own"]


def test_weights_of_tokens_in_a_loss_that_was_put_into_a_stock_model_are_refused_where_they_occur(monkeypatch):
    monkeypatch.setattr("hf_doge.gradients.verification._NUM_CLASSES", 1)
    model = tiny_gpt2()
    weight = torch.ones(VOCAB)
    weight[29] = 3
    model.loss_function = lambda logits, labels, **options: F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weight=weight
    )
    with pytest.raises(ValueError, match=REFUSED):
        recorded(model, rare_last())


@pytest.mark.parametrize("change", ["forward", "class", "loss"])
def test_a_loss_is_stock_only_where_nothing_of_it_is_someone_elses(change):
    model = tiny_gpt2()
    assert has_stock_loss(model)
    assert has_stock_loss(Accelerator(cpu=True).prepare_model(model, evaluation_mode=True))
    if change == "forward":
        model.forward = partial(model.forward)
    elif change == "class":
        model.__class__ = type("Own", (type(model),), {"__module__": "own"})
    else:
        model.loss_function = lambda logits, labels, **options: logits.mean()
    assert not has_stock_loss(model)


def test_the_weight_of_one_token_of_a_large_vocabulary_is_found_where_it_occurs(monkeypatch):
    monkeypatch.setattr("hf_doge.gradients.verification._NUM_CLASSES", 1)
    weight = torch.ones(400)
    weight[399] = 3

    def loss(logits, labels, mask):
        logits = F.pad(logits, (0, 397), value=-3.0)
        return SimpleNamespace(
            logits=logits, loss=F.cross_entropy(logits.flatten(end_dim=1), labels.flatten(), weight=weight)
        )

    model = tagged(None)
    model.loss, model.forward_once = (lambda logits, labels, mask: (logits, labels, mask)), model.forward
    model.forward = lambda **batch: loss(*model.forward_once(**batch).loss)
    tags = [[[0, 1, 2, 0, 1]] * 3, [[3, 4, 5, 6, 7]] * 3]
    assert len(recorded(model, batches(tags))) == 6
    with pytest.raises(ValueError, match=REFUSED):
        recorded(model, batches([*tags, [[0, 399, 1, 1, 1]] * 3]))


@pytest.mark.parametrize(
    ("coefficient", "dtype"), [(0.001, torch.float32), (1e-5, torch.float32), (0.001, torch.bfloat16)]
)
def test_a_loss_that_balances_experts_is_refused_however_small(coefficient, dtype):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=1, output_router_logits=True, router_aux_loss_coef=coefficient,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).to(dtype)
    ids = torch.randint(V, (3, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with pytest.raises(ValueError, match=REFUSED):
        recorded(model, [batch])
    config.output_router_logits = False
    assert len(recorded(model, [batch])) == 3


# What only later examples have

ALL = [[0, 1, 2, 0]]
COUNTED = [[0, 1, 2, 0, 1]] * 4


def with_inputs(labels, **values):
    """Batches of four with these labels; `values`: for each batch a further input."""
    for number, batch in enumerate(batches(labels * len(next(iter(values.values()))))):
        yield {**batch, **{name: torch.tensor(value[number]) for name, value in values.items()}}


class Reading(Own):
    """With a loss that reads further inputs, and no mask if the batch has none."""

    def forward(self, input_ids, attention_mask=None, **batch):
        mask = (input_ids != 0).long() if attention_mask is None else attention_mask
        hidden = self.embedding(input_ids).tanh() * mask[..., None]
        if self.pooled:
            hidden = hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True)
        logits = self.head(hidden)
        return SimpleNamespace(logits=logits, loss=self.loss(logits, batch, mask))


def reading(loss, *, pooled=True, padding=None):
    torch.manual_seed(0)
    model = Reading(loss, pooled=pooled)
    model.embedding = nn.Embedding(V, WIDTH, padding_idx=padding)
    return model


def mean_by(weight):
    """The mean of the losses by a weight of each, over the sum of the weights."""

    def loss(logits, batch, mask):
        weights = weight(batch, mask).float()
        losses = terms(logits, batch["labels"]).reshape(batch["labels"].shape)
        return (weights * losses).sum() / weights.sum()

    return loss


GROUPS = {"group": [[5] * 4, [5] * 4, [5] * 4, [5] * 4, [5, 6, 0, 6]]}
by_group = mean_by(lambda batch, mask: 1 + 4 * (batch["group"] == 6))
LATER = {
    "group": (reading(by_group), with_inputs(ALL, **GROUPS)),
    "a number for each": (
        reading(mean_by(lambda batch, mask: batch["importance"])),
        with_inputs(ALL, importance=[[0.5] * 4, [0.5, 1.0, 2.0, 4.0]]),
    ),
    "a number for each token": (
        reading(mean_by(lambda batch, mask: batch["importance"]), pooled=False),
        with_inputs([COUNTED], importance=[[[1.0] * 5] * 4, [[1.0, 2, 3, 4, 5], [5.0, 1, 1, 1, 1], [1.0] * 5, [2.0] * 5]]),
    ),
    "a mask of tokens": (
        reading(mean_by(lambda batch, mask: batch["counts"]), pooled=False),
        with_inputs([COUNTED], counts=[[[1] * 5] * 4, [[1, 0, 0, 1, 1], [1] * 5, [0, 0, 0, 0, 1], [1] * 5]]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LATER)
def test_what_only_later_examples_have_is_looked_at(kind):
    model, given = LATER[kind]
    with pytest.raises(ValueError, match=REFUSED):
        recorded(model, given)


def test_the_last_batch_of_many_is_looked_at():
    numbers = iter(range(100))
    model = reading(mean_by(lambda batch, mask: 1 + 4 * (batch["number"] == 39)))
    given = list(with_inputs(ALL, number=[[next(numbers) for _ in range(4)] for _ in range(10)]))
    assert len(recorded(model, given[:9])) == 36
    with pytest.raises(ValueError, match=REFUSED):
        recorded(model, given)


def test_padding_that_no_mask_tells_of_is_looked_at():
    model = reading(mean_by(lambda batch, mask: mask.sum(dim=1)), padding=0)
    first, second = ({**one, "input_ids": one["input_ids"].clamp(min=1)} for one in batches(ALL * 2))
    second["input_ids"][0, 2:] = 0
    for batch in (first, second):
        del batch["attention_mask"]
    with pytest.raises(ValueError, match=REFUSED):
        recorded(model, [first, second])


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, batch, mask: (
            terms(logits, batch["labels"]).topk(min(8, len(logits))).values.mean()
        ),  # the hardest ones
        lambda logits, batch, mask: plain_loss(logits, batch) + (0.1 * logits.mean() ** 2 if len(logits) > 4 else 0.0),
    ],
)
def test_what_shows_in_whole_batches_only_is_looked_at(loss):
    with pytest.raises(ValueError, match=REFUSED):
        recorded(reading(loss), batches([[0, 1, 2, 0] * 4]))


def plain_loss(logits, batch):
    return F.cross_entropy(logits, batch["labels"])


def test_an_example_without_a_loss_alone_is_compared_with_the_others():
    model = reading(lambda logits, batch, mask: F.cross_entropy(logits @ logits.T, torch.arange(len(logits))))
    (batch,) = batches(ALL)
    del batch["labels"]
    with pytest.raises(ValueError, match=REFUSED):
        recorded(model, [batch])


@pytest.mark.parametrize("order", [("labels", "task"), ("task", "labels")])
def test_other_inputs_get_no_values_that_they_never_have(order):
    for tasks in ([[0] * 4] * 3, [[1, 0, 1, 0]] * 3):
        table = torch.eye(1 + max(tasks[0]), CLASSES)
        model = reading(lambda logits, batch, mask, table=table: plain_loss(logits + table[batch["task"]], batch))
        given = [{**{name: batch[name] for name in ("input_ids", "attention_mask", *order)}}
                 for batch in with_inputs(ALL, task=tasks)]  # fmt: skip
        assert_as_alone(model, given)
