"""Slow and obvious versions of what hf_doge.functional.tracin_we and hf_doge.gradients.embedding compute."""

import copy

import torch
from torch import nn


def slow_rows(token_ids, grads, mask=None):
    """Dictionary of token -> summed gradient, position by position."""
    rows = {}
    for position, token in enumerate(token_ids.tolist()):
        if mask is None or mask[position]:
            rows[token] = rows.get(token, torch.zeros_like(grads[0])) + grads[position]
    return rows


def slow_score(ids_a, grads_a, ids_b, grads_b):
    """The position form, sum over t and s of 1[x_t = x'_s] g_t . g'_s."""
    score = torch.zeros((), dtype=grads_a.dtype)
    for t, token_a in enumerate(ids_a.tolist()):
        for s, token_b in enumerate(ids_b.tolist()):
            if token_a == token_b:
                score += grads_a[t] @ grads_b[s]
    return score


def slow_position_top_k(token_ids, grads, k):
    """The authors' rule: the k positions of largest norm, then merged by token."""
    kept = sorted(range(len(token_ids)), key=lambda t: (-grads[t].norm().item(), t))[:k]
    return slow_rows(token_ids[kept], grads[kept])


def slow_token_top_k(token_ids, grads, k):
    """Merged first, then the k tokens of largest norm."""
    rows = slow_rows(token_ids, grads)
    kept = sorted(rows, key=lambda token: (-rows[token].norm().item(), token))[:k]
    return {token: rows[token] for token in kept}


def dense(tokens, rows, vocabulary_size):
    """The whole gradient matrix of one example."""
    matrix = torch.zeros(vocabulary_size, rows.shape[1], dtype=rows.dtype)
    for token, row in zip(tokens.tolist(), rows, strict=True):
        matrix[token] += row
    return matrix


def untied(model):
    """A copy whose output layer holds its own copy of the embedding matrix, with the same values."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    if head is not None:
        head.weight = nn.Parameter(head.weight.detach().clone())
    return model


def dense_gradient(model, example, *, part="input", num_terms=1):
    """
    Gradient of `num_terms * model(**example).loss` with respect to the embedding matrix, by ordinary autograd in
    evaluation mode: through its use as the input, as the output, or through both ("full", the matrix as it is; "own", that
    with zeros but for the tokens that the example reads).
    """
    model = copy.deepcopy(model) if part in ("full", "own") else untied(model)
    model.eval()
    layer = model.get_output_embeddings() if part == "output" else model.get_input_embeddings()
    layer.weight.requires_grad_(True)
    (num_terms * model(**example).loss).backward()
    gradient = layer.weight.grad
    if part == "own":
        read = torch.zeros(len(gradient), dtype=torch.bool)
        read[tokens_read(model, example)] = True
        gradient[~read] = 0
    return gradient


def tokens_read(model, example):
    """The distinct tokens that a model looks up, in its decoder too; ascending."""
    ids = [example["input_ids"]]
    if model.config.is_encoder_decoder:
        ids.append(model.prepare_decoder_input_ids_from_labels(example["labels"]))
    return torch.cat([part.flatten() for part in ids]).unique()


def slow_part_score(query, example, parts, *, cosine=False):
    """
    The mean over parts, ranges of row numbers, of the inner product of two gradients or of its cosine, in float64.

    Each gradient is `(numbers (W,), rows (W, width))`; a part of length 0 has the score 0.
    """
    total = 0.0
    for part in parts:
        first, second = (
            {int(number): row.double() for number, row in zip(*side, strict=True) if int(number) in part}
            for side in (query, example)
        )
        score = sum(float(row @ second[number]) for number, row in first.items() if number in second)
        norms = [sum(float(row @ row) for row in side.values()) ** 0.5 for side in (first, second)]
        if cosine:
            score = score / (norms[0] * norms[1]) if all(norms) else 0.0
        total += score / len(parts)
    return total
