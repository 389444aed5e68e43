"""The data of one command: domains to train on, domains to evaluate on, and what tokenised them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from hf_doge.checks import check_choice, check_count, check_path, show
from hf_doge.data.blocks import BlockMaker, fingerprint_tokenizer
from hf_doge.data.domain_files import SPLITS, find_domain_files, read_documents, select_domains
from hf_doge.data.encoding import encode_records
from hf_doge.data.mixture import MixtureConfig
from hf_doge.data.records import Records, open_mixture
from hf_doge.data.tokenizer import get_tokenizer, require_end, unseen_folder
from hf_doge.files import write_atomically
from hf_doge.sampling.lengths import IGNORED_LABEL

PREPARED = "prepared.json"  # in the folder of the blocks: what the main process of a run made for the others
_DECIDING = (  # of a data source: which blocks there are
    *("data_dir", "domains", "tokenizer", "train_tokenizer_vocab", "chat_template_path", "block_size"),
    *("max_train_tokens", "max_validation_tokens"),
)


@dataclass(frozen=True)
class DomainData:
    """
    Blocks of every domain.

    Attributes:
        tokenizer (`PreTrainedTokenizerBase`): What made them.
        train (`dict[str, Dataset]`): Train split of every domain to train on.
        targets (`dict[str, Dataset]`): Train split of every target. No model is trained on it.
        validation (`dict[str, Dataset]`): Validation split of every domain to train on and every target.
        fingerprints (`dict[str, str]`): Name of the contents of each split, by `<domain>.<split>`.
        weights (`dict[str, float]`, *optional*): Shares that the mixture file gives the domains to train on.
    """

    tokenizer: PreTrainedTokenizerBase
    train: dict[str, Dataset]
    targets: dict[str, Dataset]
    validation: dict[str, Dataset]
    fingerprints: dict[str, str]
    weights: dict[str, float] | None = None


class DataSource(Protocol):
    """Where the domains are, and how they are read; the arguments of the commands are one."""

    data_dir: str | None
    domains: list[str] | None
    tokenizer: str | None
    train_tokenizer_vocab: int | None
    chat_template_path: str | None
    block_size: int
    max_train_tokens: int | None
    max_validation_tokens: int | None
    dataset_num_proc: int | None

    def get_mixture(self) -> MixtureConfig | None:
        """The mixture, if there is one instead of a folder."""


@dataclass(frozen=True)
class FileDomain:
    """A domain of a data folder: a JSONL file for each split."""

    name: str
    files: Mapping[str, Path]
    is_chat: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that there is a file for."""
        return tuple(self.files)

    def documents(self) -> Iterator[str]:
        """Its train texts, from the first."""
        return read_documents(self.files["train"])

    def load(self, blocks: BlockMaker, split: str, *, max_tokens: int | None) -> tuple[Dataset, str]:
        """Its blocks, and the name of their contents."""
        path = self.files[split]
        loaded = blocks.load(path, name=f"{self.name}.{split}", max_tokens=max_tokens)
        return loaded, blocks.fingerprint(path, max_tokens=max_tokens)


@dataclass(frozen=True)
class RecordDomain:
    """A domain of a mixture: rows that `datasets` reads."""

    records: Records
    num_proc: int | None = None
    splits: tuple[str, ...] = SPLITS

    @property
    def is_chat(self) -> bool:
        """Whether its rows hold messages."""
        return self.records.is_chat

    def documents(self) -> Iterator[str]:
        """Its train texts, from the first."""
        return self.records.documents()

    def encode(self, blocks: BlockMaker, split: str) -> Dataset:
        """Its rows as tokens, and labels where some tokens have no loss."""
        key, num_proc = blocks.tokenizer_key, self.num_proc
        return encode_records(self.records, split, blocks.tokenizer, tokenizer_key=key, num_proc=num_proc)

    def load(self, blocks: BlockMaker, split: str, *, max_tokens: int | None) -> tuple[Dataset, str]:
        """Its blocks, and the name of their contents."""
        encoded = self.encode(blocks, split)
        return blocks.load_encoded(encoded, name=f"{self.records.name}.{split}", max_tokens=max_tokens)


