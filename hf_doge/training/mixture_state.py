"""What a checkpoint of [`~hf_doge.training.mixture.DomainWeightedMixin`] holds of the order of examples, and how it is compared."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from transformers import TrainingArguments

from hf_doge.entries import COUNT
from hf_doge.sampling.phases import first_draw_of, read_phases
from hf_doge.sampling.sampler import DomainWeightedSampler
from hf_doge.sampling.saved_state import find_misfit_of_state
from hf_doge.sampling.weights import to_shares
from hf_doge.training.global_batch import examples_per_step
from hf_doge.training.saved_entries import damaged, read_entries

SAMPLER_FILE = "domain_sampler.json"  # in a checkpoint
READING_FILE = "domain_streams.json"  # likewise, of a mixture of streams


def save_sampler(folder: Path, sampler: DomainWeightedSampler, args: TrainingArguments, *, step: int) -> None:
    """Write where the stream stands after a step; the sampler's own place is ahead, as far as its DataLoader is."""
    step_size = examples_per_step(args)
    epoch, position = divmod(step * step_size, sampler.num_samples)
    state = {**sampler.state_dict(), "epoch": epoch, "position": position, "examples_per_step": step_size}
    (folder / SAMPLER_FILE).write_text(json.dumps(state, indent=2))  # unsorted: domains have an order


def load_sampler(checkpoint: Path, sampler: DomainWeightedSampler, args: TrainingArguments, *, learns: bool) -> None:
    """
    Take up the weights of a checkpoint, after a look at whether it is of the same stream.

    Args:
        checkpoint (`Path`): Which holds a `SAMPLER_FILE`.
        sampler ([`DomainWeightedSampler`]): As it is before the first step.
        args (`TrainingArguments`): Of the run.
        learns (`bool`): Whether the run changes its weights by itself.
    """
    path, step_size = checkpoint / SAMPLER_FILE, examples_per_step(args)
    state = read_entries(path, {"examples_per_step": COUNT})
    if misfit := find_misfit_of_state(state, sampler.domains.names):
        raise damaged(path, misfit)
    if state["examples_per_step"] != step_size:
        raise ValueError(
            "A run must go on with as many examples a step as it began with, or it would skip some and repeat "
            f"others, but {checkpoint} has {state['examples_per_step']} and these arguments make it {step_size}. "
            "Set batch size, accumulation and number of processes so that the product is the same."
        )
    if list(state["domains"]) == list(sampler.domains.names):  # others are named by who loads the state
        _refuse_other_weights(checkpoint, state["schedule"], sampler.state_dict()["schedule"], learns=learns)
    # The Trainer skips to the place inside the epoch by itself.
    try:
        sampler.load_state_dict({**state, "position": 0})
    except ValueError as error:
        raise ValueError(f"{error} It is in {str(path)!r}.") from error


def _refuse_other_weights(
    checkpoint: Path, saved: list[dict[str, Any]], own: list[dict[str, Any]], *, learns: bool
) -> None:
    """The pieces of a schedule that a checkpoint holds, against those that a run begins with."""
    first = saved[0]["weights"]
    if first != own[0]["weights"]:
        raise ValueError(
            f"A run must go on under the weights it began with, but {checkpoint} began with {first} and this "
            f"trainer has {own[0]['weights']}, after `max_epochs_per_domain`. Give it the same, or start a new run from the "
            "model of that checkpoint."
        )
    before, planned = ([(one["first_draw"], one["weights"]) for one in pieces] for pieces in (saved, own))
    if not learns and planned != before[: len(planned)]:
        raise ValueError(
            f"A run must go on through the phases it began with, but those of {checkpoint} are others. Give it the same "
            "`domain_weights` and number of steps, or start a new run from the model of that checkpoint."
        )


def refuse_other_reading(checkpoint: Path, own: Mapping[str, Any]) -> None:
    """The Trainer reads again what was trained on and throws it away, which must be the same examples."""
    saved = read_entries(checkpoint / READING_FILE)
    names = [name for name in {**saved, **own} if saved.get(name) != own.get(name)]
    if names:
        differing = "; ".join(f"`{name}` was {saved.get(name)!r} and is {own.get(name)!r}" for name in names)
        raise ValueError(
            "A run on streams must go on reading as it began, or it would skip some examples and repeat others, but in"
            f" {str(checkpoint / READING_FILE)!r} {differing}. Set them as they were, or start a new run from the model of that checkpoint."
        )


def describe_streams(streams: Mapping[str, IterableDataset]) -> dict[str, dict[str, Any]]:
    """What is known of streams before they are read, by domain: in how many shards they lie, and their columns."""
    return {
        name: {
            "num_shards": stream.num_shards,
            "columns": None if stream.features is None else sorted(stream.features),
        }
        for name, stream in streams.items()
    }


def describe_phases(weights: Any, names: tuple[str, ...]) -> list[list[Any]]:
    """Phases in plain values: at which part of the training each begins, and its weights; none for weights that stay."""
    phases = read_phases(weights)
    if len(phases) == 1:
        return []
    return [[fraction, dict(zip(names, to_shares(one, names).tolist(), strict=True))] for fraction, one in phases]


def phases_by_draw(weights: Any, args: TrainingArguments) -> tuple[Any, int | None]:
    """
    Weights whose phases begin with whole steps, as parts of all examples of a training, and how many these are; for a mixture of
    streams, which knows nothing of steps. The number is `None` where there is one phase.
    """
    phases = read_phases(weights)
    if len(phases) == 1:
        return weights, None
    step_size = examples_per_step(args)
    num_planned = args.max_steps * step_size
    # Of phases that begin with the same step the last holds; one that begins with the end never does.
    by_draw = {first_draw_of(fraction, num_planned=num_planned, step_size=step_size): one for fraction, one in phases}
    return [(first / num_planned, one) for first, one in by_draw.items() if first < num_planned], num_planned
