"""The three passes over new sources. An item is a function of committed files, and done when its file is there.

    spill       per source      the key of every row that `where` keeps
    compare     per partition   which of these rows repeat an earlier row, of this batch or of the pool
    write       per source      the shards of `samples`, without the repeats

So they run in any order on any number of workers, and a killed run goes on where it was. Memory is bounded by a batch
of rows, a run of keys, a partition or a shard, whichever is at work.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curate.errors import PlanError, SourceError
from curate.ingest.keys import (
    KEY_BYTES,
    Raw,
    among,
    hash_rows,
    hex_keys,
    merge,
    partition_of,
    same_as_before,
    sort_keys,
)
from curate.ingest.reading import fit, read_batches, web_address
from curate.ingest.schemas import names_in_samples
from curate.ingest.sources import Source, stat
from curate.ingest.spill import SpillWriter, keys_in_order, partition_keys, read_drops, write_drops
from curate.removed import tombstones_of
from curate.rows import evaluate, names_in
from curate.schema import KEY, Shard, TableSpec
from curate.store import Store


@dataclass(frozen=True)
class Batch:
    """What the passes of one batch share. `earlier` are the key files to compare with: (batch, partitions)."""

    store: Store
    samples: TableSpec
    number: int
    work: str  # folder of what is removed when the batch is in the pool
    partitions: int
    earlier: tuple[tuple[int, int], ...]
    merging: bool  # whether this batch's key files take in the earlier ones
    sources: int
    where: str | None
    rows_per_shard: int  # of tables; a tar of a pool is one shard

    def spill_path(self, source: int) -> str:
        """Of pass 1."""
        return f"{self.work}/spill-{source:05d}"

    def drops_path(self, partition: int) -> str:
        """Of pass 2."""
        return f"{self.work}/drops-{partition:05d}"

    def done_path(self, source: int) -> str:
        """Of pass 3."""
        return f"{self.work}/done-{source:05d}.json"

    def keys_path(self, number: int, partition: int) -> str:
        """Of a batch's keys, in order, 16 bytes each."""
        return f"{self.store.folder(self.samples)}/_keys/{number:06d}/{partition:05d}"


def spill(item: tuple[Batch, int, Source]) -> None:
    """Pass 1."""
    batch, place, source = item
    if batch.store.exists(batch.spill_path(place)):
        return
    _unchanged(source)
    with batch.store.staged(batch.spill_path(place)) as local, local.open("wb") as stream:
        writer = SpillWriter(stream, batch.partitions)
        for rows in kept_rows(source, identity_columns(source), batch.where, Counter()):
            writer.add(hash_rows(*url_and_text(rows, source)))
        writer.finish()


def compare(item: tuple[Batch, int]) -> None:
    """Pass 2. The first row of a key stays, in the order of sources and rows."""
    batch, partition = item
    if batch.store.exists(batch.drops_path(partition)):
        return
    found = [
        (source, rows, raw)
        for source in range(batch.sources)
        for rows, raw in partition_keys(batch.store, batch.spill_path(source), partition)
    ]
    raw = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *(part for _, _, part in found)])
    rows = np.concatenate([np.empty(0, np.int64), *(part for _, part, _ in found)])
    sources = np.repeat(np.array([source for source, _, _ in found], np.int32), [len(part) for _, part, _ in found])
    del found
    order = sort_keys(raw)
    raw = raw[order]
    repeated = same_as_before(raw)
    first = raw[~repeated]
    known = _known_keys(batch, partition)
    old = among(first, known)
    dropped = np.concatenate([order[repeated], order[~repeated][old]])
    fresh = first[~old]
    keys = merge(known, fresh) if batch.merging else fresh
    batch.store.put_bytes(batch.keys_path(batch.number, partition), keys.tobytes())
    by_source = {int(source): rows[dropped[sources[dropped] == source]] for source in np.unique(sources[dropped])}
    write_drops(batch.store, batch.drops_path(partition), by_source)


