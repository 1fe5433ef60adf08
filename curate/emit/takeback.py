"""Take-back: samples that someone asked to be removed leave the store, its releases, and never return.

In this order, so that a kill anywhere is mended by running again:

    1  tombstones are written: from here on ingest, fetch and selection refuse what they name (`curate.removed`)
    2  what killed runs left, and no row names, is swept
    3  the samples that they mean are found, in tables and releases, and their keys written down
    4  rows and bytes are erased in every table and tar of the store, scratch folders are emptied
    5  the latest release gets a successor without them, and `latest` moves
    6  every release that held one is withdrawn, its affected tars deleted

Without lists it applies all tombstones again, to what came since. It keeps runs out while it works, and does not begin
beside one (`curate.presence`). Not reached: tars of adopted pools, exports, copies that others made, the temporary
folder of a machine that was killed; the report counts the first.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.emit.erase import erase_shard, erase_tars, sweep, table_folders
from curate.emit.step import LATEST, latest_release
from curate.emit.successor import followers, groups_of, holds, releases, succeed, withdraw
from curate.emit.verify import NOTE, RELEASES
from curate.errors import PlanError
from curate.presence import present
from curate.removed import FOLDER, WATCHED, Tombstones, domain_of, tombstones_of, unfinished, url_digest
from curate.rows import SAMPLES
from curate.schema import KEY, fingerprint
from curate.store import Store

READERS = 8  # files read at once: waiting for storage, not for a core
_HEX = frozenset("0123456789abcdef")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass
class TakenBack:
    """What a removal did."""

    samples: int = 0  # rows that the tombstones mean and that still held something
    files: int = 0  # Parquet files and tars of the store that were changed
    swept: int = 0  # files that killed runs left
    adopted: int = 0  # images that lie in pools of others, and stay there
    withdrawn: list[str] = field(default_factory=list)
    latest: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.samples:,} samples removed from {self.files:,} files of the store"]
        if self.swept:
            lines.append(f"{self.swept:,} files that killed runs had left were deleted")
        if self.adopted:
            lines.append(f"{self.adopted:,} of their images lie in adopted pools and were not touched there")
        lines += [f"withdrawn: {RELEASES}/{name}" for name in self.withdrawn]
        if self.withdrawn:
            lines.append(f"latest release: {RELEASES}/{self.latest}")
        return "\n".join(lines)

    __rich__ = __str__


@dataclass(frozen=True)
class Lists:
    """What is to be removed: entries as people write them. Raises PlanError for an entry that is none."""

    keys: Sequence[str] = ()
    urls: Sequence[str] = ()
    domains: Sequence[str] = ()
    hashes: Sequence[str] = ()  # SHA-256 of the bytes as served or as emitted
    phashes: Sequence[str] = ()
    phash_radius: int = 4  # bits

    def note(self) -> dict[str, object]:
        """As it goes into `tombstones.json`."""
        note: dict[str, object] = {
            "keys": sorted({_hex("--keys", entry, 32) for entry in self.keys}),
            "urls": sorted({url_digest(_url(entry)) for entry in self.urls}),
            "domains": sorted({_domain(entry) for entry in self.domains}),
            "hashes": sorted({_hex("--hashes", entry, 64) for entry in self.hashes}),
            "phashes": sorted({_hex("--phashes", entry, 16) for entry in self.phashes}),
        }
        return {name: listed for name, listed in note.items() if listed} | (
            {"phash_radius": self.phash_radius} if self.phashes else {}
        )


def lines_of(path: str) -> list[str]:
    """Entries of a list, one a line; empty lines and those that begin with # are left out. Raises PlanError."""
    try:
        with fsspec.open(path, "rt", encoding="utf-8-sig") as stream:  # a spreadsheet's list begins with a mark
            entries = [line.strip() for line in stream]
    except Exception as error:  # whatever the client of a URL raises: credentials, endpoint, DNS
        raise PlanError(f"{path}: cannot be read: {error}") from None
    return [entry for entry in entries if entry and not entry.startswith("#")]


def take_back(store: Store, lists: Lists, on_progress: Callable[[str], None] = lambda _: None) -> TakenBack:
    """Remove what the lists name, and what earlier tombstones name and came since. See the module's docstring.

    Raises PlanError for an entry that is none, where nobody ever ran, and while a run or another removal is at work.
    """
    lists.note()  # refused before anything is touched
    if not table_folders(store) and not releases(store):
        raise PlanError(f"{store.root}: no run was ever made here, so nothing could be removed; check the root")
    with present(store, "removal"):
        return _take_back(store, lists, on_progress)


