"""
Learn domain weights with DoGE (https://huggingface.co/papers/2310.15393) on a folder of JSONL files, one per domain.

    python examples/learn_domain_weights.py --data_dir data --output_dir proxy

Every file `<domain>.train.jsonl` or `<domain>.train.jsonl.gz` is a domain; every record has a field `text`. A tokenizer
and a proxy model of one million parameters are made from scratch, so nothing is downloaded. The defaults take about
ten minutes on two CPU cores; the paper's scale is in the comments.
"""

import argparse
from itertools import chain
from pathlib import Path

from datasets import Dataset, load_dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from hf_doge import DoGEConfig, DoGETrainer


def load_domains(data_dir: Path) -> dict[str, Dataset]:
    files = sorted(data_dir.glob("*.train.jsonl*"))
    if not files:
        raise SystemExit(f"{data_dir} must hold files <domain>.train.jsonl[.gz], but it holds none.")
    return {
        file.name.split(".train.jsonl")[0]: load_dataset("json", data_files=str(file), split="train") for file in files
    }


def train_tokenizer(domains: dict[str, Dataset], vocab_size: int) -> PreTrainedTokenizerFast:
    smallest = min(map(len, domains.values()))  # as many documents of each, so that no domain decides the vocabulary
    texts = chain.from_iterable(dataset["text"][:smallest] for dataset in domains.values())
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|endoftext|>")


def cut_blocks(dataset: Dataset, tokenizer: PreTrainedTokenizerFast, block_size: int) -> Dataset:
    def cut(batch: dict) -> dict:
        documents = tokenizer(batch["text"], return_attention_mask=False, verbose=False)["input_ids"]
        tokens = [token for document in documents for token in (*document, tokenizer.eos_token_id)]
        blocks = [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)]
        return {"input_ids": blocks, "labels": blocks}

    return dataset.map(cut, batched=True, remove_columns=dataset.column_names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("proxy"))
    parser.add_argument("--max_steps", type=int, default=500)  # authors' config/doge.json: 10,000
    parser.add_argument("--block_size", type=int, default=128)  # authors' config/doge.json: 512
    parser.add_argument("--examples_per_domain", type=int, default=4)  # about 16 in the authors' runs on 4 GPUs
    parser.add_argument("--mu", type=float, default=0.01)  # authors' config/doge.json
    parser.add_argument("--push_to", default=None, metavar="USER/NAME")  # a dataset repository on the Hub
    args = parser.parse_args()

    # Load.
    domains = load_domains(args.data_dir)
    tokenizer = train_tokenizer(domains, vocab_size=4096)
    tokenizer.save_pretrained(args.output_dir / "tokenizer")
    train_dataset = {name: cut_blocks(dataset, tokenizer, args.block_size) for name, dataset in domains.items()}

    # Train the proxy, and with it the weights.
    set_seed(42)
    proxy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=args.block_size,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    config = DoGEConfig(
        output_dir=str(args.output_dir),
        mu=args.mu,
        # The authors' code clips each domain's gradient alone, to 5.0 in config/doge.json; without it one odd batch can
        # decide the weights. 1.0 suits so small a model.
        domain_max_grad_norm=1.0,
        learning_rate=1e-3,  # config/doge.json: 5e-4, for a model of 82 million parameters
        weight_decay=1e-2,  # as in config/doge.json
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.2},  # config/doge.json: from 5e-4 to 1e-4
        warmup_steps=args.max_steps // 20,  # config/doge.json: 500 of 10,000 steps
        max_steps=args.max_steps,
        per_device_train_batch_size=args.examples_per_domain * len(domains),
        logging_steps=max(1, args.max_steps // 20),
        save_strategy="no",
    )
    trainer = DoGETrainer(proxy, config, train_dataset=train_dataset)
    trainer.train()

    # Print and save.
    weights = trainer.domain_weights
    print(weights.summary())
    weights.save_pretrained(args.output_dir / "domain_weights")
    print(f"Saved to {args.output_dir / 'domain_weights'}: DomainWeights.from_pretrained reads it.")
    if args.push_to is not None:
        print(weights.push_to_hub(args.push_to).commit_url)


if __name__ == "__main__":
    main()
