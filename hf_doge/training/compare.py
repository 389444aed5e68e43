"""Training the same base model on several mixtures, to see which serves it best: [`compare_mixtures`]."""

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from hf_doge._version import __version__
from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.evaluation.comparison import Comparison, MixtureRun
from hf_doge.files import write_atomically
from hf_doge.training.adaptation import Adaptation
from hf_doge.training.global_batch import examples_per_step
from hf_doge.training.mixture import DomainWeightedTrainer

logger = logging.getLogger(__name__)

RUNS_FOLDER = "runs"
_BAR_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"

# Arguments that say where a run writes and what it prints, not what it computes.
_UNRELATED_ARGUMENTS = ("output_dir", "seed", "run_name", "disable_tqdm", "push_to_hub", "report_to", "project")
_UNRELATED_PREFIXES = ("log", "save_", "hub_", "trackio_", "dataloader_", "eval_", "resume_")


def compare_mixtures(
    make_model: Callable[[], PreTrainedModel],
    args: TrainingArguments,
    *,
    mixtures: Mapping[str, DomainWeights],
    seeds: Sequence[int],
    train_dataset: Mapping[str, Dataset],
    eval_dataset: Mapping[str, Dataset],
    data_collator: Callable[[list[dict]], dict],
    tokens_per_example: int,
    identity: Mapping[str, Any],
    adaptation: Adaptation | None = None,
    bytes_per_token: Mapping[str, float] | None = None,
) -> Comparison:
    """
    Train one model per mixture and seed, all for the same number of examples, and evaluate each on every domain.

    The runs of one seed differ by their weights and what follows from them alone: they begin with the same parameters, read
    the documents of each domain in the same order, and mixtures with the same weights are the same run.

    A finished run is a file `runs/<mixture>-seed<seed>.json` in the output folder. Called again with the same arguments,
    it is read instead of trained; with others, or interrupted before its file was written, it is trained from the start.

    Args:
        make_model (`Callable[[], PreTrainedModel]`):
            Makes the model to train. It is called once per run, after the seed is set: the mixtures of one seed start
            from the same parameters.
        args (`TrainingArguments`):
            Arguments of every run, except for `seed`.
        mixtures (`Mapping[str, DomainWeights]`):
            Weights by name of the mixture.
        seeds (`Sequence[int]`):
            Seeds of initialisation and data order.
        train_dataset (`Mapping[str, Dataset]`):
            Tokenised train split by domain.
        eval_dataset (`Mapping[str, Dataset]`):
            Tokenised validation split by domain; those that are not in `train_dataset` are reported as targets.
        data_collator (`Callable`):
            Makes a batch with `labels` of a list of examples.
        tokens_per_example (`int`):
            Length of every example.
        identity (`Mapping[str, Any]`):
            What else decides the result, in plain values: model and data. A finished run of another one is not reused.
        adaptation ([`Adaptation`], *optional*):
            Measure the targets at the model's own temperature and after a few steps on them, too.
        bytes_per_token (`Mapping[str, float]`, *optional*):
            UTF-8 bytes of a validation token by domain and target, for bits per byte.

    Several processes may be called alike at the same time, on one machine or several that see the output folder: they share
    the runs, and each returns all of them.

    Raises:
        `ValueError`: without mixtures or seeds, with repeated seeds, and for weights of other domains.
    """
    if not mixtures or not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(
            f"A comparison needs mixtures and distinct seeds, but got {list(mixtures)} and {list(seeds)}. Add or drop some."
        )
    assert args.output_dir is not None  # the arguments set one
    runs_folder = Path(args.output_dir) / RUNS_FOLDER
    runs_folder.mkdir(parents=True, exist_ok=True)
    pending = [(name, seed) for seed in seeds for name in mixtures]
    finished: dict[tuple[str, int], MixtureRun] = {}
    others: list[tuple[str, int]] = []  # at work in other processes
    with tqdm(total=len(pending), bar_format=_BAR_FORMAT, disable=args.disable_tqdm) as progress:
        for position, (name, seed) in enumerate(chain(pending, others)):
            progress.set_description(f"{name}, seed {seed} ({len(finished) + 1} of {len(pending)})")
            weights = mixtures[name].mean
            path = runs_folder / f"{name}-seed{seed}.json"
            arguments = {"training": _related_arguments(args), "weights": weights, **identity}
            if adaptation is not None:
                arguments["adaptation"] = adaptation.identity
            lock = FileLock(path.with_suffix(".lock"), timeout=0 if position < len(pending) else -1)
            try:
                lock.acquire()
            except Timeout:
                others.append((name, seed))
                continue
            try:
                run = _read_finished(path, arguments)
                if run is None:
                    run = _train(
                        make_model,
                        _arguments_of_run(args, path.with_suffix(""), seed),
                        mixture=name,
                        domain_weights=weights,
                        train_dataset=train_dataset,
                        eval_dataset=eval_dataset,
                        data_collator=data_collator,
                        tokens_per_example=tokens_per_example,
                        progress=progress,
                        adaptation=adaptation,
                        bytes_per_token=bytes_per_token or {},
                    )
                    _write_finished(path, run, arguments)
            finally:
                lock.release()
            finished[name, seed] = run
            progress.update(len(finished) - progress.n)
    return Comparison(finished[key] for key in pending)