def _take_back(store: Store, lists: Lists, on_progress: Callable[[str], None]) -> TakenBack:
    if lists.phashes:
        _check_phashes(store)
    _add(store, lists)
    on_progress("looking for what is meant")
    removed = tombstones_of(store)
    report = TakenBack()
    if not removed:
        return report
    report.swept = sweep(store)
    served = _served(store, removed) - removed.hashes
    if served:
        number = (unfinished(store) or [_begin(store, {})])[-1]
        path = f"{FOLDER}/{number}/served.json"
        store.put_json(path, sorted({*served, *(store.get_json(path) or ())}))
        removed = tombstones_of(store)
    undone = unfinished(store)
    if undone and (removed.hashes or removed.phashes):
        store.remove_tree("_scratch")  # bytes that no table has: any shard in work may hold them
    found = _found(store, removed)
    if found.keys and not undone:
        undone = [_begin(store, {})]
    for number in undone:
        held = store.get_json(f"{FOLDER}/{number}/keys.json") or []
        store.put_json(f"{FOLDER}/{number}/keys.json", sorted({*held, *found.keys}))
    every = tombstones_of(store).keys
    pending = frozenset(
        key
        for number in undone
        for part in ("keys.json", "tombstones.json")
        for key in _keys_in(store.get_json(f"{FOLDER}/{number}/{part}"))
    )
    report.samples, report.adopted = len(found.keys), found.adopted
    if pending:
        on_progress(f"erasing {len(pending):,} samples")
        report.files = _erase(store, pending)
        _clear(store)
    _republish(store, every, report, on_progress)
    if pending:
        store.remove_tree("_work")
    for number in undone:
        store.put_json(f"{FOLDER}/{number}/done.json", {"samples": report.samples})
    return report


def _add(store: Store, lists: Lists) -> None:
    """Write new tombstones, unless a killed run wrote them already."""
    note = lists.note()
    if note and all(store.get_json(f"{FOLDER}/{name}/tombstones.json") != note for name in store.names(FOLDER)):
        _begin(store, note)


def _begin(store: Store, note: dict[str, object]) -> str:
    number = f"{len(store.names(FOLDER)):06d}-{fingerprint(note)[:8]}"
    store.put_json(f"{FOLDER}/{number}/tombstones.json", note)
    return number


def _keys_in(note: object) -> Iterable[str]:
    if isinstance(note, dict):
        return list(note.get("keys", ()))
    return note if isinstance(note, list) else []


def _check_phashes(store: Store) -> None:
    notes = [store.get_json(f"{folder}/_table.json") for folder in table_folders(store)]
    if all(note is not None and "image_phash" not in note["columns"] for note in notes):
        raise PlanError("--phashes: no table here has image_phash; add `phash: {scorer: phash}` to `score:` and run")


@dataclass
class _Found:
    keys: frozenset[str]
    adopted: int


def _found(store: Store, removed: Tombstones) -> _Found:
    """Keys of all samples that are meant and not erased yet."""
    items: list[tuple[str, str]] = []
    for folder in table_folders(store):
        note = store.get_json(f"{folder}/_table.json")
        if note is None or folder.startswith(f"{SAMPLES}/") or set(removed.watched) & set(note["columns"]):
            items += [(folder, name) for name in store.names(folder) if name.endswith(".parquet")]
    keys: set[str] = set()
    adopted = 0
    with ThreadPoolExecutor(READERS) as threads:
        for mine, foreign in threads.map(partial(_look, store, removed), items):
            keys |= mine
            adopted += foreign
    for name in releases(store):
        for rows in groups_of(store, name, [KEY.name, *WATCHED]):
            keys.update(np.array(rows.column(KEY.name).to_pylist(), dtype=object)[removed.hits(rows)])
    return _Found(frozenset(keys), adopted)


def _served(store: Store, removed: Tombstones) -> frozenset[str]:
    """SHA-256 as served of the pictures that a listed hash names as emitted: the same bytes may come from elsewhere."""
    found: set[str] = set()
    for name in releases(store) if removed.hashes else ():
        for rows in groups_of(store, name, ["sha256", "member_sha256"]):
            if "sha256" in rows.column_names:
                meant = rows.filter(pc.is_in(rows.column("member_sha256"), pa.array(removed.hashes, pa.string())))
                found.update(meant.column("sha256").drop_null().to_pylist())
    return frozenset(found)


