"""Fetching again only what failed, in shards that are committed already.

    images/<fingerprint>/_previous/<shard>.parquet    the rows as they were, until the new ones are committed
    images/<fingerprint>/_revisions/<shard>.json      how often the shard was opened again, and for which statuses

Opening a shard removes what was computed from it (those tables would no longer be true), then the shard itself. The
stage is asked only for the rows with one of the statuses; the others are carried over, bytes and all. A new revision is
part of the pool's identity, so that cross-shard steps and releases are made anew.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.errors import ConfigError
from curate.schema import FAILURES, IMAGE, IMAGE_FIELDS, Shard, TableSpec
from curate.store import Store


def check_statuses(statuses: Iterable[str]) -> None:
    """Raise ConfigError for a word that is no failure status."""
    unknown = sorted(set(statuses) - set(FAILURES))
    if unknown:
        raise ConfigError(f"--retry {','.join(unknown)}: expected set_aside or some of {', '.join(FAILURES)}")


def revised(store: Store, images: TableSpec, shards: Sequence[Shard]) -> list[Shard]:
    """The shards with their revision."""
    folder = f"{store.folder(images)}/_revisions"
    numbers = {
        name.removesuffix(".json"): store.get_json(f"{folder}/{name}")["revision"] for name in store.names(folder)
    }
    return [replace(shard, revision=numbers.get(shard.name, 0)) for shard in shards]


def reopen(store: Store, images: TableSpec, shard: Shard, statuses: Sequence[str]) -> int:
    """Open a committed shard again if rows of it have one of the statuses; returns how many rows."""
    if not store.has(images, shard.name):
        return 0
    found = store.read(images, shard.name, ["status"]).column("status")
    rows = int(pc.sum(pc.is_in(found, pa.array(statuses, pa.string()))).as_py() or 0)
    if rows:
        note = f"{store.folder(images)}/_revisions/{shard.name}.json"
        number = (store.get_json(note) or {"revision": 0})["revision"] + 1
        store.put_json(note, {"revision": number, "statuses": sorted(statuses)})
        path = store.shard_path(images, shard.name)
        store.put_bytes(_previous(store, images, shard.name), store.get_bytes(path))
        for dependent in _dependents(store, images.fingerprint):
            store.remove(f"{dependent}/{shard.name}.parquet")
        store.remove(path)
    return rows


def opened(store: Store, images: TableSpec, shard: Shard) -> "Opened | None":
    """What a reopened shard was, when it is waiting to be done again."""
    if not store.exists(_previous(store, images, shard.name)):
        return None
    note = store.get_json(f"{store.folder(images)}/_revisions/{shard.name}.json")
    return Opened(store, images, shard, note["revision"], note["statuses"])


class Opened:
    """A reopened shard: which rows to do, and how to put them between those that stay."""

    def __init__(self, store: Store, images: TableSpec, shard: Shard, revision: int, statuses: Sequence[str]) -> None:
        self._store, self._images, self._shard = store, images, shard
        self.tar_suffix = f".r{revision}.tar"  # the old tar is read until the new one is committed
        with store.open(_previous(store, images, shard.name)) as handle:
            self._rows = pq.read_table(handle)
        self.mask = pc.is_in(self._rows.column("status"), pa.array(statuses, pa.string())).combine_chunks()

    def merge(
        self, outputs: Iterable[Mapping[str, pa.RecordBatch]], batch_rows: int
    ) -> Iterator[Mapping[str, pa.RecordBatch]]:
        """All rows of the shard in order: fresh ones from the stage, the others as they were."""
        fresh = _Rows(batch for output in outputs for name, batch in output.items() if name == self._images.name)
        flags = self.mask.to_pylist()
        start = 0
        while start < len(flags):
            end = start
            while end < len(flags) and flags[end] == flags[start] and end - start < batch_rows:
                end += 1
            kept = None if flags[start] else self._kept(start, end - start)
            for batch in [kept] if kept is not None else fresh.take(end - start):
                yield {self._images.name: batch}
            start = end
        yield from ({self._images.name: batch} for batch in fresh.rest())  # too many rows: the runner's count says so

    def close(self) -> None:
        """The new rows are committed: forget the old ones and their tar."""
        tars = set(self._rows.column("tar").drop_null().to_pylist())
        self._store.remove(_previous(self._store, self._images, self._shard.name))
        for tar in tars:
            if tar.startswith(self._store.folder(self._images)):  # never a tar of an adopted pool
                self._store.remove(tar)

    def _kept(self, start: int, rows: int) -> pa.RecordBatch:
        piece = self._rows.slice(start, rows)
        arrays: list[Any] = [piece.column(field.name).combine_chunks() for field in IMAGE_FIELDS]
        arrays.append(pa.array(self._store.read_images(piece), pa.large_binary()))
        return pa.RecordBatch.from_arrays(arrays, schema=pa.schema([*IMAGE_FIELDS, pa.field(IMAGE, pa.large_binary())]))


class _Rows:
    """Takes a number of rows at a time from batches of any size."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches, self._left = batches, None

    def take(self, rows: int) -> Iterator[pa.RecordBatch]:
        while rows > 0:
            batch = self._left if self._left is not None else next(self._batches, None)
            if batch is None:
                return  # too few rows came: the runner's row count says so
            piece = batch.slice(0, rows)
            self._left = batch.slice(rows) if batch.num_rows > rows else None
            rows -= piece.num_rows
            yield piece

    def rest(self) -> Iterator[pa.RecordBatch]:
        if self._left is not None:
            yield self._left
        yield from self._batches


def _previous(store: Store, images: TableSpec, shard: str) -> str:
    return f"{store.folder(images)}/_previous/{shard}.parquet"


def _dependents(store: Store, fingerprint: str) -> list[str]:
    """Folders of all tables that read the table with this fingerprint, directly or not."""
    notes = {}
    for table in store.names(""):
        if table.startswith("_") or table in ("releases", "samples") or "." in table:
            continue
        for print_ in store.names(table):
            notes[f"{table}/{print_}"] = store.get_json(f"{table}/{print_}/_table.json") or {"inputs": {}}
    found: set[str] = set()
    stale = {fingerprint}
    while True:
        more = {path for path, note in notes.items() if stale & set(note["inputs"].values())} - found
        if not more:
            return sorted(found)
        found |= more
        stale |= {path.rsplit("/", 1)[-1] for path in more}
