"""The best mixture that small runs can find: [`sweep_domain_weights`]."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict, Unpack

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, TrainingArguments

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.artifacts.provenance import describe_process
from hf_doge.checks import check_count, check_mapping, check_names, check_number
from hf_doge.evaluation.comparison import Comparison
from hf_doge.mixing.sweep import SweepFit, design_mixtures, fit_sweep
from hf_doge.training.adaptation import Adaptation
from hf_doge.training.compare import compare_mixtures

RECIPE = "sweep"
MIN_RANK_CORRELATION = 0.8  # below it the law does not rank mixtures that it has not seen


class RunOptions(TypedDict):
    """What a sweep hands on to each of its runs; see [`~hf_doge.training.compare.compare_mixtures`]."""

    eval_dataset: Mapping[str, Dataset]
    data_collator: Callable[[list[dict]], dict]
    identity: Mapping[str, Any]
    adaptation: NotRequired[Adaptation | None]


def sweep_domain_weights(
    make_model: Callable[[], PreTrainedModel],
    args: TrainingArguments,
    *,
    train_dataset: Mapping[str, Dataset],
    tokens_per_example: int,
    centers: Sequence[DomainWeights] = (),
    num_mixtures: int = 16,
    seeds: Sequence[int] = (1,),
    concentration: float = 1.0,
    kl_penalty: float = 0.01,
    max_epochs_per_domain: float | None = None,
    full_tokens: int | None = None,
    **runs: Unpack[RunOptions],
) -> tuple[DomainWeights, Comparison]:
    """
    Train a small model on each of several mixtures, fit a law to what becomes of them, and take its optimum.

    The mixtures are natural proportions, equal parts, what `centers` holds, and points that fill the simplex around these;
    see [`~hf_doge.mixing.sweep.design_mixtures`] and [`~hf_doge.mixing.sweep.fit_sweep`] for the law. Where there are targets,
    what counts is their mean loss by the strongest measure of the runs; else the mean loss of the training domains.

    Finished runs are kept as in [`~hf_doge.training.compare.compare_mixtures`], from which the other arguments come: a sweep
    that was interrupted, or that gets more mixtures, trains only what is missing.

    Args:
        centers (`Sequence[DomainWeights]`): Further mixtures to try and to draw around, such as an estimate.
        num_mixtures (`int`): Mixtures in all, at least the number of domains and 2 more.
        seeds (`Sequence[int]`): Each mixture is trained once with each, and the mean loss counts.
        concentration (`float`): How near to the centers the drawn mixtures stay, positive.
        kl_penalty (`float`): Nats of objective that a nat of divergence from natural proportions costs.
        max_epochs_per_domain (`float`, *optional*): The optimum reads no domain more often than this.
        full_tokens (`int`, *optional*): Tokens of the training that it is for, which the cap refers to; by default those of a run.
        runs: `eval_dataset`, `data_collator`, `identity` and, optional, `adaptation`, as for `compare_mixtures`.

    Returns:
        `tuple[DomainWeights, Comparison]`: The optimum, with all runs in its `metadata["sweep"]`, and the runs.

    Raises:
        ValueError: There are fewer mixtures than the law needs, or the cap leaves too few tokens.
    """
    names = check_names(check_mapping("train_dataset", train_dataset))
    check_count("num_mixtures", num_mixtures)
    check_number("concentration", concentration, above=0)
    check_number("kl_penalty", kl_penalty, least=0)
    check_number("max_epochs_per_domain", max_epochs_per_domain, above=0, optional=True)
    check_count("full_tokens", full_tokens, optional=True)
    if num_mixtures < len(names) + 2:
        raise ValueError(
            f"A sweep over {len(names)} domains must have at least {len(names) + 2} mixtures, one more than its law has "
            f"coefficients, but got {num_mixtures}. Raise `num_mixtures`."
        )
    num_tokens = {name: len(dataset) * tokens_per_example for name, dataset in train_dataset.items()}
    facts = {name: {"num_rows": len(train_dataset[name]), "num_tokens": num_tokens[name]} for name in names}
    natural = DomainWeights.natural(facts)
    around = [natural, DomainWeights.uniform(names), *centers]
    design = design_mixtures(
        [np.array([center.mean[name] for name in names]) for center in around],
        num_mixtures,
        concentration=concentration,
        seed=args.seed,
    )
    points = [DomainWeights.from_mapping(dict(zip(names, row.tolist(), strict=True))) for row in design]
    comparison = compare_mixtures(
        make_model,
        args,
        mixtures={_name_of(point): point for point in points},
        seeds=seeds,
        train_dataset=train_dataset,
        tokens_per_example=tokens_per_example,
        **runs,
    )
    weights, losses, rows = _runs_of(comparison)
    fit = fit_sweep(
        weights,
        losses,
        natural=np.array([natural.mean[name] for name in names]),
        kl_penalty=kl_penalty,
        max_weights=_ceiling(num_tokens, max_epochs_per_domain, full_tokens or comparison.train_tokens),
        seed=args.seed,
    )
    recipe = {
        "name": RECIPE,
        "law": "c + exp(b . a)",
        "num_mixtures": len(weights),
        "seeds": list(seeds),
        "objective": rows,
        "kl_penalty": kl_penalty,
        "max_epochs_per_domain": max_epochs_per_domain,
        "full_tokens": full_tokens,
        "rank_correlation": round(fit.rank_correlation, 4),
        "predicted_change": [round(value, 5) for value in fit.change],
    }
    mean = dict(zip(names, fit.weights.tolist(), strict=True))
    metadata = {**describe_process(), "sweep": _describe_runs(comparison, fit)}
    return DomainWeights.from_mapping(mean, recipe=recipe, domains=facts, metadata=metadata), comparison


def _name_of(weights: DomainWeights) -> str:
    """A name that the weights decide, so that a run is found again whatever design it came from."""
    rounded = {name: round(weight, 9) for name, weight in weights.mean.items()}
    return f"mix-{hashlib.sha256(json.dumps(rounded).encode()).hexdigest()[:10]}"


def _runs_of(comparison: Comparison) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Weights of each mixture, its losses in nats, mean over seeds, and what they are of."""
    rows = list(comparison.verdict_rows) if comparison.targets else list(comparison.domains)
    losses = [[float(comparison.row_losses(mixture)[row].mean()) for row in rows] for mixture in comparison.mixtures]
    weights = [list(comparison.weights(mixture).values()) for mixture in comparison.mixtures]
    return np.array(weights), np.array(losses), rows


def _ceiling(num_tokens: Mapping[str, int], max_epochs_per_domain: float | None, budget: int) -> np.ndarray | None:
    if max_epochs_per_domain is None:
        return None
    ceiling = np.array([max_epochs_per_domain * count / budget for count in num_tokens.values()])
    if ceiling.sum() < 1:
        raise ValueError(
            f"`max_epochs_per_domain` must leave {budget} tokens to train on, but {max_epochs_per_domain} epochs of all "
            f"domains are {int(max_epochs_per_domain * sum(num_tokens.values()))}. Raise it, or lower `full_tokens`."
        )
    return ceiling


def _describe_runs(comparison: Comparison, fit: SweepFit) -> list[dict[str, Any]]:
    return [
        {
            "mixture": mixture,
            "weights": comparison.weights(mixture),
            "objective": float(fit.observed[position]),
            "predicted": float(fit.predicted[position]),
            "predicted_left_out": float(fit.left_out[position]),
        }
        for position, mixture in enumerate(comparison.mixtures)
    ]
