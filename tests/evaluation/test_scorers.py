"""Scorers: each against its formula by autograd or a slow loop, all with positive scores for proponents."""

import copy
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_doge.evaluation.influence.cancellation import cancellation_ratios
from hf_doge.evaluation.influence.scorers import (
    SCORERS,
    BM25Scorer,
    InfluenceLastScorer,
    RandomScorer,
    RepresenterScorer,
    TracInLastScorer,
    TracInWEScorer,
    make_scorer,
)
from hf_doge.evaluation.influence.scorers.last_layer import last_layer_factors, softmax_regression_hessian
from hf_doge.evaluation.influence.small_models import TrainingRecipe, make_classifier, to_batches, train_classifier
from hf_doge.functional.tracin_we import cancellation_ratio, last_layer_score
from tests.reference_tracin_we import slow_position_top_k
from tests.tiny import tiny_classifier

VOCABULARY, CLASSES = 20, 3


def make_data(num_examples, *, seed, length=7):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (num_examples,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(1, VOCABULARY, (num_examples, length), generator=generator) * mask
    labels = torch.randint(0, CLASSES, (num_examples,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def alone(data, position):
    length = int(data["attention_mask"][position].sum())
    return {
        "input_ids": data["input_ids"][position : position + 1, :length],
        "labels": data["labels"][position : position + 1],
    }


def gradient(model, data, position, parameter):
    model = copy.deepcopy(model)
    model.zero_grad()
    model(**alone(data, position)).loss.backward()
    return dict(model.named_parameters())[parameter].grad


@pytest.fixture(params=["cnn", "transformer"])
def models(request):
    return [make_classifier(request.param, VOCABULARY, CLASSES, width=8, seed=seed).double() for seed in (1, 2)]


train, queries = make_data(9, seed=0), make_data(4, seed=1)


def gradient_products(models, rates, parameters):
    total = 0
    for model, rate in zip(models, rates, strict=True):
        ours, theirs = (
            torch.stack(
                [
                    torch.cat([gradient(model, data, i, name).flatten() for name in parameters])
                    for i in range(len(data["labels"]))
                ]
            )
            for data in (train, queries)
        )
        total = total + rate * theirs @ ours.T
    return total.numpy()


def test_tracin_we_is_the_inner_product_of_dense_embedding_gradients_over_checkpoints(models):
    scores = TracInWEScorer(models, [0.3, 0.1]).scores(to_batches(train, 4), to_batches(queries, 3))
    np.testing.assert_allclose(scores, gradient_products(models, [0.3, 0.1], ["embedding.weight"]), atol=1e-12)


def test_top_k_keeps_the_same_positions_as_the_slow_rule_and_all_of_them_when_k_is_large(models):
    exact = TracInWEScorer(models, [0.3, 0.1]).scores(to_batches(train), to_batches(queries))
    all_kept = TracInWEScorer(models, [0.3, 0.1], top_k=50).scores(to_batches(train), to_batches(queries))
    np.testing.assert_allclose(all_kept, exact, atol=1e-14)

    def kept(model, data, i):
        example = alone(data, i)
        outputs = []
        handle = model.embedding.register_forward_hook(lambda module, args, output: outputs.append(output))
        loss = model(**example).loss
        handle.remove()
        return slow_position_top_k(example["input_ids"][0], torch.autograd.grad(loss, outputs[0])[0][0], 2)

    expected = np.zeros((4, 9))
    for model, rate in zip(models, [0.3, 0.1], strict=True):
        for q in range(4):
            for n in range(9):
                ours, theirs = kept(model, train, n), kept(model, queries, q)
                expected[q, n] += rate * sum(float(ours[token] @ theirs[token]) for token in ours if token in theirs)
    scores = TracInWEScorer(models, [0.3, 0.1], top_k=2).scores(to_batches(train), to_batches(queries))
    np.testing.assert_allclose(scores, expected, atol=1e-12)


def test_excluded_tokens_carry_nothing(models):
    scorer = TracInWEScorer(models, [1.0, 1.0], exclude_tokens=range(VOCABULARY))
    assert not scorer.scores(to_batches(train), to_batches(queries)).any()


def test_self_influence_is_the_diagonal_of_the_scores(models):
    scorer = TracInWEScorer(models, [0.3, 0.1])
    batches = to_batches(train, 4)
    np.testing.assert_allclose(scorer.self_influence(batches), scorer.scores(batches, batches).diagonal(), rtol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
def test_tracin_last_is_the_inner_product_of_the_last_layers_gradients(models, bias):
    parameters = ["classifier.weight", "classifier.bias"] if bias else ["classifier.weight"]
    scores = TracInLastScorer(models, [0.3, 0.1], bias=bias).scores(to_batches(train, 4), to_batches(queries))
    np.testing.assert_allclose(scores, gradient_products(models, [0.3, 0.1], parameters), atol=1e-12)
    ours, theirs = (last_layer_factors(models[0], to_batches(data)) for data in (train, queries))
    single = TracInLastScorer(models[:1], [1.0], bias=bias).scores(to_batches(train), to_batches(queries))
    expected = last_layer_score(ours.inputs[2], ours.deltas[2], theirs.inputs[1], theirs.deltas[1], bias=bias)
    assert single[1, 2] == pytest.approx(float(expected), abs=1e-14)


def test_the_hessian_is_that_of_autograd():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    weights = torch.randn(CLASSES, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 1])
    expected = torch.autograd.functional.hessian(
        lambda flat: F.cross_entropy(inputs @ flat.reshape(CLASSES, 4).T, labels), weights.flatten()
    )
    ours = softmax_regression_hessian(inputs, (inputs @ weights.T).softmax(dim=1))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_the_influence_function_predicts_what_removing_an_example_does_to_a_queries_loss():
    """Softmax regression alone, trained to its damped optimum: scores are the first order of leaving one out."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    labels = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()
    model = Features(inputs)
    query = {"input_ids": torch.tensor([[3]]), "labels": labels[3:4]}
    train_batches = [{"input_ids": torch.arange(40)[:, None], "labels": labels}]
    optimise(model, labels, torch.ones(40))
    loss = F.cross_entropy(model(query["input_ids"]).logits, query["labels"]).item()
    scores = InfluenceLastScorer(model, damping=DAMPING).scores(train_batches, [query])[0]
    changes = []
    for left_out in range(40):
        weights = torch.ones(40, dtype=torch.float64)
        weights[left_out] = 0
        retrained = Features(inputs)
        optimise(retrained, labels, weights)
        changes.append(F.cross_entropy(retrained(query["input_ids"]).logits, query["labels"]).item() - loss)
    # without a proponent the loss rises
    assert np.corrcoef(scores, changes)[0, 1] > 0.9


DAMPING = 0.05


class Features(nn.Module):
    """A linear layer on given features of each token."""

    def __init__(self, features):
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(features.shape[1], CLASSES).double()
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids, labels=None):
        return SequenceClassifierOutput(logits=self.classifier(self.features[input_ids[:, 0]]))


def optimise(model, labels, weights):
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        losses = F.cross_entropy(model.classifier(model.features), labels, reduction="none")
        loss = (weights * losses).sum() / len(labels)
        loss = loss + 0.005 * sum(parameter.square().sum() for parameter in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)


def test_the_representer_value_is_minus_delta_of_the_explained_class_times_the_similarity(models):
    ours, theirs = (last_layer_factors(models[0], to_batches(data)) for data in (train, queries))
    scores = RepresenterScorer(models[0]).scores(to_batches(train), to_batches(queries))
    for q in range(4):
        for n in range(9):
            expected = -ours.deltas[n, theirs.labels[q]] * (ours.inputs[n] @ theirs.inputs[q])
            assert scores[q, n] == pytest.approx(float(expected), abs=1e-14)


def separable(num_examples, *, seed):
    """Each class has words of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_examples) % 2
    ids = torch.randint(1, 7, (num_examples, 6), generator=generator) + 7 * labels[:, None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("name", [name for name in SCORERS if name != "random" and not name.startswith("bm25")])
@pytest.mark.parametrize("architecture", ["cnn", "transformer"])
def test_on_a_separable_classifier_proponents_share_the_label_and_opponents_do_not(name, architecture):
    data, test = separable(60, seed=0), separable(10, seed=1)
    recipe = TrainingRecipe(num_epochs=3, batch_size=20, learning_rate=5e-3, checkpoint_epochs=(1, 3))
    _, checkpoints = train_classifier(
        lambda seed: make_classifier(architecture, VOCABULARY, 2, width=8, seed=seed),
        data,
        recipe,
        seed=0,
        keep_checkpoints=True,
    )
    scores = make_scorer(name, *zip(*checkpoints, strict=True)).scores(to_batches(data), to_batches(test))
    order = np.argsort(-scores, axis=1)
    same = data["labels"].numpy()[order] == test["labels"].numpy()[:, None]
    # the inverse Hessian takes the weight off what divides the classes: its sign is tested by leaving one out, above
    assert same[:, :10].mean() >= (0.6 if name == "influence_last" else 0.8)
    # no word of the other class is in the query, so opponents of TracIn-WE are there only through ties at 0
    if name in ("tracin_last", "tracin_last_bias", "representer"):
        assert same[:, -10:].mean() <= 0.2


def test_a_hugging_face_classifier_has_its_last_layer_found():
    model = tiny_classifier(dtype=torch.float64)
    factors = last_layer_factors(model, to_batches(train, 4))
    torch.testing.assert_close(
        model.classifier(factors.inputs).softmax(dim=1), factors.probabilities, rtol=1e-10, atol=1e-12
    )
    named = last_layer_factors(model, to_batches(train, 4), last_layer="classifier")
    assert torch.equal(named.inputs, factors.inputs)


def test_a_layer_that_does_not_give_the_logits_is_refused(models):
    model = tiny_classifier()
    with pytest.raises(ValueError, match="must be linear and return the logits"):
        last_layer_factors(model, to_batches(train), last_layer="bert.pooler.dense")
    assert not model.bert.pooler.dense._forward_hooks


def test_random_scores_depend_on_the_seed_alone():
    ours, again, other = (RandomScorer(seed=s).scores(to_batches(train), to_batches(queries)) for s in (1, 1, 2))
    assert ours.shape == (4, 9)
    assert np.array_equal(ours, again)
    assert not np.array_equal(ours, other)


def test_bm25_says_which_extra_to_install_where_its_library_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"hf-doge\[evaluate-influence\]"):
        BM25Scorer()


class CountingIndex:
    """Stands for the library: the score is how many words of the query a text has."""

    def index(self, texts, show_progress):
        self.texts = texts

    def get_scores(self, words):
        assert all(any(word in text for text in self.texts) for word in words)
        return np.array([sum(word in text for word in words) for text in self.texts], dtype=float)


@pytest.mark.parametrize("signed", [False, True])
def test_bm25_gets_the_words_without_padding_and_its_sign_from_the_label(monkeypatch, signed):
    monkeypatch.setitem(sys.modules, "bm25s", types.SimpleNamespace(BM25=CountingIndex))
    scores = BM25Scorer(signed=signed, ignore_tokens=(5,)).scores(to_batches(train, 4), to_batches(queries))
    for q in range(4):
        for n in range(9):
            ours, theirs = alone(train, n)["input_ids"][0].tolist(), alone(queries, q)["input_ids"][0].tolist()
            shared = sum(token in ours for token in theirs if token != 5)
            sign = -1 if signed and train["labels"][n] != queries["labels"][q] else 1
            assert scores[q, n] == sign * shared


def test_bm25_ranks_the_text_with_the_rare_shared_word_first():
    pytest.importorskip("bm25s")
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 7, 8]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(3, dtype=torch.long)}
    query = {"input_ids": torch.tensor([[1, 7], [99, 98]]), "labels": torch.zeros(2, dtype=torch.long)}
    scores = BM25Scorer().scores([batch], [query])
    assert scores[0].argmax() == 2
    assert not scores[1].any()  # no word in common


