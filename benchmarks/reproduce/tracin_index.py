"""
The explained run of case deletion as an influence index that anyone can search: AG News, CNN, four checkpoints, without text.

    python -m benchmarks.reproduce.tracin_index --data_dir ../shared/data --output_dir outputs/reproduce

Writes `OUTPUT_DIR/tracin_case_deletion/index-ag_news-cnn`, compares its scores with those that case deletion removed examples
by, and ends with one line of JSON. It holds token ids, labels and gradients; the texts stay where they are.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from benchmarks.reproduce.machine import describe_commit
from benchmarks.reproduce.tracin_case_deletion import SIZES, train_explained
from hf_doge import InfluenceIndex
from hf_doge.evaluation.influence.scorers import TracInWEScorer
from hf_doge.evaluation.influence.small_models import to_batches
from hf_doge.evaluation.influence.small_tasks import PAD, SEPARATOR, START, UNKNOWN
from hf_doge.tracing.batches import SequentialBatches
from hf_doge.tracing.examples import Examples
from hf_doge.tracing.models import MODELS, save_model
from hf_doge.tracing.opening import open_shared_index
from hf_doge.tracing.recording import make_recorder, record_checkpoint
from hf_doge.tracing.settings import RecordingSettings


def word_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of `hf_doge.evaluation.influence.small_tasks` for a single text: lower-case words and punctuation marks."""
    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{START} $A {SEPARATOR}", special_tokens=[(START, ids[START]), (SEPARATOR, ids[SEPARATOR])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, cls_token=START, sep_token=SEPARATOR
    )


def write_index(data_dir: Path, folder: Path, task_name: str, architecture: str, scale: str) -> dict[str, float]:
    """Record the training examples at each checkpoint; the largest difference from the exact scores, over their largest."""
    explained = train_explained(data_dir, task_name, architecture, SIZES[scale])
    train = explained.task.train
    tokenizer = word_tokenizer(explained.task.vocabulary)
    lines = [ids[mask.bool()].tolist() for ids, mask in zip(train["input_ids"], train["attention_mask"], strict=True)]
    dataset = Dataset.from_dict({"input_ids": lines, "labels": train["labels"].tolist()})
    settings = RecordingSettings(recipe="paper")
    shutil.rmtree(folder, ignore_errors=True)
    batches = SequentialBatches(dataset, DataCollatorWithPadding(tokenizer), batch_size=64, seed=0)
    index = open_shared_index(
        folder,
        model=explained.model,
        dataset=Examples(dataset, dataset),
        tokenizer=tokenizer,
        settings=settings,
        metadata=lambda: {
            "experiment": "tracin_case_deletion",
            "task": task_name,
            "architecture": architecture,
            "commit": describe_commit(),
        },
    )
    steps = -(-len(dataset) // explained.recipe.batch_size)
    try:
        for epoch, checkpoint in zip(explained.recipe.checkpoint_epochs, explained.checkpoints, strict=True):
            name = f"checkpoint-{epoch * steps}"
            save_model(checkpoint.model, folder / MODELS / name, processing_class=tokenizer)
            record_checkpoint(
                index,
                make_recorder(checkpoint.model, settings, tokenizer),
                batches,
                {
                    "name": name,
                    "step": epoch * steps,
                    "epoch": float(epoch),
                    "learning_rate": checkpoint.learning_rate,
                    "path": f"{MODELS}/{name}",
                },
                progress=False,
            )
    finally:
        index.close()
    queries = {name: values[:5] for name, values in explained.task.test.items()}
    asked = Dataset.from_dict(
        {
            "input_ids": [
                ids[mask.bool()].tolist()
                for ids, mask in zip(queries["input_ids"], queries["attention_mask"], strict=True)
            ],
            "labels": queries["labels"].tolist(),
        }
    )
    found = InfluenceIndex.from_pretrained(folder, processing_class=tokenizer, model=explained.model).scores(asked)
    exact = TracInWEScorer(*zip(*explained.checkpoints, strict=True)).scores(to_batches(train), to_batches(queries))
    return {"largest_difference": float(np.abs(found - exact).max() / np.abs(exact).max())}


def main() -> None:
    """Write the index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--task", default="ag_news")
    parser.add_argument("--architecture", default="cnn")
    parser.add_argument("--scale", default="small")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.output_dir / "tracin_case_deletion" / f"index-{args.task}-{args.architecture}"
    figures = write_index(args.data_dir / "classification", folder, args.task, args.architecture, args.scale)
    print(json.dumps({"folder": str(folder), **figures}))


if __name__ == "__main__":
    main()
