"""What is to be known of the training examples."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def ordered_examples(table: pa.Table, num_examples: int) -> pa.Table:
    """
    The table by ascending `example_id`.

    Raises:
        ValueError: The column is missing, or does not hold each of `0 ... num_examples - 1` once.
    """
    if "example_id" not in table.column_names:
        raise ValueError(f"The examples must have a column `example_id`, but they have {table.column_names}.")
    position = table.column_names.index("example_id")
    table = table.set_column(position, "example_id", pc.cast(table["example_id"], pa.int64()))
    ids = table["example_id"].to_numpy()
    unknown = ids[(ids < 0) | (ids >= num_examples)]
    if len(unknown):
        raise ValueError(f"Each `example_id` must be in [0, {num_examples}), but got {unknown[:5].tolist()}.")
    counts = np.bincount(ids, minlength=num_examples)
    for problem, wrong in (("repeat", counts > 1), ("are missing", counts == 0)):
        if wrong.any():
            raise ValueError(
                f"Each `example_id` in [0, {num_examples}) must be there once, but {np.flatnonzero(wrong)[:5].tolist()}"
                f" {problem}."
            )
    return table if (np.diff(ids) > 0).all() else table.take(pa.array(np.argsort(ids)))
