"""The tail patch: against a step by hand, and the model is as it was."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from hf_doge.evaluation.influence.tail_patch import tail_patch
from tests.tiny import tiny_classifier

RATE = 0.05


def make_dataset(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(1, 32, (5,), generator=generator),
            "labels": torch.randint(0, 3, (), generator=generator),
        }
        for _ in range(count)
    ]


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


TRAIN, QUERIES = make_dataset(9, seed=1), make_dataset(3, seed=2)
SCORES = np.random.default_rng(0).normal(size=(3, 9))


def by_hand(model, query, places, optimizer_class=torch.optim.AdamW, clip=1.0, **options):
    """Loss after a step on `places` less loss before."""
    model = copy.deepcopy(model).eval()
    batch = collate([QUERIES[query]])
    before = model(**batch).loss.item()
    optimizer = optimizer_class(model.parameters(), lr=RATE, weight_decay=0.0, **options)
    optimizer.zero_grad()
    model(**collate([TRAIN[place] for place in places])).loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return model(**batch).loss.item() - before


def run(model, **options):
    return tail_patch(model, SCORES, TRAIN, QUERIES, collate, **{"learning_rate": RATE, "top_k": 4, **options})


def best(query, k=4):
    return np.argsort(-SCORES[query])[:k]


def test_it_is_one_step_of_adam_on_the_highest_scores():
    model = tiny_classifier()
    np.testing.assert_allclose(run(model), [by_hand(model, query, best(query)) for query in range(3)], atol=1e-6)
    np.testing.assert_allclose(
        run(model, max_grad_norm=None, top_k=2),
        [by_hand(model, query, best(query, 2), clip=None) for query in range(3)],
        atol=1e-6,
    )


def test_steps_on_each_alone_are_averaged():
    model = tiny_classifier()
    expected = [np.mean([by_hand(model, query, [place]) for place in best(query)]) for query in range(3)]
    np.testing.assert_allclose(run(model, together=False), expected, atol=1e-6)


def test_an_optimizer_of_the_users_steps_at_the_given_rate():
    model = tiny_classifier()
    changes = run(
        model, make_optimizer=lambda stepped: torch.optim.SGD(stepped.parameters(), lr=99.0), max_grad_norm=None
    )
    expected = [by_hand(model, query, best(query), torch.optim.SGD, clip=None) for query in range(3)]
    np.testing.assert_allclose(changes, expected, atol=1e-6)


def test_a_loss_of_the_users_is_followed():
    model = tiny_classifier()
    doubled = run(model, loss_fn=lambda stepped, batch: 2 * stepped(**batch).loss, max_grad_norm=None)
    np.testing.assert_allclose(doubled, 2 * run(model, max_grad_norm=None), rtol=0.02)  # Adam steps by signs


def test_a_step_on_the_query_itself_lowers_its_loss_and_on_its_opposite_less():
    model = tiny_classifier()
    own = np.eye(3)
    changes = tail_patch(model, own, QUERIES, QUERIES, collate, learning_rate=1e-3, top_k=1)
    assert (changes < 0).all()
    wrong = [{**row, "labels": (row["labels"] + 1) % 3} for row in QUERIES]
    assert (tail_patch(model, own, wrong, QUERIES, collate, learning_rate=1e-3, top_k=1) > changes).all()


class Counted(nn.Module):
    """A model with a buffer that every pass changes, a frozen layer, and dropout."""

    def __init__(self):
        super().__init__()
        self.model = tiny_classifier()
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("passes", torch.zeros(()))
        self.model.classifier.bias.requires_grad_(False)

    def forward(self, **batch):
        self.passes += 1
        assert not self.dropout.training
        return self.model(**batch)


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_exactly_as_it_was(fail):
    model = Counted().train()
    model.dropout.eval()
    model(**collate(TRAIN[:2])).loss.backward()
    grads = [parameter.grad for parameter in model.parameters()]
    before = copy.deepcopy(grads), copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    calls = []

    def loss_fn(stepped, batch):
        calls.append(batch)
        if fail and len(calls) == 6:  # within the second query's step
            raise KeyboardInterrupt("stopped by the test")
        return stepped(**batch).loss

    if fail:
        with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
            run(model, loss_fn=loss_fn)
    else:
        assert np.abs(run(model, loss_fn=loss_fn)).min() > 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[1][name]), name
    after = [parameter.grad for parameter in model.parameters()]
    assert all(one is other for one, other in zip(after, grads, strict=True))
    for grad, old in zip(grads, before[0], strict=True):
        assert (grad is None and old is None) or torch.equal(grad, old)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)


def test_queries_do_not_feel_each_other():
    model = tiny_classifier()
    alone = [
        tail_patch(model, SCORES[[query]], TRAIN, [QUERIES[query]], collate, learning_rate=RATE, top_k=4)[0]
        for query in range(3)
    ]
    np.testing.assert_array_equal(run(model), alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 10}, r"`top_k` must be in \[1, 9\], but got 10"),
        ({"learning_rate": 0}, "`learning_rate` must be positive"),
        ({"max_grad_norm": 0}, "`max_grad_norm` must be positive"),
        ({"together": "no"}, "`together` must be True or False"),
        ({"loss_fn": lambda stepped, batch: stepped(**batch).loss * float("nan")}, "that of query 0 is nan"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_classifier(), **options)


def test_what_cannot_be_stepped_is_refused():
    model = tiny_classifier()
    with pytest.raises(ValueError, match="one row for each of the 2 queries"):
        tail_patch(model, SCORES, TRAIN, QUERIES[:2], collate, learning_rate=RATE)
    with pytest.raises(ValueError, match="finite"):
        tail_patch(model, SCORES * np.inf, TRAIN, QUERIES, collate, learning_rate=RATE, top_k=1)
    unlabelled = [{"input_ids": row["input_ids"]} for row in QUERIES]
    with pytest.raises(ValueError, match=r"gave none for \['input_ids'\]"):
        tail_patch(model, SCORES, TRAIN, unlabelled, collate, learning_rate=RATE, top_k=1)
    with pytest.raises(ValueError, match="Unfreeze what was trained"):
        run(model.requires_grad_(False))
