"""What the Hub of the tests keeps: repositories, commits, refs and contents, all on disk, so that a restart loses nothing."""

import fnmatch
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

FOLDERS = ("repositories", "commits", "blobs", "lfs", "incoming", "xet/xorbs", "xet/files", "xet/shards")
KINDS = ("model", "dataset", "space")
# The largest content that a commit may carry inline, and from which on the Hub asks for LFS.
REGULAR_LIMIT = 10 * 1024 * 1024
REPOSITORY_NAME = re.compile(r"^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?$")
COMMIT_ID = re.compile(r"^[0-9a-f]{40}$")

# A new repository has these rules in `.gitattributes`; they decide which files are LFS, as on the Hub.
LFS_SUFFIXES = (
    *("7z", "arrow", "avro", "bin", "bz2", "ckpt", "ftz", "gz", "h5", "joblib", "lz4", "mds", "mlmodel", "model"),
    *(
        "msgpack",
        "npy",
        "npz",
        "onnx",
        "ot",
        "parquet",
        "pb",
        "pickle",
        "pkl",
        "pt",
        "pth",
        "rar",
        "safetensors",
        "tar",
    ),
    *("tflite", "tgz", "wasm", "xz", "zip", "zst"),
)
# Pictures and sound are LFS in dataset repositories only.
MEDIA_SUFFIXES = (
    "aac",
    "bmp",
    "flac",
    "gif",
    "jpeg",
    "jpg",
    "mp3",
    "mp4",
    "ogg",
    "png",
    "tiff",
    "wav",
    "webm",
    "webp",
)


class HubError(Exception):
    """An answer other than success, as the Hub words it: status, message, and the code in `X-Error-Code`."""

    def __init__(self, status: int, message: str, code: str | None = None, **details: object) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.details = status, message, code, details


@dataclass(frozen=True)
class User:
    """Who speaks. `role` is that of the token: `write` or `read`."""

    name: str
    role: str
    organizations: tuple[str, ...] = ()

    def may_write(self, namespace: str) -> bool:
        """Whether this token may change what lies under a namespace."""
        return self.role == "write" and (namespace == self.name or namespace in self.organizations)

    def may_read(self, namespace: str) -> bool:
        """Whether this token may see what is private under a namespace."""
        return namespace == self.name or namespace in self.organizations


@dataclass
class Entry:
    """A file of a commit. `sha256` is there for a LFS file only; `oid` is git's, for LFS that of the pointer."""

    size: int
    oid: str
    sha256: str | None = None


@dataclass
class Commit:
    """A state of all files. `id` is the hash of everything else."""

    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Entry]
    id: str = ""


@dataclass
class Discussion:
    """A discussion or pull request; the ref of pull request N is `refs/pr/N`."""

    num: int
    title: str
    author: str
    is_pull_request: bool
    created: str
    status: str = "open"
    events: list[dict] = field(default_factory=list)
    merge_commit: str | None = None


@dataclass
class Repository:
    """One repository; `refs` maps full names such as `refs/heads/main` to commits."""

    kind: str
    id: str
    private: bool
    created: str
    gated: str | bool = False
    refs: dict[str, str] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]


def now() -> str:
    """The moment, as the Hub writes it."""
    seconds = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds * 1000) % 1000:03d}Z"


def git_oid(content: bytes, kind: str = "blob") -> str:
    """Git's name for a content."""
    return hashlib.sha1(b"%s %d\0%s" % (kind.encode(), len(content), content)).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The small file that git keeps in place of a LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def is_lfs(path: str, size: int, sample: bytes, attributes: str) -> bool:
    """Whether a file has to be uploaded as LFS: by the rules in `.gitattributes`, or when it is large or binary."""
    rules = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
    named = any(fnmatch.fnmatch(path, rule) or fnmatch.fnmatch(path.rsplit("/", 1)[-1], rule) for rule in rules)
    return size > 0 and (named or size > REGULAR_LIMIT or b"\0" in sample)


