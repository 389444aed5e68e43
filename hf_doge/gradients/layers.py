"""
Which layers of a model have rows of their own, next to its words or instead of them, and how their rows are laid out.

With `x_t (d_in,)` what a linear layer reads at position `t`, and `delta_t (d_out,)` the gradient of what it returns there, its
weight has the gradient

    G = sum_t delta_t x_t^T                                           (d_out, d_in)
    P_out G P_in^T = sum_t (P_out delta_t) (P_in x_t)^T               (p_out, p_in)

the second of which has the inner products of the first in the mean over random `P` ([`projection_matrix`]), and is never wider.

Flattened, it is cut into rows, the last filled up with zeros. They have the numbers from the size of the vocabulary on, where
words have their tokens. So inner products over shared numbers, norms, files and search know of rows alone. Next to words rows are
as wide as an embedding; without words as wide as leaves least room unused.
"""

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_doge.functional.layers import projection_matrix
from hf_doge.gradients.embedding_uses import input_embedding_matrix

EMBEDDING, ADAPTERS = "embedding", "adapters"
WORDS = "input embeddings"  # what messages call the matrix of words

_WRAPPERS = re.compile(r"\.base_layer\b|\.modules_to_save\.[^.]+|^base_model\.model\.")  # of peft
_LORA = ("lora_A", "lora_B")
_LARGEST_WIDTH = 1024
_ROW_COSTS = 16  # as many numbers as a row takes besides its own: its token and example, and a step of the search
_OTHER_LORA = ("lora_embedding_A", "lora_magnitude_vector")


@dataclass(frozen=True)
class Layer:
    """
    A linear layer whose gradient is recorded.

    Attributes:
        name (`str`): Of the module in its model.
        shape (`tuple[int, int]`): `(d_out, d_in)`.
        kept (`tuple[int, int]`): `(p_out, p_in)`, as `shape` where nothing is projected.
    """

    name: str
    shape: tuple[int, int]
    kept: tuple[int, int]


