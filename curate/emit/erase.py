"""Removed samples are erased where they rest: in every table of every fingerprint, and in the tars beside them.

A row stays, since rows never move, with its key and nothing else: text, URL, scores and embeddings become null, an
image's status `removed`. In a tar the members of a sample become zeros of the same length under the name
`<key>.removed0`, so that every other member keeps its place. Tars of adopted pools belong to someone else and are not
touched. Doing it twice does nothing the second time. What killed runs left, and no row names, is removed unread.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.removed import REMOVED
from curate.rows import MEMBER, SAMPLES
from curate.schema import KEY
from curate.store import ROWS_PER_GROUP, UNFINISHED, Store
from curate.tar import BLOCK, header, members

_ZEROS_AT_ONCE = 2**20
_NOT_TABLES = ("releases",)


def table_folders(store: Store) -> list[str]:
    """`<table>/<fingerprint>` of every table at rest, whichever recipe made it; `samples` last."""
    tables = [name for name in store.names("") if not name.startswith(("_", ".")) and name not in _NOT_TABLES]
    tables.sort(key=lambda name: name == SAMPLES)
    return [f"{table}/{print_}" for table in tables if "." not in table for print_ in store.names(table)]


def erase_shard(store: Store, folder: str, shard: str, keys: frozenset[str]) -> int:
    """Erase samples from one shard of one table, tars included; returns how many files changed."""
    changed = 0
    for path in (f"{folder}/{shard}.parquet", f"{folder}/_previous/{shard}.parquet"):
        changed += erase_rows(store, path, keys)
    return changed


def erase_tars(store: Store, folder: str, shards: frozenset[str], keys: frozenset[str]) -> int:
    """Erase samples from the tars of these shards beside a table; returns how many tars changed."""
    tars = [name for name in store.names(folder) if name.endswith(".tar") and name.partition(".")[0] in shards]
    return sum(erase_members(store, f"{folder}/{name}", keys) for name in tars)


def sweep(store: Store) -> int:
    """Remove what killed runs left behind and nothing will read: half-written files, and beside each table the tars
    that no committed row names. Nobody else may be at work. Returns how many files.
    """
    swept = 0
    if store.is_local:  # elsewhere nothing is written in place
        for path in Path(store.full("")).rglob(f"{UNFINISHED}*"):
            path.unlink()
            swept += 1
    for folder in table_folders(store):
        names = store.names(folder)
        for shard in sorted({name.partition(".")[0] for name in names if name.endswith(".tar")}):
            swept += _sweep_shard(store, folder, shard, names)
    return swept


def _sweep_shard(store: Store, folder: str, shard: str, names: list[str]) -> int:
    """A shard that waits for `--retry` still needs its rows as they were, and their tar; a committed one does not."""
    previous = f"{folder}/_previous/{shard}.parquet"
    rows = f"{folder}/{shard}.parquet" if f"{shard}.parquet" in names else previous
    try:
        with store.open(rows) as handle:
            alive = set(pq.read_table(handle, columns=["tar"]).column("tar").unique().to_pylist())
    except FileNotFoundError:
        alive = set()
    dead = [f"{folder}/{name}" for name in names if name.endswith(".tar") and name.partition(".")[0] == shard]
    dead = [tar for tar in dead if tar not in alive]
    if rows != previous and store.exists(previous):
        dead.append(previous)
    for path in dead:
        store.remove(path)
    return len(dead)


def erase_rows(store: Store, path: str, keys: frozenset[str]) -> bool:
    """Null everything but the key in the rows of these samples; returns whether the file changed."""
    try:
        with store.open(path) as handle, pq.ParquetFile(handle) as file:
            if KEY.name not in file.schema_arrow.names:
                return False
            found = file.read([KEY.name]).column(KEY.name).to_pylist()
            hit = np.array([key in keys for key in found], np.bool_)
            if not hit.any():
                return False
            table = file.read()
    except FileNotFoundError:
        return False
    erased = _without(table, hit, is_member=path.startswith(MEMBER))
    if erased.equals(table):
        return False
    with store.staged(path) as local:
        pq.write_table(erased, local, compression="zstd", row_group_size=ROWS_PER_GROUP)
    return True


def _without(table: pa.Table, hit: np.ndarray, *, is_member: bool) -> pa.Table:
    places = pa.array(np.arange(table.num_rows), mask=hit)  # a null place takes a null, whatever the type
    columns = []
    for field in table.schema:
        column = table.column(field.name)
        if field.name == "status":
            column = pc.if_else(pa.array(hit), pa.scalar(REMOVED, field.type), column)
        elif is_member and field.name == "member":
            column = pc.if_else(pa.array(hit), pa.scalar(False), column)
        elif is_member and field.name == "reason":
            column = pc.if_else(pa.array(hit), pa.scalar(f"status: {REMOVED}", field.type), column)
        elif field.nullable:
            column = column.combine_chunks().take(places)
        columns.append(column)
    return pa.table(columns, schema=table.schema)


def erase_members(store: Store, path: str, keys: frozenset[str]) -> bool:
    """Overwrite the members of these samples in a tar of ours; returns whether it changed."""
    with store.open(path) as handle:
        hits = list(_hits(handle, keys))
    if not hits:
        return False
    if store.is_local:
        with Path(store.full(path)).open("r+b") as stream:
            _overwrite(stream, hits)
    else:
        with store.staged(path) as local:
            with store.open(path) as source, local.open("wb") as copy:
                shutil.copyfileobj(source, copy, _ZEROS_AT_ONCE)
            with local.open("r+b") as stream:
                _overwrite(stream, hits)
    return True


def _hits(stream: BinaryIO, keys: frozenset[str]) -> Iterator[tuple[str, int, int]]:
    for name, offset, size in members(stream):
        key, _, suffix = name.partition(".")
        if key in keys and not suffix.startswith(REMOVED):
            yield key, offset, size


def _overwrite(stream: BinaryIO, hits: list[tuple[str, int, int]]) -> None:
    """Data first, names last: a kill between the two leaves members that are found again."""
    for _, offset, size in hits:
        stream.seek(offset)
        for at in range(0, size, _ZEROS_AT_ONCE):
            stream.write(bytes(min(_ZEROS_AT_ONCE, size - at)))
    stream.flush()
    os.fsync(stream.fileno())
    for number, (key, offset, size) in enumerate(hits):
        stream.seek(offset - BLOCK)
        stream.write(header(f"{key}.{REMOVED}{number}", size))
    stream.flush()
    os.fsync(stream.fileno())
