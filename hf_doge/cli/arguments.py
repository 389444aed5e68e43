"""Flags that several commands share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from transformers import TrainingArguments

from hf_doge.checks import check_count
from hf_doge.data.mixture import DatasetConfig, MixtureConfig

DEFAULT_VOCAB = 4096


@dataclass
class PlaceArguments:
    """Where the data are: one of `mixture`, `data_dir` and `dataset` says it."""

    _argument_group_name = "data (one of --mixture, --data_dir, --dataset)"
    _places: ClassVar[tuple[str, ...]] = ("mixture", "data_dir", "dataset")

    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with <domain>.train.jsonl[.gz] and <domain>.validation.jsonl[.gz] (or <domain>/train.jsonl "
            "...), one pair per domain. Each record has a field `text`."
        },
    )
    mixture: str | None = field(
        default=None,
        metadata={
            "help": "YAML file with a list `datasets`, each a domain, as trl has it. Keys of each: path, name, split, revision, "
            "columns, ...; ours: domain, domain_column, weight, max_examples, streaming, validation_split, assistant_only_loss."
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "One data set, whose --domain_column tells the domains. File, folder or name on the Hub."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of --dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of --dataset."})
    domain_column: str | None = field(
        default=None, metadata={"help": "Column of --dataset that names each row's domain."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read --dataset as a stream, --max_examples rows of it."})
    max_examples: int | None = field(default=None, metadata={"help": "Rows of --dataset, from its start."})

    def __post_init__(self) -> None:
        check_count("--max_examples", self.max_examples, optional=True)
        places = {f"--{name}": getattr(self, name) for name in self._places}
        given = [flag for flag, place in places.items() if place is not None]
        if len(given) != 1:
            raise ValueError(
                f"One of {', '.join(places)} must say where the data are, but got {' and '.join(given) or 'none of them'}. Give one."
            )
        if self.dataset is not None and self.domain_column is None:
            raise ValueError(
                "`--dataset` must be divided into domains by a column, but `--domain_column` is not given. Name it, or list data "
                "sets that are domains in a `--mixture`."
            )
        options = ("streaming", "max_examples", "dataset_config", "dataset_split", "domain_column")
        given = [f"--{name}" for name in options if getattr(self, name) not in (None, False, "train")]
        if self.dataset is None and given:
            raise ValueError(f"{', '.join(given)} go with `--dataset` alone. Write them into the mixture file.")

    def get_mixture(self, *, of_folder: bool = False, train_only: bool = False) -> MixtureConfig | None:
        """
        The data sets; of a `data_dir` nothing, as it has a reader of its own, unless they are asked for `of_folder`; with
        `train_only` its domains need no file to evaluate on.
        """
        if of_folder and self.data_dir is not None:
            return MixtureConfig.from_folder(self.data_dir, train_only=train_only)
        if self.mixture is not None:
            return MixtureConfig.from_file(self.mixture)
        if self.dataset is None:
            return None
        config = DatasetConfig(
            self.dataset,
            name=self.dataset_config,
            split=self.dataset_split,
            domain_column=self.domain_column,
            max_examples=self.max_examples,
            streaming=self.streaming,
        )
        return MixtureConfig((config,))


@dataclass
class DataArguments(PlaceArguments):
    """Where the data are and how they are cut."""

    domains: list[str] | None = field(
        default=None, metadata={"help": "Domains to train on. Default: all that are not targets."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a tokenizer. Default: that of --model_name_or_path."}
    )
    train_tokenizer_vocab: int | None = field(
        default=None,
        metadata={
            "help": "Train a byte-level BPE tokenizer of this many entries, and keep it in <output_dir>/tokenizer. It sees an "
            "equal share of each training domain. At least 257."
        },
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "Jinja file, or tokenizer, with the chat template for messages."}
    )
    block_size: int = field(default=512, metadata={"help": "Tokens per training example. At least 2."})
    max_train_tokens: int | None = field(
        default=None, metadata={"help": "Use no more than this many train tokens of each domain."}
    )
    max_validation_tokens: int | None = field(
        default=None, metadata={"help": "Use no more than this many validation tokens of each domain."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_tokenizer_vocab", "max_train_tokens", "max_validation_tokens", "dataset_num_proc"):
            check_count(f"--{name}", getattr(self, name), optional=True)
        if not 2 <= self.block_size <= 2**31:
            raise ValueError(f"`--block_size` must be at least 2 tokens, but got {self.block_size}.")

    def take_tokenizer_of(self, model_name_or_path: str | None) -> None:
        """Ask for the tokenizer of the model to start from where none is named and none is asked for."""
        if self.tokenizer is None and self.train_tokenizer_vocab is None:
            self.tokenizer = model_name_or_path

    def train_tokenizer_if_none(self) -> None:
        """Ask for a tokenizer of [`DEFAULT_VOCAB`] entries where none is named and none is asked for."""
        if self.tokenizer is None and self.train_tokenizer_vocab is None:
            self.train_tokenizer_vocab = DEFAULT_VOCAB


@dataclass
class ModelArguments:
    """A model to start from, or the shape of a new one."""

    _argument_group_name = "model"

    model_size: str = field(
        default="tiny",
        metadata={"help": "Shape of a new model: nano, micro, tiny, mini, small, 60m, 82m, 124m or 210m."},
    )
    model_type: str = field(default="llama", metadata={"help": "Architecture of `model_size`: llama or gpt2."})
    model_config: str | None = field(
        default=None,
        metadata={"help": "JSON file with the configuration of a new model, instead of `model_size`."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to start from, instead of a new one: folder or Hub name."}
    )


def get_output_dir(args: TrainingArguments) -> Path:
    """The output folder, made if it is not there."""
    assert args.output_dir is not None  # the arguments set one
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    return output_dir


def get_resume(args: TrainingArguments) -> str | bool | None:
    """
    What to resume from: with `--resume_from_checkpoint last` (or `true`) the last checkpoint of the output folder, with
    `none` (or `false`) nothing. The argument is unset, so that what is saved does not depend on how often a run was resumed.

    Raises:
        `ValueError`: for a word that is none of these and no folder.
    """
    asked, args.resume_from_checkpoint = args.resume_from_checkpoint, None
    word = str(asked).strip().lower()
    if word in ("none", "false", "no", ""):
        return None
    if word in ("last", "true", "yes"):
        return True
    if asked is None or not Path(asked).is_dir():
        raise ValueError(
            f"`--resume_from_checkpoint` must be last (or true), none (or false), or the folder of a checkpoint, but got "
            f"{asked!r}, and there is no such folder."
        )
    return asked
