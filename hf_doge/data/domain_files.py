"""The data folder: one pair of JSONL files per domain."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from hf_doge.artifacts.readers import read_jsonl

SPLITS = ("train", "validation")
SUFFIXES = (".jsonl", ".jsonl.gz")


def find_domain_files(data_dir: str | Path) -> dict[str, dict[str, Path]]:
    """
    Find the files `<domain>.<split>.jsonl[.gz]` or `<domain>/<split>.jsonl[.gz]` of a folder.

    Args:
        data_dir (`str` or `Path`): The folder. Splits are `train` and `validation`; other files are left alone.

    Returns:
        `dict[str, dict[str, Path]]`: domain -> split -> file, domains in alphabetical order.

    Raises:
        `FileNotFoundError`: if there is no such folder, or no such file in it.
        `ValueError`: if one split of a domain is there twice.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise FileNotFoundError(f"`--data_dir` must be a folder, but {str(data_dir)!r} is not one. Check the path.")
    found: dict[str, dict[str, Path]] = {}
    for split in SPLITS:
        for suffix in SUFFIXES:
            ending = f"{split}{suffix}"
            flat = {path: path.name.removesuffix(f".{ending}") for path in data_dir.glob(f"*.{ending}")}
            nested = {path: path.parent.name for path in data_dir.glob(f"*/{ending}")}
            for path, domain in sorted({**flat, **nested}.items()):
                files = found.setdefault(domain, {})
                if split in files:
                    raise ValueError(
                        f"Domain {domain!r} must have one {split} file, but there are {str(files[split])!r} and "
                        f"{str(path)!r}. Remove one of them."
                    )
                files[split] = path
    if not found:
        raise FileNotFoundError(
            f"The folder must hold files <domain>.train.jsonl[.gz] and <domain>.validation.jsonl[.gz], but "
            f"{str(data_dir)!r} holds none. Write one pair per domain, with a field `text` in each record."
        )
    return dict(sorted(found.items()))


def select_domains(
    splits: Mapping[str, Collection[str]], *, domains: Sequence[str] | None, targets: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """
    Decide which domains are trained on. Targets never are.

    Args:
        splits (`Mapping[str, Collection[str]]`): Splits of each domain that there is.
        domains (`Sequence[str]`, *optional*): Domains to train on; by default all that are not targets.
        targets (`Sequence[str]`): Domains kept out of training.

    Returns:
        `tuple[list[str], list[str]]`: the domains to train on and the targets.

    Raises:
        `ValueError`: for names that are unknown, repeated or both trained on and target, and for missing files.
    """
    for flag, names in (("--domains", domains or ()), ("--target", targets)):
        unknown = sorted(set(names) - set(splits))
        if unknown:
            raise ValueError(f"`{flag}` must name domains of the data, {list(splits)}, but got {unknown}.")
        repeated = sorted({name for name in names if list(names).count(name) > 1})
        if repeated:
            raise ValueError(
                f"`{flag}` must name each domain once, but {repeated} are repeated. Drop the repetitions."
            )
    if domains is None:
        domains = [name for name in splits if name not in targets]
    overlap = sorted(set(domains) & set(targets))
    if overlap:
        raise ValueError(
            f"A target must be kept out of training, but {overlap} are in both `--domains` and `--target`. "
            "Drop them from one."
        )
    if not domains:
        raise ValueError(f"There must be domains to train on, but all of {list(splits)} are targets. Drop a target.")
    for name in [*domains, *targets]:
        missing = [one for one in SPLITS if one not in splits[name]]
        if missing:
            raise ValueError(
                f"Domain {name!r} must have a train and a validation file, but it has no {missing[0]} file. "
                f"Add {name}.{missing[0]}.jsonl or leave the domain out with `--domains`."
            )
    return list(domains), list(targets)


def read_documents(path: Path) -> Iterator[str]:
    """
    Yield the texts of a JSONL file, see [`read_jsonl`].

    Raises:
        `ValueError`: for a line that is not a JSON record with a string `text`, naming file and line, and for a file
            without any.
    """
    for number, record in enumerate(read_jsonl(path), start=1):
        if not isinstance(record.get("text"), str):
            found = f"is {type(record['text']).__name__}" if "text" in record else f"is missing among {sorted(record)}"
            raise ValueError(
                f"Every record must have a string `text`, but in line {number} of {str(path)!r} it {found}. Correct or "
                "remove that record."
            )
        yield record["text"]
