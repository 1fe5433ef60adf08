"""Names, types and identity: what a sample is called and what a table is.

Everything that two domains must agree on without importing one another stands here: the key of a sample, the columns of
`samples` and `images`, the status vocabulary, and the fingerprint of a table. It reads and writes nothing.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

KEY = pa.field("key", pa.string(), nullable=False)

OK = "ok"
# Every way a sample's image can fail, as stored in images.status; the order is that of reports.
FAILURES = (
    "http_4xx",
    "http_5xx",
    "timeout",
    "dns",
    "connect",
    "tls",
    "too_slow",
    "too_large",
    "too_many_pixels",
    "not_image",
    "decode_error",
    "decode_crash",
    "too_small",
    "bad_ratio",
    "opted_out",
    "robots",
    "blocked_address",
    "blocked_list",
    "hash_mismatch",
    "bad_url",
    "empty",
    "removed",
    "not_asked",
)
STATUSES = (OK, *FAILURES)

# The columns every `samples` table has; the source's own columns follow under their own names.
SAMPLE_FIELDS = (KEY, pa.field("url", pa.string()), pa.field("text", pa.string()))

# The column of bytes that a stage reads or gives for an image; at rest it is LOCATION_FIELDS.
IMAGE = "image"

# What a stage gives for an image; the store adds where the bytes lie (LOCATION_FIELDS).
IMAGE_FIELDS = (
    pa.field("status", pa.string(), nullable=False),
    pa.field("error", pa.string()),
    pa.field("ext", pa.string()),  # of the stored bytes: jpg, png, webp
    pa.field("width", pa.int32()),  # of the stored image, pixels
    pa.field("height", pa.int32()),
    pa.field("original_width", pa.int32()),  # as served, pixels
    pa.field("original_height", pa.int32()),
    pa.field("original_bytes", pa.int64()),  # as served
    pa.field("sha256", pa.string()),  # of the bytes as served, lower-case hex
)
# `tar` is relative to the root for our own shards, a whole path or URL for an adopted pool.
LOCATION_FIELDS = (
    pa.field("tar", pa.string()),
    pa.field("offset", pa.int64()),
    pa.field("length", pa.int64()),
)
IMAGES_SCHEMA = pa.schema([KEY, *IMAGE_FIELDS, *LOCATION_FIELDS])


def key_of(url: str | None, text: str | None) -> str:
    """The identity of a sample: 128 bits of BLAKE2b over (url, text), 32 lower-case hex digits.

    Each part is preceded by its length, so that ("ab", "c") and ("a", "bc") differ; null differs from empty.
    A keyed-quality hash rather than a fast one: a hostile page must not be able to make another page's row
    look like a duplicate.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in (url, text):
        data = b"" if part is None else part.encode("utf-8", "surrogatepass")
        digest.update(struct.pack("<q", -1 if part is None else len(data)))
        digest.update(data)
    return digest.hexdigest()


def keys_of(urls: Iterable[str | None], texts: Iterable[str | None]) -> list[str]:
    """`key_of` for every pair, in order."""
    return [key_of(url, text) for url, text in zip(urls, texts, strict=True)]


def digest_keys(keys: pa.ChunkedArray | pa.Array) -> str:
    """sha256 over a shard's keys in order: two tables with equal digests are aligned row by row."""
    digest = hashlib.sha256()
    for key in keys.to_pylist():
        digest.update(key.encode())
    return digest.hexdigest()


def fingerprint(*parts: Any) -> str:
    """16 hex digits that name these JSON-able parts; equal parts give equal names on every machine."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class TableSpec:
    """A table as its writer declares it: name, code version, settings, what it reads, and its columns.

    `schema` starts with `key`. `settings` is JSON-able and holds everything that changes the table's content.
    `inputs` maps the tables that were read to their fingerprints. `with_images` says that the writer's batches
    carry an `image` column of bytes, which the store puts into `<shard>.tar`. `open_schema` allows a shard to lack
    declared columns (only `samples`, whose sources may differ); they are read as null.
    """

    name: str
    version: int
    schema: pa.Schema
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    with_images: bool = False
    open_schema: bool = False

    @property
    def fingerprint(self) -> str:
        """Hash of (name, version, settings, inputs): the folder in which the shards lie."""
        return fingerprint(self.name, self.version, dict(self.settings), dict(self.inputs))

    @property
    def columns(self) -> list[str]:
        """Column names without `key`."""
        return [name for name in self.schema.names if name != KEY.name]

    def __repr__(self) -> str:
        return f"{self.name}/{self.fingerprint}"


def inputs_of(specs: Iterable[TableSpec]) -> dict[str, str]:
    """The `inputs` of a table that reads these."""
    return {spec.name: spec.fingerprint for spec in specs}


@dataclass(frozen=True)
class Shard:
    """A named run of rows: the unit of work, of commit, of retry, of lineage."""

    name: str
    rows: int
    revision: int = 0  # how often it was opened again to fetch what had failed


def pool_digest(shards: Sequence[Shard]) -> str:
    """Names the set of shards that a cross-shard step looks at."""
    return fingerprint(sorted((shard.name, shard.rows, shard.revision) for shard in shards))
