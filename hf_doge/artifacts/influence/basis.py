"""
The basis that rows are projected to at each checkpoint of an index with `projection="pca"`, fitted to rows of the checkpoint itself.

With a basis `B (width, stored_width)` of orthonormal columns, the principal components of the directions of some training
examples' rows, a row `g` is stored as `g B`, and a query is projected by the same. It is a file of the checkpoint, `basis/<checkpoint>/basis.parquet`:

| column | |
|---|---|
| `checkpoint` | number of the checkpoint |
| `component` | 0, 1, ..., the one that holds most of the rows first |
| `direction` | as many numbers as the rows are wide, float32 |
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hf_doge.artifacts.influence.manifest import checkpoint_number
from hf_doge.artifacts.parquet import open_parquet, read_parquet, to_parquet
from hf_doge.files import sha256

BASIS_FILE = "basis.parquet"

_TOLERANCE = 1e-3  # of the inner products of the components, by which other numbers are known


def encode_basis(basis: Tensor, *, checkpoint: int) -> bytes:
    """The file of a basis `(width, num_components)` of the checkpoint with this number."""
    directions = basis.detach().float().cpu().T.contiguous().numpy()
    count, width = directions.shape
    column = pa.FixedSizeListArray.from_arrays(pa.array(directions.reshape(-1)), width)
    table = pa.table(
        {
            "checkpoint": pa.array(np.full(count, checkpoint, dtype=np.int32)),
            "component": pa.array(np.arange(count, dtype=np.int32)),
            "direction": column,
        }
    )
    return to_parquet(table, use_dictionary=["checkpoint"], write_statistics=["checkpoint", "component"])


def read_basis(folder: Path, config: Mapping[str, Any], checkpoint: int) -> Tensor:
    """
    The basis of an index at one checkpoint, `(width, stored_width)` in float32.

    Args:
        folder (`Path`), config (`Mapping`): The index, and the content of its config.json.
        checkpoint (`int`): Position in `config["checkpoints"]`.

    Raises:
        ValueError: The file cannot be of this index. Names it and what is wrong.
    """
    (file,) = config["checkpoints"][checkpoint]["basis"]
    number = checkpoint_number(config["checkpoints"], checkpoint)
    return decode_basis(folder / file["path"], config, number=number, checksum=file["sha256"])


def decode_basis(path: Path, config: Mapping[str, Any], *, number: int, checksum: str) -> Tensor:
    """
    What [`encode_basis`] has written to a file.

    Raises:
        FileNotFoundError, ValueError: It is not there, or is not what it was. Names it and what is wrong.
    """

    def require(holds: Any, law: str) -> None:
        if not holds:
            raise ValueError(
                f"The basis in {str(path)!r} is damaged or was manipulated: {law}. Fetch the index again."
            )

    width, count = config["width"], config["stored_width"]
    require(sha256(path) == checksum, "its sha256 is not the recorded one")
    with open_parquet(path, str(path)) as file:
        require(
            file.schema_arrow.names == ["checkpoint", "component", "direction"]
            and file.schema_arrow.types == [pa.int32(), pa.int32(), pa.list_(pa.float32(), width)],
            f"columns must be `checkpoint`, `component` and `direction`, a list of {width} numbers",
        )
        require(file.metadata.num_rows == count, f"it must have {count} components, but has {file.metadata.num_rows}")
    table = read_parquet(path, str(path)).combine_chunks()
    flat = table["direction"].combine_chunks().flatten()
    require(not any(column.null_count for column in table.columns) and not flat.null_count, "no value may be null")
    require((table["checkpoint"].to_numpy() == number).all(), f"`checkpoint` must be {number}")
    require((table["component"].to_numpy() == np.arange(count)).all(), "`component` must count from 0")
    directions = torch.from_numpy(flat.to_numpy().reshape(count, width).copy())
    products = directions.double() @ directions.double().T
    good = torch.isfinite(products).all() and (products - torch.eye(count)).abs().max() <= _TOLERANCE
    require(good, "components must be orthonormal")
    return directions.T
