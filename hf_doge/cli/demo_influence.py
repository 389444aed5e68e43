"""The last step of the demo: which documents and words of its corpus made a small model prefer a continuation."""

from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_doge.cli.arguments import ModelArguments
from hf_doge.cli.console import say
from hf_doge.cli.models import get_config, make_model
from hf_doge.data.blocks import BlockMaker, collate_blocks
from hf_doge.data.domain_files import find_domain_files
from hf_doge.tracing.callback import TracInWECallback
from hf_doge.tracing.index import InfluenceIndex

BLOCK_SIZE = 64
BLOCKS_PER_DOMAIN = 120
NUM_STEPS = 360
PROMPT = "    def close("
CONTINUATION_TOKENS = 1
NUM_HITS = 3
NUM_WORDS = 6
SNIPPET = 100


def trace_continuation(corpus_dir: Path, folder: Path, *, tokenizer_dir: Path, blocks_dir: Path) -> Path:
    """
    Train a small model while recording, let it continue a prompt, and show what made it say so.

    Args:
        corpus_dir (`Path`): The demo's corpus, `<domain>.train.jsonl.gz`.
        folder (`Path`): Where model, index and page go.
        tokenizer_dir (`Path`): Tokenizer of the demo.
        blocks_dir (`Path`): Where the demo has its blocks already.

    Returns:
        `Path`: the page, `influence.html`.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, trust_remote_code=False)
    train = _blocks_with_domain(corpus_dir, tokenizer, blocks_dir)
    model = _train_and_record(train, tokenizer, folder)
    query = _continue(model, tokenizer, PROMPT)
    continuation = tokenizer.decode([token for token in query["labels"] if token != -100])
    say(f"      {PROMPT!r}\n      goes on with {continuation!r}. Why?")

    index = InfluenceIndex.from_pretrained(folder / "influence", processing_class=tokenizer)
    queries = Dataset.from_list([query])
    hits = index.search(queries, top_k=NUM_HITS)
    for hit in hits:
        _say_hit(hit, tokenizer.decode(train[hit["example_id"]]["input_ids"]))
    shares = {row["domain"]: row["score"] for row in index.domain_influence(queries, "domain")}
    listed = ", ".join(f"{name} {score:+.3g}" for name, score in sorted(shares.items(), key=lambda item: -item[1]))
    say(f"      Mean influence of an example, by domain: {listed}")
    page = folder / "influence.html"
    index.to_html(hits, page)
    return page


def _blocks_with_domain(corpus_dir: Path, tokenizer: PreTrainedTokenizerBase, blocks_dir: Path) -> Dataset:
    """As many blocks of each domain, with its name beside them."""
    blocks = BlockMaker(tokenizer, BLOCK_SIZE, blocks_dir)
    parts = []
    for domain, files in sorted(find_domain_files(corpus_dir).items()):
        part = blocks.load(files["train"], name=f"{domain}.train")
        part = part.select(range(min(BLOCKS_PER_DOMAIN, len(part))))
        parts.append(part.add_column("domain", [domain] * len(part)))
    return concatenate_datasets(parts)


def _train_and_record(train: Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """An ordinary Trainer with one callback more."""
    set_seed(0)
    config = get_config(ModelArguments(model_size="micro"), tokenizer, BLOCK_SIZE)
    arguments = TrainingArguments(
        output_dir=str(folder / "model"),
        per_device_train_batch_size=10,
        max_steps=NUM_STEPS,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        save_steps=NUM_STEPS // 2,
        save_only_model=True,
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    callback = TracInWECallback(folder / "influence", dataset=train, batch_size=50)
    trainer = Trainer(
        make_model(None, config),
        arguments,
        train_dataset=train.remove_columns("domain"),
        data_collator=collate_blocks,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model.eval()


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, list[int]]:
    """The prompt and what the model finds likeliest after it; only the latter is labelled."""
    prompt_ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    tokens = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=CONTINUATION_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )[0].tolist()
    num_prompt = prompt_ids.shape[1]
    return {"input_ids": tokens, "labels": [-100] * num_prompt + tokens[num_prompt:]}


def _say_hit(hit: Mapping, text: str) -> None:
    words = list(zip(hit["words"], hit["word_scores"], strict=True))[:NUM_WORDS]
    snippet = " ".join(text.split())
    snippet = snippet if len(snippet) <= SNIPPET else snippet[: SNIPPET - 1] + "…"
    say(
        f"      {hit['kind']} {hit['rank']} ({hit['score']:+.3g}): {snippet}\n"
        f"        through {', '.join(f'{word!r} {part:+.2g}' for word, part in words)}"
    )