def load_shared_domain_data(
    data_args: DataSource, output_dir: Path, *, args: TrainingArguments, **options: Any
) -> DomainData:
    """
    As [`load_domain_data`], on all processes that a launcher started: the main one writes tokenizer and blocks, the
    others wait, at most `ddp_timeout` seconds, and read them.

    Args:
        data_args (`DataSource`): What to read, and with which tokenizer.
        output_dir (`Path`): A folder that all machines see, unless `save_on_each_node` says that each has its own.
        args (`TrainingArguments`): They know the processes.
        options: Of [`load_domain_data`].
    """
    with args.main_process_first(local=args.save_on_each_node, desc="preparing the data"):
        return load_domain_data(data_args, output_dir, is_prepared=not args.should_save, **options)


def load_domain_data(
    data_args: DataSource,
    output_dir: Path,
    *,
    targets: Sequence[str] = (),
    max_target_tokens: int | None = None,
    is_prepared: bool = False,
) -> DomainData:
    """
    Find, tokenise and cut what the arguments ask for, or take it from `output_dir` where an earlier run left it.

    Args:
        data_args (`DataSource`): What to read, and with which tokenizer.
        output_dir (`Path`): Blocks are kept in its folder `blocks`, a tokenizer trained here in `tokenizer`.
        targets (`Sequence[str]`): Domains that are not trained on.
        max_target_tokens (`int`, *optional*): Use no more train tokens of each target.
        is_prepared (`bool`): Whether another process of this run has done it just before: then only what it made is read.
    """
    mixture = data_args.get_mixture()
    asked = _describe(data_args, mixture, targets, max_target_tokens)
    if is_prepared:
        return _read_prepared(data_args, output_dir, asked)
    found = open_domains(data_args, mixture)
    splits = {name: domain.splits for name, domain in found.items()}
    domains, targets = select_domains(splits, domains=data_args.domains, targets=targets)
    tokenizer = load_tokenizer_of(data_args, output_dir, found, domains, targets)
    blocks = BlockMaker(tokenizer, data_args.block_size, output_dir / "blocks")
    limits = {
        **{(name, "train"): data_args.max_train_tokens for name in domains},
        **{(name, "train"): max_target_tokens for name in targets},
        **{(name, "validation"): data_args.max_validation_tokens for name in (*domains, *targets)},
    }
    loaded = {
        (name, split): found[name].load(blocks, split, max_tokens=limit) for (name, split), limit in limits.items()
    }
    weights = None if mixture is None or mixture.weights is None else {name: mixture.weights[name] for name in domains}
    _write_prepared(blocks, domains, targets, loaded, weights, asked)
    return _assemble(tokenizer, domains, targets, loaded, weights)


def open_domains(data_args: DataSource, mixture: MixtureConfig | None) -> "dict[str, FileDomain | RecordDomain]":
    """The domains of the mixture, or of the data folder, by name."""
    if mixture is not None:
        return {name: RecordDomain(rows, data_args.dataset_num_proc) for name, rows in open_mixture(mixture).items()}
    assert data_args.data_dir is not None  # the arguments require one or the other
    return {name: FileDomain(name, files) for name, files in find_domain_files(data_args.data_dir).items()}


