"""Reading parts of large files on the Hub: by ranges of bytes, several at once, at one commit."""

import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from huggingface_hub.errors import EntryNotFoundError

from hf_doge._version import __version__
from hf_doge.artifacts.hub.errors import (
    FetchError,
    Patience,
    TransportError,
    is_expired,
    is_of_the_hub,
    is_transient,
    raise_explained,
    shortly,
)

Result = TypeVar("Result")

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class ByteRange(NamedTuple):
    """Bytes `[start, stop)` of a file."""

    start: int
    stop: int


def join_near(ranges: Iterable[ByteRange], *, largest_gap: int, largest_size: int) -> list[list[ByteRange]]:
    """
    Which ranges to read by one request each.

    Args:
        ranges (`Iterable[ByteRange]`): Ranges of one file; they may touch, but not overlap.
        largest_gap (`int`): So many bytes between two of them are read along rather than by another request.
        largest_size (`int`): Bytes that a request is not to exceed, unless a single range does.

    Returns:
        `list[list[ByteRange]]`: the ranges, ascending, in groups that follow each other.
    """
    groups: list[list[ByteRange]] = []
    for one in sorted(ranges):
        near = groups and one.start - groups[-1][-1].stop <= largest_gap
        if near and one.stop - groups[-1][0].start <= largest_size:
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a file are, and how many."""

    url: str
    size: int


class RangedFile:
    """
    One file of a dataset repository at one commit. Nothing is asked of the Hub before the first call.

    Large files lie with a store of the Hub's, at an address that it signs for a while. It is asked for once, and again when
    the store does not take it any more. The access token goes to the Hub alone.

    Args:
        repo_id (`str`): The dataset repository.
        path (`str`): Path of the file in the repository.
        commit (`str`): Full hash of the commit.
        token (`str` or `bool`, *optional*): As in `huggingface_hub`.
        sha256 (`str`, *optional*): What the file must be, where the Hub tells its checksum; it does of large files.
        patience ([`Patience`]): How long to keep trying.
    """

    def __init__(
        self,
        repo_id: str,
        path: str,
        *,
        commit: str,
        token: str | bool | None = None,
        sha256: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.repo_id, self.path, self.commit = repo_id, path, commit
        self._token, self._sha256 = token, sha256
        self._patience = patience or Patience()
        self._place: _Place | None = None
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of the whole file, as the Hub says."""
        return self._call(self._find).size

    def read(self, start: int, stop: int) -> bytes:
        """
        Bytes `[start, stop)`; several threads may read at once.

        Raises:
            FileNotFoundError: There is no such file, or the repository cannot be seen.
            PermissionError: The token may not read it.
            ValueError: The range ends beyond the file, or the file is another than it must be.
            OSError: The Hub did not send the bytes, after all tries, or does not serve ranges.
        """
        if not 0 <= start <= stop:
            raise ValueError(f"A range must be ascending and not negative, but got [{start}, {stop}).")
        return b"" if start == stop else self._call(lambda: self._read(start, stop))

    def _call(self, action: Callable[[], Result]) -> Result:
        try:
            return self._patience.call(action)
        except (OSError, TransportError) as error:
            if is_transient(error):
                raise FetchError(
                    f"{self.path!r} of {self.repo_id!r} could not be read: {shortly(error)}. Try again later: what came"
                    " is kept."
                ) from error
            if isinstance(error, EntryNotFoundError):
                raise FileNotFoundError(
                    f"There is no file {self.path!r} in {self.repo_id!r} at commit {self.commit}, although its config.json"
                    " tells of it. Its author must push it again."
                ) from error
            raise_explained(error, self.repo_id, action="read")

    def _find(self) -> _Place:
        """Ask the Hub where the bytes are, once."""
        # Only here, as importing the Hub's client takes longer than most of what else this package does.
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        with self._lock:
            if self._place is None:
                url = hf_hub_url(self.repo_id, self.path, repo_type="dataset", revision=self.commit)
                found = get_hf_file_metadata(
                    url, token=self._token, library_name="hf_doge", library_version=__version__
                )
                if found.size is None or found.commit_hash != self.commit:
                    raise OSError(
                        f"The Hub must tell size and commit of {self.path!r} in {self.repo_id!r}, but said {found.size} and"
                        f" {found.commit_hash!r}. Read the index with `streaming=False`."
                    )
                is_checksum = len(found.etag or "") == 64  # of small files it is another kind of hash
                if is_checksum and self._sha256 is not None and found.etag != self._sha256:
                    raise ValueError(
                        f"{self.path!r} in {self.repo_id!r} at commit {self.commit} is not the file that its config.json"
                        f" tells of: its sha256 is {found.etag}, not {self._sha256}. Its author must push it again."
                    )
                self._place = _Place(found.location, found.size)
            return self._place

    def _read(self, start: int, stop: int) -> bytes:
        place = self._find()
        if stop > place.size:
            raise ValueError(
                f"Bytes up to {stop} are asked of {self.path!r} in {self.repo_id!r}, but it has {place.size}. It is not"
                " the file that the index tells of: its author must push it again."
            )
        try:
            return self._request(place, start, stop)
        except (OSError, TransportError) as error:
            if not is_expired(error):
                raise
        with self._lock:
            if self._place is place:
                self._place = None
        return self._request(self._find(), start, stop)

    def _request(self, place: _Place, start: int, stop: int) -> bytes:
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        token = self._token if is_of_the_hub(place.url) else False
        headers = build_hf_headers(token=token, library_name="hf_doge", library_version=__version__)
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        asked: dict[str, Any] = {
            "headers": headers,
            "follow_redirects": False,
            "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
        }
        with get_session().stream("GET", place.url, **asked) as response:
            if response.status_code >= 400:
                response.read()
                hf_raise_for_status(response)
            told = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if response.status_code != 206 or told is None:
                raise OSError(
                    f"Parts of {self.path!r} in {self.repo_id!r} were asked for, but the server answers with status"
                    f" {response.status_code} and no such part. Read the index with `streaming=False`."
                )
            if tuple(map(int, told.groups())) != (start, stop - 1, place.size):
                raise ConnectionError(f"Asked for bytes {start}-{stop - 1} of {place.size}, got {told.group()}.")
            content = bytearray()
            for piece in response.iter_raw():
                content += piece
                if len(content) > stop - start:
                    break
        if len(content) != stop - start:
            raise ConnectionError(f"Asked for {stop - start} bytes, got {len(content)}.")
        return bytes(content)


def read_all(
    wanted: Sequence[tuple[RangedFile, ByteRange]],
    receive: Callable[[int, bytes], None],
    *,
    num_threads: int = 16,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """
    Read many ranges at once. The first that fails ends it; those under way are waited for.

    Args:
        wanted (`Sequence[tuple[RangedFile, ByteRange]]`): What to read.
        receive (`Callable[[int, bytes], None]`):
            Called with a position in `wanted` and its bytes, on any thread, in any order.
        num_threads (`int`): Requests at once.
        progress (`Callable[[int], None]`): Called with the number of bytes that came.
    """

    def read(position: int) -> None:
        file, one = wanted[position]
        content = file.read(*one)
        receive(position, content)
        progress(len(content))

    with ThreadPoolExecutor(max(1, min(num_threads, len(wanted)))) as pool:
        tasks = [pool.submit(read, position) for position in range(len(wanted))]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
