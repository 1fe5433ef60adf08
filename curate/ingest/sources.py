"""The files that a recipe names: found, told apart, and looked into just far enough to know their columns.

Reads listings, footers and first lines; http(s) is refused, because a table that can change under its URL while it is
read has no identity. Nothing here writes.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from curate.errors import SourceError
from curate.ingest.schemas import Layout

KINDS = {
    ".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl",
}  # fmt: skip
PACKED = {".gz", ".bz2", ".xz", ".zst"}
HASHED_BYTES = 4 * 2**20  # read at once while hashing


@dataclass(frozen=True)
class File:
    """A file as a listing shows it. `token` changes when the content may have: mtime, ETag."""

    path: str  # absolute, or a whole URL
    bytes: int
    token: str
    kind: str  # parquet, csv, tsv, jsonl, pool


@dataclass(frozen=True)
class Source:
    """A file whose columns are known: `schema` has its own names and types, `layout` says which are ours."""

    file: File
    layout: Layout
    schema: pa.Schema
    header: bool = True  # of csv and tsv


def kind_of(path: str) -> str | None:
    """By the name's ending, below a packing's; None when it is none that is read."""
    suffixes = Path(path).suffixes
    if suffixes and suffixes[-1].lower() in PACKED:
        suffixes = suffixes[:-1]
    kind = KINDS.get(suffixes[-1].lower()) if suffixes else None
    return kind if kind != "parquet" or not path.lower().endswith(tuple(PACKED)) else None


def find_tables(entries: Sequence[str]) -> list[File]:
    """The tables that `ingest.sources` names, in its order; those of a glob or a folder by path, each once.

    Raises SourceError when an entry names nothing, or something that is not read.
    """
    found: dict[str, File] = {}
    for entry in entries:
        fs, matches = _match(entry, "ingest.sources")
        tables = [match for match in matches if kind_of(match["name"])]
        if not tables:
            raise SourceError(
                f"ingest.sources: {entry} names {_some(matches)}; read are .parquet, and .csv, .tsv, .jsonl (also .gz)"
            )
        for table in tables:
            path = whole_path(fs, table["name"])
            kind = kind_of(path)
            if kind is not None:
                found.setdefault(path, File(path, int(table["size"] or 0), token_of(table), kind))
    return list(found.values())


def _some(matches: Sequence[Mapping[str, Any]]) -> str:
    names = [str(match["name"]).rsplit("/", 1)[-1] for match in matches]
    return f"no table but {', '.join(names[:5])}" if names else "no file"


def _match(entry: str, key: str) -> tuple[fsspec.AbstractFileSystem, list[dict[str, Any]]]:
    if entry.startswith(("http://", "https://")):
        raise SourceError(
            f"{key}: {entry}: tables are not read over http(s); copy it first, or use s3://, gs://, hf://"
        )
    try:
        fs, path = fsspec.core.url_to_fs(entry)
        fs.invalidate_cache()
        if any(mark in path for mark in "*?["):
            found = fs.glob(path, detail=True)
        elif fs.isdir(path):
            found = fs.find(path, detail=True)
        else:
            found = {path: fs.info(path)}
    except FileNotFoundError:
        raise SourceError(f"{key}: {entry}: there is no such file") from None
    except Exception as error:  # each kind of storage has its own: botocore's, Hugging Face's, httpx's
        raise SourceError(f"{key}: {entry}: cannot be listed: {type(error).__name__}: {error}") from error
    files = [{**info, "name": name} for name, info in sorted(found.items()) if info["type"] == "file"]
    return fs, [file for file in files if not file["name"].rsplit("/", 1)[-1].startswith((".", "_"))]


def match_files(entry: str, key: str) -> list[tuple[str, dict[str, Any]]]:
    """(whole path, listing entry) of every file that an entry of `key` names, by path. Raises SourceError."""
    fs, matches = _match(entry, key)
    return [(whole_path(fs, match["name"]), match) for match in matches]


def whole_path(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """What opens this file from anywhere."""
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def token_of(info: Mapping[str, Any]) -> str:
    """Of a listing entry: what changes when the content may have changed."""
    for name in ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified", "updated", "created"):
        if info.get(name) is not None:
            return f"{name}={info[name]}"
    return ""


def stat(path: str) -> tuple[int, str] | None:
    """(bytes, token) of a file as it is now; None when it is gone."""
    fs, inner = fsspec.core.url_to_fs(path)
    fs.invalidate_cache()
    try:
        info = fs.info(inner)
    except FileNotFoundError:
        return None
    return int(info["size"] or 0), token_of(info)


def open_plain(path: str) -> BinaryIO:
    """A file's bytes as they lie."""
    return cast(BinaryIO, fsspec.open(path, "rb").open())


def open_unpacked(path: str) -> BinaryIO:
    """A text table's bytes, unpacked when its name says that it is packed."""
    return cast(BinaryIO, fsspec.open(path, "rb", compression="infer").open())


def sha256_of(path: str) -> str:
    """Of a file's bytes, lower-case hex."""
    digest = hashlib.sha256()
    with open_plain(path) as stream:
        while block := stream.read(HASHED_BYTES):
            digest.update(block)
    return digest.hexdigest()


def parquet_schema(path: str) -> pa.Schema:
    """A Parquet file's columns. Raises SourceError."""
    try:
        with open_plain(path) as stream:
            return pq.read_schema(stream).remove_metadata()
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path}: not a readable Parquet file: {error}") from None


def parquet_rows(path: str) -> int:
    """Rows by the footer."""
    with open_plain(path) as stream:
        return int(pq.read_metadata(stream).num_rows)


def parquet_batches(path: str, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Columns of a Parquet file in batches of at most `rows` rows."""
    with open_plain(path) as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
        yield from file.iter_batches(batch_size=rows, columns=list(columns), use_threads=False)
