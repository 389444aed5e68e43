"""
The xet storage of the tests: the content-addressed store (CAS) that hf_xet talks to, over HTTP.

A client cuts a file into chunks, uploads new ones packed into xorbs, and then a shard, which says for each file which chunks
of which xorbs it is made of. To download, it asks for these terms (a reconstruction) and fetches ranges of xorbs.
The formats are those of the public specification, https://huggingface.co/docs/xet. The hashes of chunks and xorbs, which
are BLAKE3, are not checked; a file is put together when its shard comes and must have the sha256 that the shard names.
"""

import hashlib
import itertools
import json
import re
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.hub.store import HubError, Store, write_atomically

HEADER = struct.Struct("<32sQQ")
FOOTER = struct.Struct("<9Q32sQQ72sQ")
HASH_AND_FOUR = struct.Struct("<32sIIII")
END_OF_SECTION = b"\xff" * 32
WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30
XORB_FOOTER = b"XETBLOB"
MAX_XORB = 64 << 20


def hash_name(raw: bytes) -> str:
    """A hash as text: each eight bytes are one little-endian number."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


@dataclass(frozen=True)
class Chunk:
    """Where a chunk lies in its xorb, with the eight bytes of its head, and how it is compressed."""

    start: int
    stored: int
    scheme: int
    size: int

    @property
    def end(self) -> int:
        return self.start + 8 + self.stored


@dataclass(frozen=True)
class Term:
    """A part of a file: the chunks from `start` to before `end` of a xorb."""

    xorb: str
    start: int
    end: int
    size: int


@dataclass(frozen=True)
class XetFile:
    """A file that a shard has told of."""

    hash: str
    sha256: str
    size: int
    terms: list[Term]


def read_chunks(path: Path) -> list[Chunk]:
    """The chunks of a xorb. Raises `HubError` if it is none."""
    found, position, size = [], 0, path.stat().st_size
    with path.open("rb") as file:
        while position < size:
            file.seek(position)
            head = file.read(8)
            if head.startswith(XORB_FOOTER):
                break
            stored, unpacked = int.from_bytes(head[1:4], "little"), int.from_bytes(head[5:8], "little")
            if len(head) < 8 or head[0] != 0 or head[4] > 2 or position + 8 + stored > size:
                raise HubError(400, f"This is no xorb: {head.hex()} at {position}")
            found.append(Chunk(position, stored, head[4], unpacked))
            position = found[-1].end
    if not found:
        raise HubError(400, "A xorb has at least one chunk")
    return found


def unpack(chunk: Chunk, data: bytes) -> bytes:
    """The content of a chunk from its stored bytes."""
    if chunk.scheme == 0:
        return data
    import pyarrow as pa  # only here, to start without it

    plain = pa.decompress(data, decompressed_size=chunk.size, codec="lz4", asbytes=True)
    if chunk.scheme == 2:  # grouped by their place in each four bytes
        grouped, plain, start = plain, bytearray(chunk.size), 0
        for place in range(4):
            number = len(range(place, chunk.size, 4))
            plain[place::4] = grouped[start : start + number]
            start += number
    return bytes(plain)


@dataclass(frozen=True)
class XorbBlock:
    """What a shard tells of a xorb: `raw` is that piece of the shard, `chunks` the hashes of its chunks."""

    xorb: str
    chunks: list[str]
    raw: bytes


def read_shard(data: bytes) -> tuple[list[XetFile], list[XorbBlock]]:
    """
    The files and the new xorbs that a shard tells of.

    Raises `HubError` if it is none, or lacks what an upload needs.
    """
    _, version, _ = HEADER.unpack_from(data)
    if version != 2:
        raise HubError(400, f"Unknown version of a shard: {version}")
    position, files, blocks = HEADER.size, [], []

    def following() -> tuple:
        nonlocal position
        if position + HASH_AND_FOUR.size > len(data):
            raise HubError(400, "The shard ends early")
        entry = HASH_AND_FOUR.unpack_from(data, position)
        position += HASH_AND_FOUR.size
        return entry

    while True:
        raw, flags, number, _, _ = following()
        if raw == END_OF_SECTION:
            break
        entries = [following() for _ in range(number)]
        terms = [Term(hash_name(xorb), start, end, size) for xorb, _, size, start, end in entries]
        if not flags & WITH_VERIFICATION or not flags & WITH_METADATA:
            raise HubError(400, "A shard that is uploaded has verification entries and metadata")
        for _ in range(number):
            following()
        sha256 = hash_name(following()[0])
        files.append(XetFile(hash_name(raw), sha256, sum(term.size for term in terms), terms))
    while True:
        start = position
        raw, _, number, _, _ = following()
        if raw == END_OF_SECTION:
            return files, blocks
        chunks = [hash_name(following()[0]) for _ in range(number)]
        blocks.append(XorbBlock(hash_name(raw), chunks, data[start:position]))


def deduplication_shard(tag: bytes, block: bytes) -> bytes:
    """A shard that tells a client of one xorb, for the chunks of it that it has too."""
    end = END_OF_SECTION + bytes(16)
    head = HEADER.pack(tag, 2, FOOTER.size) + end
    body = head + block + end
    # three tables for look-up, all empty, which must nevertheless lie behind the sections: hf_xet takes the number
    # of chunks from their places
    tables = (len(body), 0) * 3
    moment, no_key = int(time.time()), bytes(32)
    times = (moment, moment + 86_400)
    footer = FOOTER.pack(1, HEADER.size, len(head), *tables, no_key, *times, bytes(72), len(body))
    return body + footer


class XetStore:
    """Xorbs and files, in the folder of the store; the contents of the files are put where the LFS contents are."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._chunks: dict[str, list[Chunk]] = {}
        self._xorb_of_chunk: dict[str, str] = {}
        for path in (store.root / "xet" / "shards").iterdir():
            self._index(read_shard(path.read_bytes())[1])

    def _index(self, blocks: list[XorbBlock]) -> None:
        for block in blocks:
            self._xorb_of_chunk |= dict.fromkeys(block.chunks, block.xorb)

    def xorb_path(self, name: str) -> Path:
        """Where a xorb is, or will be when it is uploaded."""
        return self._store.root / "xet" / "xorbs" / name

    def chunks(self, xorb: str) -> list[Chunk]:
        """The chunks of a xorb that is here."""
        if not self.xorb_path(xorb).exists():
            raise HubError(400, f"There is no xorb {xorb}")
        if xorb not in self._chunks:
            self._chunks[xorb] = read_chunks(self.xorb_path(xorb))
        return self._chunks[xorb]

    def add_xorb(self, name: str, incoming: Path) -> bool:
        """Keep a xorb; returns whether it is new."""
        if incoming.stat().st_size > MAX_XORB:
            raise HubError(400, "A xorb has at most 64 MiB")
        chunks, new = read_chunks(incoming), not self.xorb_path(name).exists()
        incoming.replace(self.xorb_path(name))
        self._chunks[name] = chunks
        return new

    def add_shard(self, data: bytes) -> None:
        """Keep the files of a shard, when all of them are what it says."""
        files, blocks = read_shard(data)
        for file in files:
            incoming = self._store.root / "incoming" / f"{file.sha256}.{time.monotonic_ns()}"
            try:
                digest = hashlib.sha256()
                with incoming.open("wb") as output:
                    for piece in self._content(file):
                        digest.update(piece)
                        output.write(piece)
                if digest.hexdigest() != file.sha256 or incoming.stat().st_size != file.size:
                    raise HubError(400, f"The file {file.hash} is not what its shard says")
                incoming.replace(self._store.lfs_path(file.sha256))
            finally:
                incoming.unlink(missing_ok=True)
        for file in files:
            for key in (file.sha256, file.hash):
                path = self._store.root / "xet" / "files" / key
                write_atomically(path, json.dumps(asdict(file)).encode())
        for block in blocks:
            if len(self.chunks(block.xorb)) != len(block.chunks):
                raise HubError(400, f"The xorb {block.xorb} has other chunks")
            path = self._store.root / "xet" / "shards" / block.xorb
            write_atomically(path, deduplication_shard(data[:32], block.raw))
        self._index(blocks)

    def shard_with(self, chunk: str) -> bytes | None:
        """A shard that tells of a xorb with this chunk, if there is one that is here."""
        xorb = self._xorb_of_chunk.get(chunk)
        path = self._store.root / "xet" / "shards" / str(xorb)
        return path.read_bytes() if path.exists() else None

    def _content(self, file: XetFile) -> Iterator[bytes]:
        for term in file.terms:
            chunks = self.chunks(term.xorb)[term.start : term.end]
            if len(chunks) != term.end - term.start or sum(chunk.size for chunk in chunks) != term.size:
                raise HubError(400, f"The xorb {term.xorb} has no such chunks: {term}")
            with self.xorb_path(term.xorb).open("rb") as xorb:
                for chunk in chunks:
                    xorb.seek(chunk.start + 8)
                    yield unpack(chunk, xorb.read(chunk.stored))

    def file(self, key: str) -> XetFile | None:
        """The file with a sha256 or a xet hash, if a shard has told of it."""
        path = self._store.root / "xet" / "files" / key
        if not path.exists():
            return None
        state = json.loads(path.read_text())
        return XetFile(**{**state, "terms": [Term(**term) for term in state["terms"]]})

    def reconstruction(self, file: XetFile, asked: str | None, link) -> dict:
        """
        The terms of a file, or of a range of its bytes, and where to fetch them.

        Args:
            file (`XetFile`): Which.
            asked (`str`, *optional*): `bytes=first-last`.
            link (`Callable`): From a xorb's name to a link.
        """
        first, last = 0, file.size - 1
        if asked is not None:
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
            if found is None or int(found.group(1)) >= file.size:
                raise HubError(416, f"Range {asked} of {file.size} bytes")
            first, last = int(found.group(1)), min(int(found.group(2) or last), last)
        terms, fetch, offset, position = [], {}, None, 0
        for term in file.terms:
            chunks = self.chunks(term.xorb)
            starts = list(itertools.accumulate((one.size for one in chunks[term.start : term.end]), initial=position))
            position = starts[-1]
            # the chunks that have a byte in the range
            wanted = [
                term.start + number
                for number, (start, end) in enumerate(itertools.pairwise(starts))
                if end > first and start <= last
            ]
            if not wanted:
                continue
            if offset is None:
                offset = first - starts[wanted[0] - term.start]
            span = {"start": wanted[0], "end": wanted[-1] + 1}
            size = sum(chunk.size for chunk in chunks[span["start"] : span["end"]])
            terms.append({"hash": term.xorb, "unpacked_length": size, "range": span})
            place = {"start": chunks[span["start"]].start, "end": chunks[span["end"] - 1].end - 1}
            fetch.setdefault(term.xorb, []).append({"range": span, "url": link(term.xorb), "url_range": place})
        return {"offset_into_first_range": offset or 0, "terms": terms, "fetch_info": fetch}
