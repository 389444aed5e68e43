"""Small trainings to record, and what their rows must be."""

from functools import cache

import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from hf_doge import InfluenceIndex
from hf_doge.artifacts.influence import IndexReader
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.callback import TracInWECallback
from hf_doge.tracing.settings import RecordingSettings
from tests.reference_tracin_we import dense, dense_gradient
from tests.tiny import tiny_classifier, tiny_tokenizer, tokens

# Of trainings and of what records their checkpoints again: on some processors a matrix product rounds by the size of the batch.
BATCH_SIZE = 4
LENGTHS = (6, 3, 8, 5, 4, 7, 2)


def texts(num_examples, *, seed=0):
    ids = tokens(num_examples, low=4, seed=seed).tolist()  # 0 to 3 are special tokens of the test tokenizer
    return [row[: LENGTHS[position % len(LENGTHS)]] for position, row in enumerate(ids)]


@cache
def classification_data(num_examples=11, *, seed=0):
    ids = texts(num_examples, seed=seed)
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "attention_mask": [[1] * len(row) for row in ids],
            "label": [position % 3 for position in range(num_examples)],
            "text": [" ".join(f"w{token}" for token in row) for row in ids],
            "domain": [("wiki", "books")[position % 2] for position in range(num_examples)],
        },
        features=Features(
            {
                "input_ids": List(Value("int32")),
                "attention_mask": List(Value("int8")),
                "label": ClassLabel(names=["sport", "world", "trade"]),
                "text": Value("string"),
                "domain": Value("string"),
            }
        ),
    )


@cache
def language_data(num_examples=9):
    ids = texts(num_examples)
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})


def translation_data(num_examples=7):
    return language_data(num_examples).add_column("labels", [row[::-1] for row in texts(num_examples, seed=5)])


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": BATCH_SIZE,
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 0.01,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "logging_steps": 1,
        "seed": 3,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def make_trainer(
    folder,
    callback,
    *,
    tokenizer,
    model=None,
    dataset=None,
    trainer_class=Trainer,
    collator=None,
    optimizers=(None, None),
    **options,
):
    return trainer_class(
        model or tiny_classifier(),
        arguments(folder, **options),
        train_dataset=dataset or classification_data(),
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[] if callback is None else [callback],
        optimizers=optimizers,
    )


def train(folder, *, tokenizer, callback=None, resume=None, model=None, recording=None, **options):
    """Train with a callback that records words into `folder/index`, and return the reader of what was recorded."""
    words = {"dtype": "float32", "layers": "embedding"}
    callback = callback or TracInWECallback(folder / "index", **{**words, **(recording or {})})
    trainer = make_trainer(folder / "run", callback, tokenizer=tokenizer, model=model, **options)
    trainer.train(resume_from_checkpoint=resume)
    return IndexReader.open(folder / "index", cache_dir=folder / "cache")


def causal_collator(tokenizer):
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


def record_again(trained, folder, **settings):
    """The index of the checkpoints that a training on `language_data` left in a folder, recorded after it."""
    record_dataset(
        folder,
        sorted((trained / "run").glob("checkpoint-*")),
        language_data(),
        collator=causal_collator(tiny_tokenizer()),
        tokenizer=tiny_tokenizer(),
        settings=RecordingSettings(**settings),
        batch_size=BATCH_SIZE,
        progress=False,
    )
    return InfluenceIndex.from_pretrained(folder, cache_dir=folder.with_name(f"{folder.name}-maps"))


def seq2seq_collator(tokenizer):
    return DataCollatorForSeq2Seq(tokenizer)


def single_examples(dataset):
    """The examples of a dataset as a model takes them alone, with labels as the collators above make them."""
    for row in dataset:
        example = {key: torch.tensor([row[key]]) for key in ("input_ids", "attention_mask")}
        labels = row.get("label", row.get("labels", row["input_ids"]))
        yield {**example, "labels": torch.tensor([labels])}


def num_terms(example, *, causal=False):
    labels = example["labels"]
    return 1 if labels.ndim == 1 else int((labels[:, 1:] if causal else labels).ne(-100).sum())


def assert_rows_are_autograd(reader, checkpoint, model, dataset, *, tolerance=1e-5, causal=False):
    """Each recorded example against ordinary autograd on the dense matrix, alone."""
    recorded = reader.example_rows(checkpoint, list(range(len(dataset))))
    assert len(recorded) == len(dataset)
    for rows, example in zip(recorded, single_examples(dataset), strict=True):
        part, count = reader.config["tied"], num_terms(example, causal=causal)
        expected = dense_gradient(model, example, part=part, num_terms=count)
        rows = [torch.as_tensor(part) for part in rows]
        difference = dense(*rows, len(expected)).to(expected) - expected
        assert expected.norm() > 0
        assert difference.norm() <= tolerance * expected.norm()


def segments(reader):
    """Checksums of all gradient files: equal if and only if the recordings are, byte for byte."""
    return {entry["name"]: [file["sha256"] for file in entry["files"]] for entry in reader.config["checkpoints"]}
