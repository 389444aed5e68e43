"""
The Hub of the tests as a process: `python -m tests.hub.server --root DIR`.

It listens on loopback only, on two ports: the Hub, and the storage behind it. That storage is another origin, as with the
real one: the clients follow redirects within one origin and would then miss `X-Repo-Commit`, and it shows that no token is
sent there. One line of JSON on standard output tells the ports when it is ready. Under `/_control/` of the Hub's port
the tests order faults and read the log and the state.
"""

import argparse
import contextlib
import hashlib
import json
import os
import socket
import struct
import sys
import threading
import time
import traceback
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from tests.hub.control import Control
from tests.hub.routes import Hub, Reply, Request, Signer, Storage, as_json, error_reply
from tests.hub.store import HubError, Store, User, write_atomically
from tests.hub.tokens import USERS
from tests.hub.traffic import Fault, LogEntry, Traffic
from tests.hub.xet import XetStore

PIECE = 1 << 16
TCP_ESTABLISHED = 1  # of the states in Linux' tcp_info
OPPOSITE = bytes(range(255, -1, -1))


class Cut(Exception):
    """The connection ends here."""


class Server(ThreadingHTTPServer):
    """One port. `name` is what the log calls it; `answer` makes replies of requests."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, name: str, answer, traffic: Traffic, control: Control | None = None) -> None:
        self.name, self.answer, self.traffic, self.control = name, answer, traffic, control
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away, as when it is killed, is no error of ours."""
        if not isinstance(sys.exception(), ConnectionError | Cut):
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the faults have their way, answers."""

    protocol_version = "HTTP/1.1"
    # head and body are written apart, which Nagle's rule would hold up by 40 ms
    disable_nagle_algorithm = True
    server: Server

    def serve(self) -> None:
        """One request."""
        self._left = None
        self._cut_at = None
        self.origin = f"http://{self.headers.get('Host')}"
        if self.server.control is not None and self.path.startswith("/_control/"):
            self._entry = None
            self._send(self.server.control.answer(self.path, self._body()))
            return
        entry, user, refusal = self._begin()
        fault = self.server.traffic.fault_for(entry)
        try:
            self._answer(entry, user, refusal, fault)
        except Cut:
            self._end(reset=fault.reset)
        finally:
            entry.seconds = time.time() - entry.started

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def _begin(self) -> tuple[LogEntry, User | None, HubError | None]:
        given = self.headers.get("Authorization")
        user, refusal = None, None
        if given is not None and self.server.name == "hub":
            user = USERS.get(given.removeprefix("Bearer ").strip())
            if user is None:
                refusal = HubError(401, "Invalid credentials in Authorization header")
        parts = urlsplit(self.path)
        entry = self.server.traffic.begin(
            server=self.server.name,
            method=self.command,
            path=parts.path,
            query=parts.query,
            user=user.name if user else None,
            authorization="hf_" in (given or ""),
            user_agent=self.headers.get("User-Agent", ""),
            range=self.headers.get("Range"),
        )
        self._entry = entry
        return entry, user, refusal

    def _answer(self, entry: LogEntry, user: User | None, refusal: HubError | None, fault: Fault | None) -> None:
        if fault is not None:
            time.sleep(fault.delay)
            if fault.hold == "before":
                fault.released.wait()
                self._check_client()
            if fault.cut == "before":
                raise Cut
            if fault.other_commit is not None:
                self.server.traffic.other_commit(**fault.other_commit)
            if fault.cut == "body" and self._has_body():
                self._cut_at = int(self.headers.get("Content-Length", 0)) // 2
            if fault.status is not None:
                self._drain()
                reply = error_reply(HubError(fault.status, fault.message, fault.code))
                if fault.retry_after is not None:
                    reply.headers["Retry-After"] = f"{fault.retry_after:g}"
                self._send(reply)
                return
        request = Request(
            self.command,
            self.path,
            {name.lower(): value for name, value in self.headers.items()},
            self.origin,
            user,
            self._body,
            self._receive,
        )
        try:
            if refusal is not None:
                raise refusal
            reply = self.server.answer(request)
        except HubError as error:
            reply = error_reply(error)
        except (Cut, ConnectionError):
            raise
        except Exception:
            # a bug of this server must be seen as one, and not as a fault that a client gets over
            traceback.print_exc()
            reply = as_json({"error": traceback.format_exc()}, 501)
        self._drain()
        if fault is not None:
            if fault.hold == "after":
                fault.released.wait()
            if fault.lost_reply:
                entry.status = reply.status
                raise Cut
        cut = fault is not None and (fault.cut == "reply" or (fault.cut == "body" and self._cut_at is None))
        self._send(reply, cut=cut, corrupt=fault is not None and fault.corrupt)

    def _check_client(self) -> None:
        """A client that died while it was held is not served, though all it sent may still be there to read."""
        state = self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        if state != TCP_ESTABLISHED:
            raise ConnectionError("The client went away")

    # The body of the request

    def _has_body(self) -> bool:
        return "Transfer-Encoding" in self.headers or int(self.headers.get("Content-Length", 0)) > 0

    def _pieces(self):
        """The body piece by piece; nothing when it has been read."""
        if self._left is None:
            self._left = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self._plain()
        yield from self._left

    def _plain(self):
        left = int(self.headers.get("Content-Length", 0))
        while left:
            wanted = min(left, PIECE)
            if self._cut_at is not None:
                wanted = min(wanted, self._cut_at)
            piece = self.rfile.read(wanted) if wanted else b""
            self._count(len(piece))
            if len(piece) < wanted:
                raise ConnectionError("The client went away")
            left -= len(piece)
            yield piece

    def _chunks(self):
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            piece = self.rfile.read(size)
            self.rfile.readline()
            self._count(len(piece))
            yield piece
        while self.rfile.readline().strip():
            pass

    def _count(self, number: int) -> None:
        if self._entry is not None:
            self._entry.received += number
        if self._cut_at is not None:
            self._cut_at -= number
            if self._cut_at <= 0:
                raise Cut

    def _body(self) -> bytes:
        return b"".join(self._pieces())

    def _receive(self, path: Path) -> str:
        """Write the body to a file; returns its sha256."""
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for piece in self._pieces():
                digest.update(piece)
                file.write(piece)
        return digest.hexdigest()

    def _drain(self) -> None:
        for _ in self._pieces():
            pass

    # The answer

    def _send(self, reply: Reply, *, cut: bool = False, corrupt: bool = False) -> None:
        if self._entry is not None:
            self._entry.status = reply.status
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("X-Request-Id", f"Root={uuid.uuid4()}")
        if reply.status != 204:
            self.send_header("Content-Length", str(reply.size))
        if cut and self.command == "HEAD":
            raise Cut
        self.end_headers()
        if self.command == "HEAD":
            return
        left = reply.size // 2 if cut else reply.size
        if reply.file is None:
            self._write(reply.body[:left], corrupt)
        else:
            with reply.file.open("rb") as file:
                file.seek(reply.start)
                while left:
                    piece = file.read(min(left, PIECE))
                    left -= len(piece)
                    self._write(piece, corrupt)
        if cut:
            raise Cut

    def _write(self, piece: bytes, corrupt: bool) -> None:
        # counted first: who has the bytes and then asks for the log must find them there
        if self._entry is not None:
            self._entry.sent += len(piece)
        self.wfile.write(piece.translate(OPPOSITE) if corrupt else piece)

    def _end(self, *, reset: bool) -> None:
        """End the connection: reset, as by a machine that fell over, or closed as by a proxy that gave up."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # closed under the file objects that still hold it: they would send a FIN first
            socket.close(self.connection.detach())

    def send_response(self, code: int, message: str | None = None) -> None:
        """Without the log line and the `Server` header of the library."""
        self.send_response_only(code, message)
        self.send_header("Date", self.date_time_string())

    def finish(self) -> None:
        """As the library does, for a connection that may be gone."""
        with contextlib.suppress(OSError):
            super().finish()


