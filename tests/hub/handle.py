"""Starting the Hub of the tests, ordering faults, and running clients against it."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import get_session, hf_raise_for_status

from tests.forks import Fork, hub_port, imported_for
from tests.hub.tokens import BAD_TOKEN, OTHER_TOKEN, READ_TOKEN, TOKEN
from tests.hub.traffic import LogEntry

REPOSITORY = Path(__file__).parents[2]


class LoggedRequest(LogEntry):
    """
    One request that the Hub got.

    `sent` and `received` are the bytes of the bodies, as far as they went; `status` is `None` while there is no answer,
    and stays so if the connection was cut before one. `server` is `hub` or `storage`.
    """

    @property
    def target(self) -> str:
        """Path and query, in which the patterns are searched."""
        return f"{self.path}?{self.query}" if self.query else self.path

    @property
    def mutates(self) -> bool:
        """Whether it may change what the Hub keeps."""
        asks = re.search(r"/(paths-info|preupload)/|/validate-yaml$|/objects/(batch|verify)$", self.path)
        return self.method in ("POST", "PUT", "DELETE") and not asks

    @property
    def name(self) -> str:
        """The request for a table: hashes and signatures give way to their kinds."""
        path = re.sub(r"\b[0-9a-f]{64}\b", "{sha256}", self.path)
        path = re.sub(r"\b[0-9a-f]{40}\b", "{commit}", path)
        return f"{self.method} {path}"

    @property
    def pattern(self) -> str:
        """A pattern for `fail` that finds this request and those like it, with whatever hashes."""
        path = re.sub(r"\b[0-9a-f]{64}\b", "[0-9a-f]{64}", re.escape(self.path))
        return f"^{re.sub(r'(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])', '[0-9a-f]{40}', path)}(\\?|$)"


class HubControl:
    """
    The handle of a running Hub.

    Args:
        url (`str`): Its endpoint, which clients have as `HF_ENDPOINT`.
    """

    token = TOKEN
    read_token = READ_TOKEN
    other_token = OTHER_TOKEN
    bad_token = BAD_TOKEN

    def __init__(self, url: str) -> None:
        self.url = url

    def control(self, command: str, **arguments: object) -> Any:
        """Send a command of `tests.hub.control.Control`."""
        request = urllib.request.Request(
            f"{self.url}/_control/{command}", data=json.dumps(arguments).encode(), method="POST"
        )
        # no proxy, whatever the environment says
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{command}: {json.load(error)['error']}") from error

    # Faults

    def fail(
        self,
        method: str,
        pattern: str,
        *,
        nth: int = 1,
        times: int | None = 1,
        server: str | None = None,
        status: int | None = None,
        message: str = "Injected fault",
        code: str | None = None,
        retry_after: float | None = None,
        cut: str | None = None,
        lost_reply: bool = False,
        reset: bool = True,
        delay: float = 0.0,
        hold: str | None = None,
        corrupt: bool = False,
        other_commit: dict | None = None,
    ) -> int:
        """
        Order a fault for the requests of `method` (`*` for any) in whose path and query `pattern` is found.

        Args:
            method (`str`): `GET`, `POST`, ...
            pattern (`str`): A regular expression, searched in `path?query`.
            nth (`int`): The first matching request that is hit, counted from the order.
            times (`int` or `None`): How many are hit; `None` for all from then on.
            server (`str`, *optional*): Only `hub` or only `storage`.
            status (`int`, *optional*): Answer this in place of the real answer; nothing is done.
            message, code: Of that answer.
            retry_after (`float`, *optional*): Seconds in its `Retry-After`.
            cut (`str`, *optional*): End the connection: `before` anything is read or done; in the middle of the `body` (of
                the request if it has one, so that it is not done, and else of the answer); or when it is done in the
                middle of the `reply`.
            lost_reply (`bool`): Do it, and end the connection without an answer.
            reset (`bool`): End by a reset; `False` closes in good order.
            delay (`float`): Seconds to wait first; alone, it only slows down.
            hold (`str`, *optional*): Wait for `release`: `before` anything is done, or `after`, before the answer.
            corrupt (`bool`): Answer with every bit of the body turned.
            other_commit (`dict`, *optional*): First let somebody else commit: the arguments of `commit`.

        Returns:
            The number of the fault, for `release` and `hits`.
        """
        settings = {name: value for name, value in locals().items() if name != "self"}
        if other_commit is not None:
            settings["other_commit"] = {"kind": other_commit.get("repo_type", "dataset"), **other_commit}
            settings["other_commit"].pop("repo_type", None)
        return self.control("fail", **settings)

    def hits(self, fault: int) -> int:
        """How many requests a fault has hit."""
        return next(one["hits"] for one in self.control("faults") if one["id"] == fault)

    def release(self, fault: int | None = None) -> None:
        """Let the requests that a fault (or any) holds go on."""
        self.control("release", fault_id=fault)

    def clear_faults(self) -> None:
        """No more faults; what is held goes on."""
        self.control("clear_faults")

    # The log

    def requests(
        self, method: str | None = None, pattern: str = "", *, server: str | None = None
    ) -> list[LoggedRequest]:
        """The requests so far, in order; `pattern` is searched in `path?query`."""
        log = [LoggedRequest(**entry) for entry in self.control("log")]
        return [
            one
            for one in log
            if method in (None, one.method) and server in (None, one.server) and re.search(pattern, one.target)
        ]

    def clear_log(self) -> None:
        """Forget the requests so far."""
        self.control("log", clear=True)

    def bytes_sent(self, pattern: str = "", *, method: str | None = None, server: str | None = None) -> int:
        """The bytes of the bodies that the Hub has sent."""
        return sum(one.sent for one in self.requests(method, pattern, server=server))

    def bytes_received(self, pattern: str = "", *, method: str | None = None, server: str | None = None) -> int:
        """The bytes of the bodies that the Hub was sent."""
        return sum(one.received for one in self.requests(method, pattern, server=server))

    def wait_for(self, what: Callable[[], Any], *, timeout: float = 60) -> Any:
        """Ask again until the answer is true; for tests that wait for a client's request, or for a fault's hit."""
        end = time.monotonic() + timeout
        while not (answer := what()):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"Still not so after {timeout} s. Requests: {[one.name for one in self.requests()]}"
                )
            time.sleep(0.02)
        return answer

    # The state

    def reset(self) -> None:
        """
        As a new Hub: no faults, no log, no repositories, no contents. The tokens and ports stay.

        A client that goes by xet needs a new `home` after it: hf_xet remembers there what it has uploaded.
        """
        self.control("reset")

    def repository(self, repo_id: str, *, repo_type: str = "dataset") -> dict | None:
        """`refs` (full name to commit), `private`, `gated`, `discussions`; `None` if there is no such repository."""
        return self.control("repository", kind=repo_type, repo_id=repo_id)

    def create(self, repo_id: str, *, repo_type: str = "dataset", private: bool = False) -> None:
        """A repository, made by its owner."""
        self.control("create", kind=repo_type, repo_id=repo_id, private=private)

    def commits(self, repo_id: str, *, repo_type: str = "dataset", revision: str = "main") -> list[dict]:
        """The commits, newest first: `id`, `parent`, `title`, `message`, `author`, `files` (path to size, oid, sha256)."""
        return self.control("commits", kind=repo_type, repo_id=repo_id, revision=revision)

    def commit(self, repo_id: str, files: dict[str, str | None], *, repo_type: str = "dataset", **more: str) -> str:
        """A commit by somebody else: text by path, `None` deletes; `revision` and `title` may be given. Its id."""
        return self.control("commit", kind=repo_type, repo_id=repo_id, files=files, **more)

    def files(self, repo_id: str, *, repo_type: str = "dataset", revision: str = "main") -> dict[str, bytes]:
        """The contents of all files, by path."""
        head = self.commits(repo_id, repo_type=repo_type, revision=revision)[0]
        return {path: Path(entry["content"]).read_bytes() for path, entry in head["files"].items()}

    def objects(self) -> list[str]:
        """The sha256 of every LFS content that was uploaded, committed or not."""
        return self.control("objects")


class HubServer(HubControl):
    """
    A Hub in a process of its own; as a context manager, ended with the block.

    Args:
        root (`Path`): Folder of its state. Another server with the same folder goes on from there.
        page_size (`int`): Entries on a page of a listing.
    """

    def __init__(self, root: Path, *, page_size: int = 1000) -> None:
        super().__init__("")
        self.root = Path(root)
        self.page_size = page_size
        self.storage_url = ""
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen | None = None

    def start(self) -> "HubServer":
        """Start and wait until it answers."""
        options = [f"--root={self.root}", f"--page_size={self.page_size}", "--end_with_parent"]
        options += [f"--{name}={port}" for name, port in (self._ports or new_ports()).items()]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub.server", *options],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"The Hub of the tests did not start: it ended with {self._process.wait()}.")
        self._ports = json.loads(line)
        self.url = f"http://127.0.0.1:{self._ports['port']}"
        self.storage_url = f"http://127.0.0.1:{self._ports['storage_port']}"
        return self

    def stop(self) -> None:
        """Kill it, as a power cut does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    def restart(self) -> None:
        """Kill it and start it again on the same ports and state; faults and log are forgotten."""
        self.stop()
        self.start()

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def environment(self, **more: Any) -> dict[str, str]:
        """`client_environment` for this Hub."""
        return client_environment(self, **more)


