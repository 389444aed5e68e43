"""
Adam's metric of an index that was recorded with `metric="optimizer"`: what its rows were divided by, token by token.

There the inner product of two gradients is `<g, g'> / (sqrt(v) + eps)`, which is the plain one of `g / divisor` and
`g' / divisor` with `divisor = sqrt(sqrt(v) + eps)`. Rows are stored divided so, before they are projected. A query needs the
divisors of its tokens; they are kept for the tokens that some example holds, as no other meets a row of its own:

| column | |
|---|---|
| `checkpoint` | number of the checkpoint |
| `token_id` | ascending |
| `divisor` | as many numbers as the embeddings are wide, above 0; of float16 where the rows are no more exact, and it can hold them |
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from hf_doge.artifacts.influence.manifest import (
    FITTED_VERSION,
    FORMAT_VERSION,
    LAYERS_VERSION,
    MEASURED_VERSION,
    SETTINGS,
    checkpoint_number,
    fits_basis,
    read_config,
)
from hf_doge.artifacts.parquet import open_parquet, read_parquet, to_parquet
from hf_doge.files import sha256, write_atomically
from hf_doge.gradients.token_rows import TokenRows

Divisors = Callable[[Tensor], Tensor]  # tokens (n,) -> what their rows are divided by, (n, width), above 0

_FILE = "tokens.parquet"
_FLOAT16 = (2.0**-14, 65504.0)  # what float16 holds without losing digits
_ROUNDING = 2.0**-10  # of float16, relative
_KINDS = {"float16": pa.float16(), "float32": pa.float32()}


def metric_of(config: Mapping[str, Any]) -> str:
    """
    The metric of an index, as its config.json tells it.

    Returns:
        `str`: `"gradient"`, `"optimizer"`, `"auto"` while that is not decided, or `"one-sided"` of indices that an earlier
        version recorded with `second_moment=True`: their rows are divided by `sqrt(v) + eps`, for queries that are not.
    """
    metric = config.get("metric") or ("one-sided" if config.get("second_moment") else "gradient")
    return "gradient" if metric == "auto" and config["checkpoints"] else metric  # recorded by an earlier version


def with_metric(config: Mapping[str, Any], metric: str, why: str | None) -> dict[str, Any]:
    """The content of config.json with a metric, and in words why it is that one."""
    told = {**config.get("metadata", {}), "metric": why}
    return {
        **config,
        **metric_settings(metric),
        "format_version": version_of({**config, "metric": metric}),
        "metadata": {name: value for name, value in told.items() if name != "metric" or why is not None},
    }


def version_of(config: Mapping[str, Any]) -> str:
    """The format of an index: older readers would take rows in the optimizer's metric, of layers or in a basis for others."""
    if fits_basis(config):
        return FITTED_VERSION
    if config.get("layers") is not None:
        return LAYERS_VERSION
    return MEASURED_VERSION if config.get("metric") == "optimizer" else FORMAT_VERSION


def metric_settings(metric: str) -> dict[str, Any]:
    """What config.json says of a metric among its settings."""
    return {"metric": metric, "second_moment": metric == "optimizer"}


def continued_metric(folder: Path, asked: str) -> str:
    """
    The metric of the index that is in a folder; what is asked for where there is none, or none with a checkpoint.

    Raises:
        ValueError: It has another one.
    """
    config = _config_of(folder)
    if config is None or not is_decided(config):
        return asked
    found = "gradient" if metric_of(config) == "gradient" else "optimizer"
    if asked not in ("auto", found):
        raise ValueError(
            f"The influence index in {str(folder)!r} has another configuration: all its checkpoints are recorded with"
            f" `metric={found!r}`, but got {asked!r}. Continue it with the same, or choose another folder."
        )
    return found


def continued_settings(folder: Path, asked: str) -> dict[str, Any]:
    """What config.json of an index says of its metric, or will say."""
    config = _config_of(folder)
    if config is None:
        return metric_settings(asked)
    return {key: config.get(key, SETTINGS[key]) for key in metric_settings(asked)}


def is_decided(config: Mapping[str, Any]) -> bool:
    """Whether its metric can no longer be another. Earlier versions did not name it, and what they began stays theirs."""
    return bool(config["checkpoints"]) or config.get("metric") is None


@dataclass
class CheckpointMetric:
    """
    The metric at one checkpoint, for the tokens that some example holds.

    Attributes:
        tokens (`numpy.ndarray` of shape `(num_tokens,)`): Ascending.
        divisors (`torch.Tensor` of shape `(num_tokens, width)`).
    """

    tokens: np.ndarray
    divisors: Tensor

    def measured(self, rows: TokenRows) -> TokenRows:
        """
        Queries in this metric. Rows of tokens that no example holds are 0: they meet no row of the same token, and their metric
        is not known (the optimizer has most often never moved them, so that their length would be one over `eps`).
        """
        tokens = rows.tokens.cpu().numpy()
        places = np.searchsorted(self.tokens, tokens)
        known = np.flatnonzero(places < len(self.tokens))
        known = known[self.tokens[places[known]] == tokens[known]]
        found = torch.zeros_like(rows.rows)
        divisors = self.divisors[torch.from_numpy(places[known])].to(rows.rows)
        kept = torch.from_numpy(known)
        found[kept] = rows.rows[kept] / divisors
        return TokenRows(rows.offsets, rows.tokens, found, rows.virtual)

    def divisor(self, token: int) -> Tensor:
        """What the rows of one of `tokens` are divided by, `(width,)` in float32."""
        return self.divisors[int(np.searchsorted(self.tokens, token))].float()


