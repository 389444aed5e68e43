r"""
Train a model on a folder of JSONL files, one per domain, drawn by learned domain weights.

    python examples/train_with_domain_weights.py --data_dir data --domain_weights proxy/domain_weights \
        --tokenizer proxy/tokenizer --output_dir model

The weights are an artifact that `examples/learn_domain_weights.py` or `hf-doge learn` wrote, or its name on the Hub.
Every domain has a file `<domain>.train.jsonl[.gz]` and a file `<domain>.validation.jsonl[.gz]`; every record has a field
`text`. The defaults take about ten minutes on two CPU cores; the paper's scale is in the comments.
"""

import argparse
import math
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from hf_doge import DomainWeightedTrainer, DomainWeights


def load_blocks(
    data_dir: Path, split: str, names: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> dict[str, Dataset]:
    def cut(batch: dict) -> dict:
        documents = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        tokens = [token for ids in documents["input_ids"] for token in (*ids, tokenizer.eos_token_id)]
        blocks = [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)]
        return {"input_ids": blocks, "labels": blocks}

    blocks = {}
    for name in names:
        files = [str(file) for file in data_dir.glob(f"{name}.{split}.jsonl*")]
        if not files:
            raise SystemExit(f"The weights are of {names}, but {data_dir} has no file {name}.{split}.jsonl[.gz].")
        documents = load_dataset("json", data_files=files, split="train")
        blocks[name] = documents.map(cut, batched=True, remove_columns=documents.column_names)
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--domain_weights", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--output_dir", default="model")
    parser.add_argument("--max_steps", type=int, default=500)
    parser.add_argument("--block_size", type=int, default=128)  # authors' configs: 512
    args = parser.parse_args()

    # Load.
    weights = DomainWeights.from_pretrained(args.domain_weights)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
    train_dataset, eval_dataset = (
        load_blocks(args.data_dir, split, list(weights.mean), tokenizer, args.block_size)
        for split in ("train", "validation")
    )

    # Train.
    set_seed(42)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=680,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=args.block_size,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    training_args = TrainingArguments(
        output_dir=args.output_dir,
        learning_rate=1e-3,
        weight_decay=1e-2,  # as in the authors' configs
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.2},  # authors' configs: from 5e-4 to 1e-4
        warmup_steps=args.max_steps // 20,  # authors' configs: 500 of 10,000 steps
        max_grad_norm=1.0,  # authors' config/gpt_base for the base model
        max_steps=args.max_steps,
        per_device_train_batch_size=16,
        logging_steps=max(1, args.max_steps // 20),
        save_strategy="no",
    )
    trainer = DomainWeightedTrainer(
        model, training_args, train_dataset=train_dataset, domain_weights=weights, eval_dataset=eval_dataset
    )
    trainer.train()
    trainer.save_model()

    # Print.
    metrics = trainer.evaluate()
    for name, epochs in trainer.get_domain_epochs().items():
        perplexity = math.exp(metrics[f"eval_{name}_loss"])
        print(f"{name}: weight {weights.mean[name]:.4f}, {epochs:.2f} epochs, validation perplexity {perplexity:.2f}")


if __name__ == "__main__":
    main()
