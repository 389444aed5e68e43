"""What a repository is to hold of an artifact, what it holds, and what lies between."""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hf_doge.artifacts.cards.card import Card
from hf_doge.files import sha256
from hf_doge.text import holds_token

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

CARD_FILE = "README.md"
_PIECE = 1 << 20
# What may be in a repository before the artifact is: made by the Hub itself, or a licence.
_NEUTRAL_FILES = {".gitattributes", ".gitignore", CARD_FILE, "LICENSE", "LICENSE.md", "LICENSE.txt"}
_TEXT_FILES = (".json", ".md", ".jsonl", ".txt", ".yaml", ".yml", ".jinja")


@dataclass(frozen=True)
class Head:
    """A commit of a repository, and what the Hub says of each file: the sha256 of a large one, git's checksum of any other."""

    commit: str
    files: Mapping[str, "RepoFile"]

    def holds(self, path: str, source: bytes | Path) -> bool:
        file = self.files.get(path)
        if file is None:
            return False
        return file.blob_id == git_blob_id(source) if file.lfs is None else file.lfs.sha256 == sha256(source)


@dataclass
class Plan:
    """What lies between a head and the publication."""

    changed: dict[str, bytes | Path]
    removed: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not self.changed and not self.removed


@dataclass(frozen=True)
class Publication:
    """
    The files of an artifact as they are to be on the Hub.

    Args:
        files (`Mapping[str, bytes | Path]`): Path in the repository -> content, or the local file that has it.
        manifest (`str`): The one of `files` by which a repository is known to hold such an artifact.
        owned (`Callable[[str], bool]`):
            Whether a path in the repository is the artifact's: those that are, and are not among `files`, are removed by
            the push. All other files stay.
        check_manifest (`Callable[[bytes], None]`):
            Raises `ValueError` if a manifest that the repository holds is not one that may be replaced, and
            `PermissionError` if it may be only by who says so.
        card ([`Card`], *optional*): Becomes the README.md, merged with the one in the repository; what a person wrote stays.
        checksums (`Mapping[str, str]`): sha256 that local files must have.

    Raises:
        ValueError: A path leaves the repository, or a text file holds what looks like an access token.
        FileNotFoundError: A local file is gone.
    """

    files: Mapping[str, bytes | Path]
    manifest: str
    owned: Callable[[str], bool]
    check_manifest: Callable[[bytes], object]
    card: Card | None = None
    checksums: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.manifest not in self.files:
            raise ValueError(f"`files` must hold the manifest {self.manifest!r}, but are {sorted(self.files)[:8]}.")
        for path, source in self.files.items():
            if path.startswith("/") or "\\" in path or not {"", ".", ".."}.isdisjoint(path.split("/")):
                raise ValueError(f"Paths must stay within the repository, but got {path!r}.")
            if isinstance(source, Path) and not source.is_file():
                raise FileNotFoundError(f"{str(source)!r} is to be pushed, but is gone. Open the artifact again.")
            if path.endswith(_TEXT_FILES):
                refuse_token(path, source if isinstance(source, bytes) else source.read_bytes())

    def compare(self, head: Head, written_card: bytes | None) -> Plan:
        """
        What a commit must change so that the repository holds this.

        Args:
            head ([`Head`]): What the repository holds.
            written_card (`bytes`, *optional*): Its README.md, if it has one.

        Raises:
            ValueError: A local file is not what was recorded, or the card holds what looks like an access token.
        """
        files = dict(self.files)
        if self.card is not None:
            card = merge_card(self.card, written_card)
            refuse_token(CARD_FILE, card)
            files[CARD_FILE] = card
        changed = {path: source for path, source in files.items() if not head.holds(path, source)}
        for path, checksum in self.checksums.items():
            if path in changed and sha256(changed[path]) != checksum:
                raise ValueError(
                    f"{str(files[path])!r} was altered since it was written: its sha256 is not the recorded one. Nothing was"
                    " pushed. Record it again."
                )
        return Plan(changed, sorted(path for path in head.files.keys() - files.keys() if self.owned(path)))


def refuse_other_content(
    repo_id: str, head: Head, manifest: str, content: bytes | None, check_manifest: Callable[[bytes], object]
) -> None:
    """
    Args:
        manifest (`str`), check_manifest (`Callable[[bytes], None]`): As of the [`Publication`] that is to be pushed.
        content (`bytes`, *optional*): The manifest that the repository holds, if it has one.

    Raises:
        FileExistsError: The repository holds something else than such an artifact.
    """
    problem = f"The dataset repository {repo_id!r} must be new or hold an artifact of the same kind, but "
    if content is None and (foreign := sorted(head.files.keys() - _NEUTRAL_FILES)):
        raise FileExistsError(f"{problem}it has no {manifest} and holds {foreign[:5]}. Choose another name.")
    try:
        if content is not None:
            check_manifest(content)
    except ValueError as error:
        raise FileExistsError(f"{problem}its {manifest} is another: {error} Choose another name.") from error


def refuse_token(path: str, content: bytes) -> None:
    """
    Raises:
        ValueError: The content has what looks like an access token of the Hub. The message does not repeat it.
    """
    if holds_token(content.decode("latin-1")):
        raise ValueError(
            f"{path!r} holds what looks like an access token of the Hub, and is not pushed. Remove it from the metadata of"
            " the artifact, and revoke the token if the file was shared before."
        )


def size(source: bytes | Path) -> int:
    """Bytes of a file that is to be published."""
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def git_blob_id(source: bytes | Path) -> str:
    """By which any other file is known on the Hub: git's own checksum."""
    digest = hashlib.sha1(f"blob {size(source)}\0".encode(), usedforsecurity=False)
    if isinstance(source, bytes):
        digest.update(source)
    else:
        with source.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()


def merge_card(card: Card, written: bytes | None) -> bytes:
    """
    The card to push.

    Args:
        card ([`Card`]): The card of the publication.
        written (`bytes`, *optional*):
            The one in the repository. If it is not in UTF-8 it stays, with a warning: neither the Hub nor its client reads it.
    """
    if written is None:
        return card.merged_with(None).encode()
    try:
        found = written.decode()
    except UnicodeDecodeError:
        warnings.warn(
            "README.md in the repository is not in UTF-8, so it is kept as it is. Save it as UTF-8, and push again.",
            stacklevel=2,
        )
        return written
    return card.merged_with(found).encode()
