"""Where learned weights come from: data, model and software, as the artifact records them."""

import hashlib
import json
import re
from dataclasses import MISSING, fields
from enum import Enum
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

from hf_doge.artifacts.provenance import describe_dataset, describe_model, describe_process
from hf_doge.sampling.domains import DomainIndex, StreamDomains
from hf_doge.sampling.lengths import is_list
from hf_doge.text import public_content, public_name
from hf_doge.training.global_batch import examples_per_step

_NUM_SAMPLED, _NUM_READ_AT_ONCE, _NUM_BYTES_READ = 16_384, 64, 32_000_000  # of a domain for its fingerprint

# Where things go and how they are shown, which changes no number, and differs from machine to machine.
_UNTOLD = re.compile(
    r"^(output_dir|logging_.*|log_.*|report_to|run_name|project|trackio_.*|disable_tqdm|hub_.*|push_to_hub.*|save_.*|"
    r"eval_(strategy|steps|delay|on_start)|do_.*|dataloader_(pin|num|prefetch|persistent)_.*|local_rank|_n_gpu|deepspeed_plugin|resume_from_checkpoint|ddp_.*)$"
)


def describe_domains(
    dataset: Dataset | IterableDataset, domains: DomainIndex | StreamDomains, *, domain_column: str
) -> dict[str, dict[str, Any]]:
    """
    Rows and, where the dataset is tokenised, tokens of each domain, and a [`fingerprint_rows`] of what they hold. All are
    `None` for streams, of which no more is known than what was consumed.

    Tokens are entries of `input_ids`: padding counts if the dataset is padded already.
    """
    if domains.sizes is None:
        return {name: {"num_rows": None, "num_tokens": None, "fingerprint": None} for name in domains.names}
    tokens, stored = _count_tokens(dataset), _stored_content(dataset, without=domain_column)
    described = {}
    for position, name in enumerate(domains.names):
        size = int(domains.sizes[position])
        rows = domains.rows(np.full(size, position), np.arange(size))
        described[name] = {
            "num_rows": size,
            "num_tokens": None if tokens is None else int(tokens[rows].sum()),
            "fingerprint": _fingerprint(stored, rows),
        }
    return described


def fingerprint_rows(dataset: Dataset, rows: np.ndarray, *, without: str) -> str:
    """
    Digest of content: how many rows there are, and what up to 16,384 of them hold, evenly spaced, the first and the last
    among them; fewer if they are so long that 32 MB are read before. The same content gives the same 16 hex digits,
    wherever it lies and however it was loaded.

    Args:
        dataset (`Dataset`): Read as it is stored: no transform runs, no file is opened.
        rows (`np.ndarray`): Their numbers, in order.
        without (`str`): A column that is no content of theirs.
    """
    return _fingerprint(_stored_content(dataset, without=without), rows)


def _stored_content(dataset: Dataset, *, without: str) -> Dataset:
    """The columns of a dataset but for one, as tables of Arrow."""
    return dataset.with_format("arrow", columns=[name for name in dataset.column_names if name != without])


def _fingerprint(stored: Dataset, rows: np.ndarray) -> str:
    count, columns = len(rows), sorted(stored.format["columns"])
    chosen = rows if count <= _NUM_SAMPLED else rows[np.arange(_NUM_SAMPLED) * (count - 1) // (_NUM_SAMPLED - 1)]
    digest = hashlib.sha256(str(count).encode())
    num_read = 0
    num_parts = ceil(len(chosen) / _NUM_READ_AT_ONCE) if columns else 0
    for part in range(num_parts):  # each from end to end
        table = stored[chosen[part::num_parts].tolist()]
        for column in columns:
            content = _content(column, table.column(column))
            digest.update(content)
            num_read += len(content)
        if num_read > _NUM_BYTES_READ:
            break
    return digest.hexdigest()[:16]


def _content(name: str, column: pa.ChunkedArray) -> bytes:
    """A column as bytes, the same in whatever type it is stored. Of tokens it is their numbers, which is much faster than text."""
    kind = column.type
    if is_list(kind) and pa.types.is_integer(kind.value_type) and not column.null_count:
        numbers = pc.list_flatten(column)
        if len(numbers) and not numbers.null_count:
            lengths = pc.list_value_length(column).to_pylist()
            return json.dumps([name, lengths]).encode() + numbers.to_numpy().astype("<i8").tobytes()
    values = [_without_folder(value) for value in column.to_pylist()]
    return json.dumps([name, values], sort_keys=True, default=_to_text).encode()


def _without_folder(value: Any) -> Any:
    """An image or a sound as it is stored: its bytes, or the name of its file."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["bytes"] or (value["path"] and Path(value["path"]).name)
    return value


def _to_text(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def _count_tokens(dataset: Dataset) -> np.ndarray | None:
    """Length of `input_ids` of every row, read from the Arrow table without decoding; `None` where there is none."""
    if "input_ids" not in dataset.column_names:
        return None
    column = dataset.data.column("input_ids")
    if not is_list(column.type):
        return None
    lengths = pc.list_value_length(column).to_numpy()
    if dataset._indices is not None:
        lengths = lengths[dataset._indices.column(0).to_numpy()]
    return lengths


def describe_run(trainer: Trainer, args: TrainingArguments) -> dict[str, Any]:
    """Identity of model and tokenizer, what was run, and the versions of what ran it; of local paths the last part only."""
    model, tokenizer = trainer.model, trainer.processing_class
    config: Any = getattr(model, "config", None)
    return {
        "model": {
            **describe_model(model),
            "config": public_content(to_plain(config.to_diff_dict())) if hasattr(config, "to_diff_dict") else None,
        },
        "tokenizer": None
        if tokenizer is None
        else {
            "class": type(tokenizer).__name__,
            "name_or_path": public_name(getattr(tokenizer, "name_or_path", None)) or "",
            "vocab_size": len(tokenizer) if hasattr(tokenizer, "__len__") else None,
        },
        "dataset": describe_dataset(trainer.train_dataset),
        "training": {
            "max_steps": trainer.state.max_steps,
            "global_step": trainer.state.global_step,
            "train_batch_size": examples_per_step(args),
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "seed": args.seed,
            "arguments": describe_arguments(args),
            "num_processes": args.world_size,
            "device": args.device.type,
            "total_flos": float(trainer.state.total_flos) or None,
        },
        **describe_process(),
    }


def describe_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The arguments of the Trainer itself that are not its defaults, but for those that change no number."""
    described = {}
    for argument in fields(TrainingArguments):
        if argument.name == "fsdp_config" and not args.fsdp:
            continue  # transformers 5.0 fills it with defaults also where FSDP is off
        value = getattr(args, argument.name)
        default = argument.default if argument.default_factory is MISSING else argument.default_factory()
        if hasattr(value, "to_dict"):  # made of the default by the arguments themselves
            default = type(value)().to_dict()
            value = {key: part for key, part in value.to_dict().items() if part != default[key]}
            default = {}
        # False, 0, "" or [] in place of None sets nothing.
        is_set = argument.init and value != default and (value or default)
        if is_set and not _UNTOLD.match(argument.name):
            described[argument.name] = public_content(to_plain(value.value if isinstance(value, Enum) else value))
    return described


def to_plain(value: Any) -> Any:
    """What JSON can hold, the rest as text: no oddity of a model's configuration may cost the weights."""
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)  # in one order in every process
    if isinstance(value, dict):
        return {str(key): to_plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(entry) for entry in value]
    is_plain = value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and isfinite(value))
    return value if is_plain else str(value)
