"""
TracIn-WE-Syn: word gradient similarity between *different* words that mean the same.

Two texts without a common token have a TracIn-WE score of exactly 0. Here a similarity `S` says how far token `w` of one
may stand for token `w'` of the other:

    score = sum_{w, w'} S(w, w') <row_w, row'_w'>

`S` = identity is TracIn-WE; `S` = 1 everywhere is TracIn on one vector added to every embedding, such as a token-type
row. The score is an inner product of features (symmetric, self-influence >= 0) for sure only when `S` is positive
semi-definite, which a thresholded similarity need not be.

Shapes: W = distinct tokens of one example, D = embedding width, V = vocabulary.
"""

import torch
from torch import Tensor

_VOCABULARY_CHUNK = 1 << 14  # tokens whose embeddings are widened at a time


def synonym_scores(rows_a: Tensor, rows_b: Tensor, similarity: Tensor) -> Tensor:
    """
    The part of the score that each pair of tokens carries: `S(w, w') <row_w, row'_w'>`.

    Args:
        rows_a (`torch.Tensor` of shape `(num_tokens_a, width)`): Merged gradient rows of one example.
        rows_b (`torch.Tensor` of shape `(num_tokens_b, width)`): Same, of the other.
        similarity (`torch.Tensor` of shape `(num_tokens_a, num_tokens_b)`):
            Any similarity of their tokens, for instance that of [`synonym_similarity`].

    Returns:
        `torch.Tensor` of shape `(num_tokens_a, num_tokens_b)`, which adds up to [`synonym_score`].
    """
    expected = (rows_a.shape[0], rows_b.shape[0])
    if similarity.shape != expected:
        raise ValueError(
            f"`similarity` must have one entry per pair of tokens {expected}, but its shape is "
            f"{tuple(similarity.shape)}. Index a vocabulary-wide one by the tokens of both examples."
        )
    return similarity.to(rows_a.dtype) * (rows_a @ rows_b.T)  # (W, D) @ (D, W') -> (W, W')


def synonym_score(rows_a: Tensor, rows_b: Tensor, similarity: Tensor) -> Tensor:
    """
    TracIn-WE-Syn of two examples at one checkpoint: the sum of [`synonym_scores`], positive for a proponent.

    This is the definition; [`IndexReader.synonym_scores`] matches one query with all examples of an index.
    """
    return synonym_scores(rows_a, rows_b, similarity).sum()


def synonym_similarity(tokens_a: Tensor, tokens_b: Tensor, embeddings: Tensor, *, threshold: float = 0.5) -> Tensor:
    """
    Match each token to at most one token of the other example: itself if it is there, else its nearest synonym.

    Of the paper is, as far as we know it: words without an exact match are scored against a synonym found by the cosine
    of the model's own word embeddings. Ours, for want of the paper's detail: the value of the threshold; that a match
    counts 1 and not its cosine; that a token is matched at most once on either side, exact matches first; and that the
    rest is matched greedily, from the highest cosine down. The greedy total may fall short of the best assignment's.

    Args:
        tokens_a (`torch.Tensor` of shape `(num_tokens_a,)`): Distinct token ids of one example.
        tokens_b (`torch.Tensor` of shape `(num_tokens_b,)`): Same, of the other.
        embeddings (`torch.Tensor` of shape `(vocabulary_size, width)`): Embedding matrix of the model.
        threshold (`float`): Smallest cosine of a synonym, in [-1, 1]. Above 1 only exact matches are left.

    Returns:
        `torch.Tensor` of shape `(num_tokens_a, num_tokens_b)`: 1 where two tokens are matched, else 0.
    """
    similarity = (tokens_a[:, None] == tokens_b).to(embeddings.dtype)
    directions_a = torch.nn.functional.normalize(embeddings[tokens_a], dim=-1)
    directions_b = torch.nn.functional.normalize(embeddings[tokens_b], dim=-1)
    cosines = directions_a @ directions_b.T
    cosines[similarity.any(dim=1)] = -torch.inf
    cosines[:, similarity.any(dim=0)] = -torch.inf
    pairs = (cosines >= threshold).nonzero()
    order = cosines[pairs[:, 0], pairs[:, 1]].argsort(descending=True, stable=True)
    taken_a, taken_b = set(), set()
    for a, b in pairs[order].tolist():
        if a not in taken_a and b not in taken_b:
            similarity[a, b] = 1.0
            taken_a.add(a)
            taken_b.add(b)
    return similarity


def synonym_neighbours(tokens: Tensor, embeddings: Tensor, *, threshold: float = 0.5) -> list[tuple[Tensor, Tensor]]:
    """
    All tokens of the vocabulary that [`synonym_similarity`] may match a token with, whatever the other example holds.

    Args:
        tokens (`torch.Tensor` of shape `(num_tokens,)`): Token ids.
        embeddings (`torch.Tensor` of shape `(vocabulary_size, width)`): Embedding matrix of the model.
        threshold (`float`): Smallest cosine of a synonym.

    Returns:
        `list[tuple[torch.Tensor, torch.Tensor]]`: for each token the ids of the others with such a cosine, ascending, and
        their cosines in float64.
    """
    directions = torch.nn.functional.normalize(embeddings[tokens].double(), dim=-1)
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in tokens]
    for first in range(0, len(embeddings), _VOCABULARY_CHUNK):
        chunk = torch.nn.functional.normalize(embeddings[first : first + _VOCABULARY_CHUNK].double(), dim=-1)
        cosines = directions @ chunk.T  # (W, D) @ (D, V) -> (W, V)
        for position, row in enumerate(cosines):
            near = (row >= threshold).nonzero().squeeze(1)
            found[position].append((near + first, row[near]))
    neighbours = []
    for token, parts in zip(tokens, found, strict=True):
        ids, cosines = (torch.cat(part) for part in zip(*parts, strict=True))
        others = ids != token
        neighbours.append((ids[others], cosines[others]))
    return neighbours
