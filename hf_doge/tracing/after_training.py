"""Recording a dataset at checkpoints that a Trainer has saved, after the training."""

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers.trainer import OPTIMIZER_NAME

from hf_doge.artifacts.influence import IndexWriter
from hf_doge.artifacts.influence.manifest import MANIFEST, fits_basis, read_config
from hf_doge.artifacts.influence.metric import continued_metric
from hf_doge.checks import LARGEST_RATE, check_number, show
from hf_doge.gradients.embedding_uses import input_embedding_matrix
from hf_doge.gradients.layers import ChosenLayers
from hf_doge.tracing.basis import warn_of_few
from hf_doge.tracing.batches import SequentialBatches
from hf_doge.tracing.examples import Examples, padding_collator, prune_columns
from hf_doge.tracing.limits import takes_padding
from hf_doge.tracing.metric import moments_for
from hf_doge.tracing.models import has_fingerprint, model_fingerprint, stored_path
from hf_doge.tracing.opening import SharedIndex, open_shared_index
from hf_doge.tracing.pretrained import load_model, without_bars
from hf_doge.tracing.processes import default_device, join_processes, process_index, run_on_main_process
from hf_doge.tracing.recording import encoding_of, make_recorder, record_checkpoint
from hf_doge.tracing.saved_checkpoints import describe_checkpoint, in_order_of_steps
from hf_doge.tracing.saved_moments import (
    freeze_untrained,
    require_saved_optimizer,
    saved_group_rate,
    saved_second_moments,
    tells_groups,
    warn_of_saved_step,
)
from hf_doge.tracing.second_moments import SecondMoments
from hf_doge.tracing.settings import AUTO, RecordingSettings

logger = logging.getLogger(__name__)


