"""Image bytes of chosen rows, and nothing but them: where they are read from, how often, how much.

On a local disk each sample is one read at its place. On an object store a request costs more than a gap of 128 KiB:
the chosen ranges of a source tar are read in their order, neighbours together, into a spool on the local disk, from
which the shuffled tars are written; the spool is as large as the chosen bytes of one group.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa

from curate.store import GAP_BYTES, Store

RUN_BYTES = 8 * 2**20  # of one request: several are in flight, and memory stays at tens of MB
RUNS_AT_ONCE = 8


@dataclass(frozen=True)
class Run:
    """Ranges of one file that are read in one request: bytes start to end, and the rows they belong to."""

    start: int
    end: int
    rows: tuple[int, ...]


def runs_of(offsets: Sequence[int], lengths: Sequence[int], gap: int = GAP_BYTES, most: int = RUN_BYTES) -> list[Run]:
    """Ranges in ascending order, joined where at most `gap` bytes lie between, up to `most` bytes a run."""
    runs: list[Run] = []
    rows: list[int] = []
    start = end = 0
    for row in sorted(range(len(offsets)), key=lambda row: (offsets[row], lengths[row])):
        at, stop = offsets[row], offsets[row] + lengths[row]
        if rows and (at - end > gap or max(stop, end) - start > most):
            runs.append(Run(start, end, tuple(rows)))
            rows = []
        if not rows:
            start, end = at, stop
        rows.append(row)
        end = max(end, stop)
    return [*runs, Run(start, end, tuple(rows))] if rows else runs


class Direct:
    """Reads each sample where it lies."""

    def __init__(self, store: Store, traffic: Counter[str]) -> None:
        self._store, self._traffic = store, traffic

    def images(self, rows: pa.Table, first: int) -> list[bytes]:
        """The stored bytes of rows with `tar`, `offset`, `length`; `first` is not needed here."""
        images = [image for image in self._store.read_images(rows) if image is not None]
        self._traffic["requests"] += len(images)
        self._traffic["bytes_read"] += sum(len(image) for image in images)
        return images


class Spool:
    """Reads all samples of some rows in the order in which they lie, then gives them in any order."""

    def __init__(self, file: IO[bytes], places: np.ndarray, lengths: np.ndarray) -> None:
        self._file, self._places, self._lengths = file, places, lengths

    def images(self, rows: pa.Table, first: int) -> list[bytes]:
        """The stored bytes of the rows that stand from `first` on in the table that was spooled."""
        images = []
        for row in range(first, first + rows.num_rows):
            self._file.seek(int(self._places[row]))
            images.append(self._file.read(int(self._lengths[row])))
        return images


@contextmanager
def source_of(store: Store, rows: pa.Table, traffic: Counter[str]) -> Iterator[Direct | Spool]:
    """How the images of these rows are to be read: spooled unless all lie on this machine's disk."""
    tars = rows.column("tar").unique().to_pylist()
    if all("://" not in tar and (store.is_local or tar.startswith("/")) for tar in tars):
        yield Direct(store, traffic)
        return
    with tempfile.TemporaryFile(prefix="curate-emit-") as file:
        yield _spooled(store, rows, file, traffic)


def _spooled(store: Store, rows: pa.Table, file: IO[bytes], traffic: Counter[str]) -> Spool:
    tars = np.asarray(rows.column("tar").to_pylist(), dtype=object)
    offsets = np.asarray(rows.column("offset").to_numpy(), dtype=np.int64)
    lengths = np.asarray(rows.column("length").to_numpy(), dtype=np.int64)
    places = np.zeros(rows.num_rows, dtype=np.int64)
    written = 0
    for tar in sorted(set(tars)):
        mine = np.flatnonzero(tars == tar)
        runs = runs_of(offsets[mine].tolist(), lengths[mine].tolist())
        for at in range(0, len(runs), RUNS_AT_ONCE):
            some = runs[at : at + RUNS_AT_ONCE]
            blocks = store.read_ranges(tar, [run.start for run in some], [run.end - run.start for run in some])
            traffic["requests"] += len(some)
            for run, block in zip(some, blocks, strict=True):
                traffic["bytes_read"] += len(block)
                file.write(block)
                for row in mine[list(run.rows)]:
                    places[row] = written + offsets[row] - run.start
                written += len(block)
    file.flush()
    return Spool(file, places, lengths)
