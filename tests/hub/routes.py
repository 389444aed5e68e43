"""What the Hub answers: one function for each route, from a `Request` to a `Reply`."""

import base64
import binascii
import hashlib
import hmac
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.hub import card_rules
from tests.hub.store import (
    COMMIT_ID,
    KINDS,
    REGULAR_LIMIT,
    Commit,
    Discussion,
    Entry,
    HubError,
    Repository,
    Store,
    User,
    git_oid,
    is_lfs,
    lfs_pointer,
    now,
)
from tests.hub.xet import XetStore

HASH = re.compile(r"^[0-9a-f]{64}$")
PREFIX = {"model": "", "dataset": "datasets/", "space": "spaces/"}
NOT_FOUND = "Repository not found"
LINK_SECONDS = 3600


@dataclass
class Request:
    """One request. `body` reads what was sent, at most once."""

    method: str
    target: str
    headers: dict[str, str]
    origin: str
    user: User | None
    body: Callable[[], bytes]
    receive: Callable[[Path], str]
    path: list[str] = field(init=False)
    query: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.target)
        # a slash within a revision or a file name comes as %2F, so the path is split first
        self.path = [unquote(segment) for segment in parts.path.strip("/").split("/")]
        self.query = parse_qs(parts.query, keep_blank_values=True)

    def json(self) -> dict:
        """The body as JSON."""
        try:
            parsed = json.loads(self.body() or b"{}")
        except ValueError as error:
            raise HubError(400, f"Invalid JSON: {error}") from error
        return parsed

    def flag(self, name: str) -> bool:
        """A switch in the query."""
        return self.query.get(name, ["false"])[0].lower() in ("1", "true")