@pytest.mark.parametrize(
    ("models", "rates", "message"),
    [([], [], "one learning rate for each"), ([nn.Linear(1, 1)], [1.0, 2.0], "one learning rate for each")],
)
def test_checkpoints_and_learning_rates_must_be_as_many(models, rates, message):
    with pytest.raises(ValueError, match=message):
        TracInWEScorer(models, rates)


def test_unknown_names_and_settings_are_refused():
    with pytest.raises(ValueError, match="must be one of"):
        make_scorer("tracin", [nn.Linear(1, 1)], [1.0])
    with pytest.raises(ValueError, match="must not be negative"):
        TracInLastScorer([nn.Linear(1, 1)], [-1.0])
    with pytest.raises(ValueError, match="must be positive"):
        InfluenceLastScorer(nn.Linear(1, 1), damping=0)
    with pytest.raises(ValueError, match="architecture"):
        make_classifier("rnn", 5, 2, seed=0)


def test_cancellation_ratios_are_those_of_the_dense_gradients(models):
    ratios = cancellation_ratios(models[0], to_batches(train, 4))
    for name, parameter in (
        ("embedding", "embedding.weight"),
        ("last_weight", "classifier.weight"),
        ("last_bias", "classifier.bias"),
    ):
        grads = torch.stack([gradient(models[0], train, i, parameter) for i in range(9)])
        assert ratios[name] == pytest.approx(float(cancellation_ratio(grads)), rel=1e-10)
        assert ratios[f"{name}_sum_of_norms"] / ratios[f"{name}_norm_of_sum"] == pytest.approx(ratios[name])


