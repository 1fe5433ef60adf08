"""What was taken back and must never return: tombstones, kept in the store and respected by every later step.

    <root>/_removed/<number>/tombstones.json    what was asked for: keys, hashes of URLs and of bytes, domains, pHashes
    <root>/_removed/<number>/keys.json          the samples that this meant, found before anything of them was erased
    <root>/_removed/<number>/served.json        of those that a hash named as emitted, the hash of the bytes as served
    <root>/_removed/<number>/done.json          nothing of them is left

URLs are kept as SHA-256: the list of what was removed must not itself keep what was removed. Ingest leaves out rows
that a key, URL or domain names, the store's writer refuses bytes by their hash, selection refuses all kinds. Erasing is
done by `curate.emit.takeback`; nothing is erased here.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from yarl import URL

from curate.schema import IMAGE, KEY
from curate.store import Store

FOLDER = "_removed"
REMOVED = "removed"
# Columns that tombstones look at, wherever a table has them.
WATCHED = ("url", "sha256", "member_sha256", "image_phash")

_WILDCARD = re.compile(r"^\*?\.")
_NAME = re.compile(r"[^\s/\\:@?#%\[\]]+|\[[0-9a-f:.]+\]")  # in any script, or an IPv6 address in brackets
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*|[0-9a-f:.]+")

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Tombstones:
    """All that was ever asked to be removed. `phashes` maps a radius in bits to 64-bit hashes, uint64 (n,)."""

    keys: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()  # SHA-256 of each, hex
    domains: frozenset[str] = frozenset()  # with their subdomains
    hashes: frozenset[str] = frozenset()  # SHA-256 of bytes as served or as emitted, hex
    phashes: Mapping[int, npt.NDArray[np.uint64]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.keys or self.urls or self.domains or self.hashes or self.phashes)

    @property
    def watched(self) -> tuple[str, ...]:
        """The columns that must be read to find all hits, beside the key."""
        read = {"url": self.urls or self.domains, "sha256": self.hashes, "member_sha256": self.hashes}
        return tuple(name for name in WATCHED if (self.phashes if name == "image_phash" else read[name]))

    def hits(self, rows: pa.Table | pa.RecordBatch) -> Mask:
        """Whether each row is meant, bool (n,), by whichever of `key` and the watched columns `rows` has."""
        found = np.zeros(rows.num_rows, np.bool_)
        names = rows.schema.names
        if KEY.name in names:
            found |= _among(rows.column(KEY.name), self.keys)
        for name in ("sha256", "member_sha256"):
            if name in names and pa.types.is_string(rows.schema.field(name).type):
                found |= _among(rows.column(name), self.hashes)
        if "url" in names and (self.urls or self.domains):
            found |= np.array([self._means(url) for url in rows.column("url").to_pylist()], np.bool_)
        if "image_phash" in names and self.phashes:
            found |= self._near(rows.column("image_phash").to_pylist())
        return found

    def _means(self, url: str | None) -> bool:
        if url is None:
            return False
        return url_digest(url) in self.urls or any(part in self.domains for part in _domains(url))

    def _near(self, values: Iterable[object]) -> Mask:
        numbers = [_number(value) for value in values]
        known = np.array([number is not None for number in numbers], np.bool_)
        hashes = np.array([number or 0 for number in numbers], np.uint64)
        found = np.zeros(len(numbers), np.bool_)
        for radius, listed in self.phashes.items():
            for one in listed:
                found |= np.bitwise_count(hashes ^ one) <= radius
        return found & known


def url_digest(url: str) -> str:
    """How a URL is kept; blanks around it do not count, as a list has none."""
    return hashlib.sha256(url.strip().encode("utf-8", "surrogatepass")).hexdigest()


def domain_of(text: str) -> str | None:
    """A listed domain in the form that hosts are compared in: `*.Example.org.` is example.org.

    None for what is no domain: a URL, a path or a port below it names less, a pattern would name nothing.
    """
    name = _WILDCARD.sub("", text.strip().lower()).rstrip(".")
    host = _host(f"http://{name}/") if _NAME.fullmatch(name) else None
    return host if host is not None and _HOST.fullmatch(host) else None


def tombstones_of(store: Store) -> Tombstones:
    """Everything that was ever removed from this root."""
    keys: set[str] = set()
    urls: set[str] = set()
    domains: set[str] = set()
    hashes: set[str] = set()
    phashes: dict[int, set[int]] = {}
    for number in store.names(FOLDER):
        note = store.get_json(f"{FOLDER}/{number}/tombstones.json") or {}
        keys.update(note.get("keys", ()), store.get_json(f"{FOLDER}/{number}/keys.json") or ())
        urls.update(note.get("urls", ()))
        domains.update(note.get("domains", ()))
        hashes.update(note.get("hashes", ()), store.get_json(f"{FOLDER}/{number}/served.json") or ())
        if note.get("phashes"):
            phashes.setdefault(note["phash_radius"], set()).update(int(text, 16) for text in note["phashes"])
    return Tombstones(
        frozenset(keys), frozenset(urls), frozenset(domains), frozenset(hashes),
        {radius: np.array(sorted(found), np.uint64) for radius, found in sorted(phashes.items())},
    )  # fmt: skip


def unfinished(store: Store) -> list[str]:
    """Removals whose bytes may not all be erased yet: a kill came between."""
    return [number for number in store.names(FOLDER) if not store.exists(f"{FOLDER}/{number}/done.json")]


def refuse_images(batch: pa.RecordBatch, removed: Tombstones) -> pa.RecordBatch:
    """A batch of the images table with the bytes of removed ones gone, and their status saying so."""
    if not removed.hashes or "sha256" not in batch.schema.names:
        return batch
    hit = pa.array(_among(batch.column("sha256"), removed.hashes))
    if not hit.true_count:
        return batch
    for name, value in (("status", REMOVED), ("error", None), (IMAGE, None)):
        kind = batch.schema.field(name).type
        column = pc.if_else(hit, pa.scalar(value, kind), batch.column(name))
        batch = batch.set_column(batch.schema.get_field_index(name), batch.schema.field(name), column)
    return batch


def _among(column: pa.Array | pa.ChunkedArray, values: frozenset[str]) -> Mask:
    if not values:
        return np.zeros(len(column), np.bool_)
    chosen = values if len(values) > len(column) else None
    if chosen is not None:  # a set that is larger than the shard is not copied into Arrow for each shard
        return np.array([value in chosen for value in column.to_pylist()], np.bool_)
    found = pc.is_in(column, pa.array(sorted(values), pa.string()))
    return np.asarray(found.to_numpy(zero_copy_only=False) if isinstance(found, pa.Array) else found.to_numpy(), bool)


def _number(value: object) -> int | None:
    """A pHash as tables have it: 16 hex digits, or a number of 64 bits."""
    if isinstance(value, int):
        return value % 2**64
    try:
        return int(value, 16) if isinstance(value, str) and len(value) == 16 else None
    except ValueError:
        return None


def _host(url: str) -> str | None:
    try:
        host = URL(url).raw_host
    except ValueError:
        return None
    return host.lower().rstrip(".") if host else None


def _domains(url: str) -> list[str]:
    host = _host(url)
    parts = host.split(".") if host else []
    return [".".join(parts[at:]) for at in range(len(parts))]