def record_dataset(
    folder: str | os.PathLike,
    checkpoints: Sequence[str | os.PathLike],
    dataset: Any,
    *,
    collator: Callable | None = None,
    tokenizer: Any | None = None,
    settings: RecordingSettings | None = None,
    learning_rates: Sequence[float] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
    add_examples: bool = False,
    encoding: Mapping[str, Any] | None = None,
) -> IndexWriter:
    """
    Record a dataset at checkpoints that a Trainer has saved before; those that the index has whole are left as they are,
    and must have the weights that were recorded.

    Under `accelerate launch` each process records some segments, as [`record_checkpoint`] does. Then the whole dataset, the
    checkpoints and the folder must be there on all.

    Args:
        folder (`str` or `os.PathLike`): Of the index, new or of the same dataset, model and settings.
        checkpoints (`Sequence`):
            Folders with a model or adapter of transformers, in any order: their steps, from `trainer_state.json` or their
            names, say which comes first. Where none has a step, the order of training.
        dataset (`Dataset` or [`Examples`]): Tokenised as for training, with labels; its readable columns are kept.
        collator (`Callable`, *optional*): What makes batches of examples, as in training; pads by the tokenizer if left out.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The one of the model.
        settings ([`RecordingSettings`], *optional*):
            Of `record="checkpoint"`. With `metric="optimizer"`, Adam's second moments of the input embeddings are
            read from the `optimizer.pt` that the Trainer saved in each checkpoint, see [`saved_second_moments`]; the rows are
            those that `TracInWECallback(metric="optimizer")` would have recorded in training.
        learning_rates (`Sequence[float]`, *optional*):
            The rate at each checkpoint, in the order of `checkpoints`; else read from its `trainer_state.json`, if the
            Trainer logged at that very step, or see [`saved_learning_rate`].
        batch_size (`int`): How many examples at once; changes rows by rounding at most.
        seed (`int`): Of whatever the collator draws.
        progress (`bool`): Whether to show a progress bar, of all examples at all checkpoints.
        add_examples (`bool`):
            Add to a whole index the examples of `dataset` that come behind its own, with the settings that it was made with
            and at all of its checkpoints, in any order. They are written to further files, which show all at once when
            the last checkpoint has them; after an interruption the same call goes on.
        encoding (`Mapping`, *optional*): What is known of how texts became tokens and labels, for queries, see [`Encoding`].

    Returns:
        `IndexWriter`: of the index, closed; on the main process its `checkpoint_names` say what it holds.

    Raises:
        FileNotFoundError: if a checkpoint is no folder with a model, or with `metric="optimizer"` has no `optimizer.pt`.
        BlockingIOError: if another process is writing the index.
        ValueError: if a learning rate is unknown, the checkpoints' embeddings differ in shape, an example cannot be
            recorded, or the index has a checkpoint of that name with other weights or another rate than the one in
            `learning_rates`; what was recorded before stays. With `metric="optimizer"` also if `optimizer.pt` is not of Adam, or it is
            not certain which of its entries belongs to the embeddings. With `add_examples` also if `dataset` begins with
            other examples than the index, or `checkpoints` are not those of the index.
        ProcessFailedError: if another process raised an error or was killed.
    """
    join_processes()
    paths = _folders(checkpoints)
    learning_rates = list(learning_rates) if isinstance(learning_rates, Iterable) else learning_rates
    folder, settings = Path(folder), settings or RecordingSettings()
    asked = settings.metric
    metric = run_on_main_process(lambda heartbeat: continued_metric(folder, asked))
    settings = replace(settings, metric=metric)
    _require_after_training(settings, paths, learning_rates)
    recording = _SavedRecording(folder, dataset, collator, tokenizer, settings, batch_size, seed, encoding)
    if add_examples:
        recording.grown = _checkpoints_to_grow(folder, paths, learning_rates)
        config = read_config(folder)
        if fits_basis(config) and len(dataset) > config["num_examples"] and process_index() == 0:
            warn_of_few(config, len(dataset))
        # The index knows them, once it is seen which one it is.
        facts: list[dict[str, Any] | None] = [None] * len(paths)
    else:
        whole = _recorded_checkpoints(folder)
        order = in_order_of_steps(paths, {name: entry["step"] for name, entry in whole.items()})
        rates: list[float | None] = [None] * len(paths) if learning_rates is None else list(learning_rates)
        paths, rates = [paths[place] for place in order], [rates[place] for place in order]
        _require_same_rates(paths, rates, whole)
        known = [describe_checkpoint(path, learning_rate=rate) for path, rate in zip(paths, rates, strict=True)]
        if learning_rates is None:
            for path, fact in zip(paths, known, strict=True):
                load = partial(load_model, path, trainable=True)
                fact["learning_rate"] = saved_group_rate(path, fact["learning_rate"], load)
            if len(whole.keys() | {path.name for path in paths}) > 1:  # else it scales all scores alike
                _warn_of_unknown_groups([path for path in paths if path.name not in whole])
        facts, recording.whole = [*known], whole
    recording.awaited = [
        path for path, told in zip(paths, facts, strict=True) if told is None or told["name"] not in recording.whole
    ]
    may_have_layers = settings.layers is not None and not (settings.layers == [AUTO] and (folder / MANIFEST).is_file())
    has_more = metric != "gradient" or may_have_layers
    recording.trainable = has_more or _has_trained_embeddings(folder)
    if metric == "optimizer":
        for path in recording.awaited:
            require_saved_optimizer(path)  # now, not hours later
    if metric != "gradient" and process_index() == 0:
        for path in recording.awaited[:1]:
            warn_of_saved_step(path)
    hidden = not progress or process_index() > 0
    total, unit = len(dataset) * len(recording.awaited), " examples"
    try:
        with tqdm(total=total, desc="Recording", unit=unit, leave=False, disable=hidden) as recording.bar:
            for path, told in zip(paths, facts, strict=True):
                recording.record(path, told)
        index = recording.index
        assert index is not None
        run_on_main_process(lambda heartbeat: index.writer.require_grown())
    finally:
        if recording.index is not None:
            recording.index.close()
    return index.writer


