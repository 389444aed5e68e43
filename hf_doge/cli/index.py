"""`hf-doge index`: record what each training example pushed, at checkpoints that a Trainer has saved."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from hf_doge.cli.console import say
from hf_doge.cli.index_data import load_examples
from hf_doge.cli.parser import parse_once
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.encoding import MASKINGS
from hf_doge.tracing.pretrained import load_tokenizer, tokenizer_place
from hf_doge.tracing.processes import process_index
from hf_doge.tracing.settings import RecordingSettings


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = _parse(argv)
    missing = [path for path in args.checkpoints if not path.is_dir()]
    if missing:
        raise FileNotFoundError(f"Checkpoints must be folders that a Trainer wrote, but {str(missing[0])!r} is none.")
    tokenizer = load_tokenizer(args.tokenizer or tokenizer_place(args.checkpoints[0]) or args.checkpoints[0])
    dataset, encoding = load_examples(args, tokenizer)
    given = {one.name: getattr(args, one.name) for one in fields(RecordingSettings) if one.metadata["flag"]}
    settings = RecordingSettings(**given)
    record_dataset(
        args.output_dir,
        args.checkpoints,
        dataset,
        tokenizer=tokenizer,
        settings=settings,
        learning_rates=args.learning_rates,
        batch_size=args.batch_size,
        add_examples=args.add_examples,
        encoding=encoding,
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
        "--data",
        type=Path,
        required=True,
        help=(
            "The training examples: JSONL (.gz or not), one record on a line: a text or a pair with a label, prompt and "
            "completion, messages, or input_ids with labels. Its other fields are kept with the examples."
        ),
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
    _add_text_flags(parser)
    _add_recording_flags(parser)
    parser.add_argument("--batch_size", type=int, default=8, help="Examples at once; changes no result. Default: 8.")
    return parse_once(parser, argv)


def _add_text_flags(parser: ArgumentParser) -> None:
    """How texts become tokens and labels, as in training; and the learning rates."""
    parser.add_argument(
        "--text_field",
        nargs="+",
        default=None,
        help="Field of the text, or the two of a pair. Default: text, or premise and hypothesis, or the like.",
    )
    parser.add_argument(
        "--label_field",
        default="label",
        help="Field of a classifier's label, a number or a name, or of the text that a model from text to text writes. "
        "Default: label.",
    )
    parser.add_argument(
        "--masking",
        default=None,
        choices=MASKINGS,
        help=(
            "Which tokens of prompt and completion, or of messages, alone had a loss in training. Default: those of the "
            "completion; all of messages (none is masked)."
        ),
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


def _add_recording_flags(parser: ArgumentParser) -> None:
    """A flag for each setting of a recording that has one."""
    for one in fields(RecordingSettings):
        if not one.metadata["flag"]:
            continue
        options = {"default": one.default, "help": one.metadata["help"]}
        if one.name == "second_moment":
            parser.add_argument(f"--{one.name}", action="store_const", const=True, **options)
        else:
            kind = str if one.metadata["choices"] else int
            parser.add_argument(f"--{one.name}", type=kind, choices=one.metadata["choices"], **options)
