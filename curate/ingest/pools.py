"""Existing WebDataset pools (img2dataset, DataComp) as tables of samples: read in place, no byte is copied.

A tar with a Parquet file of the same name beside it has the rows of that file, failures included, in its order. A tar
alone has a row for each group of members; url, caption and sizes come from `.json` and `.txt` members. Where no URL is
known it is `<tar>#<key>`, which names the sample and is never fetched. A broken tar gives the rows up to the break.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa

from curate.errors import SourceError
from curate.ingest.schemas import Layout, recognise
from curate.ingest.sources import (
    File,
    match_files,
    open_plain,
    parquet_batches,
    parquet_rows,
    parquet_schema,
    sha256_of,
    token_of,
)
from curate.tar import members

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")  # in this order of preference
PLACE = (pa.field("pool_tar", pa.string()), pa.field("pool_key", pa.string()))
# Of a tar alone: what img2dataset and DataComp write into each .json.
BARE = pa.schema([
    *PLACE, ("url", pa.string()), ("text", pa.string()), ("uid", pa.string()), ("sha256", pa.string()),
    ("width", pa.int32()), ("height", pa.int32()), ("original_width", pa.int32()), ("original_height", pa.int32()),
])  # fmt: skip


@dataclass(frozen=True)
class Group:
    """A sample's members in a tar: suffix -> (offset of the data, bytes)."""

    members: dict[str, tuple[int, int]] = field(default_factory=dict)

    def image(self) -> tuple[str, int, int] | None:
        """(suffix, offset, bytes) of its image."""
        for suffix in IMAGE_SUFFIXES:
            if suffix in self.members:
                return suffix, *self.members[suffix]
        return None


def find_pools(entries: Sequence[str]) -> list[File]:
    """The tars that `ingest.adopt` names (folders or globs), each once, by path. Raises SourceError."""
    found: dict[str, File] = {}
    for entry in entries:
        tars = [(path, info) for path, info in match_files(entry, "ingest.adopt") if path.endswith(".tar")]
        if not tars:
            raise SourceError(f"ingest.adopt: {entry} names no .tar; expected a folder or glob of WebDataset tars")
        for path, info in tars:
            found.setdefault(path, File(path, int(info["size"] or 0), token_of(info), "pool"))
    return list(found.values())


def sidecar(tar: str) -> str | None:
    """The table beside a tar; None when there is none."""
    path = f"{tar.removesuffix('.tar')}.parquet"
    fs, inner = fsspec.core.url_to_fs(path)
    return path if fs.exists(inner) else None


def schema(tar: str) -> pa.Schema:
    """The columns of a tar's rows: `pool_tar`, `pool_key` and those of the table beside it. Raises SourceError."""
    table = sidecar(tar)
    if table is None:
        return BARE
    found = parquet_schema(table)
    if "key" not in found.names:
        raise SourceError(f"{table}: no column `key`, so its rows cannot be found in the tar; it has {found.names}")
    return pa.schema([*PLACE, *(column for column in found if column.name != "key")])


def layout(tar: str, found: pa.Schema, columns: Mapping[str, str]) -> Layout:
    """Which columns are url and text. Raises SourceError."""
    if columns:
        return recognise(tar, found.names, columns)
    if found.equals(BARE):
        return Layout("webdataset", {"url": "url", "text": "text"})
    if "url" in found.names and "caption" not in found.names and "text" not in found.names:
        return Layout("img2dataset without captions", {"url": "url"})
    return recognise(tar, found.names, columns)


def rows_about(tar: str) -> int:
    """Rows of a tar: exact with a table beside it, else what img2dataset puts into one by default."""
    table = sidecar(tar)
    return 10_000 if table is None else parquet_rows(table)


def identity(tar: str) -> str:
    """What stands for a pool's content, 64 hex digits: the table beside the tar, or the tar's members and sizes."""
    table = sidecar(tar)
    if table is not None:
        return sha256_of(table)
    digest = hashlib.sha256()
    with open_plain(tar) as stream:
        groups, _ = index(stream)
    for key, group in groups.items():
        digest.update(json.dumps([key, sorted(group.members.items())]).encode())
    return digest.hexdigest()


def batches(tar: str, names: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    """The named columns of a tar's rows."""
    table = sidecar(tar)
    if table is None:
        rows_of_tar = _bare_rows(tar)
        if rows_of_tar:
            yield pa.RecordBatch.from_pylist(rows_of_tar, schema=BARE).select(list(names))
        return
    own = [name for name in names if name not in ("pool_tar", "pool_key")]
    for batch in parquet_batches(table, [*own, "key"], rows):
        place = {"pool_tar": pa.array([tar] * batch.num_rows, pa.string()), "pool_key": batch.column("key")}
        columns = [place[name] if name in place else batch.column(name) for name in names]
        yield pa.RecordBatch.from_arrays(columns, list(names))


def _bare_rows(tar: str) -> list[dict[str, Any]]:
    rows = []
    with open_plain(tar) as stream:
        groups, _ = index(stream)
        for key, group in groups.items():
            facts = _json_member(stream, group)
            caption = _member(stream, group, "txt")
            text = facts.get("caption", facts.get("text")) if caption is None else caption.decode("utf-8", "replace")
            row: dict[str, Any] = {"pool_tar": tar, "pool_key": key, "url": _text(facts.get("url")) or f"{tar}#{key}"}
            row |= {"text": _text(text), "uid": _text(facts.get("uid")), "sha256": _text(facts.get("sha256"))}
            sizes = ("width", "height", "original_width", "original_height")
            rows.append(row | {name: _pixels(facts.get(name)) for name in sizes})
    return rows


def _json_member(stream: BinaryIO, group: Group) -> dict[str, Any]:
    try:
        facts = json.loads(_member(stream, group, "json") or b"{}")
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _member(stream: BinaryIO, group: Group, suffix: str) -> bytes | None:
    if suffix not in group.members:
        return None
    offset, size = group.members[suffix]
    stream.seek(offset)
    return stream.read(size)


def _text(value: object) -> str | None:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None


def _pixels(value: object) -> int | None:
    return value if isinstance(value, int) and 0 <= value < 2**31 else None


def index(stream: BinaryIO) -> tuple[dict[str, Group], str | None]:
    """A tar's samples by key, in order, and what is broken about it (None: nothing).

    A key is a member's path up to the first dot of its name, as WebDataset groups them. A key that comes again with
    a suffix it had is another sample (LAION-400M has such) and is called `<key>#2`, and so on.
    """
    groups: dict[str, Group] = {}
    current: dict[str, str] = {}  # key -> the name of its newest group
    size = stream.seek(0, 2)
    stream.seek(0)
    try:
        for name, offset, length in members(stream):
            folder, slash, last = name.rpartition("/")
            stem, _, suffix = last.partition(".")
            key, suffix = f"{folder}{slash}{stem}", suffix.lower()
            if offset + length > size:
                return groups, f"the tar ends inside {name}"
            named = current.setdefault(key, key)
            if suffix in groups.setdefault(named, Group()).members:
                named = current[key] = f"{key}#{1 + sum(other.partition('#')[0] == key for other in groups)}"
                groups[named] = Group()
            groups[named].members[suffix] = (offset, length)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        return groups, f"not a readable tar: {error}"
    return groups, None
