"""
Digests of what the package computes, to the bit: before and after a change of its code that must change none of it.

    python -m benchmarks.same_results > after.json
    git worktree add --detach ../before COMMIT; cd ../before
    python ../main/benchmarks/same_results.py > before.json; diff before.json after.json

Weights by each alignment, recipe and metric of targets; a stream of examples, its resumed rest, interleaved streams; an
index recorded at checkpoints and online, its rows, scores, words and self-influence; cards. Dates, versions and the commit
stand in no digest. Only public names are used, so that the script runs on older commits too; it needs the folder `tests`
of its commit for tiny models.

Last line: digest by name.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, os.getcwd())

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from hf_doge import (
    DoGEConfig,
    DoGETrainer,
    DomainWeightedSampler,
    DomainWeights,
    InfluenceIndex,
    TracInWECallback,
    interleave_domains,
)

VOCABULARY = 32


def digest(*values) -> str:
    """SHA-256 of arrays and of whatever JSON holds."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.detach().numpy()
        found.update(value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value).encode())
    return found.hexdigest()[:16]


def model(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, use_cache=False)
    config.bos_token_id = config.eos_token_id = 0
    return GPT2LMHeadModel(config)


def domain(low: int, seed: int, num_examples: int = 12) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, low + 12, (num_examples, 8), generator=generator)
    labels = ids.clone()
    labels[torch.rand(ids.shape, generator=generator) < 0.1] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def domains() -> dict[str, Dataset]:
    return {name: domain(low, low) for name, low in {"arxiv": 1, "books": 9, "code": 19}.items()}


def learn(folder: Path, *, target: bool = False, **options) -> str:
    defaults = {
        "recipe": "paper",
        "max_steps": 6,
        "per_device_train_batch_size": 6,
        "learning_rate": 0.01,
        "seed": 5,
        "logging_steps": 1,
    }
    args = DoGEConfig(
        folder, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", **{**defaults, **options}
    )
    trainer = DoGETrainer(model(), args, train_dataset=domains(), target_dataset=domain(5, 77) if target else None)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    weights = trainer.domain_weights
    kinds = ("domain_weight", "domain_loss/", "domain_score/", "domain_tokens/", "domain_epochs/")
    scores = [{k: v for k, v in log.items() if k.startswith(kinds)} for log in trainer.state.log_history]
    parameters = torch.cat([parameter.flatten() for parameter in trainer.model.parameters()])
    return digest(weights.mean, weights.last, scores, parameters)


LEARNING = {
    "single_pass": {"alignment": "single_pass"},
    "per_domain": {"alignment": "per_domain"},
    "streamed": {"alignment": "streamed"},
    "accumulated": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
    "paper": {"recipe": "paper"},
    "official": {"recipe": "official", "target": True},
    "target": {"target": True},
    "no_self_term": {"self_term": False},
    "every_second_step": {"reweight_steps": 2},
    "online": {"mode": "online", "reweight_steps": 2},
}


def stream() -> str:
    ids = [position % 3 for position in range(30)]
    sampler = DomainWeightedSampler(ids, [0.5, 0.3, 0.2], seed=4, num_samples=64)
    mixed = interleave_domains(domains(), DomainWeights({"arxiv": 0.5, "books": 0.3, "code": 0.2}), seed=3)
    return digest(list(sampler), [row["input_ids"] for row, _ in zip(mixed, range(40), strict=False)])


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )  # fmt: skip
    return BertForSequenceClassification(config)


def record(folder: Path, tokenizer, **options) -> dict[str, str]:
    generator = torch.Generator().manual_seed(9)
    words = [f"w{number}" for number in torch.randint(0, 28, (20 * 6,), generator=generator).tolist()]
    texts = [" ".join(words[6 * row : 6 * row + 6 - row % 3]) for row in range(20)]
    dataset = Dataset.from_dict({"text": texts, "label": [row % 3 for row in range(20)]})
    dataset = dataset.cast_column("label", ClassLabel(names=["a", "b", "c"])).map(lambda row: tokenizer(row["text"]))
    args = TrainingArguments(
        folder / "run", num_train_epochs=2, per_device_train_batch_size=4, learning_rate=5e-3, save_strategy="epoch",
        report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
    )  # fmt: skip
    callback = TracInWECallback(folder / "index", dataset=dataset, dtype="float32", **options, **paper_recipe())
    collator = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(classifier(), args, collator, dataset, processing_class=tokenizer, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    index = InfluenceIndex.from_pretrained(folder / "index", cache_dir=folder / "maps")
    tables = [pq.read_table(path).to_pydict() for path in sorted((folder / "index").rglob("gradients/**/*.parquet"))]
    queries = ["w3 w5 w7", "w1 w1 w20 w9"]
    hits = [
        {key: value for key, value in hit.items() if key != "path"} for hit in index.search(queries, top_k=4).to_list()
    ]
    card = (folder / "index" / "README.md").read_text()
    return {
        "rows": digest(json.loads(json.dumps(tables, default=str))),
        "scores": digest(index.scores(queries)),
        "cosine": digest(index.scores(queries, cosine=True)),
        "hits": digest(json.loads(json.dumps(hits, default=str))),
        "self_influence": digest([] if "record" in options else index.self_influence().to_dict()),
        "card": digest(without_time(card, folder)),
    }


def paper_recipe() -> dict[str, str]:
    """What asks for the paper's settings, which were all defaults in commits that know no recipe."""
    try:
        TracInWECallback("index", recipe="paper")
    except TypeError:
        return {}
    return {"recipe": "paper"}


def without_time(text: str, folder: Path) -> str:
    """A card without what changes from run to run, and from commit to commit."""
    text = text.replace(str(folder), "FOLDER")
    return re.sub(r"\b[0-9a-f]{7,64}\b|\d{4}-\d\d-\d\d[T \d:.+Z]*|\d+\.\d+\.\d+\S*", "X", text)


def main() -> None:
    from tests.tiny import tiny_tokenizer

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {"stream": stream()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case, options in LEARNING.items():
            found[f"learn {case}"] = learn(folder / case, **options)
        for case, options in {"checkpoints": {}, "online": {"record": "online"}}.items():
            found |= {
                f"{case} {what}": value for what, value in record(folder / case, tiny_tokenizer(), **options).items()
            }
        weights = DomainWeights({"arxiv": 0.5, "books": 0.3, "code": 0.2})
        weights.save_pretrained(folder / "weights")
        found["weights card"] = digest(without_time((folder / "weights" / "README.md").read_text(), folder))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
