"""`hf-doge index`: record what each training example pushed, at checkpoints that a Trainer has saved."""

from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, ClassVar

from hf_doge.cli.arguments import PlaceArguments
from hf_doge.cli.console import say
from hf_doge.cli.index_data import load_examples
from hf_doge.cli.parser import parse
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.encoding import MASKINGS
from hf_doge.tracing.pretrained import load_tokenizer, tokenizer_place
from hf_doge.tracing.processes import process_index
from hf_doge.tracing.settings import RecordingSettings


@dataclass(kw_only=True)
class IndexArguments(PlaceArguments):
    """Which examples are recorded, at which checkpoints, and how texts become tokens and labels, as in training."""

    _argument_group_name = "index (--checkpoints, and one of --data, --mixture, --data_dir, --dataset)"
    _places: ClassVar[tuple[str, ...]] = ("data", "mixture", "data_dir", "dataset")

    checkpoints: list[Path] = field(
        metadata={"help": "Folders that a Trainer saved, in any order: each says its step."}
    )
    data: Path | None = field(
        default=None,
        metadata={
            "help": "The training examples: JSONL (.gz or not), one record on a line: a text or a pair with a label, prompt and "
            "completion, messages, or input_ids with labels. Its other fields are kept with the examples."
        },
    )
    domains: list[str] | None = field(
        default=None,
        metadata={
            "help": "Domains of the data that were trained on. Default: all; leave out targets of that training."
        },
    )
    add_examples: bool = field(
        default=False,
        metadata={
            "help": "Add what the data hold behind the examples of the index, at all of its checkpoints. The data begin with "
            "those it was made of, and the other options are as they were then."
        },
    )
    output_dir: Path = field(default=Path("influence"), metadata={"help": "The index."})
    text_field: list[str] | None = field(
        default=None,
        metadata={
            "help": "Field of the text, or the two of a pair. Default: text (and text_pair), or premise and hypothesis, or the "
            "like; other fields, such as a title, are kept and not read."
        },
    )
    label_field: str = field(
        default="label",
        metadata={
            "help": "Field of a classifier's label, a number or a name, or of the text that a model from text to text writes."
        },
    )
    masking: str | None = field(
        default=None,
        metadata={
            "choices": MASKINGS,
            "help": "Which tokens of prompt and completion, or of messages, alone had a loss in training. Default: those of the "
            "completion; all of messages (none is masked). A mixture says it itself.",
        },
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or Hub name. Default: the one saved with the first checkpoint."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Cut texts at so many tokens. Give what training had."}
    )
    learning_rates: list[float] | None = field(
        default=None,
        metadata={
            "help": "In force at each checkpoint. Default: what the Trainer logged there, or what its schedule says."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Examples at once; changes no result."})


def _flag_of(one: Field) -> tuple[str, Any, Field]:
    """A setting of a recording as a flag."""
    metadata: dict[str, Any] = {"help": one.metadata["help"]}
    if one.metadata["choices"] is not None:
        metadata["choices"] = one.metadata["choices"]
    if one.type == bool | None:  # the flag alone says yes
        metadata["switch"] = True
    return one.name, one.type, field(default=one.default, metadata=metadata)


# A flag for each setting of a recording that has one.
RecordingFlags = make_dataclass(
    "RecordingFlags",
    [_flag_of(one) for one in fields(RecordingSettings) if one.metadata["flag"]],
    namespace={"_argument_group_name": "recording"},
)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args, recording = parse(
        argv,
        IndexArguments,
        RecordingFlags,
        prog="hf-doge index",
        description=(
            "Record the gradients of training examples at saved checkpoints, so that predictions can be traced to them "
            "by `hf-doge search`. Run again after an interruption, it continues; with more checkpoints, it adds them; "
            "with --add_examples, it adds examples. "
            "Under `accelerate launch -m hf_doge index` all processes share the work, and must see the same files."
        ),
    )
    missing = [path for path in args.checkpoints if not path.is_dir()]
    if missing:
        raise FileNotFoundError(f"Checkpoints must be folders that a Trainer wrote, but {str(missing[0])!r} is none.")
    tokenizer = load_tokenizer(args.tokenizer or tokenizer_place(args.checkpoints[0]) or args.checkpoints[0])
    dataset, encoding = load_examples(args, tokenizer)
    settings = RecordingSettings(**asdict(recording))
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