def signing_secret(root: Path) -> bytes:
    """The key of the signed links, the same after a restart."""
    path = root / "secret"
    if not path.exists():
        write_atomically(path, os.urandom(32))
    return path.read_bytes()


def end_with_parent() -> None:
    """End when the process that started us is gone: its end of our standard input closes."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="Folder of the state; made if it is not there.")
    parser.add_argument("--port", type=int, default=0, help="Port of the Hub; 0 takes a free one.")
    parser.add_argument("--storage_port", type=int, default=0, help="Port of the storage; 0 takes a free one.")
    parser.add_argument("--page_size", type=int, default=1000, help="Entries on a page of a listing.")
    parser.add_argument("--end_with_parent", action="store_true", help="End when standard input closes.")
    options = parser.parse_args()

    store, traffic = Store(options.root), Traffic()
    signer = Signer(signing_secret(options.root))
    xet = XetStore(store)
    hub = Hub(store, xet, signer, page_size=options.page_size)
    control = Control(store, traffic)
    traffic.other_commit = control.commit
    storage = Server(options.storage_port, "storage", Storage(store, xet, signer).answer, traffic)
    front = Server(options.port, "hub", hub.answer, traffic, control)
    hub.storage_origin = f"http://127.0.0.1:{storage.server_port}"
    if options.end_with_parent:
        end_with_parent()
    threading.Thread(target=storage.serve_forever, daemon=True).start()
    print(json.dumps({"port": front.server_port, "storage_port": storage.server_port}), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        front.serve_forever()


if __name__ == "__main__":
    main()
