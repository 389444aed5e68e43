"""What config.json of an index may claim: whoever makes one for others can write anything into it."""

import math
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from hf_doge.checks import require_printable

_LARGEST = {
    "width": 2**20,
    "stored_width": 2**20,
    "vocabulary_size": 2**26,  # 512 MiB of offsets; vocabularies have some 2 ** 18 tokens
    "num_examples": 2**40,
}
# What a recording says of itself, where it says it.
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "metric": (None, "auto", "gradient", "optimizer"),
    "loss_reduction": (None, "sum", "mean"),
    "tied": (None, "input", "output", "full", "own"),
    "top_k_unit": (None, "position", "token"),
    "record": ("checkpoint", "online"),
    "special_tokens": ("count", "drop"),
}
_FLAGS = ("second_moment", "virtual", "redacted")
_SAVED_DTYPES = ("float64", "float32", "bfloat16", "float16", "int8", "uint8")
_LARGEST_PROJECTION = 2**28  # entries, of 8 bytes each


def check_claims(config: Mapping[str, Any], *, source: str) -> None:
    """
    Refuse what no index can have.

    Args:
        config (`Mapping`): Whose values are of the right types.
        source (`str`): Its name, for errors.

    Raises:
        ValueError: A size is impossible or out of all proportion, or a path leads out of the folder.
    """

    def require(holds: bool, law: str, got: Any) -> None:
        if not holds:
            raise ValueError(
                f"{source!r} {law}, but got {got!r:.80}. It is damaged or was manipulated: fetch it again."
            )

    for name, largest in _LARGEST.items():
        require(1 <= config[name] <= largest, f"must have `{name}` in [1, {largest}]", config[name])
    _check_settings(config, require, source)
    projection = config.get("projection")
    if projection is None:
        require(config["stored_width"] == config["width"], "must store rows of `width`", config["stored_width"])
    else:
        good = isinstance(projection, dict) and projection.get("width") == config["stored_width"]
        require(good and _is_count(projection.get("seed")), "must have the projection of `stored_width`", projection)
        require(projection.get("kind", "pca") == "pca", "must have a known `kind` of projection", projection)
        fits = "kind" not in projection or config["stored_width"] <= config["width"]
        require(fits, "must have no more components than `width`", config["stored_width"])
        entries = config["width"] * config["stored_width"]
        require(
            entries <= _LARGEST_PROJECTION, f"must have a projection of at most {_LARGEST_PROJECTION} numbers", entries
        )
    if config.get("layers") is not None:
        require(_are_layers(config), "must have layers whose rows are numbered behind the words", config["layers"])
    for path, checksum in config["files"].items():
        require_inside(path, source=source)
        require(isinstance(checksum, str), "must have the sha256 of each of its `files`", checksum)
    numbers = [entry.get("number", place) for place, entry in enumerate(config["checkpoints"])]
    good = all(_is_count(number) and 0 <= number < 2**31 for number in numbers) and len(set(numbers)) == len(numbers)
    require(good, "must have a `number` of its own for each checkpoint", numbers)
    for checkpoint in config["checkpoints"]:
        for key in ("name", "revision", "model_class", "fingerprint"):
            told = checkpoint.get(key)
            require(told is None or isinstance(told, str), f"must have text or nothing under `{key}`", told)
            require_printable(f"What {source!r} says of a checkpoint", [told])
        step, epoch = checkpoint.get("step"), checkpoint.get("epoch")
        require(step is None or (_is_count(step) and 0 <= step < 2**63), "must have steps of at least 0", step)
        require(epoch is None or _is_finite(epoch), "must have finite epochs", epoch)
        path = checkpoint.get("path")
        require(path is None or isinstance(path, str), "must have text or nothing under `path`", path)
        require(".." not in PurePosixPath(path or "").parts, "must not lead out of the folder by `path`", path)
        dtypes = checkpoint.get("dtypes")
        require(dtypes is None or _are_dtypes(dtypes), "must have names of dtypes under `dtypes`", dtypes)
        rate = checkpoint["learning_rate"]
        require(_is_finite(rate) and rate >= 0, "must have finite learning rates of at least 0", rate)
        num_bases = int(isinstance(projection, dict) and "kind" in projection)
        bases = checkpoint.get("basis", ())
        require(len(bases) == num_bases, f"must have {num_bases} files under `basis` of a checkpoint", bases)
        for file in (*checkpoint["files"], *checkpoint.get("metric", ()), *bases):
            for key in ("path", "offsets_path"):
                if file.get(key) is not None:
                    require_inside(file[key], source=source)
        for file in checkpoint["files"]:
            require(file["num_examples"] >= 1, "must have examples in each file", file["num_examples"])
            most = file["num_examples"] * config["vocabulary_size"]
            require(
                0 <= file["num_rows"] <= most, f"must have at most {most} rows in {file['path']!r}", file["num_rows"]
            )
            scale = file["scale"]
            require(_is_finite(scale) and scale > 0, "must have finite scales above 0", scale)


