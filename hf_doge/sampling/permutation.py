"""Shuffles that are functions: where each position of a domain goes, computed for any position alone, without a table."""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_NUM_ROUNDS = 8
_SMALL_SIZE = 256  # below this there are so few rows and columns that 8 rounds leave some orders likelier than others
_NUM_ROUNDS_SMALL = 16


def mix(values: np.ndarray) -> np.ndarray:
    """
    Scramble 64-bit integers (the finaliser of splitmix64): a bijection under which close inputs have unrelated outputs.

    Args:
        values (`np.ndarray` of `uint64`): Any shape.

    Returns:
        `np.ndarray` of `uint64`, same shape.
    """
    values = values ^ (values >> np.uint64(30))
    values *= _MULTIPLIER_1
    values ^= values >> np.uint64(27)
    values *= _MULTIPLIER_2
    values ^= values >> np.uint64(31)
    return values


def derive_key(*parts: int | str) -> int:
    """Hash seeds, names and numbers into one 64-bit key, the same on every machine, process and Python version."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def pass_keys(domain_keys: np.ndarray, passes: np.ndarray) -> np.ndarray:
    """Key of the shuffle each domain uses in its pass number `passes`; arrays of one shape, `uint64` out."""
    return mix(domain_keys + passes.astype(np.uint64) * _GOLDEN)


def permute(positions: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """
    Where a keyed shuffle of `range(size)` puts each position.

    For one size and key this is a bijection of `range(size)`. It is a Feistel network: the positions fill a rectangle
    of about sqrt(size) x sqrt(size), rows and columns are shifted in turn by amounts that depend on the other
    coordinate and the key, and the few cells of the rectangle beyond `size` are walked through until the walk is back
    inside. Memory and time per position depend on neither `size` nor how many positions are asked for.

    Args:
        positions (`np.ndarray` of integers, shape `(N,)`): In `[0, size)`.
        sizes (`np.ndarray` of integers, shape `(N,)`): In `[1, 2**62]`.
        keys (`np.ndarray` of `uint64`, shape `(N,)`): One key per shuffle.

    Returns:
        `np.ndarray` of `int64` and shape `(N,)`: shuffled positions, in `[0, size)`.
    """
    sizes = sizes.astype(np.uint64)
    num_rows = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64)
    num_columns = (sizes + num_rows - np.uint64(1)) // num_rows
    cells = positions.astype(np.uint64)
    small = sizes < _SMALL_SIZE
    for walking, num_rounds in ((np.flatnonzero(~small), _NUM_ROUNDS), (np.flatnonzero(small), _NUM_ROUNDS_SMALL)):
        while walking.size:
            moved = _shift_rectangle(
                cells[walking], num_rows[walking], num_columns[walking], keys[walking], num_rounds=num_rounds
            )
            cells[walking] = moved
            walking = walking[moved >= sizes[walking]]
    return cells.astype(np.int64)


def _shift_rectangle(
    cells: np.ndarray, num_rows: np.ndarray, num_columns: np.ndarray, keys: np.ndarray, *, num_rounds: int
) -> np.ndarray:
    """One pass of the Feistel network over the cells of a rectangle: a bijection of `range(rows * columns)`."""
    row, column = np.divmod(cells, num_columns)
    for round_number in range(num_rounds):
        keys = keys + _GOLDEN
        if round_number % 2:
            column = _add_modulo(column, _fraction_of(num_columns, row ^ keys), num_columns)
        else:
            row = _add_modulo(row, _fraction_of(num_rows, column ^ keys), num_rows)
    return row * num_columns + column


def _fraction_of(limits: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Pseudo-random integers in `[0, limit)`, `limit < 2**32`, without the slow integer division."""
    return ((mix(inputs) >> np.uint64(32)) * limits) >> np.uint64(32)


def _add_modulo(values: np.ndarray, shifts: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """`(values + shifts) % limits` for operands below the limit."""
    values = values + shifts
    return np.where(values >= limits, values - limits, values)