def write_atomically(path: Path, content: bytes) -> None:
    """The file is the old one or the new one, also when the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_bytes(content)
    temporary.replace(path)


class Store:
    """
    Everything under one folder.

    `repositories/` has one JSON file each with refs and discussions, `commits/` one for each commit, `blobs/` the
    regular contents by git's oid and `lfs/` the LFS contents by sha256. The lock is held while a ref changes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()
        self._commits: dict[str, Commit] = {}
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._make_folders()
        for path in sorted((root / "repositories").rglob("*.json")):
            state = json.loads(path.read_text())
            state["discussions"] = [Discussion(**discussion) for discussion in state["discussions"]]
            repository = Repository(**state)
            self._repositories[repository.kind, repository.id] = repository

    def _make_folders(self) -> None:
        for folder in FOLDERS:
            (self.root / folder).mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Forget everything."""
        with self.lock:
            self._commits.clear()
            self._repositories.clear()
            for folder in FOLDERS:
                shutil.rmtree(self.root / folder)
            self._make_folders()

    # Repositories

    def find(self, kind: str, repository_id: str) -> Repository | None:
        """The repository, if there is one."""
        return self._repositories.get((kind, repository_id))

    def repositories(self, kind: str) -> list[Repository]:
        """All of a kind, by name."""
        return sorted((found for (of, _), found in self._repositories.items() if of == kind), key=lambda one: one.id)

    def create(self, kind: str, repository_id: str, *, private: bool, author: str) -> Repository:
        """A new repository, with the commit that the Hub makes first."""
        name = repository_id.split("/")[-1]
        if not REPOSITORY_NAME.match(name) or ".." in name or "--" in name or name.endswith((".git", ".ipynb")):
            raise HubError(400, f"Invalid repo name: {name}")
        with self.lock:
            if self.find(kind, repository_id) is not None:
                raise HubError(409, f"You already created this {kind} repo")
            repository = Repository(kind, repository_id, private, now())
            suffixes = LFS_SUFFIXES + (MEDIA_SUFFIXES if kind == "dataset" else ())
            attributes = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in suffixes).encode()
            first = self.add_commit(
                None, {".gitattributes": self.add_blob(attributes)}, "initial commit", "", author=author
            )
            repository.refs["refs/heads/main"] = first.id
            self._repositories[kind, repository_id] = repository
            self.save(repository)
        return repository

    def _path(self, repository: Repository) -> Path:
        return self.root / "repositories" / repository.kind / f"{repository.id}.json"

    def save(self, repository: Repository) -> None:
        """Write a repository's refs and discussions."""
        write_atomically(self._path(repository), json.dumps(asdict(repository), indent=1).encode())

    def delete(self, repository: Repository) -> None:
        """Forget a repository; its contents stay in the store."""
        with self.lock:
            del self._repositories[repository.kind, repository.id]
            self._path(repository).unlink()

    # Commits

    def commit(self, commit_id: str) -> Commit:
        """A commit by its id."""
        if commit_id not in self._commits:
            state = json.loads((self.root / "commits" / f"{commit_id}.json").read_text())
            state["files"] = {path: Entry(**entry) for path, entry in state["files"].items()}
            self._commits[commit_id] = Commit(**state)
        return self._commits[commit_id]

    def add_commit(
        self, parent: str | None, files: dict[str, Entry], title: str, message: str, *, author: str
    ) -> Commit:
        """Write a commit; no ref points to it yet."""
        commit = Commit(parent, title, message, author, now(), dict(sorted(files.items())))
        content = json.dumps(asdict(commit), sort_keys=True).encode()
        commit.id = git_oid(content + os.urandom(8), "commit")
        write_atomically(self.root / "commits" / f"{commit.id}.json", json.dumps(asdict(commit)).encode())
        self._commits[commit.id] = commit
        return commit

    def history(self, commit_id: str) -> Iterator[Commit]:
        """A commit and those before it, newest first."""
        current: str | None = commit_id
        while current is not None:
            commit = self.commit(current)
            yield commit
            current = commit.parent

    def resolve(self, repository: Repository, revision: str) -> Commit:
        """The commit that a branch, tag, pull request, or (short) id names."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in repository.refs:
                return self.commit(repository.refs[ref])
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            for head in set(repository.refs.values()):
                for commit in self.history(head):
                    if commit.id.startswith(revision):
                        return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def branch(self, repository: Repository, revision: str) -> str:
        """The full name of a ref that may be committed to."""
        for ref in (revision, f"refs/heads/{revision}"):
            if ref in repository.refs and ref.startswith(("refs/heads/", "refs/pr/")):
                return ref
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The commit that gave a file the content it has here."""
        entry, found = commit.files[path], commit
        for earlier in self.history(commit.id):
            if earlier.files.get(path) != entry:
                break
            found = earlier
        return found

    # Contents

    def add_blob(self, content: bytes) -> Entry:
        """Keep a regular content."""
        entry = Entry(len(content), git_oid(content))
        if not self.content(entry).exists():
            write_atomically(self.content(entry), content)
        return entry

    def lfs_path(self, sha256: str) -> Path:
        """Where a LFS content is, or will be when it is uploaded."""
        return self.root / "lfs" / sha256

    def lfs_entry(self, sha256: str) -> Entry:
        """The entry of a LFS content that is here."""
        size = self.lfs_path(sha256).stat().st_size
        return Entry(size, git_oid(lfs_pointer(sha256, size)), sha256)

    def content(self, entry: Entry) -> Path:
        """The file that holds a content."""
        return self.lfs_path(entry.sha256) if entry.sha256 else self.root / "blobs" / entry.oid

    def attributes(self, commit: Commit) -> str:
        """The text of `.gitattributes`, or nothing."""
        entry = commit.files.get(".gitattributes")
        return self.content(entry).read_text() if entry else ""
