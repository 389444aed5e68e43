"""What is recorded of each training example: one dataclass, shared by the callback, online recording and the command."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

from hf_doge.artifacts.influence.manifest import MANIFEST, PROJECTIONS, read_config
from hf_doge.artifacts.influence.metric import metric_settings
from hf_doge.checks import check_choice, check_count, check_flag, check_function, check_seed, show
from hf_doge.functional.tracin_we import TOP_K_UNITS
from hf_doge.gradients.embedding import TIED_PARTS
from hf_doge.gradients.embedding_uses import has_tied_output
from hf_doge.gradients.example_losses import LOSS_REDUCTIONS, LossFunction
from hf_doge.gradients.layers import ADAPTERS, EMBEDDING, ChosenLayers, choose_layers
from hf_doge.tracing.limits import default_layers

DTYPES = ("float16", "float32", "int8")
SPECIAL_TOKENS = ("count", "drop")
RECORDS = ("checkpoint", "online")
AUTO = "auto"
METRICS = (AUTO, "optimizer", "gradient")
TIED = (AUTO, *TIED_PARTS)
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {"tied": "input", "special_tokens": "count", "metric": "gradient", "layers": None},
}

DEFAULT_MAX_SEGMENT_BYTES = 64 * 2**20


class RecordingOptions(TypedDict, total=False):
    """The fields of [`RecordingSettings`] as keywords, for type checkers."""

    recipe: str | None
    top_k_tokens: int | None
    top_k_unit: str
    dtype: str
    projection_width: int | None
    projection_seed: int
    projection: str
    special_tokens: str
    tied: str
    loss_reduction: str
    loss_fn: LossFunction | None
    metric: str
    layers: str | Sequence[str] | None
    projection_dim: int | None
    second_moment: bool | None
    max_segment_bytes: int
    record: str


def _check_layers(name: str, value: Any) -> list[str] | None:
    """Names of layers, each once; `None` where words alone have rows."""
    given = [value] if isinstance(value, str) else value
    if given is None:
        return None
    is_list = isinstance(given, Sequence) and all(isinstance(one, str) and one.strip() for one in given)
    if not is_list or len(given) == 0 or len(set(given)) < len(given):
        raise ValueError(
            f"`{name}` must be 'auto', 'embedding', 'adapters', the name of a linear layer, or a list of these, each once, but"
            f" got {show(value)}."
        )
    return None if list(given) == [EMBEDDING] else list(given)  # `[AUTO]` until a model is known


def _option(default: Any, check: Callable, *, help: str, flag: bool = True, **more: Any) -> Any:
    """A setting: how its value is checked, what it means, and whether `hf-doge index` has a flag for it."""
    metadata = {"check": check, "help": help, "flag": flag, "choices": getattr(check, "keywords", {}).get("choices")}
    return field(default=default, metadata=metadata, **more)


@dataclass
class RecordingSettings:
    """
    How gradient rows are made and stored. Two recordings with the same settings can live in one index.

    Each field says what it means in its `metadata["help"]`; `hf-doge index` takes its flags from them.
    [`TracInWECallback`] takes them as keywords, and says more about each. A new one also goes into [`RecordingOptions`], into
    [`~RecordingSettings.to_manifest`] if it changes rows, and into the docstring of the callback.
    """

    recipe: str | None = _option(
        None,
        partial(check_choice, choices=tuple(RECIPES), optional=True),
        help="`paper`: all settings that it decides are those of TracIn-WE's paper (--tied input, --metric gradient, "
        "--special_tokens count), and a search counts special tokens. Default: what our own experiments say.",
    )
    top_k_tokens: int | None = _option(
        None, partial(check_count, optional=True), help="Keep only so many words of each example. Default: all."
    )
    top_k_unit: str = _option(
        "position",
        partial(check_choice, choices=TOP_K_UNITS),
        help="What --top_k_tokens counts: each position, as the authors' code does, or each distinct token. Default:"
        " position.",
    )
    dtype: str = _option("float16", partial(check_choice, choices=DTYPES), help="On disk. Default: float16.")
    projection_width: int | None = _option(
        None,
        partial(check_count, optional=True),
        help="Project gradients to so many numbers, see --projection. Default: none.",
    )
    projection_seed: int = _option(0, check_seed, help="Seed of the matrix, or of the sample.", flag=False)
    projection: str = _option(
        "random",
        partial(check_choice, choices=PROJECTIONS),
        help="With --projection_width: by one random matrix (random), or by the principal components of the gradients of "
        "256 examples, others at each checkpoint, which keep scores far better (pca). Default: random.",
    )
    special_tokens: str = _option(
        "count",
        partial(check_choice, choices=SPECIAL_TOKENS),
        help="Whether the rows of tokens such as [CLS] are recorded, and a search reports their share, or dropped before"
        " the largest are taken. Default: count.",
    )
    tied: str = _option(
        AUTO,
        partial(check_choice, choices=TIED),
        help="For language models whose output layer is tied to the embeddings: record the gradient of words as they are "
        "read (input, the paper's), as they are predicted (output), both (full), or both for the words of the example "
        "alone (own). output and full give each example a row for every word of the vocabulary; own has as few as input. "
        "Default: auto, which is own for such models and input for others.",
    )
    loss_reduction: str = _option(
        "sum",
        partial(check_choice, choices=LOSS_REDUCTIONS),
        help="The loss of an example: the sum or the mean of its token losses.",
        flag=False,
    )
    loss_fn: LossFunction | None = _option(  # noqa: RUF009
        None,
        partial(check_function, what="a function of (outputs, batch)", optional=True),
        help="`loss_fn(outputs, batch) -> (batch_size,)` instead of the model's own loss.",
        flag=False,
        compare=False,
    )
    metric: str = _option(
        "gradient",
        partial(check_choice, choices=METRICS),
        help="Which inner product of gradients is influence: the plain one (gradient, the paper's), or the one that Adam steps "
        "in, divided by sqrt(v) + eps (optimizer): v of the input embeddings is read from the optimizer.pt that the "
        "Trainer saved in each checkpoint (without save_only_model). auto: of these the one of the optimizer that trained the "
        "model; plain where it has no v, or none was saved. Default: gradient.",
    )
    layers: list[str] | None = _option(  # noqa: RUF009
        AUTO,
        _check_layers,
        help="Of which parameters gradients are recorded. `embedding`: of words, the paper's. `adapters`: of the matrices of LoRA "
        "adapters. Else of linear layers, by name, its end (o_proj) or a pattern (*.mlp.*). Only what is listed counts. "
        "Default: auto, which is words and the last layer of a classifier, and words alone of other models, in the metric of the "
        "optimizer and with --projection pca.",
    )
    projection_dim: int | None = _option(
        None,
        partial(check_count, optional=True),
        help="Project the gradient of each of the layers at random to at most so many numbers on each of its two sides. "
        "Default: as many as take no more room than a word; adapters whole.",
    )
    second_moment: bool | None = _option(
        None,
        partial(check_flag, optional=True),
        help="Deprecated, the same as --metric optimizer.",
    )
    max_segment_bytes: int = _option(
        DEFAULT_MAX_SEGMENT_BYTES,
        check_count,
        help="Rows held in memory, as float32, before they are written.",
        flag=False,
    )
    record: str = _option(
        "checkpoint",
        partial(check_choice, choices=RECORDS),
        help="`checkpoint`: all examples at the same weights. `online`: each at the step that used it.",
        flag=False,
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            setattr(self, one.name, one.metadata["check"](one.name, getattr(self, one.name)))
        self._read_second_moment()
        self._follow_recipe()
        if self.layers == [AUTO] and (self.record, self.projection) != ("checkpoint", "random"):
            self.layers = None
        self._check_chosen()
        self._check_projection()
        if self.tied == AUTO and (self.record == "online" or self._counts_positions()):
            self.tied = "input"  # all that these can have
        if self.tied not in ("input", AUTO) and self._counts_positions():
            raise ValueError(
                f"`top_k_unit` must be 'token' with `tied={self.tied!r}`, but got {self.top_k_unit!r}: rows of the "
                "output part belong to no position."
            )
        if self.metric == AUTO and self.record == "online":
            self.metric = "gradient"
        if self.metric == "optimizer" and self.record == "online":
            raise ValueError(
                "`metric='optimizer'` needs `record='checkpoint'`: online rows belong to many steps, each with moments of "
                "its own."
            )
        if self.record == "online" and self.tied != "input":
            raise ValueError(
                f"`record='online'` catches the input part only, but `tied` is {self.tied!r}. Use `tied='input'`, or "
                "`record='checkpoint'`."
            )
        if self.record == "online" and self.loss_fn is not None:
            raise ValueError(
                "`record='online'` records the loss that is trained, but got another as `loss_fn`. Leave it out, or use "
                "`record='checkpoint'`."
            )

    def _check_chosen(self) -> None:
        """What goes with layers that have rows."""
        if self.layers is None or self.layers == [AUTO]:
            if self.projection_dim is not None:
                raise ValueError(
                    "`projection_dim` is about the gradients of layers, but `layers` names none. Name some, or project the rows"
                    " of words by `projection_width`."
                )
            return
        if self.record == "online":
            raise ValueError(
                "`record='online'` catches the gradients of words only, but `layers` names others. Leave it out, or use"
                " `record='checkpoint'`."
            )
        if self.metric == "optimizer" and self.projection_dim is None and set(self.layers) - {EMBEDDING, ADAPTERS}:
            raise self._refuse_metric()
        if EMBEDDING in self.layers:
            return
        for name, plain in (("top_k_tokens", (None,)), ("tied", (AUTO, "input")), ("special_tokens", ("count",))):
            if getattr(self, name) not in plain:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is about the rows of words, but `layers` is {self.layers}, without"
                    " 'embedding'. Add that, or leave the other out."
                )
        self.tied = "input"

    def _check_projection(self) -> None:
        """What goes with principal components."""
        if self.projection == "random":
            return
        if self.projection_width is None:
            raise ValueError(
                f"`projection={self.projection!r}` needs a `projection_width`, the number of principal components that are"
                " kept, but it is None. Pass one, say 32."
            )
        if self.record == "online":
            raise ValueError(
                f"`record='online'` has no weights at which a sample of examples could be seen, as `projection={self.projection!r}`"
                " needs. Use `projection='random'`, or `record='checkpoint'`."
            )
        if self.layers is not None:
            raise ValueError(
                f"`projection={self.projection!r}` is of the rows of words, which have other principal components than those of"
                f" `layers={self.layers}`. Use `projection='random'`, or record words alone."
            )

    def _read_second_moment(self) -> None:
        """The older name of `metric`."""
        given, self.second_moment = self.second_moment, None
        if given is None:
            return
        meant = "optimizer" if given else "gradient"
        warnings.warn(
            f"`second_moment={given}` is called `metric={meant!r}` now, and goes in hf_doge 0.3.",
            FutureWarning,
            stacklevel=4,
        )
        if self.metric not in ("gradient", meant):
            raise ValueError(f"`second_moment={given}` says other than `metric={self.metric!r}`. Leave it out.")
        self.metric = meant

    def _counts_positions(self) -> bool:
        return self.top_k_tokens is not None and self.top_k_unit == "position"

    def _follow_recipe(self) -> None:
        """Set what the recipe says, and refuse what contradicts it."""
        defaults = {one.name: one.metadata["check"](one.name, one.default) for one in fields(self)}
        for name, value in RECIPES.get(self.recipe or "", {}).items():
            given = getattr(self, name)
            if given not in (value, defaults[name]):
                raise ValueError(
                    f"`recipe={self.recipe!r}` means `{name}={value!r}`, but got `{name}={given!r}`. Leave out one of the two."
                )
            setattr(self, name, value)

    def resolved(self, model: nn.Module, folder: str | os.PathLike | None = None) -> "RecordingSettings":
        """
        The same settings with a value for each that was left to us (`"auto"`).

        Args:
            model (`nn.Module`): Which is recorded.
            folder (`str` or `os.PathLike`, *optional*): Of the index. One that is there keeps what it was begun with.
        """
        begun = None  # is read where it is asked for something, and once
        if folder is not None and (self.layers == [AUTO] or self.tied == AUTO) and (Path(folder) / MANIFEST).is_file():
            begun = read_config(Path(folder))
        return self._resolved(model, begun)

    def _resolved(self, model: nn.Module, begun: Mapping[str, Any] | None) -> "RecordingSettings":
        if self.layers == [AUTO]:
            chosen = default_layers(model, begun)
            if begun is None and self.metric != "gradient":
                chosen = {"layers": None}
            return replace(self, **chosen)._resolved(model, begun)
        if self.metric == AUTO and self.layers is not None and not self.chosen_layers(model).is_exact:  # type: ignore[union-attr]
            warnings.warn(
                f"`metric='auto'` records plain gradients, as the layers {self.layers} are projected, and the metric of Adam divides"
                " whole ones. `metric='gradient'` says that the plain ones are meant.",
                stacklevel=4,
            )
            return replace(self, metric="gradient")._resolved(model, begun)
        if self.tied != AUTO:
            return self
        if begun is not None:
            return replace(self, tied=begun.get("tied") or "input")
        return replace(self, tied="own" if has_tied_output(model) else "input")

    def chosen_layers(self, model: nn.Module) -> ChosenLayers | None:
        """
        The layers of a model that have rows besides its words, or instead of them.

        Raises:
            ValueError: See [`choose_layers`]; or they are projected, and the metric is that of the optimizer.
        """
        if self.layers == [AUTO]:
            return self.resolved(model).chosen_layers(model)
        if self.layers is None:
            return None
        chosen = choose_layers(model, self.layers, projection_dim=self.projection_dim, seed=self.projection_seed)
        if self.metric == "optimizer" and not chosen.is_exact:
            raise self._refuse_metric()
        return chosen

    def _refuse_metric(self) -> ValueError:
        return ValueError(
            f"`metric='optimizer'` divides each number of a gradient, so it needs layers that are whole, but {self.layers} are"
            f" projected (`projection_dim={self.projection_dim}`). Use `metric='gradient'`; or keep them whole by a `projection_dim`"
            " as large as they are, as adapters are without one."
        )

    def recorder_options(self, tokenizer: Any | None) -> dict[str, Any]:
        """Arguments of [`EmbeddingGradientRecorder`], for training examples and queries alike."""
        return {
            "loss_fn": self.loss_fn,
            "loss_reduction": self.loss_reduction,
            "tied": self.tied,
            "top_k": self.top_k_tokens,
            "top_k_unit": self.top_k_unit,
            "pad_token_id": padding_token_id(tokenizer),
            "drop_token_ids": special_token_ids(tokenizer) if self.special_tokens == "drop" else (),
        }

    def to_manifest(self, tokenizer: Any | None, *, vocabulary_size: int) -> dict[str, Any]:
        """
        What `config.json` of the index says about it; `IndexWriter` takes the rest as arguments of its own. Tokens that the
        embedding matrix has no row for are not in it: their numbers are those of other rows.
        """
        return {
            "loss_reduction": self.loss_reduction,
            "loss_fn": qualified_name(self.loss_fn),
            "tied": self.tied,
            "top_k": self.top_k_tokens,
            "top_k_unit": self.top_k_unit if self.top_k_tokens is not None else None,
            "record": self.record,
            **metric_settings(self.metric),
            "special_tokens": self.special_tokens,
            "special_token_ids": [token for token in special_token_ids(tokenizer) if token < vocabulary_size],
        }


def special_token_ids(tokenizer: Any | None) -> list[int]:
    """Ids of [CLS], [SEP], end of text and the like, ascending; none without a tokenizer."""
    return sorted(set(getattr(text_tokenizer(tokenizer), "all_special_ids", ())))


def padding_token_id(tokenizer: Any | None) -> int | None:
    """The padding token, unless real text holds it too, as the end of text."""
    tokenizer = text_tokenizer(tokenizer)
    padding = getattr(tokenizer, "pad_token_id", None)
    shared = {getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos", "sep", "cls", "unk", "mask")}
    return None if padding in shared else padding


def text_tokenizer(processing_class: Any | None) -> Any | None:
    """The tokenizer, also out of a processor that has one among others."""
    return getattr(processing_class, "tokenizer", processing_class)


def qualified_name(function: LossFunction | None) -> str | None:
    """The module and name of a loss function, as the index keeps them."""
    if function is None:
        return None
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", type(function).__qualname__)
    return f"{module}.{name}"
