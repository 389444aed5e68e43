"""Rows of text, of prompts with completions, and of messages, as tokens and labels, by `Dataset.map`."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, List, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hf_doge.checks import show
from hf_doge.data.records import Records
from hf_doge.tracing.encoding import Encoding
from hf_doge.tracing.queries import check_dialogue

ROWS_PER_CALL = 256
_TOKENS = List(Value("int32"))


@dataclass(frozen=True)
class RecordEncoder:
    """
    Makes tokens and labels of rows.

    Texts are tokenised without special tokens and end in the end-of-text token, as the texts of a data folder do. Prompts with
    completions, and messages, become what trl's SFTTrainer makes of them.

    Attributes:
        tokenizer (`PreTrainedTokenizerBase`): With a chat template, if rows hold messages.
        kind (`tuple[str, ...]`): The columns that are read.
        masks (`tuple[str, ...]`): Which tokens alone have labels; all if it is empty. Then there is no column `labels`.
        what (`str`): The data set, for errors.
    """

    tokenizer: PreTrainedTokenizerBase
    kind: tuple[str, ...]
    masks: tuple[str, ...]
    what: str

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[list[int]]]:
        """
        Encode a batch of rows.

        Raises:
            ValueError: A row is not what its columns promise. Shows it.
        """
        if self.kind == ("text",):
            return {"input_ids": self._encode_texts(rows["text"])}
        records = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        pairs = [self._encode(record) for record in records]
        encoded = {"input_ids": [ids for ids, _ in pairs]}
        return {**encoded, "labels": [labels for _, labels in pairs]} if self.masks else encoded

    def columns(self, names: Iterable[str]) -> list[str]:
        """Those of a data set's columns that are read."""
        used = (*self.kind, *(() if self.kind == ("text",) else ("tools", "chat_template_kwargs")))
        return [name for name in names if name in used]

    def _encode_texts(self, texts: Sequence[str | None]) -> list[list[int]]:
        if None in texts:
            raise ValueError(f"{self.what} must have a text in every row, but one has none. Remove that row.")
        # `verbose=False`: a document longer than the model's context is no mistake here.
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [[*ids, self.tokenizer.eos_token_id] for ids in encoded["input_ids"]]

    def _encode(self, record: dict[str, Any]) -> tuple[list[int], list[int]]:
        record = {name: _without_none(value) for name, value in record.items() if value is not None}
        wrong = check_dialogue(record) if set(self.kind) <= set(record) else f"have {' and '.join(self.kind)}"
        if wrong is not None:
            raise ValueError(
                f"Every row of {self.what} must {wrong}, but one is {show(record)}. Correct or remove it."
            )
        encoding = Encoding(masks=self.masks, ends=self.tokenizer.eos_token is not None)
        try:
            return encoding.encode(record, self.tokenizer)
        except (ValueError, TemplateError, TypeError) as error:
            raise ValueError(f"A row of {self.what} cannot be encoded: {error} The row is {show(record)}.") from error


def require_chat_template(records: Records, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Messages need a chat template.

    Raises:
        ValueError: Rows hold messages and the tokenizer has none.
    """
    if records.is_chat and tokenizer.chat_template is None:
        raise ValueError(
            f"A tokenizer must have a chat template to encode messages, but this one has none, and data set {records.name!r} "
            "holds messages. Give one by `--chat_template_path`, or the tokenizer of a chat model."
        )


def encode_records(
    records: Records,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokenizer_key: str,
    num_proc: int | None = None,
) -> Dataset:
    """
    Tokens, and labels where some tokens have no loss, of the rows of a domain; from the cache of `datasets` where they are.

    Args:
        records (`Records`): The domain.
        split (`str`): `"train"` or `"validation"`.
        tokenizer (`PreTrainedTokenizerBase`): With an end-of-text token.
        tokenizer_key (`str`): Name of the tokenizer's contents, for the cache.
        num_proc (`int`, *optional*): Processes that share the work.

    Raises:
        ValueError: Rows hold messages and the tokenizer has no chat template, or a row cannot be encoded.
    """
    require_chat_template(records, tokenizer)
    rows = records.splits[split]
    encoder = RecordEncoder(tokenizer, records.kind, records.masks, f"data set {records.name!r}")
    rows = rows.select_columns(encoder.columns(rows.column_names))
    names = ("input_ids", "labels") if encoder.masks else ("input_ids",)
    # What `datasets` would make of a tokenizer differs from process to process.
    key = (rows._fingerprint, tokenizer_key, records.kind, records.masks)
    return rows.map(
        encoder,
        batched=True,
        batch_size=ROWS_PER_CALL,
        remove_columns=rows.column_names,
        features=Features(dict.fromkeys(names, _TOKENS)),
        num_proc=num_proc,
        new_fingerprint=hashlib.sha256(repr(key).encode()).hexdigest()[:16],
        desc=f"Tokenizing {records.name} ({split})",
    )


def _without_none(value: Any) -> Any:
    """Messages without the keys that Arrow gave them because another message has them."""
    if isinstance(value, list):
        return [_without_none(one) for one in value]
    if isinstance(value, Mapping):
        return {name: _without_none(one) for name, one in value.items() if one is not None}
    return value
