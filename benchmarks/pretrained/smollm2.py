"""
A small language model, fine-tuned on documents of which some tell invented facts: are those found that tell what it says?

SmolLM2-135M on 113 short documents: three invented facts in eight wordings each (`planted_facts`), and 89 beginnings of real
texts, at most 32 tokens each, all of whose tokens are trained on. Four epochs of AdamW, batches of 8: all weights at 5e-5, or
(`--lora`) adapters of rank 8 on all attention projections at 1e-3. Indices are of the ends of the first and third epoch: of words
by each use of the tied matrix and in each metric, of all attention outputs and of one layer in the middle (both projected), and
of the adapters.
Twelve questions, four a fact, each in words that no document has; by setting the mean average precision of finding the
eight documents of the fact among the 113:

- `completion`: prompt and completion, the loss is that of the completion;
- `whole`: the same with the loss of all tokens, as the documents were trained on;
- `text`: the two as one plain text.

`loss_before` and `loss_after` are those of the completions: whether the model learned the facts at all. BM25 and the distance
of MiniLM's sentence embeddings stand beside, where these are installed, over the whole text and over the prompt alone.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.pretrained.minilm import read
from benchmarks.pretrained.packaged_models import MissingPackage, minilm, smollm2
from benchmarks.pretrained.planted_facts import FACTS, QUESTIONS
from hf_doge import InfluenceIndex
from hf_doge.evaluation.influence.rank_metrics import average_precision
from hf_doge.evaluation.influence.scorers import BM25Scorer
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.settings import RecordingSettings

LENGTH = 32
NUM_OTHERS = 89
FORMS = {"completion": "completion", "whole": "none", "text": None}
RECORDINGS: dict[str, dict[str, Any]] = {
    "input_plain": {"tied": "input", "metric": "gradient"},
    "own_plain": {"tied": "own", "metric": "gradient"},
    "input_metric": {"tied": "input", "metric": "optimizer"},
    "own_metric": {"tied": "own", "metric": "optimizer"},
    "attention_outputs": {"layers": ["o_proj"]},
    "middle": {"layers": ["layers.15.mlp.down_proj"]},
    "adapters": {"layers": ["adapters"]},
    "adapters_16": {"layers": ["adapters"], "projection_dim": 16},
    "adapters_metric": {"layers": ["adapters"], "metric": "optimizer"},
}
SEARCHES: dict[str, dict[str, Any]] = {"": {}, "_paper": {"recipe": "paper"}, "_cosine": {"cosine": True}}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune once, record by each setting, search; figures by setting."""
    folder = args.output_dir / ("smollm2-lora" if args.lora else "smollm2-full")
    base = args.output_dir / "smollm2"
    model, tokenizer = smollm2(base)
    texts, facts = documents(args.data_dir, seed=args.seed)
    encoded = tokenizer(texts, truncation=True, max_length=LENGTH)
    train = Dataset.from_dict({"text": texts, "fact": facts, **encoded})
    questions = [(fact, *pair) for fact, pairs in QUESTIONS.items() for pair in pairs]
    figures: dict[str, Any] = {"loss_before": completion_loss(model, tokenizer, questions)}
    checkpoints = fine_tune(model, tokenizer, train, folder / "run", args, base=base)
    figures["loss_after"] = completion_loss(load(checkpoints[-1], base, lora=args.lora), tokenizer, questions)
    print(figures, flush=True)
    relevant = [[place for place, own in enumerate(facts) if own == fact] for fact, _, _ in questions]

    def note(name: str, scores: np.ndarray) -> None:
        figures[name] = round(float(average_precision(scores, relevant).mean()), 3)
        print(name, figures[name], flush=True)

    beside(note, args.output_dir, texts, questions)
    chosen = [checkpoints[0], checkpoints[2]]
    for name, options in RECORDINGS.items():
        if args.settings is not None and name not in args.settings:
            continue
        try:
            record_dataset(
                folder / name,
                chosen,
                train,
                tokenizer=tokenizer,
                collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
                settings=RecordingSettings(**options),
                batch_size=8,
                progress=False,
            )
        except ValueError as error:
            print(f"{name}: {error}")
            continue
        for form, masking in FORMS.items():
            index = InfluenceIndex.from_pretrained(folder / name, masking=masking, cache_dir=folder / "maps")
            queries: list[Any] = [{"prompt": prompt, "completion": end} for _, prompt, end in questions]
            if form == "text":
                queries = [prompt + end for _, prompt, end in questions]
            for suffix, search in SEARCHES.items():
                try:
                    note(f"{name}{suffix}/{form}", index.scores(queries, **search))
                except ValueError as error:
                    print(f"{name}{suffix}: {error}")
    return figures


