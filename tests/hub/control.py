"""What the tests may order and see, over HTTP under `/_control/`: `POST` of keyword arguments as JSON, JSON back."""

import hashlib
import json
import traceback
from dataclasses import asdict

from tests.hub.routes import Reply, as_json
from tests.hub.store import Commit, HubError, Store, is_lfs, write_atomically
from tests.hub.traffic import Traffic


class Control:
    """The commands; each is a public method, named by the last part of the path."""

    def __init__(self, store: Store, traffic: Traffic) -> None:
        self._store = store
        self._traffic = traffic

    def answer(self, path: str, body: bytes) -> Reply:
        """Run a command. What goes wrong is told in full, for it is a mistake in a test."""
        name = path.removeprefix("/_control/")
        try:
            if name.startswith("_") or name == "answer":
                raise ValueError(f"There is no command {name}")
            return as_json(getattr(self, name)(**json.loads(body or b"{}")))
        except HubError as error:
            return as_json({"error": error.message}, error.status)
        except Exception:
            return as_json({"error": traceback.format_exc()}, 500)

    # Faults and the log

    def fail(self, **settings: object) -> int:
        """Order a fault, see `Fault`; returns its number."""
        return self._traffic.add(settings)

    def faults(self) -> list[dict]:
        """All faults, with how often each was matched and hit."""
        return [fault.state() for fault in self._traffic.faults]

    def release(self, fault_id: int | None = None) -> None:
        """Let held requests go on."""
        self._traffic.release(fault_id)

    def clear_faults(self) -> None:
        """No more faults."""
        self._traffic.clear()

    def log(self, clear: bool = False) -> list[dict]:
        """The requests so far."""
        return self._traffic.log(clear=clear)

    # State

    def reset(self) -> None:
        """As new: no faults, no log, no repositories, no contents."""
        self._traffic.clear()
        self._traffic.log(clear=True)
        self._store.clear()

    def _repository(self, kind: str, repo_id: str):
        repository = self._store.find(kind, repo_id)
        if repository is None:
            raise HubError(404, f"There is no {kind} {repo_id}")
        return repository

    def repository(self, kind: str, repo_id: str) -> dict | None:
        """Refs, visibility and discussions; nothing if there is none."""
        repository = self._store.find(kind, repo_id)
        return asdict(repository) if repository else None

    def create(self, kind: str, repo_id: str, private: bool = False) -> None:
        """A repository that is there before the test begins."""
        self._store.create(kind, repo_id, private=private, author=repo_id.split("/")[0])

    def _shown(self, commit: Commit) -> dict:
        shown = asdict(commit)
        for path, entry in commit.files.items():
            shown["files"][path]["content"] = str(self._store.content(entry))
        return shown

    def commits(self, kind: str, repo_id: str, revision: str = "main") -> list[dict]:
        """The commits behind a revision, newest first, with their files and where the contents lie on disk."""
        repository = self._repository(kind, repo_id)
        head = self._store.resolve(repository, revision)
        return [self._shown(commit) for commit in self._store.history(head.id)]

    def commit(
        self,
        kind: str,
        repo_id: str,
        files: dict[str, str | None],
        revision: str = "main",
        title: str = "Another commit",
    ) -> str:
        """A commit by somebody else: text by path, or `None` to delete. Returns its id."""
        repository = self._repository(kind, repo_id)
        with self._store.lock:
            ref = self._store.branch(repository, revision)
            head = self._store.commit(repository.refs[ref])
            entries = dict(head.files)
            for path, text in files.items():
                entries.pop(path, None)
                if text is not None:
                    entries[path] = self._entry(path, text.encode(), self._store.attributes(head))
            made = self._store.add_commit(head.id, entries, title, "", author="somebody-else")
            repository.refs[ref] = made.id
            self._store.save(repository)
        return made.id

    def _entry(self, path: str, content: bytes, attributes: str):
        entry = self._store.add_blob(content)
        if not is_lfs(path, len(content), content[:512], attributes):
            return entry
        digest = hashlib.sha256(content).hexdigest()
        write_atomically(self._store.lfs_path(digest), content)
        return self._store.lfs_entry(digest)

    def objects(self) -> list[str]:
        """The sha256 of all LFS contents that are here, committed or not."""
        return sorted(path.name for path in (self._store.root / "lfs").iterdir() if not path.name.startswith("."))
