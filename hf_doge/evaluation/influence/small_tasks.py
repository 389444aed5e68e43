"""A text classification task out of a folder of labelled JSONL, small enough to train on again and again."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_doge.artifacts.readers import read_jsonl
from hf_doge.checks import check_count, check_seed, show

PAD, UNKNOWN, START, SEPARATOR = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
SPECIAL_TOKENS = (PAD, UNKNOWN, START, SEPARATOR)

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class SmallTask:
    """
    Tokenised examples of a task.

    Attributes:
        train, test (`dict[str, torch.Tensor]`): `input_ids` and `attention_mask` of shape `(N, T)`, `labels (N,)`.
        vocabulary (`tuple[str, ...]`): The word of each token id; the first four are special.
        num_classes (`int`): Number of labels.
        train_texts, test_texts (`list[str]`): What was tokenised, for reading.
    """

    train: dict[str, Tensor]
    test: dict[str, Tensor]
    vocabulary: tuple[str, ...]
    num_classes: int
    train_texts: list[str]
    test_texts: list[str]


def load_small_task(
    data_dir: str | Path,
    task: str,
    *,
    num_train: int = 400,
    num_test: int = 400,
    max_length: int = 32,
    min_count: int = 2,
    seed: int = 0,
) -> SmallTask:
    """
    Draw examples, build a vocabulary of lower-case words from the train ones, and tokenise.

    A text becomes `[CLS] words [SEP]`, a pair `[CLS] premise [SEP] hypothesis [SEP]`, each cut at the end.

    Args:
        data_dir (`str` or `Path`): Folder with `<task>.train.jsonl[.gz]` and `<task>.test.jsonl[.gz]`, records of `text`
            (or `premise` and `hypothesis`) and `label`, an integer.
        task (`str`): Name of the files.
        num_train, num_test (`int`): How many examples to draw; the same share of each label as in the file, about.
        max_length (`int`): Tokens per text, special ones included.
        min_count (`int`): Words that occur less often in the drawn train texts become `[UNK]`.
        seed (`int`): Seeds the draw.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file has fewer examples than asked for, or a record lacks a field.
    """
    for name, value, least in (("num_train", num_train, 1), ("num_test", num_test, 1), ("min_count", min_count, 1)):
        check_count(name, value, least=least)
    check_count("max_length", max_length, least=5)  # [CLS], two parts and their [SEP]
    generator = np.random.default_rng(check_seed("seed", seed, least=0))
    train = _draw(_read(_find(Path(data_dir), task, "train")), num_train, generator, f"{task}.train")
    test = _draw(_read(_find(Path(data_dir), task, "test")), num_test, generator, f"{task}.test")
    counts = Counter(word for parts, _ in train for part in parts for word in split_words(part))
    words = sorted(word for word, count in counts.items() if count >= min_count)
    vocabulary = (*SPECIAL_TOKENS, *words)
    ids = {word: position for position, word in enumerate(vocabulary)}
    return SmallTask(
        train=_encode(train, ids, max_length),
        test=_encode(test, ids, max_length),
        vocabulary=vocabulary,
        num_classes=1 + max(label for _, label in train + test),
        train_texts=[" / ".join(parts) for parts, _ in train],
        test_texts=[" / ".join(parts) for parts, _ in test],
    )


def flip_labels(labels: np.ndarray, share: float, *, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Give a share of the examples another class, drawn evenly from the others.

    Args:
        labels (`numpy.ndarray` of shape `(N,)`): Classes from 0 to `num_classes - 1`.
        share (`float`): Which share to flip, rounded to whole examples, at least one of each kind.
        num_classes (`int`): At least 2.
        seed (`int`): Seeds the draw.

    Returns:
        `tuple[numpy.ndarray, numpy.ndarray]`: new labels `(N,)`, and which were flipped, `(N,)` of dtype bool.

    Raises:
        ValueError: if a label is no class, or the share leaves nothing flipped or nothing as it was.
    """
    labels = np.asarray(labels)
    if num_classes < 2 or not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"Labels must be classes from 0 to {num_classes - 1}, of at least two, but got {set(labels.tolist())}."
        )
    count = round(share * len(labels))
    if not 1 <= count < len(labels):
        raise ValueError(
            f"`share` must flip at least one of {len(labels)} labels and leave at least one, but {share} flips {count}."
        )
    generator = np.random.default_rng(seed)
    flipped = np.zeros(len(labels), dtype=bool)
    flipped[generator.choice(len(labels), size=count, replace=False)] = True
    flips = generator.integers(1, num_classes, size=len(labels))
    return np.where(flipped, (labels + flips) % num_classes, labels), flipped


def split_words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return _WORD.findall(text.lower())


def _find(data_dir: Path, task: str, split: str) -> Path:
    for suffix in ("jsonl", "jsonl.gz"):
        path = data_dir / f"{task}.{split}.{suffix}"
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"`data_dir` must hold {task}.{split}.jsonl or .jsonl.gz, but {str(data_dir)!r} holds neither. Check "
        "`--data_dir` and `--task`."
    )


def _read(path: Path) -> list[tuple[list[str], int]]:
    examples = []
    for number, record in enumerate(read_jsonl(path), start=1):
        parts = [record[name] for name in ("text", "premise", "hypothesis") if name in record]
        label = record.get("label")
        has_label = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < 2**16
        if not parts or not all(isinstance(part, str) for part in parts) or not has_label:
            raise ValueError(
                f"Every record must have a string `text` (or `premise` and `hypothesis`) and a `label`, a whole number from "
                f"0 on, but line {number} of {str(path)!r} has {show(record)}."
            )
        examples.append((parts, record["label"]))
    return examples


def _draw(
    examples: list[tuple[list[str], int]], count: int, generator: np.random.Generator, name: str
) -> list[tuple[list[str], int]]:
    if not 1 <= count <= len(examples):
        raise ValueError(f"{name} must have as many examples as asked for, {count}, but it has {len(examples)}.")
    return [examples[i] for i in generator.choice(len(examples), size=count, replace=False)]


def _encode(examples: Sequence[tuple[list[str], int]], ids: dict[str, int], max_length: int) -> dict[str, Tensor]:
    lines = [_token_ids(parts, ids, max_length) for parts, _ in examples]
    input_ids = torch.full((len(lines), max(map(len, lines))), ids[PAD])
    for row, line in zip(input_ids, lines, strict=True):
        row[: len(line)] = torch.tensor(line)
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != ids[PAD]).long(),
        "labels": torch.tensor([label for _, label in examples]),
    }


def _token_ids(parts: Iterable[str], ids: dict[str, int], max_length: int) -> list[int]:
    """Each part may take an equal share of the places that `[CLS]` and the `[SEP]` after each part leave."""
    parts = list(parts)
    room = (max_length - 1) // len(parts) - 1
    line = [ids[START]]
    for part in parts:
        line += [ids.get(word, ids[UNKNOWN]) for word in split_words(part)[:room]] + [ids[SEPARATOR]]
    return line
