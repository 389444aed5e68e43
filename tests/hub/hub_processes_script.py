"""Learns and records with pushes on, under `accelerate launch`: `python hub_processes_script.py FOLDER`."""

import sys
from pathlib import Path

from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from hf_doge import DoGEConfig, DoGETrainer, DomainWeights, InfluenceIndex, TracInWECallback
from tests.artifacts.influence_rows import random_rows, write_index
from tests.launch import end_process_group
from tests.tiny import language_model_rows, tiny_gpt2, tiny_tokenizer


def learn(folder):
    domains = {
        name: Dataset.from_dict(language_model_rows(12, low=1 + 9 * number, high=13 + 9 * number, seed=number))
        for number, name in enumerate(("arxiv", "books"))
    }
    args = DoGEConfig(
        str(folder / "proxy"),
        max_steps=2,
        per_device_train_batch_size=2,
        push_to_hub=True,
        hub_model_id="doge/proxy",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = DoGETrainer(
        model=tiny_gpt2(),
        args=args,
        train_dataset=domains,
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
    )
    trainer.train()
    trainer.push_to_hub()
    trainer.push_to_hub()
    save_and_push(trainer, folder)


def save_and_push(trainer, folder):
    """By all processes, as a script does that knows of none; each reads at once what it has saved."""
    weights = trainer.domain_weights
    weights.push_to_hub("doge/direct")
    saved = [DomainWeights.from_pretrained("doge/direct")]
    for number in range(5):
        weights.save_pretrained(folder / "saved" / str(number))
        saved.append(DomainWeights.from_pretrained(folder / "saved" / str(number)))
    trainer.save_model(folder / "model")
    assert all(one.mean == weights.mean for one in saved)
    if trainer.is_world_process_zero():  # alone, as a script does that knows of the others
        weights.save_pretrained(folder / "alone")
        weights.push_to_hub("doge/alone")
        write_index(folder / "rows", random_rows(40))
    trainer.accelerator.wait_for_everyone()
    InfluenceIndex.from_pretrained(folder / "rows", cache_dir=folder / "maps").save_pretrained(folder / "copy")
    assert len(InfluenceIndex.from_pretrained(folder / "copy", cache_dir=folder / "maps")) == 40
    (folder / f"read-{trainer.accelerator.process_index}").touch()


def record(folder):
    args = TrainingArguments(
        str(folder / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        save_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        hub_private_repo=True,
    )
    dataset = Dataset.from_dict(language_model_rows(12, low=1, high=13))
    callback = TracInWECallback(folder / "index", hub_index_id="doge/traced")
    Trainer(
        tiny_gpt2(),
        args,
        train_dataset=dataset,
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        callbacks=[callback],
    ).train()


if __name__ == "__main__":
    learn(Path(sys.argv[1]))
    record(Path(sys.argv[1]))
    end_process_group()