def _look(store: Store, removed: Tombstones, item: tuple[str, str]) -> tuple[set[str], int]:
    """What one file holds of the removed: keys of rows that are not erased, and how many images lie elsewhere."""
    folder, name = item
    with store.open(f"{folder}/{name}") as handle, pq.ParquetFile(handle) as file:
        wanted = [KEY.name, "text", "url", "tar", *WATCHED]
        rows = file.read([column for column in dict.fromkeys(wanted) if column in file.schema_arrow.names])
    rows = rows.filter(removed.hits(rows))
    alive = np.zeros(rows.num_rows, np.bool_)
    for column in rows.column_names:
        if column != KEY.name:
            alive |= ~rows.column(column).is_null().to_numpy()
    rows = rows.filter(alive)
    tars = rows.column("tar").drop_null().to_pylist() if "tar" in rows.column_names else []
    return set(rows.column(KEY.name).to_pylist()), sum("://" in tar or tar.startswith("/") for tar in tars)


def _erase(store: Store, keys: frozenset[str]) -> int:
    """Erase samples everywhere in the store's tables; returns how many files changed."""
    if not keys:
        return 0
    folders = table_folders(store)
    samples = [(folder, name) for folder in folders if folder.startswith(f"{SAMPLES}/") for name in store.names(folder)]
    with ThreadPoolExecutor(READERS) as threads:
        held = threads.map(partial(_holds, store, keys), samples)
        shards = frozenset(name.removesuffix(".parquet") for (_, name), is_here in zip(samples, held, strict=True)
                           if is_here)  # fmt: skip
        changed = list(threads.map(
            lambda item: erase_shard(store, item[0], item[1], keys), [(f, s) for f in folders for s in sorted(shards)]
        ))  # fmt: skip
        changed += threads.map(lambda folder: erase_tars(store, folder, shards, keys), folders)
    for stage in store.names("_scratch"):
        for print_ in store.names(f"_scratch/{stage}"):
            for shard in shards & set(store.names(f"_scratch/{stage}/{print_}")):
                store.remove_tree(f"_scratch/{stage}/{print_}/{shard}")
    return sum(changed)


def _holds(store: Store, keys: frozenset[str], item: tuple[str, str]) -> bool:
    folder, name = item
    if not name.endswith(".parquet"):
        return False
    with store.open(f"{folder}/{name}") as handle:
        found = pq.read_table(handle, columns=[KEY.name]).column(KEY.name).to_pylist()
    return any(key in keys for key in found)


def _clear(store: Store) -> None:
    """Remove what unfinished steps and releases have copied; they begin anew."""
    store.remove_tree("_work")
    for name in store.names(RELEASES):
        if f"{RELEASES}/{name}" != LATEST and not store.exists(f"{RELEASES}/{name}/{NOTE}"):
            store.remove_tree(f"{RELEASES}/{name}")


def _republish(store: Store, keys: frozenset[str], report: TakenBack, on_progress: Callable[[str], None]) -> None:
    """A successor for the latest release if it holds one of these samples; every release that does is withdrawn."""
    published = releases(store)
    old = latest_release(store)
    if old not in published:  # lost, or written by hand
        old = published[-1] if published else None
    affected = [name for name in published if holds(store, name, keys)]
    if old is not None and old in affected:
        on_progress(f"writing the successor of {old}")
        # There is one already when a kill came between publishing it and moving `latest`.
        made = [name for name in followers(store, old) if name not in affected]
        new = made[-1] if made else succeed(store, old, keys)
        store.put_bytes(LATEST, f"{new}\n".encode())
    for name in affected:
        on_progress(f"withdrawing {name}")
        withdraw(store, name, keys)
    report.withdrawn = affected
    report.latest = latest_release(store)


def _url(entry: str) -> str:
    if not _SCHEME.match(entry):
        raise PlanError(f"--urls: {entry[:80]!r} is not a URL; a URL a line, beginning with http:// or https://")
    return entry


def _domain(entry: str) -> str:
    domain = domain_of(entry)
    if domain is None:
        raise PlanError(f"--domains: {entry[:80]!r} is not a domain such as example.org; --urls takes URLs")
    return domain


def _hex(option: str, entry: str, digits: int) -> str:
    lower = entry.lower()
    if len(lower) != digits or not _HEX.issuperset(lower):
        raise PlanError(f"{option}: {entry[:80]!r} is not {digits} hex digits")
    return lower
