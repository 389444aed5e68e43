"""
From words to tokens and labels, as the examples of an index were made: plain texts, prompts with completions, chats.

The forms and their masks are those of trl's SFTTrainer. What a recording sees of its examples (are prompts ignored, do
texts end in the end-of-text token) is kept in config.json, so that a query goes through the same.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_doge.gradients.example_losses import IGNORE_INDEX

MASKINGS = ("none", "completion", "assistant")
DIALOGUE_FIELDS = ("prompt", "completion", "messages", "tools", "chat_template_kwargs")

_TRUNCATIONS = ("keep_start", "keep_end", "tokenizer")


@dataclass(frozen=True)
class Encoding:
    """
    How words become the tokens and labels of one example.

    Attributes:
        inputs (`tuple[str, ...]`, *optional*): What the model is fed of what the tokenizer makes. `None`: all it takes.
        masks (`tuple[str, ...]`, *optional*): Which tokens alone have labels: those of the `"completion"`, those of the
            `"assistant"`, of both those that are in both; of none all. `None`: not known.
        ends (`bool`): Whether a text or completion gets the end-of-text token at its end.
        ignores_padding (`bool`): Whether the padding token has no label, even where a text holds it (as its end).
        max_length (`int`, *optional*): How many tokens are kept.
        truncation (`str`): Which: the first (`"keep_start"`), the last (`"keep_end"`), or those that the tokenizer keeps.
    """

    inputs: tuple[str, ...] | None = None
    masks: tuple[str, ...] | None = None
    ends: bool = False
    ignores_padding: bool = False
    max_length: int | None = None
    truncation: str = "tokenizer"

    @classmethod
    def of(cls, config: Mapping[str, Any], masking: str | None = None) -> "Encoding":
        """
        The one that an index tells of in its config.json.

        Args:
            config (`Mapping`): Its content.
            masking (`str`, *optional*): One of `"none"`, `"completion"`, `"assistant"`, in place of what the index tells.

        Raises:
            ValueError: `masking` or what the index tells is none that there is.
        """
        if masking is not None and masking not in MASKINGS:
            raise ValueError(f"`masking` must be one of {list(MASKINGS)}, but got {masking!r}.")
        told = config.get("metadata", {}).get("encoding")
        told = {} if told is None else told
        kinds = {
            "inputs": list,
            "masks": list,
            "ends": bool,
            "ignores_padding": bool,
            "max_length": int,
            "truncation": str,
        }
        good = isinstance(told, dict) and all(
            told.get(name) is None or type(told[name]) is kinds[name] for name in kinds
        )
        lists = [*((told.get("masks") or []) + (told.get("inputs") or []) if good else ())]
        good = good and all(isinstance(one, str) for one in lists)
        good = good and set(told.get("masks") or ()) <= set(MASKINGS[1:]) and (told.get("max_length") or 1) >= 1
        if not good or told.get("truncation", _TRUNCATIONS[0]) not in _TRUNCATIONS:
            raise ValueError(
                f"`metadata.encoding` in config.json of the index must tell how its examples were made, but is {told!r:.200}."
                " It is damaged or was manipulated: fetch it again."
            )
        told = {
            name: tuple(told[name]) if kinds[name] is list else told[name]
            for name in kinds
            if told.get(name) is not None
        }
        return cls(**told) if masking is None else replace(cls(**told), masks=() if masking == "none" else (masking,))

    def encode(self, record: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
        """
        Token ids and labels of `{"prompt", "completion"}` or `{"messages"}`.

        Args:
            record (`Mapping`): Texts, or lists of messages with `role` and `content`; `tools` and `chat_template_kwargs` as
                trl has them.
            tokenizer (`PreTrainedTokenizerBase`): With the chat template of the training, if there are messages.

        Raises:
            ValueError: The masks are not known or do not fit the record, or the tokenizer cannot make it.
        """
        if self.masks is None:
            raise ValueError(
                "What is asked with `prompt` and `completion`, or `messages`, must be masked as the recorded examples were, but"
                " the index does not tell how. Pass `masking=` to `InfluenceIndex.from_pretrained` (`--masking`):"
                f" {', '.join(map(repr, MASKINGS))}; or ask with `input_ids` and `labels`."
            )
        wants_mask = "assistant" in self.masks
        if record.get("messages") is not None:
            if "completion" in self.masks and not wants_mask:
                raise ValueError(
                    "The index was recorded with the loss of completions alone, but `messages` do not tell what the"
                    " completion is. Ask with `prompt` and `completion`, each a list of messages."
                )
            ids, assistant = _apply_template(tokenizer, record["messages"], record, wants_mask=wants_mask)
            return self._finish(ids, assistant, tokenizer)
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str):
            end = tokenizer.eos_token if self.ends else ""
            whole = prompt + completion + ("" if completion.endswith(end) else end)
            before, ids = (list(tokenizer(text, verbose=False)["input_ids"]) for text in (prompt, whole))
            kept = [True] * len(ids)
        else:
            ids, kept = _apply_template(tokenizer, [*prompt, *completion], record, wants_mask=wants_mask)
            before, _ = _apply_template(tokenizer, prompt, record, add_generation_prompt=True)
        if "completion" in self.masks:
            start = _num_common(before, ids)
            kept = [keep and at >= start for at, keep in enumerate(kept)]
        return self._finish(ids, kept, tokenizer)

    def answer_places(self, record: Mapping[str, Any], tokenizer: Any) -> range:
        """
        Which of the tokens of [`encode`] are those of the completion or last message: those that differ where another text stands
        in its place. A token that also holds a character next to it is one of them.
        """
        whole = replace(self, masks=(), ignores_padding=False, max_length=None)
        name = "messages" if record.get("messages") is not None else "completion"
        ids, given = whole.encode(record, tokenizer)[0], record[name]
        before = after = len(ids)
        for text in ("0", "a"):  # an answer can begin or end like one of them, but not like both
            other = text if isinstance(given, str) else [*given[:-1], {**given[-1], "content": text}]
            found = whole.encode({**record, name: other}, tokenizer)[0]
            before = min(before, _num_common(ids, found))
            after = min(after, _num_common(ids[::-1], found[::-1]))
        left = range(len(ids))[self.part(len(ids))]
        start, stop = max(before, left.start), min(len(ids) - after, left.stop)
        return range(start - left.start, stop - left.start)

    def encode_prompt(
        self, prompt: Sequence[Any], tokenizer: Any, *, record: Mapping[str, Any], ends: bool = False
    ) -> list[int]:
        """
        Token ids of what is to be answered.

        Args:
            prompt (`Sequence`): A text or a pair, or messages with `role` and `content`, the assistant's turn being next.
            tokenizer (`PreTrainedTokenizerBase`): See [`encode`].
            record (`Mapping`): With `tools` and `chat_template_kwargs`, if messages have them.
            ends (`bool`): Whether an end-of-text token that the tokenizer adds stays, as before a decoder of its own.
        """
        if not isinstance(prompt[0], str):
            return _apply_template(tokenizer, prompt, record, add_generation_prompt=True)[0]
        ids = list(tokenizer(*prompt, verbose=False)["input_ids"])
        added = not ends and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
        return ids[:-1] if added and not prompt[-1].endswith(tokenizer.eos_token) else ids

    def _finish(self, ids: Sequence[int], kept: Sequence[bool], tokenizer: Any) -> tuple[list[int], list[int]]:
        """Labels, and what is left of both where an example may have so many tokens only."""
        padding = tokenizer.pad_token_id if self.ignores_padding else None
        labels = [token if keep and token != padding else IGNORE_INDEX for token, keep in zip(ids, kept, strict=True)]
        part = self.part(len(ids))
        if all(label == IGNORE_INDEX for label in labels[part]):
            cut = f", or lies beyond the {self.max_length} tokens that examples were cut to. Shorten the prompt"
            raise ValueError(
                "No token is left that has a label: the completion or assistant's turn is empty"
                f"{'' if self.max_length is None else cut}."
            )
        return list(ids)[part], labels[part]

    def part(self, length: int) -> slice:
        """Which of so many tokens are kept."""
        if self.max_length is None or length <= self.max_length:
            return slice(None)
        return slice(-self.max_length, None) if self.truncation == "keep_end" else slice(self.max_length)


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def describe_encoding(batches: Iterable[Mapping[str, Any]], tokenizer: Any | None, args: Any = None) -> dict[str, Any]:
    """
    What some examples show of how they were made, for config.json. Labels are described only where they are the tokens themselves.

    Args:
        batches (`Iterable[Mapping]`): Some examples, collated as for training.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The one that made the examples.
        args (`TrainingArguments`, *optional*): Those of trl's SFTTrainer say more.
    """
    inputs: set[str] = set()
    texts: list[tuple[Tensor, Tensor]] = []  # of each example its tokens, and which of them have a label
    for batch in batches:
        inputs |= set(batch) - {"labels"}
        ids, labels, mask = (batch.get(name) for name in ("input_ids", "labels", "attention_mask"))
        if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or labels.shape != ids.shape or ids.ndim != 2:
            return {"inputs": sorted(inputs)}
        there = mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids).bool()
        labelled = labels != IGNORE_INDEX
        if labels.is_floating_point() or bool((labels != ids)[labelled].any()) or not bool(there.any(dim=1).all()):
            return {"inputs": sorted(inputs)}
        texts += [(row[own], kept[own]) for row, kept, own in zip(ids, labelled, there, strict=True)]
    padding, end = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos"))
    padded = [kept[ids == (-1 if padding is None else padding)] for ids, kept in texts]
    lengths = [len(ids) for ids, _ in texts]
    longest = max(lengths)
    ended = [int(ids[-1]) == end for ids, _ in texts]
    told: dict[str, Any] = {
        "inputs": sorted(inputs),
        "masks": _masks([kept[ids != (-1 if padding is None else padding)] for ids, kept in texts], args),
        # all of them, but for those that were cut
        "ends": any(ended) and all(e or length == longest for e, length in zip(ended, lengths, strict=True)),
        "ignores_padding": any(map(len, padded)) and not any(bool(kept.any()) for kept in padded),
    }
    if getattr(args, "max_length", None) is not None and hasattr(args, "completion_only_loss"):
        told |= {"max_length": args.max_length, "truncation": getattr(args, "truncation_mode", "keep_start")}
        told["ends"] = told["ends"] or min(lengths) >= args.max_length  # SFTTrainer puts it where all of them were cut
    return told


def _masks(labelled: Sequence[Tensor], args: Any) -> list[str] | None:
    """Which masks made these labels, if that is certain."""
    if getattr(args, "assistant_only_loss", False):
        return ["assistant"] if args.completion_only_loss is False else ["assistant", "completion"]
    if all(bool(kept.all()) for kept in labelled):
        return []
    # From its first label on each example has nothing but labels: what has none is a prompt.
    suffixes = all(bool(kept.long().cumsum(dim=0).bool().eq(kept).all()) for kept in labelled)
    return ["completion"] if suffixes else None


def _apply_template(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    record: Mapping[str, Any],
    *,
    wants_mask: bool = False,
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them are the assistant's (all if that is not asked)."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "Messages need the chat template of the training, but the tokenizer has none. Set its `chat_template`, and pass it"
            " as `processing_class`."
        )
    tools = record.get("tools")
    encoded = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=add_generation_prompt,
        return_assistant_tokens_mask=wants_mask,
        **(record.get("chat_template_kwargs") or {}),
    )
    ids = list(encoded["input_ids"])
    if not wants_mask:
        return ids, [True] * len(ids)
    if not any(encoded["assistant_masks"]):
        raise ValueError(
            "The assistant's tokens must be known to score them alone, but the chat template marks none: it needs `{% generation %}`"
            " before and `{% endgeneration %}` behind what the assistant says. Set such a template as `chat_template` of the"
            " tokenizer (on the command line: the file of `--chat_template_path`), or give `input_ids` and `labels`."
        )
    return ids, [bool(own) for own in encoded["assistant_masks"]]
