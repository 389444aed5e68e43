"""
A small corpus of really different domains, made of text that every machine with this package already has.

The texts are cut from Python's own library, from the installed packages' documentation, headers and licences. Whole
files go to train or to validation, repeated paragraphs are dropped, and nothing depends on where Python is installed,
so that the same machine always gives the same corpus.
"""

import ast
import gzip
import hashlib
import importlib.util
import inspect
import io
import json
import logging
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation")
SHINGLE_WORDS = 13
MIN_DOCUMENT_CHARS = 200
MAX_DOCUMENT_CHARS = {"train": 60_000, "validation": 8_000}
MIN_VALIDATION_CHARS = 5_000
MIN_DOMAINS = 4

# Library folders that hold tables, generated text or, on some machines only, tests.
_SKIPPED_LIBRARY_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "encodings",
        "pydoc_data",
        "__pycache__",
    }
)
_DOCUMENTED_PACKAGES = ("datasets", "huggingface_hub", "networkx", "numpy", "pandas", "sympy", "torch", "transformers")
_HEADER_PACKAGES = ("torch", "pyarrow", "numpy/_core")
_LICENCE_NAME = re.compile(r"licen[cs]e|copying|notice", re.IGNORECASE)
_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n+")
_WORD = re.compile(r"\w+")
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Candidate:
    """A text that may enter the corpus: where it is from, whatever the machine, and how to read it."""

    source: str
    read: Callable[[], str]

    @property
    def order(self) -> bytes:
        """A place in a fixed random order."""
        return hashlib.blake2b(self.source.encode(), digest_size=16).digest()


@dataclass
class Split:
    """The documents of one domain in one split."""

    documents: list[dict[str, str]] = field(default_factory=list)
    num_chars: int = 0

    def add(self, source: str, text: str) -> None:
        """Append a document."""
        self.documents.append({"text": text, "source": source})
        self.num_chars += len(text)


class ParagraphFilter:
    """
    Drops paragraphs most of whose 13-word shingles are in a paragraph kept before, in any document of any domain.

    Paragraphs shorter than a shingle always pass: a closing brace is no copy of another. A document of which less than
    a quarter passes is dropped whole: what is left of a copied licence is crumbs.
    """

    def __init__(self) -> None:
        self._word_ids: dict[str, int] = {}
        self._seen: set[int] = set()

    def __call__(self, text: str) -> str:
        """Return the text without its repeated paragraphs, and remember the ones that stay; empty if it is dropped."""
        kept: list[str] = []
        new: set[int] = set()
        for paragraph in _PARAGRAPH_BREAK.split(text):
            shingles = self._shingles(paragraph)
            if 2 * len(shingles & self._seen | shingles & new) <= len(shingles):
                kept.append(paragraph)
                new |= shingles
        if 4 * sum(map(len, kept)) < len(text.strip()):
            return ""
        self._seen |= new
        return "\n\n".join(kept)

    def _shingles(self, paragraph: str) -> set[int]:
        words = [self._word_ids.setdefault(word, len(self._word_ids)) for word in _WORD.findall(paragraph.lower())]
        # The hash of a tuple of integers does not depend on PYTHONHASHSEED.
        return {hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(len(words) - SHINGLE_WORDS + 1)}