def _train(
    make_model: Callable[[], PreTrainedModel],
    args: TrainingArguments,
    *,
    mixture: str,
    domain_weights: Mapping[str, float],
    train_dataset: Mapping[str, Dataset],
    eval_dataset: Mapping[str, Dataset],
    data_collator: Callable[[list[dict]], dict],
    tokens_per_example: int,
    progress: tqdm,
    adaptation: Adaptation | None,
    bytes_per_token: Mapping[str, float],
) -> MixtureRun:
    set_seed(args.seed)
    trainer = DomainWeightedTrainer(
        make_model(),
        args,
        train_dataset=train_dataset,
        domain_weights=domain_weights,
        eval_dataset=eval_dataset,
        data_collator=data_collator,
        callbacks=[_FractionOfRun(progress)],
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)  # one bar over all runs instead
    trainer.train()
    metrics = trainer.evaluate()
    step_size = examples_per_step(args)
    return MixtureRun(
        mixture=mixture,
        seed=args.seed,
        weights=dict(domain_weights),
        losses={name: metrics[f"eval_{name}_loss"] for name in eval_dataset},
        epochs=trainer.get_domain_epochs(),
        train_tokens=trainer.state.global_step * step_size * tokens_per_example,
        target_losses={} if adaptation is None else adaptation.measure(trainer, eval_dataset),
        bytes_per_token=dict(bytes_per_token),
    )


class _FractionOfRun(TrainerCallback):
    """Moves a progress bar that counts runs by a fraction per step."""

    def __init__(self, progress: tqdm) -> None:
        self.progress = progress
        self.num_finished = progress.n

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.update(self.num_finished + state.global_step / state.max_steps - self.progress.n)


def _arguments_of_run(args: TrainingArguments, output_dir: Path, seed: int) -> TrainingArguments:
    args = copy.copy(args)
    args.output_dir, args.seed = str(output_dir), seed
    return args


def _related_arguments(args: TrainingArguments) -> dict[str, Any]:
    return {
        name: value
        for name, value in args.to_dict().items()
        if name not in _UNRELATED_ARGUMENTS and not name.startswith(_UNRELATED_PREFIXES)
    }


def _read_finished(path: Path, arguments: Mapping[str, Any]) -> MixtureRun | None:
    """The run in a file, if it was made with these arguments."""
    if not path.exists():
        return None
    contents = json.loads(path.read_text(encoding="utf-8"))
    expected = json.loads(json.dumps(arguments))
    if contents["arguments"] == expected:
        logger.info("%s is finished already.", path.stem)
        return MixtureRun.from_dict(contents)
    different = sorted(_flatten(contents["arguments"]).items() ^ _flatten(expected).items())
    logger.warning(
        "%s was made with other arguments and is trained again: %s differ.",
        path.stem,
        ", ".join(dict.fromkeys(name for name, _ in different)),
    )
    return None


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = json.dumps(value)
    return flat


def _write_finished(path: Path, run: MixtureRun, arguments: Mapping[str, Any]) -> None:
    contents = {"hf_doge_version": __version__, **asdict(run), "arguments": arguments}
    write_atomically(path, json.dumps(contents, indent=2, sort_keys=True, ensure_ascii=False).encode())
