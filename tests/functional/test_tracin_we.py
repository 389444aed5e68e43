"""The formulas of TracIn-WE against autograd, closed forms and slow references."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_doge.functional.synonyms import synonym_neighbours, synonym_score, synonym_scores, synonym_similarity
from hf_doge.functional.tracin_we import (
    batch_token_gradient_rows,
    batch_top_k_rows,
    cancellation_ratio,
    cosine_scores,
    last_layer_score,
    scale_by_second_moment,
    self_influence,
    sum_checkpoints,
    tied_score,
    token_gradient_rows,
    top_k_rows,
    tracin_we_score,
    tracin_we_token_scores,
)
from tests.reference_tracin_we import dense, slow_position_top_k, slow_rows, slow_score, slow_token_top_k

VOCABULARY = 13


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def random_example(seed, *, num_positions=9, width=4, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(vocabulary, (num_positions,), generator=generator)
    return token_ids, torch.randn(num_positions, width, dtype=torch.float64, generator=generator)


def merged(seed, **kwargs):
    return token_gradient_rows(*random_example(seed, **kwargs))


# Rows


def test_rows_are_the_gradient_of_the_embedding_matrix():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    embedding = nn.Embedding(VOCABULARY, 5, dtype=torch.float64)
    token_ids = torch.tensor([3, 7, 3, 1, 3])
    output = embedding(token_ids)
    output.retain_grad()
    (output**3 * torch.randn(5, 5, dtype=torch.float64, generator=generator)).sum().backward()
    tokens, rows = token_gradient_rows(token_ids, output.grad)
    assert tokens.tolist() == [1, 3, 7]
    close(dense(tokens, rows, VOCABULARY), embedding.weight.grad)


def test_masked_positions_never_contribute():
    token_ids, grads = random_example(1)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0])
    grads[mask == 0] = torch.nan
    tokens, rows = token_gradient_rows(token_ids, grads, mask)
    expected = slow_rows(token_ids, grads, mask)
    assert tokens.tolist() == sorted(expected)
    close(rows, torch.stack([expected[token] for token in tokens.tolist()]))


def test_a_batch_has_the_rows_of_its_examples():
    examples = [random_example(seed) for seed in range(6)]
    token_ids, grads = (torch.stack(parts) for parts in zip(*examples, strict=True))
    mask = torch.rand(token_ids.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[2] = False  # an example without a token has no rows
    offsets, tokens, rows = batch_token_gradient_rows(token_ids, grads, mask)
    for i in range(6):
        expected_tokens, expected_rows = token_gradient_rows(token_ids[i], grads[i], mask[i])
        assert torch.equal(tokens[offsets[i] : offsets[i + 1]], expected_tokens)
        assert torch.equal(rows[offsets[i] : offsets[i + 1]], expected_rows)
    assert offsets[2] == offsets[3]
    assert offsets[-1] == len(tokens)


def test_half_precision_gradients_are_summed_in_float32():
    grads = torch.full((3000, 1), 0.1, dtype=torch.bfloat16)
    _, rows = token_gradient_rows(torch.zeros(3000, dtype=torch.long), grads)
    assert rows.dtype == torch.float32
    close(rows, grads.float().sum(dim=0, keepdim=True), 1e-5)


def test_gradients_of_other_positions_are_refused():
    with pytest.raises(ValueError, match="one row per position"):
        token_gradient_rows(torch.zeros(3, dtype=torch.long), torch.zeros(4, 2))


# Scores


@pytest.mark.parametrize("seed", range(5))
def test_the_score_is_the_inner_product_of_dense_gradients(seed):
    a, b = merged(seed), merged(seed + 100)
    close(tracin_we_score(*a, *b), (dense(*a, VOCABULARY) * dense(*b, VOCABULARY)).sum())


@pytest.mark.parametrize("seed", range(5))
def test_the_score_of_merged_rows_is_the_sum_over_pairs_of_positions(seed):
    a, b = random_example(seed), random_example(seed + 100)
    close(tracin_we_score(*token_gradient_rows(*a), *token_gradient_rows(*b)), slow_score(*a, *b))


def test_token_parts_add_up_to_the_score_and_tokens_of_one_side_have_none():
    a, b = merged(0), merged(1)
    tokens, parts = tracin_we_token_scores(*a, *b)
    assert tokens.tolist() == sorted(set(a[0].tolist()) & set(b[0].tolist()))
    close(parts.sum(), tracin_we_score(*a, *b))
    dense_parts = (dense(*a, VOCABULARY) * dense(*b, VOCABULARY)).sum(dim=1)
    close(parts, dense_parts[tokens])
    assert dense_parts.count_nonzero() == len(tokens)


def test_examples_without_a_common_token_score_exactly_zero():
    rows = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert tracin_we_score(torch.tensor([1, 5]), rows, torch.tensor([2, 9]), rows) == 0
    assert tracin_we_score(torch.tensor([1, 5]), rows, torch.tensor([]).long(), rows[:0]) == 0


def test_unmerged_tokens_are_refused():
    rows = torch.ones(2, 4)
    with pytest.raises(ValueError, match="distinct and ascending"):
        tracin_we_score(torch.tensor([1, 2]), rows, torch.tensor([3, 3]), rows)


def test_self_influence_is_the_ghost_norm_of_positions():
    token_ids, grads = random_example(3)
    same = (token_ids[:, None] == token_ids).double()
    influence = self_influence(token_gradient_rows(token_ids, grads)[1])
    close(influence, (same * (grads @ grads.T)).sum())
    assert not torch.isclose(influence, grads.square().sum())  # some token repeats


@pytest.mark.parametrize("unit", [None, "position", "token"])
def test_the_kernel_is_symmetric_and_positive_semi_definite(unit):
    examples = [random_example(seed) for seed in range(25)]
    rows = [token_gradient_rows(*e) if unit is None else top_k_rows(*e, 3, unit=unit) for e in examples]
    gram = torch.stack([torch.stack([tracin_we_score(*a, *b) for b in rows]) for a in rows])
    close(gram, gram.T)
    close(gram.diagonal(), torch.stack([self_influence(r) for _, r in rows]))
    assert torch.linalg.eigvalsh(gram).min() > -1e-12


@pytest.mark.parametrize(("pool", "expected"), [("sum", -1.5), ("mean", -0.25)])
def test_logistic_bag_of_embeddings_has_its_closed_form(pool, expected):
    """f = u . pool(E_t) + b with u = (1, 2), x = "a b a" (y = 1), x' = "a c" (y = 0)."""
    u = torch.tensor([1.0, 2.0], dtype=torch.float64)
    rows = []
    for token_ids, label, p in zip(([0, 1, 0], [0, 2]), (1.0, 0.0), (0.75, 0.6), strict=True):
        embedded = nn.Embedding(3, 2, dtype=torch.float64)(torch.tensor(token_ids)).detach().requires_grad_()
        logit = (embedded.sum(dim=0) if pool == "sum" else embedded.mean(dim=0)) @ u
        bias = math.log(p / (1 - p)) - logit.item()  # so that the predicted probability is p
        loss = F.binary_cross_entropy_with_logits(logit + bias, torch.tensor(label, dtype=torch.float64))
        (grads,) = torch.autograd.grad(loss, embedded)
        rows.append(token_gradient_rows(torch.tensor(token_ids), grads))
    close(tracin_we_score(*rows[0], *rows[1]).item(), expected)