def write_metric(
    folder: Path, segments: Sequence[Path], divisors: Divisors, *, config: Mapping[str, Any], checkpoint: int
) -> dict[str, Any] | None:
    """
    Write the metric of a checkpoint.

    Args:
        folder (`Path`): Where to.
        segments (`Sequence[Path]`): The files of its rows, whose tokens are wanted.
        divisors (`Callable`): What the rows were divided by.
        config (`Mapping`): The content of config.json.
        checkpoint (`int`): Its number.

    Returns:
        `dict`, *optional*: `path` (within `folder`), `sha256` and `num_tokens`; nothing where no example has a row.
    """
    parts = [np.unique(pq.read_table(path, columns=["token_id"])["token_id"].to_numpy()) for path in segments]
    tokens = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int32)
    if not len(tokens):
        return None
    values = divisors(torch.from_numpy(tokens.astype(np.int64))).float().cpu()
    smallest, largest = values.aminmax()
    exact = config["dtype"] == "float32" or float(smallest) < _FLOAT16[0] or float(largest) > _FLOAT16[1]
    stored = (values if exact else values.half()).numpy()
    column = pa.array(stored.reshape(-1), type=_KINDS[str(stored.dtype)])
    table = pa.table(
        {
            "checkpoint": pa.array(np.full(len(tokens), checkpoint, dtype=np.int32)),
            "token_id": pa.array(tokens.astype(np.int32)),
            "divisor": pa.FixedSizeListArray.from_arrays(column, config["width"]),
        }
    )
    content = to_parquet(table, use_dictionary=["checkpoint"], write_statistics=["checkpoint", "token_id"])
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _FILE, content)
    return {"path": _FILE, "sha256": sha256(content), "num_tokens": len(tokens)}


def read_metric(folder: Path, config: Mapping[str, Any], checkpoint: int, *, held: np.ndarray) -> CheckpointMetric:
    """
    The metric of an index at one checkpoint.

    Args:
        folder (`Path`), config (`Mapping`): The index, and the content of its config.json.
        checkpoint (`int`): Position in `config["checkpoints"]`.
        held (`numpy.ndarray`): The tokens that have rows.

    Raises:
        ValueError: A file cannot be of this index. Names it and what is wrong.
    """
    entry, number = config["checkpoints"][checkpoint], checkpoint_number(config["checkpoints"], checkpoint)

    def require(holds: Any, law: str) -> None:
        if not holds:
            raise ValueError(
                f"The metric of checkpoint {entry['name']!r} in {str(folder)!r} is damaged or was manipulated: {law}. Fetch the"
                " index again."
            )

    empty = (np.zeros(0, np.int64), np.zeros((0, config["width"]), np.float32))
    parts = [_read(folder / file["path"], config, number) for file in entry["metric"]] or [empty]
    found, values = np.concatenate([one for one, _ in parts]), np.concatenate([one for _, one in parts])
    # Examples that were added may hold the tokens of those before, and then with the same divisors.
    tokens, first, places = np.unique(found, return_index=True, return_inverse=True)
    divisors = values[first]
    agree = np.allclose(values, divisors[places], rtol=_ROUNDING, atol=0)
    require(agree, "its files must agree on the divisors of a token")
    require(np.isin(held, tokens).all(), "it must have the divisors of all tokens that have rows")
    return CheckpointMetric(tokens, torch.from_numpy(divisors))


def _read(path: Path, config: Mapping[str, Any], number: int) -> tuple[np.ndarray, np.ndarray]:
    def require(holds: Any, law: str) -> None:
        if not holds:
            raise ValueError(
                f"The metric in {str(path)!r} is damaged or was manipulated: {law}. Fetch the index again."
            )

    width = config["width"]
    with open_parquet(path, str(path)) as file:
        names, types = file.schema_arrow.names, file.schema_arrow.types
        kinds = [[pa.int32(), pa.int32(), pa.list_(kind, width)] for kind in _KINDS.values()]
        require(
            names == ["checkpoint", "token_id", "divisor"] and types in kinds,
            f"columns must be `checkpoint`, `token_id` and `divisor`, a list of {width} numbers",
        )
        require(file.metadata.num_rows <= config["vocabulary_size"], "no token may have two rows")
    table = read_parquet(path, str(path)).combine_chunks()
    flat = table["divisor"].combine_chunks().flatten()
    require(not any(column.null_count for column in table.columns) and not flat.null_count, "no value may be null")
    tokens = table["token_id"].to_numpy().astype(np.int64)
    require((table["checkpoint"].to_numpy() == number).all(), f"`checkpoint` must be {number}")
    require(
        len(tokens) == 0
        or (tokens[0] >= 0 and tokens[-1] < config["vocabulary_size"] and (np.diff(tokens) > 0).all()),
        f"`token_id` must ascend within [0, {config['vocabulary_size']})",
    )
    divisors = flat.to_numpy().reshape(len(tokens), width)
    require((np.isfinite(divisors) & (divisors > 0)).all(), "`divisor` must be finite and above 0")
    return tokens, divisors


def _config_of(folder: Path) -> dict[str, Any] | None:
    """That of an index; what is wrong with any other is for the writer to say."""
    try:
        return read_config(folder)
    except (FileNotFoundError, ValueError):
        return None