def build_demo_corpus(
    output_dir: str | Path, *, train_chars: int = 1_200_000, validation_chars: int = 60_000
) -> dict[str, dict[str, Split]]:
    """
    Write one pair of files `<domain>.train.jsonl.gz`, `<domain>.validation.jsonl.gz` per domain.

    Args:
        output_dir (`str` or `Path`):
            Folder of the files. It is created.
        train_chars (`int`):
            Most characters of a domain's train split; less where the machine has less.
        validation_chars (`int`):
            Same, for the validation split, which takes at most a tenth of a domain's files.

    Returns:
        `dict[str, dict[str, Split]]`: for each domain, its splits `"train"` and `"validation"`.

    Raises:
        `FileNotFoundError`: if this machine has fewer than four domains with enough text.
    """
    drop_repetitions = ParagraphFilter()
    corpus, remaining = {}, {}
    # Validation first, in every domain: what is repeated is then dropped from train, and no validation text is in it.
    for domain, candidates in find_candidates().items():
        candidates = sorted(candidates, key=lambda candidate: candidate.order)
        validation, rest = _fill(
            candidates,
            validation_chars,
            drop_repetitions,
            max_document_chars=MAX_DOCUMENT_CHARS["validation"],
            max_candidates=len(candidates) // 10,
        )
        if validation.num_chars < min(MIN_VALIDATION_CHARS, validation_chars // 2):
            logger.info("Left out %s: this machine has too little of it.", domain)
            continue
        corpus[domain] = {"validation": validation}
        remaining[domain] = rest
    if len(corpus) < MIN_DOMAINS:
        raise FileNotFoundError(
            f"The demo needs text in at least {MIN_DOMAINS} domains, but this machine only has {sorted(corpus)}. "
            "Run `hf-doge learn --data_dir` on a folder of your own."
        )
    for domain, rest in remaining.items():
        corpus[domain]["train"], _ = _fill(
            rest, train_chars, drop_repetitions, max_document_chars=MAX_DOCUMENT_CHARS["train"]
        )

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for domain, splits in corpus.items():
        for split in SPLITS:
            _write_jsonl(output_dir / f"{domain}.{split}.jsonl.gz", splits[split].documents)
    return corpus


def find_candidates() -> dict[str, list[Candidate]]:
    """List the texts of this machine by domain. No file is read yet."""
    return {
        "cpp_headers": list(_find_headers()),
        "documentation": list(_find_documentation()),
        "licences": list(_find_licences()),
        "python_code": list(_find_python_code()),
        "readmes": list(_find_readmes()),
    }


def _fill(
    candidates: list[Candidate],
    max_chars: int,
    drop_repetitions: ParagraphFilter,
    *,
    max_document_chars: int,
    max_candidates: int | None = None,
) -> tuple[Split, list[Candidate]]:
    """Take texts in order until there are `max_chars` or so many candidates were seen; return those not seen too."""
    split = Split()
    for num_seen, candidate in enumerate(candidates):
        if split.num_chars >= max_chars or num_seen == max_candidates:
            return split, candidates[num_seen:]
        text = drop_repetitions(candidate.read()[:max_document_chars])
        if len(text) >= MIN_DOCUMENT_CHARS:
            split.add(candidate.source, text[: max(max_chars - split.num_chars, MIN_DOCUMENT_CHARS)])
    return split, []


def _find_python_code() -> Iterator[Candidate]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in _files(library, (".py",)):
        if _SKIPPED_LIBRARY_FOLDERS.isdisjoint(path.relative_to(library).parts):
            yield Candidate(f"python:{path.relative_to(library).as_posix()}", lambda path=path: _code_only(path))


def _find_documentation() -> Iterator[Candidate]:
    for topic in importlib.import_module("pydoc_data.topics").topics:
        yield Candidate(f"pydoc:{topic}", lambda topic=topic: _pydoc_topic(topic))
    for root, path in _package_files(_DOCUMENTED_PACKAGES, (".py",)):
        yield Candidate(path.relative_to(root).as_posix(), lambda path=path: _docstrings_only(path))


def _find_headers() -> Iterator[Candidate]:
    for root, path in _package_files(_HEADER_PACKAGES, (".h", ".hpp", ".cuh")):
        yield Candidate(path.relative_to(root).as_posix(), lambda path=path: _handwritten_only(path))


def _find_licences() -> Iterator[Candidate]:
    library = Path(sysconfig.get_paths()["stdlib"])
    if (library / "LICENSE.txt").is_file():
        yield Candidate("python:LICENSE.txt", lambda: _read(library / "LICENSE.txt"))
    for distribution in _distributions():
        for file in distribution.files or ():
            if ".dist-info" in file.parts[0] and _LICENCE_NAME.search(file.name):
                yield Candidate(file.as_posix(), lambda file=file: _read(Path(file.locate())))


def _find_readmes() -> Iterator[Candidate]:
    for distribution in _distributions():
        name = distribution.metadata["Name"]
        yield Candidate(f"readme:{name}", lambda distribution=distribution: _description(distribution))


def _distributions() -> Iterable[metadata.Distribution]:
    """Every installed package once, however often it is on the path, but for this one, which changes."""
    found = {distribution.metadata["Name"].lower(): distribution for distribution in metadata.distributions()}
    return [distribution for name, distribution in found.items() if name != "hf-doge"]


def _package_files(packages: Iterable[str], suffixes: tuple[str, ...]) -> Iterator[tuple[Path, Path]]:
    """The files of the packages that are installed, each with the folder that holds its package."""
    for package in packages:
        name, _, folder = package.partition("/")
        spec = importlib.util.find_spec(name)
        for location in (spec.submodule_search_locations or ()) if spec else ():
            for path in _files(Path(location) / folder, suffixes):
                yield Path(location).parent, path


def _files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names if name.endswith(suffixes))


def _read(path: Path) -> str:
    """The text of a file, empty if it is not UTF-8 or is listed but not there."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
        return ""


def _handwritten_only(path: Path) -> str:
    text = _read(path)
    return "" if "@generated" in text[:500] else text


def _description(distribution: metadata.Distribution) -> str:
    return distribution.metadata.get_payload() or ""


def _pydoc_topic(topic: str) -> str:
    return importlib.import_module("pydoc_data.topics").topics[topic]


def _code_only(path: Path) -> str:
    """Source without docstrings, which are another domain."""
    source = _read(path)
    lines = source.splitlines()
    for node in _docstring_nodes(source):
        lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines)


def _docstrings_only(path: Path) -> str:
    """The docstrings of a source file that are long enough to be texts."""
    docstrings = (inspect.cleandoc(node.value.value) for node in _docstring_nodes(_read(path)))
    return "\n\n".join(docstring for docstring in docstrings if len(docstring) >= MIN_DOCUMENT_CHARS)


def _docstring_nodes(source: str) -> list[ast.Expr]:
    """The docstrings of a module, its classes and their methods, in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # an installed file's invalid escape is not ours to report
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # a template, or a file for another Python
            return []
    docstrings, unvisited = [], [tree]
    while unvisited:
        node = unvisited.pop()
        if ast.get_docstring(node, clean=False) is not None:
            docstrings.append(node.body[0])
        unvisited += [child for child in reversed(node.body) if isinstance(child, _DEFINITIONS)]
    return docstrings


def _write_jsonl(path: Path, documents: list[dict[str, str]]) -> None:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as file:  # no time stamp: the same corpus, the same bytes
        for document in documents:
            file.write((json.dumps(document, ensure_ascii=False) + "\n").encode())
    path.write_bytes(buffer.getvalue())
