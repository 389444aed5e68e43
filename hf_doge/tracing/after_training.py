"""Recording a dataset at checkpoints that a Trainer has saved, after the training."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_doge.artifacts.influence import IndexWriter
from hf_doge.artifacts.influence.manifest import MANIFEST, read_config
from hf_doge.checks import LARGEST_RATE, check_number
from hf_doge.gradients.embedding_uses import input_embedding_matrix
from hf_doge.tracing.batches import SequentialBatches
from hf_doge.tracing.examples import Examples, padding_collator, prune_columns
from hf_doge.tracing.limits import takes_padding
from hf_doge.tracing.models import model_fingerprint
from hf_doge.tracing.opening import SharedIndex, open_shared_index
from hf_doge.tracing.pretrained import load_model
from hf_doge.tracing.processes import default_device, join_processes, run_on_main_process
from hf_doge.tracing.recording import encoding_of, make_recorder, record_checkpoint
from hf_doge.tracing.saved_checkpoints import describe_checkpoint, in_order_of_steps, stored_path
from hf_doge.tracing.second_moments import require_saved_optimizer, saved_group_rate, saved_second_moments
from hf_doge.tracing.settings import RecordingSettings


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
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
    add_examples: bool = False,
    encoding: Mapping[str, Any] | None = None,
) -> IndexWriter:
    """
    Record a dataset at checkpoints that a Trainer has saved before; those that the index has whole are left as they are.

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
            Of `record="checkpoint"`. With `second_moment`, Adam's second moments of the input embeddings are read from the
            `optimizer.pt` that the Trainer saved in each checkpoint, see [`saved_second_moments`]; the rows are those
            that `TracInWECallback(second_moment=True)` would have recorded in training.
        learning_rates (`Sequence[float]`, *optional*):
            In force at each checkpoint, in the order of `checkpoints`; else read from its `trainer_state.json`, if the Trainer logged at that very step.
        batch_size (`int`): How many examples at once; changes no row.
        device (`str` or `torch.device`, *optional*): Where to compute; a GPU if there is one.
        seed (`int`): Of whatever the collator draws.
        progress (`bool`): Whether to show progress bars.
        add_examples (`bool`):
            Add to a whole index the examples of `dataset` that come behind its own, with the settings that it was made with
            and at all of its checkpoints, in any order. They are written to further files, which show all at once when
            the last checkpoint has them; after an interruption the same call goes on.
        encoding (`Mapping`, *optional*): What is known of how texts became tokens and labels, for queries, see [`Encoding`].

    Returns:
        `IndexWriter`: of the index, closed; on the main process its `checkpoint_names` say what it holds.

    Raises:
        FileNotFoundError: if a checkpoint is no folder with a model, or with `second_moment` has no `optimizer.pt`.
        BlockingIOError: if another process is writing the index.
        ValueError: if a learning rate is unknown, the checkpoints' embeddings differ in shape, or an example cannot be
            recorded; what was recorded before stays. With `second_moment` also if `optimizer.pt` is not of Adam, or it is
            not certain which of its entries belongs to the embeddings. With `add_examples` also if `dataset` begins with other examples
            than the index, or `checkpoints` are not those of the index.
        ProcessFailedError: if another process raised an error or was killed.
    """
    join_processes()
    settings = settings or RecordingSettings()
    if isinstance(checkpoints, str | os.PathLike):
        raise ValueError(f"`checkpoints` must be a list of folders, but got {str(checkpoints)!r} alone.")
    paths = [Path(os.path.abspath(checkpoint)) for checkpoint in checkpoints]  # '.' has a name too
    _require_after_training(settings, paths, learning_rates)
    if not add_examples:
        order = in_order_of_steps(paths, _recorded_steps(Path(folder)))
        paths = [paths[place] for place in order]
        learning_rates = None if learning_rates is None else [learning_rates[place] for place in order]
    recorded = _checkpoints_to_grow(Path(folder), paths, learning_rates) if add_examples else []
    facts: list[dict[str, Any] | None] = [
        None  # known from the index, once it is seen which one it is
        if add_examples
        else describe_checkpoint(path, learning_rate=None if learning_rates is None else learning_rates[position])
        for position, path in enumerate(paths)
    ]
    for path, fact in zip(paths, facts, strict=True):
        if fact is not None and learning_rates is None:
            fact["learning_rate"] = saved_group_rate(
                path, fact["learning_rate"], partial(load_model, path, trainable=True)
            )
    device = device or default_device()
    whole = {} if add_examples else _recorded_steps(Path(folder))
    if settings.second_moment:
        for path, fact in zip(paths, facts, strict=True):
            if fact is None or fact["name"] not in whole:
                require_saved_optimizer(path)  # now, not hours later
    index: SharedIndex | None = None
    batches: SequentialBatches | None = None
    taken: list[str] = []  # checkpoints that a folder before was found to be
    try:
        for path, fact in zip(paths, facts, strict=True):
            if index is not None and fact is not None and index.has_whole(fact["name"]):
                continue
            dtypes = next((entry.get("dtypes") for entry in recorded if entry["name"] == path.name), None)
            model = load_model(path, dtypes=dtypes, device=device, trainable=settings.second_moment)
            if fact is None:
                fact = _recorded_facts(recorded, model, path, taken=taken)
                taken.append(fact["name"])
            recorder = make_recorder(model, settings, tokenizer)
            if index is not None:
                index.writer.require_embeddings(input_embedding_matrix(model), type(model).__name__)
            moments = None
            if settings.second_moment and fact["name"] not in whole:
                moments = saved_second_moments(path, model)
            if index is None:
                examples = dataset if isinstance(dataset, Examples) else Examples(dataset, dataset)
                examples = Examples(prune_columns(examples.recorded, model), examples.described)
                pad_token_id = getattr(getattr(model, "config", None), "pad_token_id", None)
                collator = collator or padding_collator(
                    tokenizer, pad_token_id=pad_token_id, vocabulary_size=len(input_embedding_matrix(model))
                )
                at_once = batch_size if takes_padding(model) else 1
                batches = SequentialBatches(examples.recorded, collator, batch_size=at_once, seed=seed)
                index = open_shared_index(
                    folder,
                    model=model,
                    dataset=examples,
                    tokenizer=tokenizer,
                    settings=settings,
                    metadata=partial(encoding_of, batches, tokenizer, known=encoding),
                    seed=seed,
                    add_examples=add_examples,
                )
            index.writer.require_embeddings(input_embedding_matrix(model), type(model).__name__)
            if not index.has_whole(fact["name"]):
                record_checkpoint(
                    index,
                    recorder,
                    batches,
                    {**fact, "path": stored_path(path, index.writer.folder)},
                    second_moments=moments,
                    progress=progress,
                )
        run_on_main_process(lambda heartbeat: index.writer.require_grown())
    finally:
        if index is not None:
            index.close()
    return index.writer


def _recorded_steps(folder: Path) -> dict[str, int]:
    """Name -> step of the checkpoints that an index has, if it is there."""
    if not (folder / MANIFEST).is_file():
        return {}
    return {entry["name"]: entry["step"] for entry in read_config(folder)["checkpoints"]}


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