def test_padding_changes_nothing_in_the_small_classifiers(models):
    together = models[0](**{name: train[name] for name in ("input_ids", "attention_mask")}).logits
    for i in range(9):
        torch.testing.assert_close(models[0](alone(train, i)["input_ids"]).logits[0], together[i])


def test_a_retraining_depends_on_seed_and_removed_set_alone():
    data = separable(40, seed=0)
    recipe = TrainingRecipe(num_epochs=2, batch_size=10, learning_rate=5e-3, checkpoint_epochs=(2,))

    def run(seed, removed, data=data):
        model, _ = train_classifier(
            lambda seed: make_classifier("cnn", VOCABULARY, 2, width=8, seed=seed),
            data,
            recipe,
            seed=seed,
            removed=removed,
        )
        return model.classifier.weight

    assert torch.equal(run(1, (3, 4)), run(1, (4, 3)))
    assert not torch.equal(run(1, (3, 4)), run(1, ()))
    assert not torch.equal(run(1, ()), run(2, ()))
    other = {name: values.clone() for name, values in data.items()}
    other["input_ids"][3:5] = 1
    assert torch.equal(run(1, (3, 4)), run(1, (3, 4), data=other))  # what is removed is never seen


@pytest.mark.parametrize("change", [{"optimizer": "lion"}, {"checkpoint_epochs": (9,)}, {"checkpoint_epochs": ()}])
def test_a_recipe_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match="must be"):
        TrainingRecipe(**change)