def new_ports() -> dict[str, int]:
    """Of a Hub: where clients have imported that it is (`tests.forks.HUB`), or anywhere while another one is there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not matter
        try:
            probe.bind(("127.0.0.1", hub_port()))
        except OSError:
            return {"port": 0, "storage_port": 0}
    return {"port": hub_port(), "storage_port": 0}


def client_environment(
    hub: HubServer, *, token: str | None = TOKEN, home: Path | None = None, xet: bool = False, **changes: str
) -> dict[str, str]:
    """
    The whole environment of a client's process.

    Nothing of the Hub's settings of this process goes along; every other address is behind a proxy that is not there,
    so that a connection to anywhere else fails.

    Args:
        hub (`HubServer`): Which Hub.
        token (`str`, *optional*): `HF_TOKEN`; `None` for a user who is not logged in.
        home (`Path`, *optional*): `HF_HOME`, with the caches. A folder beside the Hub's state by default, the same for
            all its clients; give one of its own to a client whose cache has to be empty.
        xet (`bool`): Whether uploads and downloads go by xet (`HF_HUB_DISABLE_XET` is set otherwise).
        changes: Environment variables beside these.
    """
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    home = home or hub.root.with_name(f"{hub.root.name}-home")
    proxy = "http://127.0.0.1:9"
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        # said, and not only left out, for `tests.launch` sets them for those who say nothing
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(REPOSITORY),
        "CUDA_VISIBLE_DEVICES": "",
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), proxy),
        **dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost"),
    }
    if token is not None:
        settings["HF_TOKEN"] = token
    if not xet:
        settings["HF_HUB_DISABLE_XET"] = "1"
    return {**kept, **settings, **changes}


def start_client(hub: HubServer, script: Path | str, *arguments: object, **environment: Any) -> Fork:
    """As `run_client`, but does not wait: for tests that kill it, or look on while it runs."""
    source = ["-c", script] if isinstance(script, str) else [str(script)]
    environment = client_environment(hub, **environment)
    return Fork([*source, *arguments], env=environment, imported=imported_for(environment), separate_errors=True)


def run_client(
    hub: HubServer,
    script: Path | str,
    *arguments: object,
    timeout: float = 120,
    check: bool = True,
    **environment: Any,
) -> subprocess.CompletedProcess:
    """
    Run a script in a process of its own against a Hub, with whatever client it imports, and wait for it.

    Args:
        hub (`HubServer`): Which Hub.
        script (`Path` or `str`): A file, or the code itself.
        arguments: Of the script.
        timeout (`float`): Seconds after which it is killed.
        check (`bool`): Whether to fail, showing the end of its output, if it does.
        environment: Of `client_environment`: `token`, `home`, `xet`, and variables.
    """
    process = start_client(hub, script, *arguments, **environment)
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    if check:
        assert process.returncode == 0, f"{output[-3000:]}\n{errors[-6000:]}"
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def last_json(result: subprocess.CompletedProcess) -> Any:
    """What a client printed as its last line, from JSON."""
    return json.loads(result.stdout.strip().splitlines()[-1])


def validate_card(card: Any) -> None:
    """Ask the Hub whether a card is valid; `RepoCard.validate` of huggingface_hub 1.3 asks huggingface.co alone."""
    body = {"repoType": card.repo_type, "content": str(card)}
    response = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=body)
    if response.status_code == 400:
        raise ValueError(response.text)
    hf_raise_for_status(response)
