"""What a shard has fetched so far, on local disk: so that memory stays flat and a killed run goes on where it was.

An append-only file of records, each with its checksum; a torn last record is cut off. Under a root that is no local
folder the same bytes also go there, some records at a time, so that they outlive the node. It is scratch, not a format:
another version or other settings simply start anew.
"""

import hashlib
import json
import struct
import time
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType

from curate.fetch.outcome import Outcome
from curate.scratch import Parts

_RECORD = struct.Struct("<16sIQI")  # URL digest, bytes of facts, bytes of image, CRC-32 of both
_FORMAT = b"curate spool 1\n"
# What a killed node may lose: 150 pictures of 512 pixels, or ten seconds of a slow shard; a part is one PUT request.
PART_BYTES = 16_000_000
PART_S = 10.0
_FACTS = tuple(field.name for field in fields(Outcome) if field.name != "image")


@dataclass(frozen=True)
class Fetched:
    """The outcome of a URL; `matched` holds those expected digests (hex) that its bytes have."""

    outcome: Outcome
    matched: tuple[str, ...] = ()


def digest_of(url: str | None) -> bytes:
    """16 bytes that stand for a URL."""
    return hashlib.blake2b(("" if url is None else url).encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Spool:
    """One shard's outcomes by URL digest. `purpose` names the settings; a spool made for another one is discarded.

    With `parts` an earlier attempt's bytes come from there, and new ones go there.
    """

    def __init__(self, folder: Path, purpose: str, parts: Parts | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "fetched.spool"
        self._places: dict[bytes, tuple[int, int, int, int]] = {}
        self._head = _FORMAT + hashlib.sha256(purpose.encode()).hexdigest().encode() + b"\n"
        with self.path.open("ab" if parts is None else "wb") as file:
            for part in parts.load() if parts is not None else ():
                file.write(part)
        self._parts, self._part, self._sent_at = parts, bytearray(), time.monotonic()
        self._file = self.path.open("r+b", buffering=0)
        self._end = self._recover()
        self.resumed = len(self._places)  # outcomes that an earlier attempt left

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._places

    def _recover(self) -> int:
        size = self.path.stat().st_size
        end = len(self._head)
        if self._file.read(end) != self._head:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(self._head)
            if self._parts is not None:
                self._parts.clear()
                self._part += self._head
            return end
        while head := self._file.read(_RECORD.size):
            if len(head) < _RECORD.size:
                break
            digest, facts, image, crc = _RECORD.unpack(head)
            start = end + _RECORD.size
            if start + facts + image > size or zlib.crc32(self._file.read(facts + image)) != crc:
                break
            self._places[digest] = (start, facts, image, crc)
            end = start + facts + image
        self._file.truncate(end)
        self._file.seek(end)
        return end

    def add(self, digest: bytes, fetched: Fetched) -> None:
        """Append one outcome; in the file when this returns."""
        image = fetched.outcome.image
        facts = json.dumps([[getattr(fetched.outcome, name) for name in _FACTS], fetched.matched]).encode()
        crc = zlib.crc32(image, zlib.crc32(facts))
        record = _RECORD.pack(digest, len(facts), len(image), crc) + facts + image
        view = memoryview(record)
        while view:
            view = view[self._file.write(view) :]
        self._places[digest] = (self._end + _RECORD.size, len(facts), len(image), crc)
        self._end += len(record)
        if self._parts is not None:
            self._part += record
            if len(self._part) >= PART_BYTES or time.monotonic() - self._sent_at >= PART_S:
                self._parts.add(bytes(self._part))
                self._part.clear()
                self._sent_at = time.monotonic()

    def get(self, digest: bytes) -> Fetched:
        """Read an outcome back. Raises KeyError when there is none."""
        start, facts_length, image_length, _ = self._places[digest]
        self._file.seek(start)
        facts = json.loads(self._file.read(facts_length))
        image = self._file.read(image_length) if image_length else b""
        self._file.seek(self._end)
        (status, error, *rest), matched = facts
        return Fetched(Outcome(status, error, image, *rest), tuple(matched))
