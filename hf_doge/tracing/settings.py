"""What is recorded of each training example: one dataclass, shared by the callback, online recording and the command."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hf_doge.checks import check_choice, check_count, check_flag, check_function, check_seed
from hf_doge.functional.tracin_we import TOP_K_UNITS
from hf_doge.gradients.embedding import TIED_PARTS
from hf_doge.gradients.example_losses import LOSS_REDUCTIONS, LossFunction

DTYPES = ("float16", "float32", "int8")
SPECIAL_TOKENS = ("count", "drop")
RECORDS = ("checkpoint", "online")

DEFAULT_MAX_SEGMENT_BYTES = 64 * 2**20
_CHECKS = {
    "top_k_tokens": partial(check_count, optional=True),
    "top_k_unit": partial(check_choice, choices=TOP_K_UNITS),
    "dtype": partial(check_choice, choices=DTYPES),
    "projection_width": partial(check_count, optional=True),
    "projection_seed": check_seed,
    "special_tokens": partial(check_choice, choices=SPECIAL_TOKENS),
    "tied": partial(check_choice, choices=TIED_PARTS),
    "loss_reduction": partial(check_choice, choices=LOSS_REDUCTIONS),
    "loss_fn": partial(check_function, what="a function of (outputs, batch)", optional=True),
    "second_moment": check_flag,
    "max_segment_bytes": check_count,
    "record": partial(check_choice, choices=RECORDS),
}


@dataclass
class RecordingSettings:
    """
    How gradient rows are made and stored. Two recordings with the same settings can live in one index.

    Args:
        top_k_tokens (`int`, *optional*):
            Keep only the rows of largest norm of each example and checkpoint (TracIn-WE-Topk; the paper has 10).
        top_k_unit (`str`): `"position"`, as the authors' code counts, or `"token"` (ours), see [`top_k_rows`].
        dtype (`str`): On disk: `"float16"`, `"float32"`, or `"int8"` with one scale per row.
        projection_width (`int`, *optional*): Project rows to this width by one random matrix. Ours.
        projection_seed (`int`): Seed of that matrix.
        special_tokens (`str`):
            `"count"` records the rows of special tokens ([CLS], [SEP], end of text) like any other, and a search
            reports their share of each score; `"drop"` leaves them out before top-k is taken.
        tied (`str`):
            Which use of an embedding matrix that is tied to the output layer counts: `"input"` (the paper), `"output"`,
            `"full"` or, of the full gradient, the rows of the example's `"own"` tokens; see [`EmbeddingGradientRecorder`].
        loss_reduction (`str`): `"sum"` or `"mean"` of an example's token losses.
        loss_fn (`Callable`, *optional*): `loss_fn(outputs, batch) -> (batch_size,)` instead of the model's own loss.
        second_moment (`bool`):
            Divide training rows by `sqrt(v) + eps` of Adam, the whole metric on this side, so that a score is the
            inner product in Adam's metric with plain query rows. Not in the paper.
        max_segment_bytes (`int`): Rows held in memory, as float32, before they are written.
        record (`str`): `"checkpoint"`: all examples at the same weights. `"online"`: each at the step that used it.
    """

    top_k_tokens: int | None = None
    top_k_unit: str = "position"
    dtype: str = "float16"
    projection_width: int | None = None
    projection_seed: int = 0
    special_tokens: str = "count"
    tied: str = "input"
    loss_reduction: str = "sum"
    loss_fn: LossFunction | None = field(default=None, compare=False)
    second_moment: bool = False
    max_segment_bytes: int = DEFAULT_MAX_SEGMENT_BYTES
    record: str = "checkpoint"

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            setattr(self, name, check(name, getattr(self, name)))
        if self.tied != "input" and self.top_k_tokens is not None and self.top_k_unit != "token":
            raise ValueError(
                f"`top_k_unit` must be 'token' with `tied={self.tied!r}`, but got {self.top_k_unit!r}: rows of the "
                "output part belong to no position."
            )
        if self.second_moment and self.record == "online":
            raise ValueError(
                "`second_moment` needs `record='checkpoint'`: online rows belong to many steps, each with moments of "
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

    def to_manifest(self, tokenizer: Any | None) -> dict[str, Any]:
        """What `config.json` of the index says about it; `IndexWriter` takes the rest as arguments of its own."""
        return {
            "loss_reduction": self.loss_reduction,
            "loss_fn": _qualified_name(self.loss_fn),
            "tied": self.tied,
            "top_k": self.top_k_tokens,
            "top_k_unit": self.top_k_unit if self.top_k_tokens is not None else None,
            "record": self.record,
            "second_moment": self.second_moment,
            "special_tokens": self.special_tokens,
            "special_token_ids": special_token_ids(tokenizer),
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


def _qualified_name(function: LossFunction | None) -> str | None:
    if function is None:
        return None
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", type(function).__qualname__)
    return f"{module}.{name}"