# Sign


def bag_of_embeddings(num_examples, *, seed):
    """A separable two-class problem: words 0-4 mean class 0, words 5-9 class 1, words 10-12 mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_examples) % 2
    telling = torch.randint(5, (num_examples, 3), generator=generator) + 5 * labels[:, None]
    filling = torch.randint(10, VOCABULARY, (num_examples, 2), generator=generator)
    return torch.cat([telling, filling], dim=1), labels


def train_bag(token_ids, labels, *, seed, steps=20, learning_rate=0.3):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(VOCABULARY, 4, generator=generator).double().mul_(0.3).requires_grad_()
    head = torch.randn(4, 2, generator=generator).double().requires_grad_()
    for _ in range(steps):
        loss = F.cross_entropy(embeddings[token_ids].mean(dim=1) @ head, labels)
        gradients = torch.autograd.grad(loss, (embeddings, head))
        with torch.no_grad():
            embeddings -= learning_rate * gradients[0]
            head -= learning_rate * gradients[1]
    return embeddings.detach(), head.detach()


def bag_rows(embeddings, head, token_ids, labels):
    """Merged rows of each example."""
    embedded = embeddings[token_ids].requires_grad_()
    loss = F.cross_entropy(embedded.mean(dim=1) @ head, labels, reduction="sum")
    (grads,) = torch.autograd.grad(loss, embedded)
    return [token_gradient_rows(ids, g) for ids, g in zip(token_ids, grads, strict=True)]


def scores_of(queries, examples):
    return torch.stack([torch.stack([tracin_we_score(*q, *e) for e in examples]) for q in queries])


def test_a_gradient_step_on_a_proponent_lowers_the_query_loss_by_the_score():
    token_ids, labels = bag_of_embeddings(20, seed=0)
    embeddings, head = train_bag(token_ids, labels, seed=1, steps=5)
    rows = bag_rows(embeddings, head, token_ids, labels)

    def query_loss(matrix):
        return F.cross_entropy(matrix[token_ids[:1]].mean(dim=1) @ head, labels[:1])

    for example in range(1, 20):
        score = tracin_we_score(*rows[example], *rows[0])
        step = 1e-6
        moved = query_loss(embeddings - step * dense(*rows[example], VOCABULARY)) - query_loss(embeddings)
        close(moved / step, -score, 1e-5)


def test_proponents_share_the_label_of_the_query_and_opponents_do_not():
    token_ids, labels = bag_of_embeddings(80, seed=0)
    rows = bag_rows(*train_bag(token_ids, labels, seed=1), token_ids, labels)
    order = scores_of(rows[:20], rows[20:]).argsort(dim=1, descending=True)
    same_label = labels[20:][order] == labels[:20, None]
    assert same_label[:, :10].float().mean() >= 0.8
    assert same_label[:, -10:].float().mean() <= 0.2


def test_removing_proponents_hurts_a_query_removing_opponents_helps_and_negated_scores_swap_the_two():
    token_ids, labels = bag_of_embeddings(48, seed=2)
    queries = range(4)
    train = torch.arange(4, 48)
    rows = bag_rows(*train_bag(token_ids[train], labels[train], seed=3), token_ids, labels)
    scores = scores_of([rows[q] for q in queries], [rows[i] for i in train.tolist()])

    def mean_change(scores, *, end):
        changes = []
        for query in queries:
            kept = scores[query].argsort(descending=end == "proponents")[12:]
            for seed in (3, 4):
                probabilities = []
                for subset in (train, train[kept]):
                    embeddings, head = train_bag(token_ids[subset], labels[subset], seed=seed)
                    logits = embeddings[token_ids[query]].mean(dim=0) @ head
                    probabilities.append(logits.softmax(dim=0)[labels[query]])
                changes.append(probabilities[1] - probabilities[0])
        return torch.stack(changes).mean()

    del_plus, del_minus = mean_change(scores, end="proponents"), mean_change(scores, end="opponents")
    assert del_plus < 0 < del_minus
    close(mean_change(-scores, end="proponents"), del_minus)
    close(mean_change(-scores, end="opponents"), del_plus)
    noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
    assert mean_change(noise, end="proponents").abs() < min(-del_plus, del_minus) / 2


# Top-k


@pytest.mark.parametrize("unit", ["position", "token"])
def test_top_k_of_at_least_all_positions_is_exact(unit):
    token_ids, grads = random_example(0)
    for actual, expected in zip(
        top_k_rows(token_ids, grads, 9, unit=unit), token_gradient_rows(token_ids, grads), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("unit", "reference"), [("position", slow_position_top_k), ("token", slow_token_top_k)])
def test_top_k_keeps_the_largest_norms_of_its_unit(unit, reference, seed):
    token_ids, grads = random_example(seed, vocabulary=5)
    expected = reference(token_ids, grads, 3)
    tokens, rows = top_k_rows(token_ids, grads, 3, unit=unit)
    assert tokens.tolist() == sorted(expected)
    close(rows, torch.stack([expected[token] for token in tokens.tolist()]))


def test_positions_are_truncated_before_merging_and_tokens_after():
    token_ids, grads = torch.tensor([0, 0, 1]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.5, 0.0]])
    assert [part.tolist() for part in top_k_rows(token_ids, grads, 1, unit="position")] == [[1], [[1.5, 0.0]]]
    assert [part.tolist() for part in top_k_rows(token_ids, grads, 1, unit="token")] == [[0], [[2.0, 0.0]]]


def test_of_equal_norms_the_earlier_position_is_kept():
    tokens, _ = top_k_rows(torch.tensor([9, 4, 7, 2]), torch.ones(4, 3), 2)
    assert tokens.tolist() == [4, 9]


def test_masked_positions_take_no_place_among_the_top_k():
    token_ids, grads = torch.tensor([5, 6, 7]), torch.tensor([[9.0], [1.0], [2.0]])
    for unit in ("position", "token"):
        for k, expected in ((1, [7]), (2, [6, 7]), (3, [6, 7])):
            tokens, _ = top_k_rows(token_ids, grads, k, unit=unit, mask=torch.tensor([0, 1, 1]))
            assert tokens.tolist() == expected


@pytest.mark.parametrize("unit", ["position", "token"])
def test_top_k_of_a_batch_is_that_of_its_examples(unit):
    examples = [random_example(seed, vocabulary=6) for seed in range(5)]
    token_ids, grads = (torch.stack(parts) for parts in zip(*examples, strict=True))
    mask = torch.rand(token_ids.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[1], mask[3] = False, torch.arange(9) < 2
    offsets, tokens, rows = batch_top_k_rows(token_ids, grads, 3, unit=unit, mask=mask)
    for i in range(5):
        expected_tokens, expected_rows = top_k_rows(token_ids[i], grads[i], 3, unit=unit, mask=mask[i])
        assert torch.equal(tokens[offsets[i] : offsets[i + 1]], expected_tokens)
        close(rows[offsets[i] : offsets[i + 1]], expected_rows)
    assert offsets[-1] == len(tokens)


def test_each_checkpoint_is_truncated_on_its_own():
    """A token kept at one checkpoint on one side and at another on the other side contributes nothing."""
    token_ids = torch.tensor([0, 1])
    first, second = torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0], [3.0]])
    a = [top_k_rows(token_ids, grads, 1) for grads in (first, second)]
    b = [top_k_rows(token_ids, grads, 1) for grads in (second, first)]
    scores = torch.stack([tracin_we_score(*x, *y) for x, y in zip(a, b, strict=True)])
    assert sum_checkpoints(scores, torch.ones(2)) == 0


@pytest.mark.parametrize(
    ("k", "unit", "message"), [(0, "token", "must be at least 1, but got 0"), (3, "word", "must be one of")]
)
def test_unknown_truncations_are_refused(k, unit, message):
    with pytest.raises(ValueError, match=message):
        top_k_rows(*random_example(0), k, unit=unit)


# Checkpoints, cosine, Adam


def test_scores_are_linear_in_the_learning_rates_of_checkpoints():
    scores = torch.tensor([[2.0, -1.0], [10.0, 4.0]])
    close(sum_checkpoints(scores, torch.tensor([0.5, 0.1])), torch.tensor([2.0, -0.1]), 1e-6)
    assert torch.equal(sum_checkpoints(scores, torch.tensor([1.0, 0.0])), scores[0])


def test_scaling_the_loss_scales_the_score_by_its_square():
    (ids_a, grads_a), (ids_b, grads_b) = random_example(0), random_example(1)
    score = tracin_we_score(*token_gradient_rows(ids_a, grads_a), *token_gradient_rows(ids_b, grads_b))
    scaled = tracin_we_score(*token_gradient_rows(ids_a, 3 * grads_a), *token_gradient_rows(ids_b, 3 * grads_b))
    close(scaled, 9 * score)


def test_cosine_scores_are_cosines_of_dense_gradients():
    examples = [merged(seed) for seed in range(5)]
    scores = scores_of(examples[:2], examples[2:])
    influences = torch.stack([self_influence(rows) for _, rows in examples])
    flat = torch.stack([dense(*example, VOCABULARY).flatten() for example in examples])
    expected = F.cosine_similarity(flat[:2, None], flat[None, 2:], dim=-1)
    close(cosine_scores(scores, influences[:2], influences[2:]), expected)
    close(cosine_scores(scores[0, 0], influences[0], influences[2]), expected[0, 0])
    assert cosine_scores(torch.zeros(1, 1), torch.zeros(1), torch.ones(1)) == 0


def test_scaling_both_sides_by_the_second_moment_equals_scaling_one_side_whole():
    tokens, rows = merged(0)
    second_moments = torch.rand(rows.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = scale_by_second_moment(rows, second_moments)
    one = scale_by_second_moment(rows, second_moments, sides="one")
    close(one, rows / (second_moments.sqrt() + 1e-8))
    close(self_influence(both), tracin_we_score(tokens, rows, tokens, one))
    per_row = second_moments.mean(dim=1, keepdim=True)
    close(scale_by_second_moment(rows, per_row), scale_by_second_moment(rows, per_row.expand_as(rows)))


@pytest.mark.parametrize(
    ("option", "message"),
    [({"sides": "left"}, r"`sides` must be one of \['both', 'one'\]"), ({"eps": 0.0}, "positive")],
)
def test_unknown_second_moment_options_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        scale_by_second_moment(torch.ones(1, 1), torch.ones(1, 1), **option)


# Last layer and tied matrices


def test_last_layer_score_is_the_inner_product_of_weight_gradients():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layer = nn.Linear(6, 3, dtype=torch.float64)
    weights, biases, factors = [], [], []
    for label in (0, 2):
        activation = torch.randn(6, dtype=torch.float64, generator=generator)
        logits = layer(activation)
        gradients = torch.autograd.grad(
            F.cross_entropy(logits, torch.tensor(label)), (layer.weight, layer.bias, logits)
        )
        weights.append(gradients[0])
        biases.append(gradients[1])
        factors.append((activation, gradients[2]))
    close(last_layer_score(*factors[0], *factors[1]), (weights[0] * weights[1]).sum())
    with_bias = (weights[0] * weights[1]).sum() + biases[0] @ biases[1]
    close(last_layer_score(*factors[0], *factors[1], bias=True), with_bias)
    (a, d), (a_other, d_other) = factors
    close(with_bias, (a @ a_other + 1) * (d @ d_other))


def test_tied_score_is_the_inner_product_of_dense_gradients_of_both_uses():
    generator = torch.Generator().manual_seed(0)
    inputs, outputs, full = [], [], []
    for seed, num_predicted in ((0, 4), (1, 6)):
        tokens, rows = merged(seed)
        hidden = torch.randn(num_predicted, 4, dtype=torch.float64, generator=generator)
        logit_grads = torch.randn(num_predicted, VOCABULARY, dtype=torch.float64, generator=generator)
        inputs.append((tokens, rows))
        outputs.append((hidden, logit_grads))
        full.append(dense(tokens, rows, VOCABULARY) + logit_grads.T @ hidden)
    close(tied_score(inputs[0], outputs[0], inputs[1], outputs[1]), (full[0] * full[1]).sum())


# Synonyms


def test_the_identity_similarity_is_tracin_we():
    (tokens_a, rows_a), (tokens_b, rows_b) = merged(0), merged(1)
    identity = torch.eye(VOCABULARY, dtype=torch.float64)[tokens_a][:, tokens_b]
    close(synonym_score(rows_a, rows_b, identity), tracin_we_score(tokens_a, rows_a, tokens_b, rows_b))


def test_the_all_ones_similarity_is_tracin_on_a_vector_added_to_every_embedding():
    scores, gradients, rows = [], [], []
    for seed in (0, 1):
        token_ids, mixing = random_example(seed)
        shared = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        output = nn.Embedding(VOCABULARY, 4, dtype=torch.float64)(token_ids).detach().requires_grad_()
        loss = ((output + shared) * mixing).sum().tanh()
        grads, shared_grad = torch.autograd.grad(loss, (output, shared))
        gradients.append(shared_grad)
        rows.append(token_gradient_rows(token_ids, grads)[1])
    ones = torch.ones(len(rows[0]), len(rows[1]))
    scores = synonym_scores(*rows, ones)
    close(synonym_score(*rows, ones), gradients[0] @ gradients[1])
    close(scores.sum(), gradients[0] @ gradients[1])


def test_synonyms_reach_between_texts_without_a_common_token():
    embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    tokens_a, tokens_b = torch.tensor([0]), torch.tensor([1, 2])
    rows_a, rows_b = torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 0.0], [5.0, 5.0]])
    assert tracin_we_score(tokens_a, rows_a, tokens_b, rows_b) == 0
    similarity = synonym_similarity(tokens_a, tokens_b, embeddings)
    assert similarity.tolist() == [[1.0, 0.0]]
    assert synonym_score(rows_a, rows_b, similarity) == 6


def test_exact_matches_come_first_and_each_token_is_matched_at_most_once():
    # 0, 1 and 2 point almost the same way; 3 stands apart
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.01], [1.0, 0.3], [0.0, 1.0]])
    similarity = synonym_similarity(torch.tensor([0, 1]), torch.tensor([0, 2, 3]), embeddings)
    assert similarity.tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]  # 1 is nearer to 0, which is taken
    assert synonym_similarity(torch.tensor([0, 1]), torch.tensor([2]), embeddings).tolist() == [[0.0], [1.0]]


def test_a_threshold_above_one_leaves_exact_matches_only():
    tokens_a, tokens_b = merged(0)[0], merged(1)[0]
    embeddings = torch.randn(VOCABULARY, 3, generator=torch.Generator().manual_seed(0))
    similarity = synonym_similarity(tokens_a, tokens_b, embeddings, threshold=1.1)
    assert torch.equal(similarity.bool(), tokens_a[:, None] == tokens_b)


def test_neighbours_are_all_tokens_that_a_token_can_be_matched_with(monkeypatch):
    embeddings = torch.randn(23, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.tensor([2, 7, 22])
    expected = synonym_neighbours(tokens, embeddings, threshold=0.3)
    for token, (ids, cosines) in zip(tokens.tolist(), expected, strict=True):
        others = [other for other in range(23) if other != token]
        alone = [
            synonym_similarity(torch.tensor([token]), torch.tensor([other]), embeddings, threshold=0.3).item()
            for other in others
        ]
        assert ids.tolist() == [other for other, match in zip(others, alone, strict=True) if match]
        close(cosines, torch.nn.functional.cosine_similarity(embeddings[ids], embeddings[token][None]))
    monkeypatch.setattr("hf_doge.functional.synonyms._VOCABULARY_CHUNK", 5)
    for one, other in zip(synonym_neighbours(tokens, embeddings, threshold=0.3), expected, strict=True):
        assert torch.equal(one[0], other[0])
        close(one[1], other[1])


@pytest.mark.parametrize("seed", range(5))
def test_synonym_matching_is_symmetric(seed):
    tokens_a, tokens_b = merged(seed)[0], merged(seed + 50)[0]
    embeddings = torch.randn(VOCABULARY, 3, generator=torch.Generator().manual_seed(seed))
    similarity = synonym_similarity(tokens_a, tokens_b, embeddings, threshold=0.2)
    assert torch.equal(similarity, synonym_similarity(tokens_b, tokens_a, embeddings, threshold=0.2).T)
    assert similarity.sum(dim=0).max() <= 1
    assert similarity.sum(dim=1).max() <= 1


def test_a_similarity_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="one entry per pair of tokens"):
        synonym_score(torch.ones(2, 3), torch.ones(4, 3), torch.eye(4))


# Cancellation


def test_cancellation_ratio_is_at_least_one():
    for seed in range(5):
        grads = torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(seed))
        assert cancellation_ratio(grads) >= 1
    close(cancellation_ratio(torch.ones(5, 3, 2)).item(), 1.0, 1e-6)


def test_sixteen_orthonormal_gradients_have_ratio_four():
    close(cancellation_ratio(torch.eye(16, dtype=torch.float64)).item(), 4.0)


def test_cancellation_over_a_stretch_of_training_divides_by_the_net_update():
    updates = -0.1 * torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    net_update = torch.tensor([-0.2, 0.0])
    close(cancellation_ratio(updates, net_update).item(), (0.5 + 0.5) / 0.2, 1e-6)


def test_gradients_of_a_softmax_bias_cancel_fully_at_its_optimum():
    labels = F.one_hot(torch.tensor([0, 1, 0, 1])).double()
    deltas = torch.full((4, 2), 0.5, dtype=torch.float64) - labels  # the optimum predicts the label frequencies
    assert cancellation_ratio(deltas) == torch.inf
    assert cancellation_ratio(torch.zeros(3, 2)).isnan()