def _known_keys(batch: Batch, partition: int) -> Raw:
    known: Raw = np.empty((0, KEY_BYTES), np.uint8)
    for number, partitions in batch.earlier:
        data = batch.store.get_bytes(batch.keys_path(number, partition * partitions // batch.partitions))
        raw = np.frombuffer(data, np.uint8).reshape(-1, KEY_BYTES)
        known = merge(known, raw[partition_of(raw, batch.partitions) == partition])
    return known


def write(item: tuple[Batch, int, Source]) -> None:
    """Pass 3."""
    batch, place, source = item
    if batch.store.exists(batch.done_path(place)):
        return
    _unchanged(source)
    counts: Counter[str] = Counter(rows_in=0, pruned=0, bad_lines=0, duplicates=0, samples=0)
    shards = []
    for part, table in enumerate(_shards(batch, place, source, counts)):
        shard = Shard(f"{batch.number:04d}-{place:05d}-{part:05d}", table.num_rows)
        batch.store.write(batch.samples, shard, table)
        shards.append({"name": shard.name, "rows": shard.rows})
    batch.store.put_json(batch.done_path(place), {"shards": shards, "counts": dict(counts)})


def _shards(batch: Batch, place: int, source: Source, counts: Counter[str]) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    rows = 0
    for piece in _unique_rows(batch, place, source, counts):
        held.append(piece)
        rows += piece.num_rows
        while source.file.kind != "pool" and rows >= batch.rows_per_shard:
            table = pa.Table.from_batches(held)
            yield table.slice(0, batch.rows_per_shard).combine_chunks()
            held = table.slice(batch.rows_per_shard).to_batches()
            rows -= batch.rows_per_shard
    if rows:
        yield pa.Table.from_batches(held).combine_chunks()


def _unique_rows(batch: Batch, place: int, source: Source, counts: Counter[str]) -> Iterator[pa.RecordBatch]:
    drops = np.sort(
        np.concatenate([read_drops(batch.store, batch.drops_path(part), place) for part in range(batch.partitions)])
    )
    keys = _Keys(keys_in_order(batch.store, batch.spill_path(place)))
    removed = tombstones_of(batch.store)
    at = 0
    for rows in kept_rows(source, source.schema.names, batch.where, counts):
        keep = np.ones(rows.num_rows, np.bool_)
        low, high = np.searchsorted(drops, [at, at + rows.num_rows])
        keep[drops[low:high] - at] = False
        at += rows.num_rows
        raw = keys.take(rows.num_rows)
        counts["duplicates"] += int(high - low)
        samples = _as_samples(rows, raw, source, batch.samples, counts)
        if removed:  # what was taken back does not return with a new caption or a new crawl
            hits = removed.hits(samples) & keep
            counts["removed"] += int(hits.sum())
            keep &= ~hits
        counts["samples"] += int(keep.sum())
        yield samples.filter(pa.array(keep))


class _Keys:
    """A stream of keys, taken in amounts that are not those of its runs."""

    def __init__(self, runs: Iterator[Raw]) -> None:
        self._runs = runs
        self._held: Raw = np.empty((0, KEY_BYTES), np.uint8)

    def take(self, rows: int) -> Raw:
        """The next `rows` keys."""
        while len(self._held) < rows:
            self._held = np.concatenate([self._held, next(self._runs)])
        taken, self._held = self._held[:rows], self._held[rows:]
        return taken


def kept_rows(
    source: Source, names: Sequence[str], where: str | None, counts: Counter[str]
) -> Iterator[pa.RecordBatch]:
    """Columns of the rows that satisfy `where`; an unknown (null) is not satisfied."""
    read = list(names)
    if where is not None:
        read += [name for name in names_in(where, source.schema) if name not in read]
    for rows in read_batches(source, read, counts):
        counts["rows_in"] += rows.num_rows
        if where is None:
            yield rows
            continue
        try:
            keep = evaluate(pa.Table.from_batches([rows]), {"keep": where}).column("keep").combine_chunks()
        except PlanError as error:
            raise SourceError(f"{source.file.path}: ingest.where fails on a value; try TRY_CAST: {error}") from None
        if len(keep) != rows.num_rows:
            raise PlanError(f"ingest.where: {where}: must say yes or no for each row; it is an aggregate")
        keep = keep.fill_null(False)
        counts["pruned"] += keep.false_count
        yield rows.filter(keep).select(list(names))


def check_where(source: Source, where: str) -> None:
    """Raises PlanError when `where` does not bind to the source's own columns, or is no condition on a row."""
    try:
        names_in(where, source.schema)
        answer = evaluate(source.schema.empty_table(), {"keep": where}).column("keep")
        blank = [pa.nulls(1, field.type) for field in source.schema]
        evaluate(pa.Table.from_arrays(blank, source.schema.names), {"keep": where})  # constants that do not convert
    except PlanError as error:
        raise PlanError(f"ingest.where, over {source.file.path}: {error}") from None
    if len(answer) or not pa.types.is_boolean(answer.type):
        raise PlanError(f"ingest.where: {where}: must be true or false for each row; it is {answer.type}")


def identity_columns(source: Source) -> list[str]:
    """The own columns that a key is made of."""
    columns = source.layout.columns
    return [columns[name] for name in ("url", "text") if name in columns]


def url_and_text(rows: pa.RecordBatch, source: Source) -> tuple[pa.Array, pa.Array]:
    """`url` and `text` of rows that have the own columns of both."""
    columns = source.layout.columns
    url = web_address(rows.column(columns["url"]))
    if "text" not in columns:
        return url, pa.nulls(rows.num_rows, pa.string())
    return url, fit(rows.column(columns["text"]), pa.string(), Counter())


def _as_samples(
    rows: pa.RecordBatch, raw: Raw, source: Source, samples: TableSpec, counts: Counter[str]
) -> pa.RecordBatch:
    url, text = url_and_text(rows, source)
    columns: dict[str, pa.Array] = {KEY.name: hex_keys(raw), "url": url, "text": text}
    counts["no_url"] += url.null_count
    declared = {name.lower(): name for name in samples.schema.names}
    for own, name in names_in_samples(rows.schema.names, source.layout).items():
        ours = declared[name.lower()]
        if ours not in columns:
            columns[ours] = fit(rows.column(own), samples.schema.field(ours).type, counts)
    fields = [field for field in samples.schema if field.name in columns]
    return pa.RecordBatch.from_arrays([columns[field.name] for field in fields], schema=pa.schema(fields))


def _unchanged(source: Source) -> None:
    if stat(source.file.path) != (source.file.bytes, source.file.token):
        raise SourceError(
            f"{source.file.path}: changed while it was being ingested; run again, and the new content is taken"
        )


def own_fields(source: Source) -> pa.Schema:
    """The fields that a source brings to `samples`, without key, url and text."""
    named: Mapping[str, str] = names_in_samples(source.schema.names, source.layout)
    swap = source.layout.swap
    other: dict[str, Any] = dict([swap, swap[::-1]]) if swap else {}
    fields = [pa.field(name, source.schema.field(other.get(own, own)).type) for own, name in named.items()]
    return pa.schema([field for field in fields if field.name not in ("url", "text")])
