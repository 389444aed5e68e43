"""The data of one command: domains to train on, domains to evaluate on, and what tokenised them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from hf_doge.cli.arguments import DataArguments
from hf_doge.cli.blocks import BlockMaker
from hf_doge.cli.domain_files import find_domain_files, select_domains
from hf_doge.cli.tokenizer import get_tokenizer


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
    """

    tokenizer: PreTrainedTokenizerBase
    train: dict[str, Dataset]
    targets: dict[str, Dataset]
    validation: dict[str, Dataset]
    fingerprints: dict[str, str]


def load_shared_domain_data(
    data_args: DataArguments, output_dir: Path, *, args: TrainingArguments, **options: Any
) -> DomainData:
    """
    As [`load_domain_data`], on all processes that a launcher started: the main one writes tokenizer and blocks, the
    others wait, at most `ddp_timeout` seconds, and read them.

    Args:
        data_args (`DataArguments`): What to read, and with which tokenizer.
        output_dir (`Path`): A folder that all machines see, unless `save_on_each_node` says that each has its own.
        args (`TrainingArguments`): They know the processes.
        options: Of [`load_domain_data`].
    """
    with args.main_process_first(local=args.save_on_each_node, desc="preparing the data"):
        return load_domain_data(data_args, output_dir, is_prepared=not args.should_save, **options)


def load_domain_data(
    data_args: DataArguments,
    output_dir: Path,
    *,
    targets: Sequence[str] = (),
    max_target_tokens: int | None = None,
    is_prepared: bool = False,
) -> DomainData:
    """
    Find, tokenise and cut what the arguments ask for, or take it from `output_dir` where an earlier run left it.

    Args:
        data_args (`DataArguments`): What to read, and with which tokenizer.
        output_dir (`Path`): Blocks are kept in its folder `blocks`, a tokenizer trained here in `tokenizer`.
        targets (`Sequence[str]`): Domains that are not trained on.
        max_target_tokens (`int`, *optional*): Use no more train tokens of each target.
        is_prepared (`bool`): Whether another process of this run has done it just before.
    """
    files = find_domain_files(data_args.data_dir)
    domains, targets = select_domains(files, domains=data_args.domains, targets=targets)
    tokenizer = get_tokenizer(
        data_args.tokenizer,
        data_args.train_tokenizer_vocab,
        files=[files[name]["train"] for name in domains],
        save_directory=output_dir / "tokenizer",
        is_trained=is_prepared,
    )
    blocks = BlockMaker(tokenizer, data_args.block_size, output_dir / "blocks")
    limits = {
        **{(name, "train"): data_args.max_train_tokens for name in domains},
        **{(name, "train"): max_target_tokens for name in targets},
        **{(name, "validation"): data_args.max_validation_tokens for name in (*domains, *targets)},
    }
    loaded = {
        (name, split): blocks.load(files[name][split], name=f"{name}.{split}", max_tokens=limit)
        for (name, split), limit in limits.items()
    }
    return DomainData(
        tokenizer=tokenizer,
        train={name: loaded[name, "train"] for name in domains},
        targets={name: loaded[name, "train"] for name in targets},
        validation={name: loaded[name, "validation"] for name in (*domains, *targets)},
        fingerprints={
            f"{name}.{split}": blocks.fingerprint(files[name][split], max_tokens=limit)
            for (name, split), limit in limits.items()
        },
    )


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
    """UTF-8 bytes of text for each token, by domain and target, of their first validation blocks."""
    sizes = {}
    for name, rows in data.validation.items():
        blocks = rows[:max_blocks]["input_ids"]
        texts = data.tokenizer.batch_decode(blocks, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        sizes[name] = sum(len(text.encode()) for text in texts) / sum(map(len, blocks))
    return sizes