@dataclass
class Reply:
    """One answer; the body is either bytes or a piece of a file."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    start: int = 0
    length: int | None = None

    @property
    def size(self) -> int:
        return len(self.body) if self.file is None else self.length


def as_json(value: object, status: int = 200, **headers: str) -> Reply:
    """An answer in JSON."""
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8", **headers})


def error_reply(error: HubError) -> Reply:
    """An error as the Hub sends it: in the body and in headers, from which the clients make their classes."""
    headers = {"X-Error-Message": error.message.splitlines()[0].encode("latin-1", "replace").decode("latin-1")}
    if error.code is not None:
        headers["X-Error-Code"] = error.code
    return as_json({"error": error.message, **error.details}, error.status, **headers)


def file_reply(path: Path, request: Request, headers: dict[str, str]) -> Reply:
    """A file, or the one range of it that is asked for."""
    size = path.stat().st_size
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if asked is None or asked.groups() == ("", ""):
        return Reply(200, file=path, length=size, headers=headers)
    first, last = asked.groups()
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last), size - 1) if first and last else size - 1
    if start >= size or end < start:
        return Reply(416, headers={**headers, "Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{size}"
    return Reply(206, file=path, start=start, length=end - start + 1, headers=headers)


class Signer:
    """Links to the storage server that need no token, as those of S3 and the CDN: signed, for a method, for a time."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def _signature(self, method: str, path: str, expires: str) -> str:
        return hmac.new(self._secret, f"{method} {path} {expires}".encode(), hashlib.sha256).hexdigest()[:32]

    def link(self, origin: str, path: str, method: str) -> str:
        """A link that `check` accepts."""
        expires = str(int(time.time()) + LINK_SECONDS)
        return f"{origin}{path}?Expires={expires}&Signature={self._signature(method, path, expires)}"

    def check(self, request: Request) -> None:
        """Raises 403 unless the link is ours and still good."""
        path = urlsplit(request.target).path
        method = "GET" if request.method == "HEAD" else request.method
        expires = request.query.get("Expires", ["0"])[0]
        given = request.query.get("Signature", [""])[0]
        right = hmac.compare_digest(given, self._signature(method, path, expires))
        if not right or not expires.isdigit() or int(expires) < time.time():
            raise HubError(403, "SignatureDoesNotMatch")

    def token(self, scope: str, expires: int) -> str:
        """A token of the xet storage: `read` or `write`."""
        return f"xet_{scope}_{expires}_{self._signature('xet', scope, str(expires))}"

    def check_token(self, request: Request, scope: str) -> None:
        """Raises 401 without a token of ours that is still good, 403 if it does not reach that far."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        found = re.fullmatch(r"xet_(read|write)_(\d+)_[0-9a-f]+", given)
        if found is None or int(found[2]) < time.time() or self.token(found[1], int(found[2])) != given:
            raise HubError(401, "Unauthorized")
        if scope == "write" and found[1] == "read":
            raise HubError(403, "Forbidden")


class Hub:
    """The API and the pages of the Hub."""

    def __init__(self, store: Store, xet: XetStore, signer: Signer, *, page_size: int = 1000) -> None:
        self.store = store
        self.xet = xet
        self.signer = signer
        self.page_size = page_size
        self.storage_origin = ""

    def answer(self, request: Request) -> Reply:
        """Find the route. Raises `HubError` for everything that is refused."""
        method, path = request.method, request.path
        match path:
            case ["api", "whoami-v2"]:
                return self.whoami(request)
            case ["api", "validate-yaml"]:
                return self.validate_yaml(request)
            case ["api", "repos", "create"]:
                return self.create_repository(request)
            case ["api", "repos", "delete"]:
                return self.delete_repository(request)
            case ["api", kind] if kind[:-1] in KINDS:
                return self.list_repositories(request, kind[:-1])
            case ["api", kind, namespace, name, *rest] if kind[:-1] in KINDS:
                repository_id = f"{namespace}/{name}"
                return self.repository_route(request, kind[:-1], repository_id, rest)
        kind = path[0][:-1] if path[0] in ("datasets", "spaces") else "model"
        match path if kind == "model" else path[1:]:
            case [namespace, name, "info", "lfs", "objects", action] if name.endswith(".git"):
                return self.lfs(request, kind, f"{namespace}/{name.removesuffix('.git')}", action)
            case [namespace, name, "resolve", revision, *file]:
                return self.resolve_file(request, kind, f"{namespace}/{name}", revision, "/".join(file))
        raise HubError(404, f"Sorry, we can't find the page you are looking for: {method} /{'/'.join(path)}")

    # Who may do what

    def visible(self, request: Request, kind: str, repository_id: str) -> Repository:
        """The repository, or the error that also hides whether there is one."""
        repository = self.store.find(kind, repository_id)
        user = request.user
        if repository is None or (repository.private and not (user and user.may_read(repository.namespace))):
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, NOT_FOUND, "RepoNotFound")
        return repository

    def writable(self, request: Request, kind: str, repository_id: str, *, as_pr: bool = False) -> Repository:
        """The repository, for a change or (with less rights) a pull request."""
        repository = self.visible(request, kind, repository_id)
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        if request.user.role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if not as_pr and not request.user.may_write(repository.namespace):
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repository

    def open_for_reading(self, request: Request, kind: str, repository_id: str) -> Repository:
        """The repository, if its files may be read too."""
        repository = self.visible(request, kind, repository_id)
        if repository.gated and not (request.user and request.user.may_read(repository.namespace)):
            status = 401 if request.user is None else 403
            ask = f"Visit {request.origin}/{PREFIX[kind]}{repository_id} to ask for access."
            raise HubError(status, f"Access to {kind} {repository_id} is restricted. {ask}", "GatedRepo")
        return repository

    def whoami(self, request: Request) -> Reply:
        user = request.user
        if user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "tests", "role": user.role, "createdAt": "2026-01-01T00:00:00.000Z"}
        organizations = [{"type": "org", "name": name, "roleInOrg": "admin"} for name in user.organizations]
        auth = {"type": "access_token", "accessToken": token}
        return as_json({"type": "user", "id": user.name, "name": user.name, "orgs": organizations, "auth": auth})

    # Repositories

    def _namespace(self, request: Request, payload: dict, kind: str) -> str:
        user = request.user
        if user is None:
            raise HubError(401, "Invalid username or password.")
        namespace = payload.get("organization") or user.name
        if not user.may_write(namespace):
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        return namespace

    def create_repository(self, request: Request) -> Reply:
        payload = request.json()
        kind = payload.get("type") or "model"
        if kind not in KINDS:
            raise HubError(400, f"Invalid repository type: {kind}")
        namespace = self._namespace(request, payload, kind)
        repository_id = f"{namespace}/{payload.get('name', '')}"
        url = f"{request.origin}/{PREFIX[kind]}{repository_id}"
        private = payload.get("visibility") == "private" or payload.get("private") is True
        try:
            self.store.create(kind, repository_id, private=private, author=request.user.name)
        except HubError as error:
            error.details["url"] = url
            raise
        return as_json({"url": url, "name": repository_id, "id": repository_id})

    def delete_repository(self, request: Request) -> Reply:
        payload = request.json()
        kind = payload.get("type") or "model"
        namespace = self._namespace(request, payload, kind)
        repository = self.writable(request, kind, f"{namespace}/{payload.get('name')}")
        self.store.delete(repository)
        return Reply(200, b"OK")

    def list_repositories(self, request: Request, kind: str) -> Reply:
        authors, searches = request.query.get("author"), request.query.get("search", [])
        wanted = set(request.query.get("filter", []))
        found = []
        for repository in self.store.repositories(kind):
            mine = request.user is not None and request.user.may_read(repository.namespace)
            if (repository.private and not mine) or (authors and repository.namespace not in authors):
                continue
            info = self.repository_info(repository, self.store.resolve(repository, "main"))
            if all(word in repository.id for word in searches) and wanted <= set(info["tags"]):
                found.append(info)
        return as_json(found)

    def repository_route(self, request: Request, kind: str, repository_id: str, rest: list[str]) -> Reply:
        """Everything under `/api/{kind}s/{repository_id}`."""
        match [request.method, *rest]:
            case ["GET"] | ["GET", "revision", _]:
                repository = self.visible(request, kind, repository_id)
                commit = self.store.resolve(repository, rest[1] if rest else "main")
                return as_json(self.repository_info(repository, commit, blobs=request.flag("blobs")))
            case ["GET", "auth-check", *write]:
                (self.writable if write else self.open_for_reading)(request, kind, repository_id)
                return Reply(200, b"OK")
            case ["GET", "tree", revision, *folder]:
                repository = self.open_for_reading(request, kind, repository_id)
                return self.tree(request, repository, self.store.resolve(repository, revision), "/".join(folder))
            case ["POST", "paths-info", revision]:
                repository = self.open_for_reading(request, kind, repository_id)
                return self.paths_info(request, repository, self.store.resolve(repository, revision))
            case ["GET", "commits", revision]:
                repository = self.visible(request, kind, repository_id)
                return self.commits(request, self.store.resolve(repository, revision))
            case ["GET", "refs"]:
                return self.references(self.visible(request, kind, repository_id))
            case ["POST", "preupload", revision]:
                return self.preupload(request, kind, repository_id, revision)
            case ["POST", "commit", revision]:
                return self.commit(request, kind, repository_id, revision)
            case ["PUT", "settings"]:
                return self.settings(request, self.writable(request, kind, repository_id))
            case ["POST", "branch", name]:
                return self.create_branch(request, self.writable(request, kind, repository_id), name)
            case ["POST", "tag", revision]:
                return self.create_tag(request, self.writable(request, kind, repository_id), revision)
            case ["DELETE", "branch" | "tag", name]:
                return self.delete_reference(self.writable(request, kind, repository_id), rest[0], name)
            case [_, "discussions", *action]:
                return self.discussions(request, kind, repository_id, action)
            case ["GET", "xet-read-token", revision]:
                repository = self.open_for_reading(request, kind, repository_id)
                self.store.resolve(repository, revision)
                return self.xet_token("read")
            case ["GET", "xet-write-token", revision]:
                as_pr = request.flag("create_pr") or revision.startswith("refs/pr/")
                repository = self.writable(request, kind, repository_id, as_pr=as_pr)
                if not as_pr:
                    self.store.branch(repository, revision)
                return self.xet_token("write")
        raise HubError(404, f"Sorry, we can't find the page you are looking for: {request.method} {request.target}")

    def repository_info(self, repository: Repository, commit: Commit, *, blobs: bool = False) -> dict:
        siblings = []
        for path, entry in commit.files.items():
            siblings.append({"rfilename": path})
            if blobs:
                siblings[-1] |= {"size": entry.size, "blobId": entry.oid}
                if entry.sha256:
                    siblings[-1]["lfs"] = self._lfs(entry)
        card = {}
        if "README.md" in commit.files:
            readme = self.store.content(commit.files["README.md"]).read_text(errors="replace")
            card = card_rules.readable_metadata(readme)
        return {
            "_id": git_oid(repository.id.encode())[:24],
            "id": repository.id,
            **({"modelId": repository.id} if repository.kind == "model" else {}),
            "author": repository.namespace,
            "sha": commit.id,
            "lastModified": commit.date,
            "createdAt": repository.created,
            "private": repository.private,
            "gated": repository.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card_rules.tags(card, repository.kind),
            **({"cardData": json.loads(json.dumps(card, default=str))} if card else {}),
            "siblings": siblings,
        }

    def settings(self, request: Request, repository: Repository) -> Reply:
        payload = request.json()
        with self.store.lock:
            if "visibility" in payload or "private" in payload:
                repository.private = payload.get("visibility") == "private" or payload.get("private") is True
            if "gated" in payload:
                repository.gated = payload["gated"]
            self.store.save(repository)
        return as_json({"private": repository.private, "gated": repository.gated})

    # Refs

    def references(self, repository: Repository) -> Reply:
        def of(prefix: str) -> list[dict]:
            return [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit}
                for ref, commit in sorted(repository.refs.items())
                if ref.startswith(prefix)
            ]

        lists = {"branches": of("refs/heads/"), "tags": of("refs/tags/"), "pullRequests": of("refs/pr/")}
        return as_json({**lists, "converts": []})

    def create_branch(self, request: Request, repository: Repository, name: str) -> Reply:
        start = request.json().get("startingPoint") or "main"
        with self.store.lock:
            if f"refs/heads/{name}" in repository.refs:
                raise HubError(409, "Reference already exists")
            repository.refs[f"refs/heads/{name}"] = self.store.resolve(repository, start).id
            self.store.save(repository)
        return Reply(201, b"OK")

    def create_tag(self, request: Request, repository: Repository, revision: str) -> Reply:
        name = request.json().get("tag", "")
        with self.store.lock:
            commit = self.store.resolve(repository, revision)
            if f"refs/tags/{name}" in repository.refs:
                raise HubError(409, "Tag reference exists already")
            repository.refs[f"refs/tags/{name}"] = commit.id
            self.store.save(repository)
        return Reply(201, b"OK")

    def delete_reference(self, repository: Repository, kind: str, name: str) -> Reply:
        ref = f"refs/{'heads' if kind == 'branch' else 'tags'}/{name}"
        if ref == "refs/heads/main":
            raise HubError(403, "Cannot delete the main branch")
        with self.store.lock:
            if ref not in repository.refs:
                raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
            del repository.refs[ref]
            self.store.save(repository)
        return Reply(204)

    # Reading

    def _lfs(self, entry: Entry) -> dict:
        pointer = len(lfs_pointer(entry.sha256, entry.size))
        return {"oid": entry.sha256, "sha256": entry.sha256, "size": entry.size, "pointerSize": pointer}

    def path_info(self, commit: Commit, path: str, *, expand: bool) -> dict:
        """What the Hub tells of one file."""
        entry = commit.files[path]
        info = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
        if entry.sha256:
            info["lfs"] = self._lfs(entry)
            if (xet := self.xet.file(entry.sha256)) is not None:
                info["xetHash"] = xet.hash
        if expand:
            last = self.store.last_change(commit, path)
            info["lastCommit"] = {"id": last.id, "title": last.title, "date": last.date}
        return info

    def folder_info(self, commit: Commit, path: str, *, expand: bool) -> dict:
        """What the Hub tells of a folder."""
        inside = {name: entry.oid for name, entry in commit.files.items() if name.startswith(f"{path}/")}
        info = {"type": "directory", "path": path, "size": 0, "oid": git_oid(json.dumps(inside).encode(), "tree")}
        if expand:
            last = max((self.store.last_change(commit, name) for name in inside), key=lambda one: one.date)
            info["lastCommit"] = {"id": last.id, "title": last.title, "date": last.date}
        return info

    def tree(self, request: Request, repository: Repository, commit: Commit, folder: str) -> Reply:
        recursive, expand = request.flag("recursive"), request.flag("expand")
        prefix = f"{folder}/" if folder else ""
        names = []
        for path in commit.files:
            if path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                depths = range(1, len(parts) + 1) if recursive else [1]
                names += [prefix + "/".join(parts[:depth]) for depth in depths]
        if folder and not names:
            raise HubError(404, f"{folder} does not exist on {request.path[-2]}", "EntryNotFound")
        names = sorted(set(names))
        first = int(request.query.get("cursor", ["0"])[0])
        page = names[first : first + self.page_size]
        listing = [
            (self.path_info if name in commit.files else self.folder_info)(commit, name, expand=expand)
            for name in page
        ]
        return as_json(listing, **self._next_page(request, first + self.page_size, len(names)))

    def _next_page(self, request: Request, start: int, total: int) -> dict[str, str]:
        if start >= total:
            return {}
        parts = urlsplit(request.target)
        others = [f"{key}={quote(value)}" for key, (value, *_) in request.query.items() if key != "cursor"]
        query = "&".join([*others, f"cursor={start}"])
        return {"Link": f'<{request.origin}{parts.path}?{query}>; rel="next"'}

    def paths_info(self, request: Request, repository: Repository, commit: Commit) -> Reply:
        form = parse_qs(request.body().decode())
        expand = form.get("expand", ["False"])[0].lower() == "true"
        found = []
        for path in form.get("paths", []):
            if path in commit.files:
                found.append(self.path_info(commit, path, expand=expand))
            elif any(name.startswith(f"{path}/") for name in commit.files):
                found.append(self.folder_info(commit, path, expand=expand))
        return as_json(found)

    def commits(self, request: Request, head: Commit) -> Reply:
        history = list(self.store.history(head.id))
        first = int(request.query.get("cursor", ["0"])[0])
        listing = [
            {
                "id": commit.id,
                "title": commit.title,
                "message": commit.message,
                "authors": [{"user": commit.author}],
                "date": commit.date,
            }
            for commit in history[first : first + self.page_size]
        ]
        return as_json(listing, **self._next_page(request, first + self.page_size, len(history)))

    def resolve_file(self, request: Request, kind: str, repository_id: str, revision: str, path: str) -> Reply:
        """A file: regular ones from here, LFS ones by a signed link to the storage, which is another server."""
        repository = self.open_for_reading(request, kind, repository_id)
        commit = self.store.resolve(repository, revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        entry = commit.files[path]
        name = quote(path.rsplit("/", 1)[-1])
        headers = {
            "X-Repo-Commit": commit.id,
            "Content-Disposition": f"inline; filename*=UTF-8''{name}; filename=\"{name}\";",
        }
        if not entry.sha256:
            return file_reply(self.store.content(entry), request, {**headers, "ETag": f'"{entry.oid}"'})
        headers |= {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.sha256}"'}
        if (xet := self.xet.file(entry.sha256)) is not None:
            token_url = f"{request.origin}/api/{kind}s/{repository_id}/xet-read-token/{commit.id}"
            headers |= {"X-Xet-Hash": xet.hash, "Link": f'<{token_url}>; rel="xet-auth"'}
        link = self.signer.link(self.storage_origin, f"/lfs/{entry.sha256}", "GET")
        return Reply(302, f"Found. Redirecting to {link}".encode(), {**headers, "Location": link})

    def xet_token(self, scope: str) -> Reply:
        """Where the xet storage is, and a token of its own for it."""
        expires = int(time.time()) + LINK_SECONDS
        token = self.signer.token(scope, expires)
        headers = {"X-Xet-Cas-Url": self.storage_origin, "X-Xet-Access-Token": token}
        body = {"casUrl": self.storage_origin, "accessToken": token, "exp": expires}
        return as_json(body, **headers, **{"X-Xet-Token-Expiration": str(expires)})

    # Writing

    def validate_yaml(self, request: Request) -> Reply:
        payload = request.json()
        errors, warnings = card_rules.check_card(payload.get("content", ""), payload.get("repoType") or "model")
        shown = {key: [{"message": one} for one in ones] for key, ones in (("errors", errors), ("warnings", warnings))}
        if request.headers.get("accept") == "text/plain":
            return Reply(
                400 if errors else 200, "\n".join(errors or warnings).encode(), {"Content-Type": "text/plain"}
            )
        error = {"error": "Invalid metadata in README.md"} if errors else {}
        return as_json({**shown, **error}, 400 if errors else 200)

    def _target(self, request: Request, kind: str, repository_id: str, revision: str) -> tuple[Repository, Commit]:
        """What a push is for, with its rights checked: a branch, or anything for a pull request."""
        as_pr = request.flag("create_pr")
        repository = self.writable(request, kind, repository_id, as_pr=as_pr or revision.startswith("refs/pr/"))
        if as_pr:
            return repository, self.store.resolve(repository, revision)
        return repository, self.store.commit(repository.refs[self.store.branch(repository, revision)])

    def preupload(self, request: Request, kind: str, repository_id: str, revision: str) -> Reply:
        _, commit = self._target(request, kind, repository_id, revision)
        files = request.json()["files"]
        if len(files) > 256:
            raise HubError(413, "Too many files in one preupload request")
        attributes = self.store.attributes(commit)
        answers = []
        for file in files:
            sample = base64.b64decode(file["sample"])
            lfs = is_lfs(file["path"], file["size"], sample, attributes)
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            entry = commit.files.get(file["path"])
            if entry is not None:
                answer["oid"] = entry.sha256 or entry.oid
            answers.append(answer)
        return as_json({"files": answers, "commitOid": commit.id})

    def lfs(self, request: Request, kind: str, repository_id: str, action: str) -> Reply:
        """The batch of git-lfs for uploads, and the check after one."""
        payload = request.json()
        # without a ref the upload is for a pull request, which anybody who sees the repository may open
        as_pr = action == "verify" or "ref" not in payload or payload["ref"]["name"].startswith("refs/pr/")
        repository = self.writable(request, kind, repository_id, as_pr=as_pr)
        if action == "verify":
            path = self.store.lfs_path(payload["oid"])
            if not path.exists() or path.stat().st_size != payload["size"]:
                raise HubError(404, "The uploaded object was not found, or has another size")
            return Reply(200)
        if action != "batch" or payload.get("operation") != "upload":
            raise HubError(400, "Only batches of uploads are answered")
        if "ref" in payload:
            self.store.branch(repository, payload["ref"]["name"])
        objects = []
        for wanted in payload["objects"]:
            if not HASH.match(wanted["oid"]):
                raise HubError(422, f"Invalid oid: {wanted['oid']}")
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.store.lfs_path(wanted["oid"]).exists():
                upload = self.signer.link(self.storage_origin, f"/lfs/{wanted['oid']}", "PUT")
                verify = f"{request.origin}/{PREFIX[kind]}{repository_id}.git/info/lfs/objects/verify"
                answer |= {"authenticated": True, "actions": {"upload": {"href": upload}, "verify": {"href": verify}}}
            objects.append(answer)
        # huggingface_hub before 2 offers xet here; later ones do not ask
        transfer = "xet" if "xet" in payload.get("transfers", ()) else "basic"
        return as_json({"transfer": transfer, "objects": objects, "hash_algo": "sha256"})

    def commit(self, request: Request, kind: str, repository_id: str, revision: str) -> Reply:
        """One commit from lines of JSON: all of it, or nothing."""
        repository, seen = self._target(request, kind, repository_id, revision)
        try:
            lines = [json.loads(line) for line in request.body().splitlines() if line.strip()]
        except ValueError as error:
            raise HubError(400, f"Invalid ndjson: {error}") from error
        header = next((line["value"] for line in lines if line.get("key") == "header"), None)
        if header is None or not header.get("summary"):
            raise HubError(400, "A commit needs a header with a summary")
        parent = header.get("parentCommit")
        if parent is not None and not COMMIT_ID.match(parent):
            raise HubError(400, f"Invalid parentCommit: {parent}")
        with self.store.lock:
            as_pr = request.flag("create_pr")
            base = seen if as_pr else self.store.resolve(repository, self.store.branch(repository, revision))
            if parent is not None and parent != base.id:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(base.files)
            attributes = self.store.attributes(base)
            for line in lines:
                self._apply(line, files, attributes, kind)
            text = header.get("description") or ""
            made = self.store.add_commit(base.id, files, header["summary"], text, author=request.user.name)
            pull_request = None
            if as_pr:
                pull_request = self._open(repository, header["summary"], request.user.name, made.id)
            else:
                repository.refs[self.store.branch(repository, revision)] = made.id
            self.store.save(repository)
        url = f"{request.origin}/{PREFIX[kind]}{repository_id}"
        answer = {"success": True, "commitOid": made.id, "commitUrl": f"{url}/commit/{made.id}", "hookOutput": ""}
        if pull_request is not None:
            answer["pullRequestUrl"] = f"{url}/discussions/{pull_request.num}"
        return as_json(answer)

    def _apply(self, line: dict, files: dict[str, Entry], attributes: str, kind: str) -> None:
        """One line of a commit, on the files as they are so far."""
        operation, value = line.get("key"), line.get("value", {})
        if operation == "header":
            return
        path = value.get("path", "")
        parts = path.rstrip("/").split("/")
        if any(part in ("", ".", "..", ".git") for part in parts):
            raise HubError(400, f"Invalid path: {path!r}")
        if operation in ("file", "lfsFile"):
            parents = {"/".join(parts[:depth]) for depth in range(1, len(parts))}
            if parents & files.keys() or any(name.startswith(f"{path}/") for name in files):
                raise HubError(400, f"A file and a folder cannot have one name: {path}")
        match operation:
            case "file":
                files[path] = self._regular_file(path, value, attributes, kind)
            case "lfsFile":
                if value.get("algo") != "sha256" or not HASH.match(value.get("oid", "")):
                    raise HubError(400, f"Invalid LFS object for {path}")
                if not self.store.lfs_path(value["oid"]).exists():
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
                entry = self.store.lfs_entry(value["oid"])
                if value.get("size", entry.size) != entry.size:
                    raise HubError(400, f"The LFS object of {path} has another size")
                files[path] = entry
            case "deletedFile":
                if path not in files:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                del files[path]
            case "deletedFolder":
                inside = [name for name in files if name.startswith(f"{path.rstrip('/')}/")]
                if not inside:
                    raise HubError(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
                for name in inside:
                    del files[name]
            case _:
                raise HubError(400, f"Unknown operation: {operation}")

    def _regular_file(self, path: str, value: dict, attributes: str, kind: str) -> Entry:
        if value.get("encoding") == "base64":
            try:
                content = base64.b64decode(value["content"], validate=True)
            except binascii.Error as error:
                raise HubError(400, f"Invalid base64 for {path}") from error
        else:
            content = value["content"].encode()
        if is_lfs(path, len(content), content[:512], attributes):
            size = f"files larger than {REGULAR_LIMIT >> 20} MiB" if len(content) > REGULAR_LIMIT else "binary files"
            raise HubError(400, f"Your push was rejected because it contains {size}: {path}")
        if path == "README.md":
            errors, _ = card_rules.check_card(content.decode(), kind)
            if errors:
                raise HubError(400, f"Your push was rejected due to an issue with card metadata: {'; '.join(errors)}")
        return self.store.add_blob(content)

    # Discussions and pull requests

    def _open(self, repository: Repository, title: str, author: str, commit_id: str | None) -> Discussion:
        """A new discussion, or with a commit a pull request. The caller saves."""
        num = len(repository.discussions) + 1
        discussion = Discussion(num, title, author, commit_id is not None, now())
        repository.discussions.append(discussion)
        if commit_id is not None:
            repository.refs[f"refs/pr/{num}"] = commit_id
        return discussion

    def discussions(self, request: Request, kind: str, repository_id: str, action: list[str]) -> Reply:
        if request.method == "GET":
            repository = self.visible(request, kind, repository_id)
        else:
            repository = self.writable(request, kind, repository_id, as_pr=action == [])
        payload = request.json()
        with self.store.lock:
            match [request.method, *action]:
                case ["GET"]:
                    listing = [self._discussion(repository, one) for one in repository.discussions]
                    return as_json({"discussions": listing, "count": len(listing), "start": 0})
                case ["POST"]:
                    head = self.store.resolve(repository, "main").id if payload.get("pullRequest") else None
                    discussion = self._open(repository, payload["title"], request.user.name, head)
                    if discussion.is_pull_request:
                        discussion.status = "draft"
                    data = {"edited": False, "hidden": False, "latest": {"raw": payload["description"]}}
                    self._event(discussion, "comment", request.user.name, data)
                    self.store.save(repository)
                    return as_json(
                        {"num": discussion.num, "url": f"{request.origin}{request.target}/{discussion.num}"}
                    )
            if not action[0].isdigit() or int(action[0]) not in range(1, len(repository.discussions) + 1):
                raise HubError(404, "Discussion not found")
            discussion = repository.discussions[int(action[0]) - 1]
            match [request.method, *action[1:]]:
                case ["GET"]:
                    return as_json(self._discussion(repository, discussion))
                case ["POST", "status"]:
                    discussion.status = payload["status"]
                    event = self._event(discussion, "status-change", request.user.name, {"status": discussion.status})
                    self.store.save(repository)
                    return as_json({"newStatus": event})
                case ["POST", "merge"]:
                    self._merge(repository, discussion, request.user.name)
                    return as_json({"mergeCommitOid": discussion.merge_commit})
        raise HubError(404, f"Sorry, we can't find the page you are looking for: {request.method} {request.target}")

    def _event(self, discussion: Discussion, kind: str, author: str, data: dict) -> dict:
        event = {"id": f"{discussion.num}-{len(discussion.events)}", "type": kind, "createdAt": now(), "data": data}
        event["author"] = {"name": author}
        discussion.events.append(event)
        return event

    def _discussion(self, repository: Repository, discussion: Discussion) -> dict:
        shown = {
            "num": discussion.num,
            "title": discussion.title,
            "author": {"name": discussion.author},
            "createdAt": discussion.created,
            "status": discussion.status,
            "repo": {"name": repository.id, "type": repository.kind},
            "isPullRequest": discussion.is_pull_request,
            "events": discussion.events,
        }
        if discussion.is_pull_request:
            shown["changes"] = {"base": "refs/heads/main", "mergeCommitId": discussion.merge_commit}
            shown |= {"filesWithConflicts": [], "diff": ""}
        return shown

    def _merge(self, repository: Repository, discussion: Discussion, author: str) -> None:
        """Put the changes of a pull request on main."""
        if not discussion.is_pull_request or discussion.status in ("merged", "closed"):
            raise HubError(400, "Only an open pull request can be merged")
        main = self.store.resolve(repository, "main")
        theirs = self.store.resolve(repository, f"refs/pr/{discussion.num}")
        ours = {commit.id: commit for commit in self.store.history(main.id)}
        base = next(commit for commit in self.store.history(theirs.id) if commit.id in ours)
        files = dict(main.files)
        for path in base.files.keys() | theirs.files.keys():
            change = theirs.files.get(path)
            if change == base.files.get(path):
                continue
            if main.files.get(path) not in (base.files.get(path), change):
                raise HubError(409, f"Conflict in {path}")
            files.pop(path, None)
            if change is not None:
                files[path] = change
        made = self.store.add_commit(main.id, files, f"{discussion.title} (#{discussion.num})", "", author=author)
        repository.refs["refs/heads/main"] = made.id
        discussion.status, discussion.merge_commit = "merged", made.id
        self._event(discussion, "status-change", author, {"status": "merged"})
        self.store.save(repository)


class Storage:
    """
    The storage behind the Hub, on an origin of its own, for LFS contents and for xet.

    It takes signed links and tokens of its own; no token of the Hub gets here.
    """

    def __init__(self, store: Store, xet: XetStore, signer: Signer) -> None:
        self.store = store
        self.xet = xet
        self.signer = signer

    def answer(self, request: Request) -> Reply:
        """Give or take a content."""
        match [request.method, *request.path]:
            case ["GET" | "HEAD", "lfs" | "xorbs" as kind, name] if HASH.match(name):
                self.signer.check(request)
                path = self.store.lfs_path(name) if kind == "lfs" else self.xet.xorb_path(name)
                if not path.exists():
                    raise HubError(404, "NoSuchKey")
                return file_reply(path, request, {"ETag": f'"{name}"'})
            case ["PUT", "lfs", oid] if HASH.match(oid):
                self.signer.check(request)
                return self.put(request, oid)
            case ["POST", "v1", "xorbs", "default", name] if HASH.match(name):
                self.signer.check_token(request, "write")
                return self.put_xorb(request, name)
            case ["POST", "v1", "shards"]:
                self.signer.check_token(request, "write")
                self.xet.add_shard(request.body())
                return as_json({"result": 1})
            case ["GET", "v1", "chunks", _, name] if HASH.match(name):
                self.signer.check_token(request, "read")
                shard = self.xet.shard_with(name)
                if shard is None:
                    raise HubError(404, "No shard has this chunk")
                return Reply(200, shard, {"Content-Type": "application/octet-stream"})
            case ["GET", "v1", "reconstructions", name] if HASH.match(name):
                self.signer.check_token(request, "read")
                return self.reconstruction(request, name)
        raise HubError(404, "NoSuchKey")

    @contextmanager
    def _incoming(self, name: str) -> Iterator[Path]:
        """A file that is gone afterwards, unless it was moved to its place."""
        path = self.store.root / "incoming" / f"{name}.{time.monotonic_ns()}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def put(self, request: Request, oid: str) -> Reply:
        """All of a LFS content, or nothing."""
        with self._incoming(oid) as incoming:
            if request.receive(incoming) != oid:
                raise HubError(400, "BadDigest: the content is not what its oid says")
            incoming.replace(self.store.lfs_path(oid))
        return Reply(200, headers={"ETag": f'"{oid}"'})

    def put_xorb(self, request: Request, name: str) -> Reply:
        """All of a xorb, or nothing."""
        with self._incoming(name) as incoming:
            request.receive(incoming)
            return as_json({"was_inserted": self.xet.add_xorb(name, incoming)})

    def reconstruction(self, request: Request, name: str) -> Reply:
        """What a file is made of."""
        file = self.xet.file(name)
        if file is None:
            raise HubError(404, "File not found")

        def link(xorb: str) -> str:
            return self.signer.link(request.origin, f"/xorbs/{xorb}", "GET")

        return as_json(self.xet.reconstruction(file, request.headers.get("range"), link))
