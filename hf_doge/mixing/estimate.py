"""Domain weights without training: [`estimate_domain_weights`]."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.artifacts.provenance import describe_process
from hf_doge.checks import check_count, check_mapping, check_names, check_number
from hf_doge.functional.mixture_weights import fit_mixture_weights
from hf_doge.mixing.ngrams import SourceCounts, TargetBigrams
from hf_doge.mixing.tokens import iterate_tokens

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

RECIPE = "ngram_em"
MIN_TARGET_TOKENS = 500  # fewer say more of themselves than of what they are a sample of


def estimate_domain_weights(
    train_dataset: "Mapping[str, Dataset] | Mapping[str, IterableDataset]",
    target_dataset: "Dataset | IterableDataset",
    *,
    order: int = 2,
    processing_class: Callable[..., Mapping] | None = None,
    text_column: str = "text",
    max_tokens: int | None = None,
    max_target_tokens: int | None = 100_000,
    tolerance: float = 1e-6,
    disable_tqdm: bool = False,
) -> DomainWeights:
    """
    Estimate which mixture of the training domains a target looks like, in seconds and without a model.

    Every domain becomes an n-gram model of its tokens. The weights are those under which the mixture of these models makes
    the target's tokens most likely: `argmax_a sum_t log sum_j a_j p_j(w_t | w_{t-1})`, found by expectation-maximisation.
    It is the answer to beat for every method that trains a proxy: it sees which text resembles the target, and nothing of
    how a model learns from it.

    Each domain is read once, one after the other, and forgotten: memory grows with the target's distinct bigrams times the
    number of domains (8 bytes each), and with the bigrams of one domain.

    Args:
        train_dataset (`Mapping[str, Dataset]` or `Mapping[str, IterableDataset]`):
            The domains by name, with a column `input_ids`, or one of text.
        target_dataset (`Dataset` or `IterableDataset`):
            Text of the target, at least 500 tokens of it, tokenised alike. Where it has `labels` of tokens, only those
            whose label is not -100 count, though all are context. Labels of whole texts are not read.
        order (`int`): 1 for unigrams with add-one smoothing, 2 for bigrams interpolated with them (Witten-Bell).
        processing_class (`Callable`, *optional*): The tokenizer; it tokenises datasets that have texts only.
        text_column (`str`): Where their texts are.
        max_tokens (`int`, *optional*): Read no more than this many tokens of each domain, from its start.
        max_target_tokens (`int`, *optional*): The same for the target.
        tolerance (`float`): Stop when no other weights can be better by more than this many nats a token.
        disable_tqdm (`bool`): Show no progress bar.

    Returns:
        [`DomainWeights`]: `recipe` tells how close to the optimum the weights are (`gap`) and the target's loss under the
            mixture (`target_loss`), `domains` the tokens and the `target_loss` of each domain alone, in nats a token.

    Raises:
        ValueError: A domain or the target has no tokens, the target has too few or is one of the domains, or an argument is
            out of its range.
    """
    names = check_names(check_mapping("train_dataset", train_dataset))
    order, max_tokens = check_count("order", order, most=2), check_count("max_tokens", max_tokens, optional=True)
    max_target_tokens = check_count("max_target_tokens", max_target_tokens, optional=True)
    tolerance = check_number("tolerance", tolerance, above=0, below=1, unit="nats")
    _refuse_target_among(train_dataset, target_dataset)
    read = partial(iterate_tokens, processing_class=processing_class, text_column=text_column)
    target = TargetBigrams.of(read(target_dataset, "The target", only_labels=True), max_tokens=max_target_tokens)
    if target.num_tokens < MIN_TARGET_TOKENS:
        raise ValueError(
            f"The target must have at least {MIN_TARGET_TOKENS} tokens that count, but it has {target.num_tokens}. Give it "
            "more text."
        )
    counts = {}
    with tqdm(names, desc="counting", disable=disable_tqdm) as progress:
        for name in progress:
            progress.set_postfix_str(name)
            batches = read(train_dataset[name], f"Domain {name!r}")
            counts[name] = SourceCounts.of(batches, target, max_tokens=max_tokens)
            if counts[name].num_tokens == 0:
                raise ValueError(f"Every domain must have tokens, but {name!r} has none. Drop it.")
            if np.array_equal(counts[name].bigrams, target.counts) and counts[name].num_tokens == target.num_tokens:
                raise ValueError(_same_data(name))
    largest = max(int(target.tokens.max()), *(count.largest_token for count in counts.values()))
    likelihoods = np.stack(
        [count.probabilities(order=order, vocab_size=largest + 1) for count in counts.values()], axis=1
    )
    fit = fit_mixture_weights(torch.from_numpy(likelihoods), torch.from_numpy(target.counts), tolerance=tolerance)
    alone = -(target.counts / target.num_tokens) @ np.log(likelihoods)
    return DomainWeights(
        dict(zip(names, fit.weights.tolist(), strict=True)),
        recipe={
            "name": RECIPE,
            "unit": "tokens",
            "order": order,
            "num_target_tokens": target.num_tokens,
            "target_loss": round(-fit.log_likelihood, 6),
            "num_iterations": fit.num_iterations,
            "gap": fit.gap,
            "tolerance": tolerance,
        },
        domains={
            name: {
                "num_rows": count.num_rows if count.is_whole else None,
                "num_tokens": count.num_tokens if count.is_whole else None,
                "num_tokens_read": count.num_tokens,
                "target_loss": round(float(loss), 6),
            }
            for (name, count), loss in zip(counts.items(), alone, strict=True)
        },
        metadata=describe_process(),
    )


def _refuse_target_among(train_dataset: Mapping[str, Any], target_dataset: Any) -> None:
    mark = getattr(target_dataset, "_fingerprint", None)
    for name, dataset in train_dataset.items():
        if dataset is target_dataset or (mark is not None and getattr(dataset, "_fingerprint", None) == mark):
            raise ValueError(_same_data(name))


def _same_data(name: str) -> str:
    return (
        f"The target must not be one of the domains, but it is the data of {name!r}, which would get all the weight. Give "
        "other text of the target, or drop that domain."
    )
