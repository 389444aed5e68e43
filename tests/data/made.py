"""Small data sets of each kind: chat, prompts with completions, text; every one of words of its own."""

import json
import random

SIZES = {"chat": 60, "tasks": 80, "prose": 60}


def sentence(draw, words, length=12):
    return " ".join(draw.choices(words, k=length))


def rows_of(name, number):
    """Rows of a data set, from a seed of its own."""
    draw = random.Random(name)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(30)]
    for _ in range(number):
        if name == "chat":
            question, answer = sentence(draw, words), sentence(draw, words)
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        elif name == "tasks":
            yield {"prompt": sentence(draw, words), "completion": " " + sentence(draw, words)}
        else:
            yield {"text": sentence(draw, words, 25)}


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_sets(folder):
    """`chat.jsonl`, `tasks.jsonl` and `prose.jsonl`."""
    for name, number in SIZES.items():
        write_jsonl(folder / f"{name}.jsonl", rows_of(name, number))
    return folder
