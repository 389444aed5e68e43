"""The card of domain weights."""

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from hf_doge._version import __version__
from hf_doge.artifacts.cards.card import Card, TableFacts, data_header
from hf_doge.artifacts.cards.text import (
    counted,
    escape,
    format_table,
    hub_link,
    join,
    json_block,
    listing,
    named_part,
    names_of,
    part_of,
    place_of,
    render,
    revision,
    run_facts,
    seconds,
    sources_of,
    table,
)
from hf_doge.artifacts.record import WeightsRecord
from hf_doge.artifacts.score_noise import (
    LEAST_UPDATES,
    estimate_score_noise,
    score_sums,
    undecided_groups,
    updates_a_point,
    weight_noise,
)
from hf_doge.files import sha256
from hf_doge.text import printable

PLOT_FILE = "plot.png"

_LEARNED = ("doge_plus", "paper", "official")
_CONFIGS = ("weights", "trajectory")
_ORIGINS = {
    "uniform": "The same weight for every domain: a baseline, nothing was learned.",
    "natural": "In proportion to the tokens of each domain, as training on all the data: a baseline, nothing was learned.",
    "ngram_em": "Estimated without training: under these weights, n-gram models of the domains make the text of the target"
    " most likely.",
    "sweep": "The optimum of a law fitted to the losses of small models that were each trained on another mixture.",
    "temperature": "In proportion to a power of the tokens of each domain: a rule, nothing was learned.",
    "unimax": "Equal parts, but for domains too small for theirs within the allowed epochs"
    " ([UniMax](https://huggingface.co/papers/2304.09151)): a rule, nothing was learned.",
}
_NO_ORIGIN = "How they were chosen is told below, as far as it was recorded."
_LEARNED_BEFORE = (
    "Learned with a small proxy model by [DoGE](https://huggingface.co/papers/2310.15393) (domain reweighting with"
    " generalization estimation)."
)
_LEARNED_ONLINE = (
    "Learned while a model was trained on them, by the rule of [DoGE](https://huggingface.co/papers/2310.15393)"
    " (domain reweighting with generalization estimation)."
)
_OBJECTIVES = {
    "universal": "They serve the mean loss of the training domains themselves, as a small step of training lowers it.",
    "target": "They serve the loss on the target that they were learned for, as a small step of training lowers it.",
}
_COSTS = {
    "Time": ("seconds", lambda number: f"{seconds(number)} of training"),
    "Data read": ("num_tokens_seen", lambda number: f"{number:,} tokens with a loss"),
    "Computation": ("total_flos", lambda number: f"{number:.3g} FLOPs, as the Trainer counts them"),
    "Processes": ("num_processes", lambda number: f"{number:,}"),
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LARGEST = 1e300  # beyond it, integers are no floats
_MOST_DRAWN = 1000  # domains, each a line of the trajectory; with 10,000 it took minutes
_MOST_BARS = 50  # the heaviest; with 300 a picture took 3 s, at each save


def weights_card(
    weights: WeightsRecord,
    files: Mapping[str, bytes | Path],
    *,
    repo_id: str | None = None,
    model_id: str | None = None,
) -> Card:
    """
    The README.md of domain weights.

    Args:
        weights (`WeightsRecord`): What the card is of.
        files (`Mapping`): Path in the artifact -> content, or where the file lies. The card tells of tables and picture.
        repo_id (`str`, *optional*): The repository it will be in; without one the code in the card names a placeholder.
        model_id (`str`, *optional*): The repository of the model that the weights were learned with.
    """
    if model_id is not None and not _HUB_NAME.fullmatch(str(model_id)):
        raise ValueError(f"`model_id` must be like 'user/name', but got {model_id!r:.80}.")
    block = _render(weights, repo_id=repo_id, model_id=model_id, plot=PLOT_FILE in files)
    title = "Domain weights" if repo_id is None else f"Domain weights: {str(repo_id).rpartition('/')[2]}"
    paths = {path.partition("/")[0]: [path] for path in files if path.endswith(".parquet")}
    tables = {name: TableFacts.of([files[path] for path in found]) for name, found in paths.items()}
    checksums = {name: [sha256(files[path]) for path in found] for name, found in paths.items()}
    header = {
        "pretty_name": title,
        "tags": ["hf_doge", "domain-weights", "data-mixing", *(["doge"] if _is_learned(weights) else [])],
        "task_categories": ["text-generation"],
        **data_header(tables, paths, checksums, default="weights"),
    }
    return Card(header, title, block, _CONFIGS)


def draw_plot(weights: WeightsRecord) -> bytes | None:
    """
    The content of `plot.png`, the same for the same weights; `None` where matplotlib is not installed, or there are so many
    domains that a picture would show nothing.
    """
    if find_spec("matplotlib") is None or len(weights.names) > _MOST_DRAWN:
        return None
    from hf_doge.plots import plot_domain_weights

    picture, trajectory = io.BytesIO(), weights.trajectory
    noise = None if trajectory is None or len(trajectory.steps) < LEAST_UPDATES else weight_noise(weights)
    plot_domain_weights(weights, max_domains=_MOST_BARS, noise=noise).savefig(
        picture, format="png", metadata={"Software": None}
    )
    return picture.getvalue()


def _is_learned(weights: WeightsRecord) -> bool:
    return weights.recipe.get("name") in _LEARNED


def _render(weights: WeightsRecord, *, repo_id: str | None, model_id: str | None, plot: bool) -> str:
    notes, columns, is_learned = _table_notes(weights), summary_columns(weights), _is_learned(weights)
    facts = _facts(weights, model_id)
    metadata, recipe = weights.metadata, {key: value for key, value in weights.recipe.items() if key != "arguments"}
    own, run = part_of(weights.recipe, "arguments"), part_of(metadata, "training")
    arguments, config = {**part_of(run, "arguments"), **own}, part_of(metadata, "model").get("config")
    learned = _LEARNED_ONLINE if own.get("mode") == "online" else _LEARNED_BEFORE
    trajectory = None
    if weights.trajectory is not None:
        steps = weights.trajectory.steps
        trajectory = {"num_steps": f"{len(steps):,}", "first": int(steps[0]), "last": int(steps[-1])}
    return render(
        "weights.md.jinja",
        **place_of(repo_id),
        origin=learned if is_learned else _ORIGINS.get(str(recipe.get("name")), _NO_ORIGIN),
        table=table(columns),
        table_notes=notes,
        plot=PLOT_FILE if plot else None,
        trajectory=trajectory,
        **facts,
        recipe=json_block(recipe) if recipe else None,
        arguments=json_block(arguments) if arguments else None,
        model_config=json_block(config) if config else None,
        is_learned=is_learned,
        objective=_OBJECTIVES.get(str(metadata.get("objective")), "They serve losses, to first order."),
    )


def _table_notes(weights: WeightsRecord) -> str:
    notes = [f"{len(weights.names)} domains; entropy {weights.entropy:.3f} nats (uniform {weights.max_entropy:.3f})."]
    if weights.last != weights.mean:
        notes.append("`weight`: mean over the run, the one to train with; `last`: after the last update.")
    if weights.natural_proportions:
        notes.append("`natural`: share of all tokens.")
    if gains(weights):
        notes.append("`nats`: how far steps on the domain alone would have lowered the loss, to first order.")
    return " ".join(notes)


def _facts(weights: WeightsRecord, model_id: str | None) -> dict[str, str]:
    """What is known of where the weights come from, and of what they cost."""
    metadata, domains = weights.metadata, weights.domains.values()
    model, tokenizer, run = (named_part(metadata, key) for key in ("model", "tokenizer", "training"))
    rows, tokens = ([facts.get(key) for facts in domains] for key in ("num_rows", "num_tokens"))
    if weights.recipe.get("name") is None and all(count is None for count in tokens) and not metadata:
        return {"facts": "Nothing was recorded of where these weights come from.", "cost": "Not recorded."}
    fingerprints = sorted({str(facts["fingerprint"]) for facts in domains if facts.get("fingerprint")})
    described = join(
        escape(model.get("class") or ""),
        f"{model['num_parameters']:,} parameters" if isinstance(model.get("num_parameters"), int) else None,
        f"begun from {hub_link(model['name_or_path'])}" if model.get("name_or_path") else None,
        revision(model),
    )
    if model_id is not None:
        link = f"[{escape(model_id)}](https://huggingface.co/{model_id})"
        described = f"{link} ({described})" if described else link
    facts = {
        "Data": join(
            *sources_of(metadata),
            counted(sum(rows), "sequences") if None not in rows else None,
            counted(sum(tokens), "tokens") if None not in tokens else None,
            f"fingerprint {names_of(fingerprints)}" if fingerprints else None,
        ),
        "Source": join(f"file {escape(metadata['source_file'])}", escape(metadata.get("source_format") or ""))
        if metadata.get("source_file")
        else None,
        "Model": described,
        "Tokenizer": join(
            hub_link(tokenizer.get("name_or_path")),
            escape(tokenizer.get("class") or ""),
            revision(tokenizer),
            counted(tokenizer.get("vocab_size"), "tokens"),
        ),
        "Training": join(
            counted(run.get("global_step"), "steps"),
            counted(run.get("train_batch_size"), "sequences a step"),
            f"learning rate {escape(run['learning_rate'])}" if "learning_rate" in run else None,
            f"{escape(run['lr_scheduler_type'])} schedule" if "lr_scheduler_type" in run else None,
            f"seed {escape(run['seed'])}" if "seed" in run else None,
        ),
    }
    numbers = {
        key: one
        for key, one in run.items()
        if isinstance(one, int | float) and not isinstance(one, bool) and abs(one) < _LARGEST
    }
    cost: dict[str, str | None] = {
        name: sentence(numbers[key]) for name, (key, sentence) in _COSTS.items() if key in numbers
    }
    cost["Device"] = escape(run["device"]) if run.get("device") else None
    return {
        "facts": listing(facts) + run_facts(metadata, written_by=__version__),
        "cost": listing(cost) or "Not recorded.",
    }


def summarize(weights: WeightsRecord) -> str:
    """
    The recipe, the entropy and a table of the domains, heaviest first, columns without any value left out; and which weights
    the run cannot tell apart.
    """
    lines, texts = [*headline(weights), "", format_table(summary_columns(weights))], []
    settled = part_of(weights.metadata, "training").get("settled_after_updates")
    if isinstance(settled, int):
        texts.append(
            f"Learning stopped after {settled:,} updates: the scores no longer told the domains apart for their noise."
        )
    for text in filter(None, (*texts, *noise_notes(weights))):
        lines += ["", *textwrap.wrap(text, width=100, subsequent_indent="  ")]
    return "\n".join(lines)


def noise_notes(weights: WeightsRecord) -> tuple[str | None, str | None]:
    """Which weights the run cannot tell apart, and what to change; `None` where there is nothing to say."""
    undecided = undecided_groups(weights)
    groups = "; ".join(", ".join(map(printable, group)) for group in undecided)
    told = f"Weights that this run cannot tell apart, for the noise of its scores: {groups}." if undecided else None
    return told, advise(weights, undecided)


def advise(weights: WeightsRecord, undecided: Sequence[Sequence[str]]) -> str | None:
    """
    What to change where a run says nothing: more examples a step if all of its weights are one of the `undecided_groups`, another `mu`
    if it left the weights no room to move and did not follow the scores by itself, more updates if noise is not told from so few;
    otherwise `None`. A domain without weight, or without a score, counts for neither.
    """
    if weights.trajectory is not None and 0 < len(weights.trajectory.steps) < LEAST_UPDATES:
        return (
            f"Only {len(weights.trajectory.steps)} updates are recorded, too few to tell weights from the noise of their scores. Train for "
            f"longer (`max_steps`), or record more of the updates (`trajectory_steps`): {LEAST_UPDATES} at least."
        )
    is_universal = weights.metadata.get("objective") == "universal"
    sums = {name: total for name, total in score_sums(weights).items() if weights.mean[name] > 0}
    if any(len(group) == len(sums) for group in undecided):
        usual = "As a rule equal parts are best then, where all domains count alike. " if is_universal else ""
        more = "" if is_universal else "`per_device_target_batch_size`, and "
        return (
            f"So no two domains are told apart for sure. {usual}Where they do differ, look at more examples a step "
            f"({more}ten or more of each domain in the train batch), or train for longer."
        )
    recipe, mu = weights.recipe, weights.recipe.get("mu")
    if len(sums) < 2 or not isinstance(mu, int | float) or recipe.get("min_spread"):
        return None
    span = max(sums.values()) - min(sums.values())
    if not 0 < span < mu:
        return None
    what = "scores" if recipe.get("score_metric") == "optimizer" else "scores times the learning rate"
    return (
        f"The sums of the {what} differ by {span:.2g}, less than mu ({mu:g}), so no weight could move over another by a factor above "
        f"{math.exp(span / mu):.1f}: the run is short, or its learning rate low. With `mu` at a quarter of that, {span / 4:.1g}, the "
        "weights follow the scores."
        + (" Where all domains count alike no such weights were seen to beat equal parts." if is_universal else "")
    )


def signal_to_noise(weights: WeightsRecord) -> dict[str, float]:
    """Mean score of each domain over the noise of one step's score; empty for fewer than ten recorded updates."""
    trajectory = weights.trajectory
    if trajectory is None or len(trajectory.steps) < LEAST_UPDATES:
        return {}
    noises = estimate_score_noise(trajectory.scores)
    scores = [column[np.isfinite(column)] for column in trajectory.scores.T]
    every = zip(trajectory.domains, scores, noises.tolist(), strict=True)
    return {name: float(score.mean()) / noise for name, score, noise in every if noise > 0}


def gains(weights: WeightsRecord) -> dict[str, float]:
    """
    Nats that the loss of the target would have fallen by in a run on this domain alone, to first order: the sum of its scores.

    Returns:
        `dict[str, float]` by domain, without those that have no score; empty unless each step of the run is recorded with scores in nats
        (`score_metric="optimizer"`), ten of them at least.
    """
    recipe = weights.recipe
    is_in_nats = recipe.get("score_metric") == "optimizer" and recipe.get("normalization", "none") == "none"
    if not is_in_nats or recipe.get("reweight_steps", 1) != 1 or updates_a_point(recipe.get("arguments")) != 1:
        return {}
    return score_sums(weights)


def summary_columns(weights: WeightsRecord) -> dict[str, list[str]]:
    """Title -> cells, heaviest domain first; columns without any value are left out."""
    natural = weights.natural_proportions
    names = sorted(weights.names, key=lambda name: weights.mean[name], reverse=True)
    signals, nats = signal_to_noise(weights), gains(weights)

    def fact(key: str) -> list[str]:
        values = [weights.domains[name].get(key) for name in names]
        return ["" if value is None else f"{value:,}" for value in values]

    columns = {
        "domain": names,
        "weight": [f"{weights.mean[name]:.4f}" for name in names],
        "last": [f"{weights.last[name]:.4f}" for name in names] if weights.last != weights.mean else [],
        "uniform": [f"{1 / len(names):.4f}" for _ in names],
        "natural": [f"{natural[name]:.4f}" for name in names] if natural else [],
        "x natural": [_ratio(weights.mean[name], natural[name]) for name in names] if natural else [],
        "score/noise": [f"{signals[name]:.2f}" if name in signals else "" for name in names],
        "nats": [f"{nats[name]:.3f}" if name in nats else "" for name in names],
        "rows": fact("num_rows"),
        "tokens": fact("num_tokens"),
    }
    return {title: cells for title, cells in columns.items() if any(cells)}


def headline(weights: WeightsRecord) -> list[str]:
    """How the weights were made, wrapped, and how far they are from uniform."""
    arguments = ", ".join(
        f"{key} {value}"
        for key, value in weights.recipe.items()
        if key != "name" and value is not None and not isinstance(value, dict | list)
    )
    recipe = f"Recipe: {weights.recipe.get('name', 'not recorded')}" + (f" ({arguments})" if arguments else "")
    recipe = printable(recipe)
    spread = f"{len(weights.names)} domains, entropy {weights.entropy:.3f} nats (uniform {weights.max_entropy:.3f})"
    if weights.trajectory is not None:
        steps = weights.trajectory.steps
        spread += f", steps {steps[0]} to {steps[-1]}"
        mus = weights.trajectory.mus
        spread += f", mu {mus[-1]:.2g} in the end" if mus is not None and mus[-1] != weights.recipe.get("mu") else ""
    return [*textwrap.wrap(recipe, width=100, subsequent_indent="  "), spread]


def _ratio(weight: float, natural: float) -> str:
    """How many times its natural share a domain gets."""
    return f"{weight / natural:.2f}" if natural > 0 else ""