def load_tokenizer_of(
    data_args: DataSource,
    output_dir: Path,
    found: "Mapping[str, FileDomain | RecordDomain]" = MappingProxyType({}),
    domains: Sequence[str] = (),
    targets: Sequence[str] = (),
    *,
    is_trained: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer that the arguments name, or one trained on the domains; see [`get_tokenizer`]."""
    return get_tokenizer(
        data_args.tokenizer,
        data_args.train_tokenizer_vocab,
        documents=[found[name].documents for name in domains],
        save_directory=output_dir / "tokenizer",
        is_trained=is_trained,
        for_chat=data_args.tokenizer is None and any(found[name].is_chat for name in (*domains, *targets)),
        chat_template_path=data_args.chat_template_path,
    )


Loaded = Mapping[tuple[str, str], tuple[Dataset, str]]  # by domain and split: blocks, and the name of their contents


def _assemble(
    tokenizer: PreTrainedTokenizerBase,
    domains: Sequence[str],
    targets: Sequence[str],
    loaded: Loaded,
    weights: dict[str, float] | None,
) -> DomainData:
    """Where some tokens of one domain have no loss, all domains have labels: they are trained on together."""
    has_labels = any("labels" in rows.column_names for rows, _ in loaded.values())
    blocks = {key: _with_labels(rows) if has_labels else rows for key, (rows, _) in loaded.items()}
    return DomainData(
        tokenizer=tokenizer,
        train={name: blocks[name, "train"] for name in domains},
        targets={name: blocks[name, "train"] for name in targets},
        validation={name: blocks[name, "validation"] for name in (*domains, *targets)},
        fingerprints={f"{name}.{split}": fingerprint for (name, split), (_, fingerprint) in loaded.items()},
        weights=weights,
    )


def _with_labels(rows: Dataset) -> Dataset:
    if "labels" in rows.column_names:
        return rows
    return rows.add_column("labels", rows.data.column("input_ids"), feature=rows.features["input_ids"])


def _describe(
    data_args: DataSource, mixture: MixtureConfig | None, targets: Sequence[str], max_target_tokens: int | None
) -> dict[str, Any]:
    """What decides which blocks there are, by the name of its flag, in plain values."""
    return {
        **{name: getattr(data_args, name) for name in _DECIDING},
        "mixture": None if mixture is None else repr(mixture),
        "target": list(targets),
        "max_target_tokens": max_target_tokens,
    }


def _write_prepared(
    blocks: BlockMaker,
    domains: Sequence[str],
    targets: Sequence[str],
    loaded: Loaded,
    weights: dict[str, float] | None,
    asked: dict[str, Any],
) -> None:
    """What the other processes of a run need to find the blocks, without reading the data again."""
    made = [[name, split, fingerprint] for (name, split), (_, fingerprint) in loaded.items()]
    content = {"domains": list(domains), "targets": list(targets), "blocks": made, "weights": weights, "asked": asked}
    path, text = blocks.cache_dir / PREPARED, json.dumps(content, indent=2).encode()
    if not path.is_file() or path.read_bytes() != text:
        write_atomically(path, text)


def _read_prepared(data_args: DataSource, output_dir: Path, asked: dict[str, Any]) -> DomainData:
    tokenizer = load_tokenizer_of(data_args, output_dir, is_trained=True)
    blocks = BlockMaker(tokenizer, data_args.block_size, output_dir / "blocks")
    path = blocks.cache_dir / PREPARED
    if not path.is_file():
        raise FileNotFoundError(unseen_folder(blocks.cache_dir))
    made = json.loads(path.read_text(encoding="utf-8"))
    other = [name for name, value in asked.items() if made.get("asked", {}).get(name) != value]
    if other:
        raise ValueError(
            f"All processes must be started with the same arguments, but what the main process has made in {str(blocks.cache_dir)!r} "
            f"is of other {other}. Start them alike; if another run writes there too, give each an `--output_dir` of its own."
        )
    loaded = {
        (name, split): (Dataset.from_file(str(blocks.locate(f"{name}.{split}", fingerprint))), fingerprint)
        for name, split, fingerprint in made["blocks"]
    }
    return _assemble(tokenizer, made["domains"], made["targets"], loaded, made["weights"])


def load_mixture(
    mixture: str | Path,
    processing_class: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    num_proc: int | None = None,
) -> dict[str, Dataset]:
    """
    The data sets of a mixture file as tokens and labels, by domain, as a trainer takes them for its `train_dataset`.

    They are what the commands train on, before it is put end to end and cut: one row for each row of the data. Trl's
    SFTTrainer trains on them as they are, or with `packing=True` on rows that it fills. The weights that the file may give are the
    trainer's to take (`domain_weights`).

    Args:
        mixture (`str` or `Path`): YAML or JSON file with a list `datasets`, as `--mixture` takes it.
        processing_class (`PreTrainedTokenizerBase`): Tokenizer with an end-of-text token, and with a chat template if rows
            hold messages.
        split (`str`): `"train"`, or `"validation"` for what the file holds out.
        num_proc (`int`, *optional*): Processes that tokenise.

    Returns:
        `dict[str, Dataset]`: rows of `input_ids` and as many `labels`, -100 where a token has no loss.

    Raises:
        FileNotFoundError: There is no such file, or none of a data set.
        ValueError: The file is malformed, rows are not what their columns promise, or the tokenizer lacks what they need.
    """
    check_choice("split", split, SPLITS)
    check_path("mixture", mixture)
    check_count("num_proc", num_proc, optional=True)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ValueError(
            f"`processing_class` must be a tokenizer, as `AutoTokenizer.from_pretrained` loads it, but got {show(processing_class)}."
        )
    require_end(processing_class, "`processing_class`")
    key = fingerprint_tokenizer(processing_class)
    return {
        name: _with_labels(encode_records(rows, split, processing_class, tokenizer_key=key, num_proc=num_proc))
        for name, rows in open_mixture(MixtureConfig.from_file(mixture)).items()
    }


def match_repetition(data: DomainData, *, num_tokens: int | None, full_tokens: int) -> DomainData:
    """
    The first blocks of every domain, as many as a small run repeats as often as the full training repeats them all.

    With weights `a`, a training on `full_tokens` reads domain j `a_j * full_tokens / n_j` times. A run on `num_tokens` does
    the same with `n_j * num_tokens / full_tokens` tokens of it, whatever `a` is. Otherwise small runs see fresh text of
    domains that the full training repeats, and find weights that are wrong for it
    (https://huggingface.co/papers/2606.07597).

    Args:
        data (`DomainData`): Blocks of the domains; targets and validation stay as they are.
        num_tokens (`int`, *optional*): Tokens of a small run.
        full_tokens (`int`): Tokens of the training that the mixture is for.

    Raises:
        `ValueError`: if the small run is the larger one or its length is not known, or a domain would have no block left.
    """
    if num_tokens is None:
        raise ValueError(
            "`--match_repetition` must know how many tokens a run is trained on, but `--max_steps` is not given. Set it."
        )
    if full_tokens < num_tokens:
        raise ValueError(
            f"`--full_tokens` must be at least the {num_tokens:,} tokens of a run here, but got {full_tokens:,}."
        )
    sizes = {name: len(rows) * num_tokens // full_tokens for name, rows in data.train.items()}
    short = [name for name, size in sizes.items() if size == 0]
    if short:
        raise ValueError(
            f"Every domain must keep a block, but at {num_tokens:,} of {full_tokens:,} tokens {short} would have none. Train the "
            "runs longer, or lower `--block_size`."
        )
    cut = {name: rows.select(range(sizes[name])) for name, rows in data.train.items()}
    marks = {f"{name}.train": f"{data.fingerprints[f'{name}.train']}[:{size}]" for name, size in sizes.items()}
    return replace(data, train=cut, fingerprints={**data.fingerprints, **marks})


def measure_bytes_per_token(data: DomainData, *, max_blocks: int = 200) -> dict[str, float]:
    """UTF-8 bytes of text for each token that has a loss, by domain and target, of their first validation blocks."""
    sizes = {}
    for name, rows in data.validation.items():
        first = rows[:max_blocks]
        blocks = first["input_ids"]
        if "labels" in first:
            pairs = zip(blocks, first["labels"], strict=True)
            blocks = [[one for one, label in zip(*pair, strict=True) if label != IGNORED_LABEL] for pair in pairs]
        texts = data.tokenizer.batch_decode(blocks, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        sizes[name] = sum(len(text.encode()) for text in texts) / sum(map(len, blocks))
    return sizes
