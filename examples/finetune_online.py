r"""
Fine-tune a model on several sources towards a target, and let the mixture find itself on the way (online mode).

    python examples/finetune_online.py --model model --data_dir data --target books --output_dir finetuned
    accelerate launch --num_processes 8 examples/finetune_online.py --model ...   # the same run, faster

Every source has a file `<name>.train.jsonl[.gz]`; the target, which the model is never trained on, has a file
`<target>.validation.jsonl[.gz]`. Records have a field `text`. Needs `pip install trl`; add `--lora` for adapters (peft).
There is no proxy: every 20 steps the gradients of a few examples of each source are compared with the target's, and the
sampler draws by the new weights from the next period on. On one process they all come out of one backward.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_doge import DoGEConfig, DoGEMixin


@dataclass
class DoGESFTConfig(DoGEConfig, SFTConfig):
    pass


class DoGESFTTrainer(DoGEMixin, SFTTrainer):
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", help="By default that of the model.")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--output_dir", default="finetuned")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--lora", action="store_true")
    args = parser.parse_args()

    # Load.
    def read(file: Path):
        return load_dataset("json", data_files=str(file), split="train").select_columns(["text"])

    files = {file.name.split(".train.")[0]: file for file in sorted(args.data_dir.glob("*.train.jsonl*"))}
    sources = {name: read(file) for name, file in files.items() if name != args.target}
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    target = read(next(args.data_dir.glob(f"{args.target}.validation.jsonl*"))).map(
        lambda batch: {"input_ids": tokenizer(batch["text"], truncation=True, max_length=256)["input_ids"]},
        batched=True,
        remove_columns="text",
    )

    # Train.
    peft_config = None
    if args.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=8, target_modules="all-linear")
    trainer = DoGESFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=False),
        args=DoGESFTConfig(
            args.output_dir,
            mode="online",
            mu=2e-4,  # of the step exp(learning_rate * score / mu): raise it if one source takes everything at once
            reweight_steps=20,
            per_device_train_batch_size=8,
            learning_rate=2e-4,
            max_length=256,
            max_steps=args.max_steps,
            logging_steps=20,
            report_to="none",
        ),
        train_dataset=sources,
        target_dataset=target,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model()

    # Print.
    if trainer.is_world_process_zero():
        print(trainer.domain_weights.summary())


if __name__ == "__main__":
    main()