def documents(data_dir: Path, *, seed: int) -> tuple[list[str], list[str]]:
    """Texts, and of each which fact it tells, or none; shuffled by the seed."""
    told = [(text, fact) for fact, texts in FACTS.items() for text in texts]
    for domain in ("wikipedia", "news", "web"):
        rows = read(data_dir / "lm" / f"{domain}.train.jsonl.gz")
        told += [(row["text"][:200].rpartition(" ")[0], "") for row in rows[: NUM_OTHERS // 3 + 1]]
    told = told[: sum(len(texts) for texts in FACTS.values()) + NUM_OTHERS]
    order = np.random.default_rng(seed).permutation(len(told))
    return [told[place][0] for place in order], [told[place][1] for place in order]


def fine_tune(
    model: Any, tokenizer: Any, train: Dataset, folder: Path, args: argparse.Namespace, *, base: Path
) -> list[Path]:
    """The checkpoints of a training, one at the end of each epoch; those of an earlier run if they are there."""
    epochs = args.epochs or 4
    steps = -(-len(train) // 8)
    checkpoints = [folder / f"checkpoint-{steps * epoch}" for epoch in range(1, epochs + 1)]
    if all(path.is_dir() for path in checkpoints):
        return checkpoints
    set_seed(args.seed)
    if args.lora:
        from peft import LoraConfig, get_peft_model

        modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model.name_or_path = model.config._name_or_path = str(base.absolute())
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        learning_rate=1e-3 if args.lora else 5e-5,
        save_strategy="epoch",
        logging_steps=1,
        report_to=[],
        seed=args.seed,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(
        model,
        arguments,
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train.select_columns(["input_ids", "attention_mask"]),
        processing_class=tokenizer,
    ).train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    return checkpoints


def load(checkpoint: Path, base: Path, *, lora: bool) -> nn.Module:
    """The model of a checkpoint."""
    model, _ = smollm2(base if lora else checkpoint)
    if lora:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, checkpoint)
    return model


@torch.no_grad()
def completion_loss(model: nn.Module, tokenizer: Any, questions: list[tuple[str, str, str]]) -> float:
    """Mean loss of the completions' tokens, in nats."""
    losses = []
    for _, prompt, end in questions:
        ids, before = tokenizer(prompt + end)["input_ids"], len(tokenizer(prompt)["input_ids"])
        labels = [-100] * before + ids[before:]
        losses.append(float(model.eval()(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss))
    return round(float(np.mean(losses)), 3)


def beside(note: Any, output_dir: Path, texts: list[str], questions: list[tuple[str, str, str]]) -> None:
    """What needs no gradients: BM25 over words, and sentence embeddings."""
    try:
        encoder, tokenizer = minilm(output_dir / "minilm", num_labels=2)
    except MissingPackage as missing:
        print(missing)
        return
    forms = {"text": [prompt + end for _, prompt, end in questions], "prompt": [prompt for _, prompt, _ in questions]}

    def encode(some: list[str]) -> dict[str, torch.Tensor]:
        return dict(tokenizer(some, truncation=True, max_length=64, padding=True, return_tensors="pt"))

    @torch.no_grad()
    def embed(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden, mask = encoder.bert.eval()(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1))

    train = encode(texts)
    for form, asked in forms.items():
        bm25 = BM25Scorer(ignore_tokens=tuple(tokenizer.all_special_ids))
        note(f"bm25/{form}", bm25.scores([train], [encode(asked)]))
        note(f"sentence_embedding/{form}", (embed(encode(asked)) @ embed(train).T).numpy())
