"""`hf-doge index`: record what each training example pushed, at checkpoints that a Trainer has saved."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from hf_doge.cli.arguments import parse_once
from hf_doge.cli.console import say
from hf_doge.cli.records import check_text_fields, read_records, select_fields
from hf_doge.gradients.embedding import TIED_PARTS
from hf_doge.tracing.processes import process_index
from hf_doge.tracing.queries import text_fields
from hf_doge.tracing.recording import record_dataset
from hf_doge.tracing.settings import DTYPES, SPECIAL_TOKENS, RecordingSettings

LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = _parse(argv)
    missing = [path for path in args.checkpoints if not path.is_dir()]
    if missing:
        raise FileNotFoundError(f"Checkpoints must be folders that a Trainer wrote, but {str(missing[0])!r} is none.")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.checkpoints[0])
    dataset = _load(args, tokenizer)
    settings = RecordingSettings(
        top_k_tokens=args.top_k_tokens,
        top_k_unit=args.top_k_unit,
        dtype=args.dtype,
        projection_width=args.projection_width,
        special_tokens=args.special_tokens,
        tied=args.tied,
        second_moment=args.second_moment,
    )
    record_dataset(
        args.output_dir,
        args.checkpoints,
        dataset,
        tokenizer=tokenizer,
        settings=settings,
        learning_rates=args.learning_rates,
        batch_size=args.batch_size,
        add_examples=args.add_examples,
    )
    if process_index() > 0:
        return 0
    say(f"Recorded {len(dataset)} examples at {len(args.checkpoints)} checkpoints: {args.output_dir}")
    say(f'Search it with: hf-doge search --index {args.output_dir} --query "..."')
    return 0


def _parse(argv: Sequence[str]) -> Namespace:
    parser = ArgumentParser(
        prog="hf-doge index",
        description=(
            "Record the gradients of training examples at saved checkpoints, so that predictions can be traced to them "
            "by `hf-doge search`. Run again after an interruption, it continues; with more checkpoints, it adds them; "
            "with --add_examples, it adds examples. "
            "Under `accelerate launch -m hf_doge index` all processes share the work, and must see the same files."
        ),
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        nargs="+",
        required=True,
        help="Folders that a Trainer saved, in any order: each says its step.",
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="The training examples: JSONL (.gz or not), one record on a line."
    )
    parser.add_argument(
        "--add_examples",
        action="store_true",
        help=(
            "Add what --data holds behind the examples of the index, at all of its checkpoints; --data begins with those it "
            "was made of, and the other options are as they were then."
        ),
    )
    parser.add_argument("--output_dir", type=Path, default=Path("influence"), help="The index. Default: influence.")
    parser.add_argument(
        "--text_field",
        nargs="+",
        default=None,
        help="Field of the text, or the two of a pair. Default: text, or premise and hypothesis, or the like.",
    )
    parser.add_argument(
        "--label_field", default="label", help="Field of a classifier's label, a number or a name. Default: label."
    )
    parser.add_argument(
        "--tokenizer", default=None, help="Folder or Hub name. Default: the one saved with the first checkpoint."
    )
    parser.add_argument(
        "--max_length", type=int, default=None, help="Cut texts at so many tokens. Give what training had."
    )
    parser.add_argument(
        "--learning_rates",
        type=float,
        nargs="+",
        default=None,
        help="In force at each checkpoint. Default: what the Trainer logged there.",
    )
    parser.add_argument(
        "--top_k_tokens", type=int, default=None, help="Keep only so many words of each example. Default: all."
    )
    parser.add_argument("--top_k_unit", default="position", help="What is counted there: position or token.")
    parser.add_argument("--dtype", default="float16", choices=DTYPES, help="On disk. Default: float16.")
    parser.add_argument(
        "--projection_width", type=int, default=None, help="Project gradients to so many numbers. Default: none."
    )
    parser.add_argument(
        "--special_tokens", default="count", choices=SPECIAL_TOKENS, help="Whether tokens such as [CLS] are recorded."
    )
    parser.add_argument(
        "--tied",
        default="input",
        choices=TIED_PARTS,
        help=(
            "For language models whose output layer is tied to the embeddings: record the gradient of words as they are "
            "read (input, the paper's), as they are predicted (output), both (full), or both for the words of the example "
            "alone (own). output and full give each example a row for every word of the vocabulary; own has as few as "
            "input. Default: input."
        ),
    )
    parser.add_argument(
        "--second_moment",
        action="store_true",
        help=(
            "Divide rows by sqrt(v) + eps of Adam, influence in the metric that it steps in: v of the input embeddings is "
            "read from the optimizer.pt that the Trainer saved in each checkpoint (without save_only_model)."
        ),
    )
    parser.add_argument("--batch_size", type=int, default=8, help="Examples at once; changes no result. Default: 8.")
    return parse_once(parser, argv)


def _load(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The examples, tokenised as the model is fed them, with their text beside them."""
    config = AutoConfig.from_pretrained(args.checkpoints[-1])
    generative = (config.architectures or [""])[0].endswith(LANGUAGE_MODELS)
    records = read_records(args.data)
    try:
        names = check_text_fields(args.text_field) or text_fields(records[0])
    except ValueError as error:
        raise ValueError(f"Line 1 of {str(args.data)!r}: {error}") from error
    rows = [
        select_fields(
            record,
            text_fields=names,
            label_field=None if generative else args.label_field,
            where=f"line {number} of {str(args.data)!r}",
        )
        for number, record in enumerate(records, start=1)
    ]

    if not generative:
        rows = [{**row, "label": _label_number(row["label"], config.label2id)} for row in rows]
    dataset = Dataset.from_list(rows)
    if not generative and _has_label_names(config):
        dataset = dataset.cast_column(
            "label", ClassLabel(names=[config.id2label[i] for i in range(config.num_labels)])
        )

    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        texts = [row[name] for name in names]
        encoded = dict(tokenizer(*texts, truncation=args.max_length is not None, max_length=args.max_length))
        return {**encoded, "labels": encoded["input_ids"]} if generative else encoded

    return dataset.map(tokenise, desc="Tokenising")


def _has_label_names(config: PretrainedConfig) -> bool:
    """Whether somebody named the model's labels."""
    return config.label2id.keys() != {f"LABEL_{number}" for number in range(config.num_labels)}


def _label_number(label: int | str, numbers: dict[str, int]) -> int:
    if isinstance(label, str) and label not in numbers:
        raise ValueError(
            f"Labels must be numbers or names that the model knows, {sorted(numbers)}, but got {label!r}."
        )
    return numbers[label] if isinstance(label, str) else label
