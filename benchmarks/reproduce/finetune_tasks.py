"""Labelled text as short instructions with a yes-or-no answer, for `doge_finetune`."""

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that is not scored


@dataclass(frozen=True)
class Question:
    """
    How the records of a set become yes-or-no questions.

    Attributes:
        prompt (`str`): What follows the text; the answer, `"1"` or `"0"`, is the next token.
        is_yes (`Callable`): Whether a record's `label_name` means yes.
    """

    prompt: str
    is_yes: Callable[[str], bool]


QUESTIONS = {
    "hate_davidson": Question("\nOffensive:", lambda label: label != "neither"),
    "toxicity_jigsaw": Question("\nOffensive:", lambda label: label != "non_toxic"),
    "sst2": Question("\nPositive:", lambda label: label == "positive"),
    "ag_news": Question("\nSports:", lambda label: label == "Sports"),
    "snli": Question("\nFollows:", lambda label: label == "entailment"),
}


def load_questions(
    data_dir: Path,
    name: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_examples: int,
    length: int,
    seed: int,
) -> Dataset:
    """
    As many questions with the answer yes as with no, in an order drawn by the seed.

    Args:
        data_dir (`Path`): Folder with `<name>.<split>.jsonl.gz`.
        name (`str`): One of `QUESTIONS`.
        split (`str`): train, validation or test.
        tokenizer (`PreTrainedTokenizerBase`): With an end-of-text token, which also pads.
        num_examples (`int`): Most examples to take, half of them yes.
        length (`int`): Tokens of an example; the text is cut at its end to fit.
        seed (`int`): Of the choice of examples.

    Returns:
        `Dataset` with `input_ids`, `labels` (only the answer is scored) and `attention_mask`, each of `length` entries.
    """
    question = QUESTIONS[name]
    with gzip.open(data_dir / f"{name}.{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    is_yes = np.array([question.is_yes(record["label_name"]) for record in records])
    order = np.random.default_rng(seed).permutation(len(records))
    yes, no = order[is_yes[order]], order[~is_yes[order]]
    count = min(len(yes), len(no), num_examples // 2)
    chosen = np.stack([yes[:count], no[:count]], axis=1).ravel()
    prompt = tokenizer(question.prompt, add_special_tokens=False)["input_ids"]
    answers = answer_ids(tokenizer)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for index in chosen:
        ids = tokenizer(_text(records[index]), add_special_tokens=False, verbose=False)["input_ids"]
        ids = [*ids[: length - len(prompt) - 1], *prompt]
        answer, padding = answers[int(is_yes[index])], length - len(ids) - 1
        rows["input_ids"].append([*ids, answer, *[tokenizer.eos_token_id] * padding])
        rows["labels"].append([IGNORED] * len(ids) + [answer] + [IGNORED] * padding)
        rows["attention_mask"].append([1] * (len(ids) + 1) + [0] * padding)
    return Dataset.from_dict(rows)


def answer_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Token ids of no and yes: digits, which every byte-level vocabulary holds as one token."""
    return tuple(tokenizer.convert_tokens_to_ids(digit) for digit in "01")


def _text(record: Mapping[str, Any]) -> str:
    return record["text"] if "text" in record else f"{record['premise']} / {record['hypothesis']}"


def collate_questions(examples: list[dict]) -> dict[str, Tensor]:
    """Stack examples of one length."""
    return {
        name: torch.tensor([example[name] for example in examples])
        for name in ("input_ids", "labels", "attention_mask")
    }


@torch.no_grad()
def evaluate_answers(model: nn.Module, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Mean loss of the answer in nats, and the share of questions whose right answer is the likelier of the two."""
    model.eval()
    no, yes = answer_ids(tokenizer)
    losses, hits = [], []
    for start in range(0, len(rows), 64):
        batch = collate_questions([rows[index] for index in range(start, min(start + 64, len(rows)))])
        batch = {name: values.to(model.device) for name, values in batch.items()}
        places = (batch["labels"] != IGNORED).int().argmax(dim=1)  # of the answers
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        at_answer = logits[torch.arange(len(places)), places - 1].float()
        answers = batch["input_ids"][torch.arange(len(places)), places]
        losses.append(nn.functional.cross_entropy(at_answer, answers, reduction="none"))
        hits.append((at_answer[:, yes] > at_answer[:, no]) == (answers == yes))
    return {"loss": float(torch.cat(losses).mean()), "accuracy": float(torch.cat(hits).float().mean())}