def _check_settings(config: Mapping[str, Any], require: Callable[[bool, str, Any], None], source: str) -> None:
    for name, choices in _CHOICES.items():
        told = config.get(name, choices[0])
        require(told in choices, f"must have one of {list(choices)} under `{name}`", told)
    for name in _FLAGS:
        told = config.get(name, False)
        require(isinstance(told, bool), f"must have true or false under `{name}`", told)
    loss_fn, top_k, tokens = config.get("loss_fn"), config.get("top_k"), config["special_token_ids"]
    require(loss_fn is None or (isinstance(loss_fn, str) and loss_fn != ""), "must name its `loss_fn`", loss_fn)
    require(top_k is None or (_is_count(top_k) and 1 <= top_k < 2**63), "must have a `top_k` of at least 1", top_k)
    good = all(_is_count(one) and 0 <= one < config["vocabulary_size"] for one in tokens)
    require(good, "must have tokens of its vocabulary under `special_token_ids`", tokens)
    tokenizer, dataset = config.get("tokenizer"), config.get("dataset")
    require(
        tokenizer is None or _is_tokenizer(tokenizer), "must tell the size and vocabulary of `tokenizer`", tokenizer
    )
    require(dataset is None or isinstance(dataset, dict), "must have an object or nothing under `dataset`", dataset)
    require_printable(f"What {source!r} says of its recording", [loss_fn, *(tokenizer or {}).values()])


def _is_tokenizer(told: Any) -> bool:
    return (
        isinstance(told, dict)
        and _is_count(told.get("vocabulary_size"))
        and isinstance(told.get("fingerprint"), str)
        and isinstance(told.get("name"), str | None)
    )


def require_inside(path: str, *, source: str) -> None:
    """
    Raises:
        ValueError: The path of a file of an index is not plainly within the folder, on any system.
    """
    parts, windows = PurePosixPath(path).parts, PureWindowsPath(path)
    anchored = windows.drive or windows.root  # which `/` is as well
    if anchored or "\\" in path or "\0" in path or ".." in parts or not parts:
        raise ValueError(f"Files in {source!r} must lie in the folder, but got {path!r}.")


def _are_layers(config: Mapping[str, Any]) -> bool:
    """Whether `layers` are as [`ChosenLayers.to_dict`] has them, with as many rows as there are numbers for."""
    layers, width = config["layers"], config["width"]
    modules = layers.get("modules") if isinstance(layers, dict) else None
    if not isinstance(modules, list) or not modules or not all(_is_layer(one) for one in modules):
        return False
    if len({one["name"] for one in modules}) < len(modules) or not isinstance(layers.get("embedding"), bool):
        return False
    matrix, seed = layers.get("embedding_shape"), layers.get("seed")
    if not (
        isinstance(matrix, list) and len(matrix) == 2 and all(map(_is_count, [*matrix, seed])) and min(matrix) >= 1
    ):
        return False
    num_rows = sum(-(-one["kept"][0] * one["kept"][1] // width) for one in modules)
    fits = width == matrix[1] or not layers["embedding"]
    return fits and matrix[0] + num_rows == config["vocabulary_size"] and isinstance(layers.get("sha256"), str)


def _is_layer(one: Any) -> bool:
    if not isinstance(one, dict) or not isinstance(one.get("name"), str):
        return False
    require_printable("The name of a layer", [one["name"]])
    shape, kept = one.get("shape"), one.get("kept")
    if not all(isinstance(sizes, list) and len(sizes) == 2 and all(map(_is_count, sizes)) for sizes in (shape, kept)):
        return False
    sides: list[tuple[int, int]] = list(zip(shape, kept, strict=True))  # type: ignore[arg-type]
    return all(
        1 <= small <= whole <= _LARGEST["vocabulary_size"] and (small == whole or small * whole <= _LARGEST_PROJECTION)
        for whole, small in sides
    )


def _are_dtypes(dtypes: Any) -> bool:
    others = dtypes.get("parameters") if isinstance(dtypes, dict) else None
    if not isinstance(others, dict):
        return False
    return all(kind in _SAVED_DTYPES for kind in (dtypes.get("loaded"), dtypes.get("default"), *others.values()))


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**1023 and math.isfinite(value)  # integers beyond are no floats


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