@dataclass
class _SavedRecording:
    """
    Records checkpoint after checkpoint, into an index that is opened for the model of the first one.

    Attributes:
        grown (`list[dict]`, *optional*): The checkpoints of an index that examples are added to, and `None` of another.
        whole (`dict[str, dict]`): Name -> entry of the checkpoints that the index had whole before.
        awaited (`list[Path]`): The folders that are still to be recorded.
        trainable (`bool`): Whether models are loaded as in training.
        taken (`list[str]`): Those of an index that grows that a folder was found to be.
        bar (`tqdm`, *optional*): Of all examples at all checkpoints.
        index ([`SharedIndex`], *optional*), batches ([`SequentialBatches`], *optional*): Once it is opened.
    """

    folder: Path
    dataset: Any
    collator: Callable | None
    tokenizer: Any | None
    settings: RecordingSettings
    batch_size: int
    seed: int
    encoding: Mapping[str, Any] | None
    grown: list[dict[str, Any]] | None = None
    whole: dict[str, dict[str, Any]] = field(default_factory=dict)
    awaited: list[Path] = field(default_factory=list)
    trainable: bool = False
    taken: list[str] = field(default_factory=list)
    bar: tqdm | None = None
    index: SharedIndex | None = None
    batches: SequentialBatches | None = None

    def record(self, path: Path, facts: dict[str, Any] | None) -> None:
        """
        Record a checkpoint that the index has not got whole, and see that one that it has is the same; `facts` are None
        where they are in the index.
        """
        is_whole = self.index is not None and facts is not None and self.index.has_whole(facts["name"])
        if is_whole and path.name not in self.whole:
            return
        entries = [*(self.grown or ()), *self.whole.values()]
        dtypes = next((entry.get("dtypes") for entry in entries if entry["name"] == path.name), None)
        with without_bars():
            model = load_model(path, dtypes=dtypes, device=default_device(), trainable=self.trainable)
        if path.name in self.whole:
            self._require_same_weights(model, path)
        if is_whole:
            return
        if not (self.folder / MANIFEST).is_file() or _has_frozen(self.folder):
            freeze_untrained(path, model)  # an index that takes all for trained goes on so
        if facts is None:
            facts = _recorded_facts(self.grown or (), model, path, taken=self.taken)
            self.taken.append(facts["name"])
        self.settings = self.settings.resolved(model, self.folder)
        recorder = make_recorder(model, self.settings, self.tokenizer)
        if self.index is not None:
            self.index.writer.require_embeddings(recorder.matrix, type(model).__name__)
        find = cache(partial(self._second_moments, path, model))
        if self.settings.metric == "optimizer" and facts["name"] not in self.whole:
            find()  # before there is an index
        if self.index is None:
            self.index, self.batches = self._open(model)
            self.index.writer.require_embeddings(recorder.matrix, type(model).__name__)
        assert self.batches is not None
        self._require_same_layers(model, facts["name"])
        if self.index.has_whole(facts["name"]):
            return
        moments = None
        if self.settings.metric != "gradient":
            moments = moments_for(self.index, self.settings.metric, find, name=facts["name"])
        facts["path"] = stored_path(path, self.index.writer.folder)
        bar = False if self.bar is None else self.bar
        record_checkpoint(self.index, recorder, self.batches, facts, second_moments=moments, progress=bar)

    def _require_same_weights(self, model: nn.Module, path: Path) -> None:
        """Refuse a folder with other weights than those that the index has under its name."""
        recorded = self.whole[path.name]["fingerprint"]
        if not has_fingerprint(model, recorded):
            raise ValueError(
                f"Checkpoint {path.name!r} must have the weights that {str(self.folder)!r} was recorded of, but those in"
                f" {str(path)!r} differ: their fingerprint is {model_fingerprint(model)[:12]}, the recorded one"
                f" {recorded[:12]}. Record another training in a folder of its own."
            )

    def _require_same_layers(self, model: nn.Module, name: str) -> None:
        """Refuse a checkpoint whose layers have other shapes: its rows would be numbered otherwise."""
        assert self.index is not None
        layers, config = self.settings.chosen_layers(model), self.index.writer.config
        if layers is None or config.get("layers") is None:
            return
        recorded = ChosenLayers.from_dict(config["layers"], width=config["width"])
        if layers != recorded:
            pairs = zip(recorded.layers, layers.layers, strict=False)
            other = [[f"{one.name} {one.shape}" for one in pair] for pair in pairs if pair[0] != pair[1]][:3]
            raise ValueError(
                f"All checkpoints of an index must have the same layers, but {name!r} has others than those before: {other}. Record "
                "checkpoints of one training only."
            )

    def _second_moments(self, path: Path, model: nn.Module) -> SecondMoments:
        if self.settings.metric == "auto":  # one metric for all, and so plain gradients where one has no optimizer
            for other in self.awaited:
                require_saved_optimizer(other)
        return saved_second_moments(path, model, self.settings.chosen_layers(model))

    def _open(self, model: nn.Module) -> tuple[SharedIndex, SequentialBatches]:
        """The index, and batches of all examples that the model takes."""
        examples = self.dataset if isinstance(self.dataset, Examples) else Examples(self.dataset, self.dataset)
        examples = Examples(prune_columns(examples.recorded, model), examples.described)
        padding = getattr(getattr(model, "config", None), "pad_token_id", None)
        collator = self.collator or padding_collator(
            self.tokenizer, pad_token_id=padding, vocabulary_size=len(input_embedding_matrix(model))
        )
        at_once = self.batch_size if takes_padding(model) else 1
        batches = SequentialBatches(examples.recorded, collator, batch_size=at_once, seed=self.seed)
        index = open_shared_index(
            self.folder,
            model=model,
            dataset=examples,
            tokenizer=self.tokenizer,
            settings=self.settings,
            metadata=partial(encoding_of, batches, self.tokenizer, known=self.encoding),
            seed=self.seed,
            add_examples=self.grown is not None,
        )
        return index, batches


