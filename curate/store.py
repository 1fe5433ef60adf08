"""Tables at rest: one Parquet file per shard and table, under the hash of what made it.

    <root>/<table>/<fingerprint>/_table.json       what made it
    <root>/<table>/<fingerprint>/<shard>.parquet   the rows; the shard is done when this file is there
    <root>/<table>/<fingerprint>/<shard>.tar       image bytes, for a table that has them
    <root>/samples/<fingerprint>/_pool/*.json      the shards that exist, a file per ingested batch

The three invariants (row count, key order, schema) are checked here and nowhere else. A commit is a rename on a local
disk and a single object PUT elsewhere: nothing is ever half visible. The store knows no recipe, no stage and no Ray.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, cast

import fsspec
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from curate.errors import MissingTable, StoreError
from curate.schema import KEY, Shard, TableSpec, digest_keys

KEYS_ENTRY = b"curate.keys"  # footer entry: digest of the keys, so that alignment is checked without reading a row
ROWS_PER_GROUP = 2_500  # a reader of one column of a 10,000-row shard touches 4 chunks; smaller ones bloat footers
UNFINISHED = ".tmp-"  # prefix of files being written
GAP_BYTES = 128 * 1024  # on an object store one request of 128 KiB more costs less than a second request


class Store:
    """All reading and writing under one root: a local folder or any fsspec URL (s3://, gs://, memory://)."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/") or root
        try:
            if not root or "\0" in root:
                raise ValueError(f"{root!r} is no place")
            # Listings must not be remembered: another worker may have committed since.
            self.fs, self._base = fsspec.core.url_to_fs(self.root, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise StoreError(f"root {self.root}: {error}; expected a folder or a URL such as s3://bucket/run") from None
        self._base = self._base.rstrip("/")
        if self.is_local and not _ground(Path(self._base)).is_dir():
            raise StoreError(f"root {self.root}: {_ground(Path(self._base))} is a file, expected a folder")

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.root,)  # each worker opens its own connections

    @property
    def is_local(self) -> bool:
        """Whether the root is a folder of this machine."""
        return isinstance(self.fs, LocalFileSystem)

    def check(self, *, writable: bool = False) -> None:
        """Raise StoreError when the root cannot be reached or, if asked, not be written; nothing is written."""
        if self.is_local:
            if writable and not os.access(ground := _ground(Path(self._base)), os.W_OK | os.X_OK):
                raise StoreError(f"root {self.root}: no permission to write in {ground}; choose another root")
            return
        bucket = self._base if "://" in self._base else self._base.partition("/")[0]
        try:
            found = not bucket or self.fs.exists(bucket)  # memory:// has none
        except Exception as error:  # whatever the store's client raises: credentials, endpoint, DNS
            raise StoreError(f"root {self.root}: cannot be reached: {type(error).__name__}: {error}") from None
        if not found:
            raise StoreError(f"root {self.root}: there is no {bucket}, or these credentials may not list it")

    # ---- files ---------------------------------------------------------------------------------------------------

    def full(self, path: str) -> str:
        """Path in the filesystem's own form of a path below the root."""
        return f"{self._base}/{path}"

    def url(self, path: str) -> str:
        """What a person or another program opens."""
        return f"{self.root}/{path}"

    def exists(self, path: str) -> bool:
        """Whether a file or folder is there."""
        return bool(self.fs.exists(self.full(path)))

    def names(self, folder: str) -> list[str]:
        """Sorted names directly below a folder; empty when it is not there. Unfinished files are left out."""
        try:
            found = self.fs.ls(self.full(folder), detail=False, refresh=True)
        except FileNotFoundError:
            return []
        names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in found)
        return sorted(name for name in names if name and not name.startswith(UNFINISHED))

    def get_bytes(self, path: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        return cast(bytes, self.fs.cat_file(self.full(path)))

    def put_bytes(self, path: str, data: bytes) -> None:
        """Write a file so that it is there whole or not at all."""
        if self.is_local:
            with self.staged(path) as local:
                local.write_bytes(data)
        else:
            self.fs.pipe_file(self.full(path), data)

    def get_json(self, path: str) -> Any:
        """A JSON file; None when it is not there."""
        try:
            data = self.get_bytes(path)
        except FileNotFoundError:
            return None
        try:
            return json.loads(data)
        except ValueError as error:
            raise StoreError(f"{self.url(path)} is not JSON ({error}); restore it or delete it") from None

    def put_json(self, path: str, value: Any) -> None:
        """Write JSON with sorted keys, whole or not at all."""
        text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        self.put_bytes(path, (text + "\n").encode())

    def remove(self, path: str) -> None:
        """Delete a file; fine when it is not there."""
        try:
            self.fs.rm_file(self.full(path))
        except FileNotFoundError:
            return

    def remove_tree(self, folder: str) -> None:
        """Delete a folder with all that is in it; fine when it is not there."""
        try:
            self.fs.rm(self.full(folder), recursive=True)
        except FileNotFoundError:
            return

    @contextmanager
    def staged(self, path: str) -> Iterator[Path]:
        """A local path to write to, committed under `path` when the block ends without an error."""
        if not self.is_local:
            with TemporaryDirectory(prefix="curate-") as folder:
                local = Path(folder) / "staged"
                yield local
                self.fs.put_file(str(local), self.full(path))
            return
        target = Path(self.full(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        local = target.parent / f"{UNFINISHED}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        try:
            yield local
            with local.open("rb") as handle:
                os.fsync(handle.fileno())
            local.replace(target)
        finally:
            local.unlink(missing_ok=True)

    def sweep(self, folder: str) -> int:
        """Remove what killed writers left in a local folder; returns how many files.

        A file is left alone while the process that writes it may live: on this machine, by its pid; else for a day.
        """
        if not self.is_local:
            return 0  # elsewhere nothing is written in place
        dead = [path for path in Path(self.full(folder)).glob(f"{UNFINISHED}*") if _is_dead(path)]
        for path in dead:
            path.unlink(missing_ok=True)
        return len(dead)

    def open(self, path: str) -> BinaryIO:
        """Open for reading a path below the root, or a whole path or URL (an adopted tar)."""
        fs, full = self._locate(path)
        return cast(BinaryIO, fs.open(full, "rb"))

    def _locate(self, path: str) -> tuple[fsspec.AbstractFileSystem, str]:
        if "://" in path:
            fs, full = fsspec.core.url_to_fs(path)
            return fs, full
        return (self.fs, self.full(path)) if not path.startswith("/") else (LocalFileSystem(), path)

    def read_ranges(self, tar: str, offsets: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Byte ranges of one file, in the order asked for; neighbours are read in one request on an object store.

        Raises StoreError when the file is gone, or shorter than a range says.
        """
        fs, full = self._locate(tar)
        try:
            if isinstance(fs, LocalFileSystem):
                with Path(full).open("rb") as handle:
                    parts = [os.pread(handle.fileno(), length, at) for at, length in zip(offsets, lengths, strict=True)]
            else:
                parts = _read_coalesced(fs, full, offsets, lengths)
        except FileNotFoundError:
            raise StoreError(f"{tar}: the tar is gone, the table that points into it is not; restore it") from None
        for part, at, length in zip(parts, offsets, lengths, strict=True):
            if len(part) != length:
                raise StoreError(
                    f"{tar}: {length} bytes wanted at {at}, {len(part)} found; the tar was cut or replaced"
                )
        return parts

    def read_images(self, batch: pa.RecordBatch | pa.Table) -> list[bytes | None]:
        """The image bytes of rows with `tar`, `offset`, `length`; None where a row has none."""
        tars, offsets, lengths = (batch.column(name).to_pylist() for name in ("tar", "offset", "length"))
        images: list[bytes | None] = [None] * len(tars)
        for tar in sorted({tar for tar in tars if tar is not None}):
            rows = [row for row, name in enumerate(tars) if name == tar]
            parts = self.read_ranges(tar, [offsets[row] for row in rows], [lengths[row] for row in rows])
            for row, part in zip(rows, parts, strict=True):
                images[row] = part
        return images

    # ---- tables --------------------------------------------------------------------------------------------------

    def folder(self, spec: TableSpec) -> str:
        """`<table>/<fingerprint>`."""
        return f"{spec.name}/{spec.fingerprint}"

    def shard_path(self, spec: TableSpec, shard: str, suffix: str = ".parquet") -> str:
        """`<table>/<fingerprint>/<shard><suffix>`."""
        return f"{self.folder(spec)}/{shard}{suffix}"

    def describe(self, spec: TableSpec) -> None:
        """Leave a note in the table's folder that says what made it."""
        path = f"{self.folder(spec)}/_table.json"
        if self.exists(path):
            return
        self.put_json(path, {
            "table": spec.name, "version": spec.version, "settings": dict(spec.settings),
            "inputs": dict(spec.inputs), "columns": {field.name: str(field.type) for field in spec.schema},
        })  # fmt: skip

    def done(self, spec: TableSpec) -> set[str]:
        """Names of the committed shards."""
        return {name[: -len(".parquet")] for name in self.names(self.folder(spec)) if name.endswith(".parquet")}

    def has(self, spec: TableSpec, shard: str) -> bool:
        """Whether one shard is committed."""
        return self.exists(self.shard_path(spec, shard))

    def write(self, spec: TableSpec, shard: Shard, table: pa.Table, aligned_with: TableSpec | None = None) -> None:
        """Commit a shard of a table, after checking the three invariants.

        `aligned_with` names a committed table of the same shard (in the end: `samples`) whose key order must be the
        same; None only for `samples` itself. Raises StoreError on a wrong schema, row count or key order.
        """
        where = f"{spec.name}/{shard.name}"
        if table.num_rows != shard.rows:
            raise StoreError(f"{where}: {table.num_rows} rows written, the shard has {shard.rows}")
        _check_schema(where, spec, table.schema)
        digest = digest_keys(table.column(KEY.name))
        if aligned_with is not None and digest != self.keys_digest(aligned_with, shard.name):
            raise StoreError(f"{where}: its keys are not those of {aligned_with.name} in the same order")
        table = table.replace_schema_metadata({KEYS_ENTRY: digest.encode()})
        with self.staged(self.shard_path(spec, shard.name)) as local:
            pq.write_table(table, local, compression="zstd", row_group_size=ROWS_PER_GROUP)

    def keys_digest(self, spec: TableSpec, shard: str) -> str:
        """The digest of a committed shard's keys, from its footer."""
        with self._parquet(spec, shard) as file:
            return _keys_entry(file, spec, shard)

    def read(self, spec: TableSpec, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns of a committed shard in the order asked for (all as declared when None).

        Raises MissingTable when it was never committed, StoreError when a column is not declared.
        """
        return self.read_joined([(spec, columns)], shard)

    def read_joined(self, reads: Sequence[tuple[TableSpec, Sequence[str] | None]], shard: str) -> pa.Table:
        """Several tables of a shard side by side: `key`, then the columns asked for, table by table.

        A column of `samples` that an earlier table has too comes as `source_<name>` (`curate.rows`).
        Raises MissingTable, and StoreError when tables are not aligned or two give the same column.
        """
        fields: list[pa.Field] = []
        arrays: list[pa.ChunkedArray] = []
        digests: dict[str, str] = {}
        for spec, wanted in reads:
            names = spec.schema.names if wanted is None else list(wanted)
            if not digests and KEY.name not in names:
                names = [KEY.name, *names]
            names = [name for name in names if name != KEY.name or not digests]
            with self._parquet(spec, shard) as file:
                digests[spec.name] = _keys_entry(file, spec, shard)
                table = _read_declared(file, spec, names)
            for name in names:
                field = spec.schema.field(name)
                taken = {other.name for other in fields}
                if name in taken and spec.name == "samples":
                    field = field.with_name(f"source_{name}")
                if field.name in taken:
                    raise StoreError(f"{shard}: column {name} comes from two tables ({', '.join(digests)})")
                fields.append(field)
                arrays.append(table.column(name))
        if len(set(digests.values())) > 1:
            raise StoreError(f"{shard}: tables are not aligned: key digests {digests}")
        return pa.table(arrays, schema=pa.schema(fields))

    @contextmanager
    def _parquet(self, spec: TableSpec, shard: str) -> Iterator[pq.ParquetFile]:
        path = self.shard_path(spec, shard)
        try:
            source: Any = self.full(path) if self.is_local else self.fs.open(self.full(path), "rb")
            with pq.ParquetFile(source) as file:
                yield file
        except FileNotFoundError:
            raise MissingTable(f"{self.url(path)}: never committed; run the stage that writes {spec.name}") from None
        except pa.ArrowInvalid as error:
            raise StoreError(f"{self.url(path)}: not a Parquet file of ours: {error}; {remedy(spec.name)}") from None

    # ---- the pool ------------------------------------------------------------------------------------------------

    def batches(self, samples: TableSpec) -> list[dict[str, Any]]:
        """The ingested batches in order, as ingest wrote them: {shards: [{name, rows}], sources, counts, …}."""
        folder = f"{self.folder(samples)}/_pool"
        return [self.get_json(f"{folder}/{name}") for name in self.names(folder) if name.endswith(".json")]

    def add_batch(self, samples: TableSpec, number: int, batch: Mapping[str, Any]) -> None:
        """Make the shards of an ingested batch part of the pool."""
        self.put_json(f"{self.folder(samples)}/_pool/{number:06d}.json", dict(batch))

    def shards(self, samples: TableSpec) -> list[Shard]:
        """Every shard of the pool, in order of ingestion."""
        return [Shard(shard["name"], shard["rows"]) for batch in self.batches(samples) for shard in batch["shards"]]


def remedy(table: str) -> str:
    """What to do about a file of this table that cannot be read; all other tables are made from `samples`."""
    return "delete it and run again" if table != "samples" else "restore it from a copy, or start a new root"


def _ground(path: Path) -> Path:
    """The nearest of a path and its parents that exists."""
    return next(place for place in (path, *path.parents) if place.exists() or place == place.parent)


def _is_dead(path: Path) -> bool:
    host, pid, _ = path.name.removeprefix(UNFINISHED).rsplit("-", 2)
    if host == socket.gethostname():
        return not psutil.pid_exists(int(pid))
    return time.time() - path.stat().st_mtime > 24 * 3600


def _check_schema(where: str, spec: TableSpec, found: pa.Schema) -> None:
    declared = spec.schema.remove_metadata()
    if spec.open_schema:
        names = [name for name in declared.names if name in found.names]
        declared = pa.schema([declared.field(name) for name in names])
    if not found.remove_metadata().equals(declared):
        raise StoreError(f"{where}: columns differ from the declaration.\ndeclared: {declared}\nfound: {found}")


def _keys_entry(file: pq.ParquetFile, spec: TableSpec, shard: str) -> str:
    metadata = file.schema_arrow.metadata or {}
    if KEYS_ENTRY not in metadata:
        raise StoreError(f"{spec.name}/{shard}: no key digest in its footer; it was not written by curate")
    return cast(bytes, metadata[KEYS_ENTRY]).decode()


def _read_declared(file: pq.ParquetFile, spec: TableSpec, names: Iterable[str]) -> pa.Table:
    names = list(names)
    undeclared = [name for name in names if name not in spec.schema.names]
    if undeclared:
        raise StoreError(f"{spec.name} has no column {', '.join(undeclared)}; it has {', '.join(spec.schema.names)}")
    present = [name for name in names if name in file.schema_arrow.names]
    if len(present) < len(names) and not spec.open_schema:
        raise StoreError(f"{spec.name}: declared columns are not in the file: {sorted(set(names) - set(present))}")
    table = file.read(columns=present)
    if table.num_columns == 0:
        table = pa.table({KEY.name: file.read(columns=[KEY.name]).column(KEY.name)})
    for name in names:
        if name not in present:
            table = table.append_column(name, pa.nulls(table.num_rows, spec.schema.field(name).type))
    return table.select(names)


def _read_coalesced(
    fs: fsspec.AbstractFileSystem, path: str, offsets: Sequence[int], lengths: Sequence[int]
) -> list[bytes]:
    order = sorted(range(len(offsets)), key=lambda row: offsets[row])
    runs: list[list[int]] = []
    end = -1
    for row in order:
        if runs and offsets[row] - end <= GAP_BYTES:
            runs[-1].append(row)
        else:
            runs.append([row])
        end = max(end, offsets[row] + lengths[row])
    parts: list[bytes] = [b""] * len(offsets)
    starts = [offsets[run[0]] for run in runs]
    ends = [max(offsets[row] + lengths[row] for row in run) for run in runs]
    blocks = fs.cat_ranges([path] * len(runs), starts, ends, max_gap=None, on_error="raise")
    for run, start, block in zip(runs, starts, blocks, strict=True):
        for row in run:
            parts[row] = block[offsets[row] - start : offsets[row] - start + lengths[row]]
    return parts