@dataclass(frozen=True)
class ChosenLayers:
    """
    The layers with rows of their own.

    Attributes:
        layers (`tuple[Layer, ...]`): In the order of their rows.
        embedding_shape (`tuple[int, int]`): Of the matrix of words; as many as it has, is the number of the first row.
        width (`int`): Of a row.
        seed (`int`): Of all projections.
        embedding (`bool`): Whether words have rows too.
    """

    layers: tuple[Layer, ...]
    embedding_shape: tuple[int, int]
    width: int
    seed: int
    embedding: bool

    @property
    def num_words(self) -> int:
        """Tokens of the vocabulary: the number of the first row."""
        return self.embedding_shape[0]

    def num_rows_of(self, layer: Layer) -> int:
        """How many rows the gradient of a layer fills."""
        return -(-layer.kept[0] * layer.kept[1] // self.width)

    def cut(self, layer: Layer, values: Tensor, *, fill: float = 0.0) -> Tensor:
        """`(..., p_out, p_in)` of a layer as its rows `(..., num_rows, width)`, what is left of the last one filled up."""
        num_rows = self.num_rows_of(layer)
        flat = values.flatten(start_dim=-2)
        return F.pad(flat, (0, num_rows * self.width - flat.shape[-1]), value=fill).unflatten(
            -1, (num_rows, self.width)
        )

    @property
    def num_rows(self) -> int:
        """Rows of all layers; each example has as many."""
        return sum(map(self.num_rows_of, self.layers))

    @property
    def is_exact(self) -> bool:
        """Whether no layer is projected."""
        return all(layer.kept == layer.shape for layer in self.layers)

    def names(self) -> dict[int, str]:
        """Number of the first row -> name, of each layer."""
        names, number = {}, self.num_words
        for layer in self.layers:
            names[number] = layer.name
            number += self.num_rows_of(layer)
        return names

    def projections(self, layer: Layer) -> tuple[Tensor | None, Tensor | None]:
        """`P_out^T (d_out, p_out)` and `P_in^T (d_in, p_in)` of a layer in float64; `None` where a side is whole."""
        return tuple(  # type: ignore[return-value]
            None if whole == kept else projection_matrix(whole, kept, _seed_of(layer.name, side, self.seed))
            for side, whole, kept in zip(("out", "in"), layer.shape, layer.kept, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """For config.json, with a checksum of all signs of the projections."""
        digest = hashlib.sha256()
        for layer in self.layers:
            for matrix in self.projections(layer):
                digest.update(b"" if matrix is None else (matrix > 0).numpy().tobytes())
        return {
            "embedding": self.embedding,
            "embedding_shape": [*self.embedding_shape],
            "seed": self.seed,
            "sha256": digest.hexdigest(),
            "modules": [{"name": one.name, "shape": [*one.shape], "kept": [*one.kept]} for one in self.layers],
        }

    @staticmethod
    def from_dict(facts: Mapping[str, Any], *, width: int) -> "ChosenLayers":
        """What [`~ChosenLayers.to_dict`] was of."""
        layers = tuple(Layer(one["name"], (*one["shape"],), (*one["kept"],)) for one in facts["modules"])
        return ChosenLayers(layers, (*facts["embedding_shape"],), width, facts["seed"], facts["embedding"])


def choose_layers(
    model: nn.Module, wanted: Sequence[str], *, projection_dim: int | None = None, seed: int = 0
) -> ChosenLayers:
    """
    Find the layers that are meant.

    Args:
        model (`nn.Module`): With input embeddings.
        wanted (`Sequence[str]`):
            `"embedding"`: the words, as ever. `"adapters"`: the matrices A and B of all active LoRA adapters, each a layer.
            Anything else names linear layers: by their name in `model.named_modules()`, by its end (`"o_proj"`: those of all
            blocks), or by a pattern (`"*.1?.mlp.*"`). What peft adds to names may be left out.
        projection_dim (`int`, *optional*):
            Most numbers on each side of a gradient; a side that is no longer stays whole. If left out, adapters are whole,
            and others have as many as make one row of an embedding's width: its root.
        seed (`int`): Of the projections.

    Raises:
        ValueError: None is named; the model has no such layer, it is not linear, or quantised, or on no device, or its weight is
            the embedding matrix; or it has no LoRA adapter, or one with more than A and B.
    """
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if len(wanted) == 0:
        raise ValueError(
            "`layers` must name at least one layer, but it is empty. 'embedding' stands for the words alone."
        )
    matrix = input_embedding_matrix(model)
    found: dict[str, Layer] = {}
    modules = {name: module for name, module in model.named_modules() if ".original_module" not in name}
    for item in sorted(wanted, key=lambda item: item != ADAPTERS):  # first: a pattern may match their matrices too
        if item == EMBEDDING:
            continue
        names = _adapters(model, modules) if item == ADAPTERS else _matching(model, modules, item)
        dim = projection_dim or (None if item == ADAPTERS else isqrt(matrix.shape[1]))
        for name in names:
            shape = _shape_of(name, modules[name], matrix)
            kept = shape if dim is None else (min(shape[0], dim), min(shape[1], dim))
            found.setdefault(name, Layer(name, shape, kept))
    layers = tuple(found[name] for name in modules if name in found)
    width = matrix.shape[1] if EMBEDDING in wanted else _best_width([one.kept[0] * one.kept[1] for one in layers])
    return ChosenLayers(layers, (matrix.shape[0], matrix.shape[1]), width, seed, EMBEDDING in wanted)


def recorded_layers(config: Mapping[str, Any]) -> ChosenLayers | None:
    """
    The layers of which an index has rows, as its config.json tells; `None` where words alone have some.

    Raises:
        ValueError: Their projections cannot be drawn again.
    """
    facts = config.get("layers")
    if facts is None:
        return None
    chosen = ChosenLayers.from_dict(facts, width=config["width"])
    if chosen.to_dict()["sha256"] != facts["sha256"]:
        raise ValueError(
            f"The projections of layers must be drawn again for queries, but torch {torch.__version__} draws others than those"
            " that the index was recorded with. Use the torch it was made with."
        )
    return chosen


@dataclass(frozen=True)
class Virtual:
    """
    What has rows, but is frozen: its gradients say what training it would have done.

    Attributes:
        parts (`tuple[str, ...]`): `"embedding"` for the words, and names of layers.
        is_all (`bool`): Whether nothing that has rows is trained.
    """

    parts: tuple[str, ...]
    is_all: bool

    @staticmethod
    def of(model: nn.Module, chosen: ChosenLayers | None) -> "Virtual":
        """As the weights of a model say by `requires_grad`."""
        weights = recorded_weights(model, chosen)
        parts = [EMBEDDING if name == WORDS else name for name, weight in weights.items() if not weight.requires_grad]
        return Virtual(tuple(parts), is_all=len(parts) == len(weights))

    def warning(self) -> str:
        """What to tell whoever records them."""
        if self.is_all:
            is_words = self.parts == (EMBEDDING,)
            return (
                f"The {WORDS if is_words else 'chosen layers'} of the model are frozen, so no training example ever"
                " moved them: the recorded gradients are virtual. "
                + ("Train the embeddings too, or choose" if is_words else "Choose")
                + " layers that are trained (`layers`, of LoRA `layers='adapters'`) if you want the influence of training itself."
            )
        few = ", ".join(map(repr, self.parts[:4])) + (
            f" and {len(self.parts) - 4} more" if len(self.parts) > 4 else ""
        )
        return (
            f"The parts {few} of the model are frozen, so no training example ever moved them: their gradients are virtual, and"
            " a search counts what was trained alone, unless it is told otherwise (`virtual='count'`). Leave them out of `layers`"
            " to save their room."
        )


def virtual_rows(config: Mapping[str, Any], parts: Sequence[Any]) -> list[int]:
    """
    The numbers of the rows of some parts of an index.

    Args:
        config (`Mapping`): The content of its config.json.
        parts (`Sequence[str]`): As [`Virtual`] names them; others are ignored.
    """
    if config.get("layers") is None:
        return []
    chosen = ChosenLayers.from_dict(config["layers"], width=config["width"])
    rows = [*range(chosen.num_words)] if EMBEDDING in parts else []
    for first, layer in zip(chosen.names(), chosen.layers, strict=True):
        rows += range(first, first + chosen.num_rows_of(layer)) if layer.name in parts else ()
    return rows


def recorded_weights(model: nn.Module, chosen: ChosenLayers | None) -> dict[str, Tensor]:
    """Name -> weight of all that has rows, in their order; `"input embeddings"` first, if words have some."""
    words = {WORDS: input_embedding_matrix(model)} if chosen is None or chosen.embedding else {}
    return words | ({} if chosen is None else {name: one.weight for name, one in layer_modules(model, chosen).items()})


def layer_modules(model: nn.Module, chosen: ChosenLayers) -> dict[str, Any]:
    """
    Name -> module of each layer.

    Raises:
        ValueError: The model lacks one.
    """
    modules = dict(model.named_modules())
    missing = [layer.name for layer in chosen.layers if layer.name not in modules]
    if missing:
        raise ValueError(
            f"The model must have all layers that are recorded, but `{type(model).__name__}` lacks {missing[:3]}. Load"
            " it as it was recorded, in its adapter if it had one."
        )
    return {layer.name: modules[layer.name] for layer in chosen.layers}


def as_out_in(module: nn.Module, values: Tensor) -> Tensor:
    """What belongs to the weight of a linear layer, as `(d_out, d_in)`."""
    return values.T if hasattr(module, "nf") else values


def _best_width(sizes: Sequence[int]) -> int:
    """The width of rows, at most 1024, by which gradients of these sizes take least room; of equal ones the largest."""

    def room(width: int) -> int:
        return sum(-(-size // width) for size in sizes) * (width + _ROW_COSTS)

    return min(range(min(_LARGEST_WIDTH, max(sizes)), 0, -1), key=room)


def _seed_of(name: str, side: str, seed: int) -> int:
    """Every side of every layer is projected by a matrix of its own."""
    return int.from_bytes(hashlib.sha256(f"{seed} {side} {name}".encode()).digest()[:7])


def _is_linear(module: nn.Module) -> bool:
    """GPT-2's `Conv1D` is one whose weight is transposed; its gradient is recorded as `(d_out, d_in)` as well."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _matching(model: nn.Module, modules: Mapping[str, nn.Module], item: str) -> list[str]:
    """Names of the linear layers that an item of the list means."""
    matching = [name for name in modules if any(_means(item, one) for one in (name, _WRAPPERS.sub("", name)))]
    linear = [name for name in matching if _is_linear(modules[name])]
    if linear:
        return linear
    known = [_WRAPPERS.sub("", name) for name, module in modules.items() if _is_linear(module)]
    parts = {".".join(name.split(".")[-count:]): None for name in known for count in range(1, name.count(".") + 2)}
    if matching:
        inside = [name for name in modules if name.startswith(f"{matching[0]}.") and _is_linear(modules[name])]
        kind = type(modules[matching[0]]).__name__
        raise ValueError(
            f"`layers` must name linear layers, but {item!r} of `{type(model).__name__}` is a `{kind}`."
            + (f" Linear ones within it are {inside[:4]}." if inside else f" It has {known[:4]}, for instance.")
        )
    near = difflib.get_close_matches(item, parts, n=3, cutoff=0.4) or known[:3]
    raise ValueError(
        f"`layers` must name linear layers of the model, but `{type(model).__name__}` has none that is called {item!r}, ends"
        f" so or fits it. The nearest are {near}."
    )


def _means(item: str, name: str) -> bool:
    return name == item or name.endswith(f".{item}") or fnmatchcase(name, item)


def _adapters(model: nn.Module, modules: Mapping[str, Any]) -> list[str]:
    """Names of the matrices of the active adapters."""
    found = []
    for name, module in modules.items():
        if not all(isinstance(getattr(module, part, None), nn.ModuleDict) for part in _LORA):
            continue
        for adapter in module.active_adapters:
            others = [part for part in _OTHER_LORA if adapter in getattr(module, part, {})]
            own = [f"{name}.{part}.{adapter}" for part in _LORA if adapter in getattr(module, part)]
            if others or not all(_is_linear(modules[one]) for one in own):
                what = others[0] if others else f"{type(modules[own[0]]).__name__} matrices"
                raise _more_than_matrices(name, adapter, what, modules)
            found += own
    if not found:
        raise ValueError(
            f"`layers='adapters'` needs a model with LoRA adapters, but `{type(model).__name__}` has none that is active. Name"
            " linear layers instead, or record the adapted model (of peft) that is trained."
        )
    return found


def _more_than_matrices(name: str, adapter: str, what: str, modules: Mapping[str, nn.Module]) -> ValueError:
    """What to do about an adapter of which not all has rows, as far as any of it can."""
    linear = {
        part for part in _LORA for one in modules if one.endswith(f"{part}.{adapter}") and _is_linear(modules[one])
    }
    advice = (
        f"Name its matrices of linear layers to record them alone: `layers={[f'{part}.{adapter}' for part in sorted(linear)]}`."
        if linear
        else "It has no matrix of a linear layer: record layers of the model instead."
    )
    return ValueError(
        f"`layers='adapters'` records matrices A and B of linear layers, but adapter {adapter!r} has {what} at"
        f" {_WRAPPERS.sub('', name)!r}, which have no row. {advice}"
    )


def _shape_of(name: str, module: Any, matrix: Tensor) -> tuple[int, int]:
    """`(d_out, d_in)` of a linear layer that can be recorded."""
    weight = module.weight
    if weight is matrix:
        raise ValueError(
            f"`layers` must not hold {name!r}: its weight is the matrix of the input embeddings (tied), whose rows are those of"
            " words. Leave it out, and choose by `tied` which uses of the matrix count (`tied='own'`: both)."
        )
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ValueError(
            f"`layers` must hold layers with weights that have a gradient, but {name!r} is quantised"
            f" (`{type(module).__name__}`), and nothing trains it. Record what is trained: `layers='adapters'`."
        )
    if weight.is_meta:
        raise ValueError(
            f"`layers` must hold layers whose weights are on a device, but that of {name!r} is offloaded (to main memory or a disk,"
            " by `device_map`). Load the model onto devices that hold all of it."
        )
    if hasattr(module, "nf"):
        return module.nf, weight.shape[0]
    return module.out_features, module.in_features