def _warn_of_unknown_groups(paths: Sequence[Path]) -> None:
    """Of one rate alone it is known that it was logged: that of the first parameter group."""
    lacking = [path.name for path in paths if not tells_groups(path)]
    if lacking and process_index() == 0:
        logger.warning(
            "The learning rates of %s are those of the first parameter group of the optimizer, since there is no %s that can be read"
            " to tell in which the input embeddings were. If their group had other ones, pass `learning_rates` (`hf-doge index"
            " --learning_rates`), one for each checkpoint.",
            lacking,
            OPTIMIZER_NAME,
        )


def _folders(checkpoints: Any) -> list[Path]:
    """The folders of `checkpoints`, absolute: '.' has a name too."""
    alone = isinstance(checkpoints, str | os.PathLike)
    given = list(checkpoints) if isinstance(checkpoints, Iterable) and not alone else None
    if given is None or not all(isinstance(one, str | os.PathLike) for one in given):
        shown = f"{str(checkpoints)!r} alone" if alone else show(checkpoints if given is None else given)
        raise ValueError(f"`checkpoints` must be a list of folders, but got {shown}.")
    return [Path(os.path.abspath(one)) for one in given]


def _recorded_checkpoints(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> entry of the checkpoints that an index has, if it is there."""
    if not (folder / MANIFEST).is_file():
        return {}
    return {entry["name"]: entry for entry in read_config(folder)["checkpoints"]}


def _require_same_rates(
    paths: Sequence[Path], rates: Sequence[float | None], whole: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse a rate that was given for a checkpoint that the index has with another."""
    for path, rate in zip(paths, rates, strict=True):
        recorded = whole[path.name]["learning_rate"] if path.name in whole else None
        if rate is not None and recorded is not None and not math.isclose(rate, recorded, rel_tol=1e-6):
            raise ValueError(
                f"`learning_rates` must give {path.name!r} the rate that the index has, {recorded}, but got {rate}. Leave"
                " `learning_rates` out if the index is right, else record in another folder."
            )


def _has_trained_embeddings(folder: Path) -> bool:
    """Whether an index that is there says that its embeddings were trained."""
    return (folder / MANIFEST).is_file() and not read_config(folder).get("virtual", True)


def _has_frozen(folder: Path) -> bool:
    """Whether an index says that something in it was frozen."""
    config = read_config(folder)
    return config.get("virtual", False) or bool(config["metadata"].get("virtual_parts"))


def _checkpoints_to_grow(
    folder: Path, paths: Sequence[Path], learning_rates: Sequence[float] | None
) -> list[dict[str, Any]]:
    """The checkpoints of the index that examples are to be added to."""
    recorded = read_config(folder)["checkpoints"]
    if learning_rates is not None:
        raise ValueError("`learning_rates` are known where examples are added: the index has them. Leave them out.")
    if len(paths) != len(recorded):
        names = [entry["name"] for entry in recorded]
        raise ValueError(
            f"Examples are added at all checkpoints of the index, {names}, but {len(paths)} folders were given:"
            f" {[str(path) for path in paths]}. Name the folder of each."
        )
    return recorded


def _recorded_facts(
    recorded: Sequence[Mapping[str, Any]], model: nn.Module, path: Path, *, taken: Sequence[str]
) -> dict[str, Any]:
    """
    What the index says of the checkpoint that has these weights; of several one that is not taken, and the one that is
    called like the folder.
    """
    fingerprint = model_fingerprint(model)
    same = [entry for entry in recorded if entry["fingerprint"] == fingerprint]
    same.sort(key=lambda entry: (entry["name"] in taken, entry["name"] != path.name))
    if not same:
        raise ValueError(
            f"The weights in {str(path)!r} are not those of any checkpoint of the index,"
            f" {[entry['name'] for entry in recorded]}. Name the folders that it was recorded from."
        )
    return {key: same[0][key] for key in ("name", "step", "epoch", "learning_rate")}


def _require_after_training(
    settings: RecordingSettings, paths: Sequence[Path], learning_rates: Sequence[float] | None
) -> None:
    if not paths:
        raise ValueError("`checkpoints` must name at least one folder with a model, but it is empty.")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"`checkpoints` must have names of their own, but their folders are called {names}.")
    if settings.record != "checkpoint":
        raise ValueError(
            "Checkpoints can be recorded after training with `record='checkpoint'`: online rows are made in training only."
            " Use `TracInWECallback` for those."
        )
    if learning_rates is None:
        return
    given = list(learning_rates) if isinstance(learning_rates, Iterable) else [learning_rates]
    if len(given) != len(paths):
        raise ValueError(
            f"`learning_rates` must have one number for each checkpoint, but there are {len(given)} for {len(paths)}."
        )
    for rate in given:
        check_number("learning_rates", rate, least=0, most=LARGEST_RATE)
