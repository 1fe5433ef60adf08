"""Keys on their way from the files that have them to the partitions that compare them.

One spill file per source: runs of rows, each ordered by partition, and a footer that says where each partition's part
of each run lies. One drops file per partition: which rows of which source are repeats. Both are raw numbers behind a
JSON footer, written once and removed when their batch is in the pool.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, cast

import numpy as np

from curate.ingest.keys import KEY_BYTES, Raw, Rows, partition_of
from curate.store import Store

RUN_ROWS = 2**20  # 20 MB; a file of any size is spilled with this much in memory
ROW_BYTES = 4 + KEY_BYTES  # place in the run, key


class SpillWriter:
    """Writes a source's keys, in order, to a stream."""

    def __init__(self, stream: BinaryIO, partitions: int) -> None:
        self._stream, self._partitions = stream, partitions
        self._runs: list[dict[str, Any]] = []
        self._held: list[Raw] = []
        self._rows = 0

    def add(self, raw: Raw) -> None:
        """The keys of the next rows."""
        self._held.append(raw)
        self._rows += len(raw)
        if self._rows >= RUN_ROWS:
            self._flush()

    def _flush(self) -> None:
        raw = np.concatenate(self._held)
        parts = partition_of(raw, self._partitions)
        order = np.argsort(parts, kind="stable").astype("<u4")
        bounds = np.searchsorted(parts[order], np.arange(self._partitions + 1))
        self._runs.append({"start": self._stream.tell(), "bounds": bounds.tolist()})
        self._stream.write(order.tobytes())
        self._stream.write(raw[order].tobytes())
        self._held, self._rows = [], 0

    def finish(self) -> None:
        """Write the footer."""
        if self._rows:
            self._flush()
        write_footer(self._stream, {"runs": self._runs})


def write_footer(stream: BinaryIO, footer: Mapping[str, Any]) -> None:
    """JSON and its length at a file's end."""
    text = json.dumps(footer, sort_keys=True).encode()
    stream.write(text + struct.pack("<q", len(text)))


class Footed:
    """A file with a footer, open for reading."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        end = stream.seek(-8, 2)
        (length,) = struct.unpack("<q", stream.read(8))
        stream.seek(end - length)
        self.footer = cast(dict[str, Any], json.loads(stream.read(length)))

    def array(self, start: int, count: int, kind: str, width: int = 1) -> np.ndarray:
        """`count` rows of `width` numbers that lie at byte `start`."""
        self._stream.seek(start)
        data = self._stream.read(count * width * np.dtype(kind).itemsize)
        return np.frombuffer(data, kind).reshape((count, width) if width > 1 else count)


def partition_keys(store: Store, path: str, partition: int) -> Iterator[tuple[Rows, Raw]]:
    """(row numbers in the source, keys) of a partition, run by run, in order."""
    with store.open(path) as stream:
        file = Footed(stream)
        first = 0
        for run in file.footer["runs"]:
            low, high, rows = run["bounds"][partition], run["bounds"][partition + 1], run["bounds"][-1]
            if high > low:
                places = file.array(run["start"] + 4 * low, high - low, "<u4").astype(np.int64)
                keys = file.array(run["start"] + 4 * rows + KEY_BYTES * low, high - low, "u1", KEY_BYTES)
                yield first + places, keys
            first += rows


def keys_in_order(store: Store, path: str) -> Iterator[Raw]:
    """A source's keys, run by run, in the order of its rows."""
    with store.open(path) as stream:
        file = Footed(stream)
        for run in file.footer["runs"]:
            rows = run["bounds"][-1]
            places = file.array(run["start"], rows, "<u4")
            raw = np.empty((rows, KEY_BYTES), np.uint8)
            raw[places] = file.array(run["start"] + 4 * rows, rows, "u1", KEY_BYTES)
            yield raw


def write_drops(store: Store, path: str, drops: Mapping[int, Rows]) -> None:
    """Commit the rows to leave out, per source."""
    with store.staged(path) as local, local.open("wb") as stream:
        places: dict[str, list[int]] = {}
        for source in sorted(drops):
            places[str(source)] = [stream.tell(), len(drops[source])]
            stream.write(np.sort(drops[source]).astype("<i8").tobytes())
        write_footer(stream, places)


def read_drops(store: Store, path: str, source: int) -> Rows:
    """The rows of a source that a partition leaves out, ascending."""
    with store.open(path) as stream:
        file = Footed(stream)
        start, count = file.footer.get(str(source), (0, 0))
        return file.array(start, count, "<i8").astype(np.int64)
