"""A release without some of its samples: a new one that names its predecessor, and the old one withdrawn.

Only the tars that hold a removed sample are written anew; the others keep their bytes and their sha256 (a hard link on
a local disk, the store's own copy elsewhere). A tar that would be empty gives its number to the last one, so that
numbering stays without gaps. The predecessor loses its affected tars and their rows, and `withdrawn.json` says which
release to use; its other tars stay, for trainers that are reading them.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from curate.emit.card import card
from curate.emit.passes import Hashed
from curate.emit.provenance import SEAL, seal_of
from curate.emit.summary import Summary
from curate.emit.verify import NOTE, RELEASES, WITHDRAWN
from curate.removed import REMOVED
from curate.schema import KEY
from curate.store import Store
from curate.tar import TarWriter, members

MANIFEST = "manifest.parquet"


@dataclass(frozen=True)
class Piece:
    """A tar of the old release: its row group, how many of its rows stay, and what release.json says of it."""

    group: int
    file: Mapping[str, Any]
    left: int

    @property
    def touched(self) -> bool:
        """Whether it holds a removed sample."""
        return bool(self.left < self.file["samples"])


def releases(store: Store) -> list[str]:
    """Names of all whole releases, oldest first."""
    return [name for name in store.names(RELEASES) if name != "latest" and store.exists(f"{RELEASES}/{name}/{NOTE}")]


def groups_of(store: Store, name: str, columns: Sequence[str]) -> Iterable[pa.Table]:
    """The manifest of a release, tar by tar: those of the columns that it has."""
    try:
        with store.open(f"{RELEASES}/{name}/{MANIFEST}") as handle, pq.ParquetFile(handle) as file:
            known = [column for column in columns if column in file.schema_arrow.names]
            for number in range(file.metadata.num_row_groups):
                yield file.read_row_group(number, columns=known)
    except FileNotFoundError:
        return  # a kill came between withdrawing and the end of it


def holds(store: Store, name: str, keys: frozenset[str]) -> bool:
    """Whether a release has one of these samples."""
    return any(_hit(rows, keys).any() for rows in groups_of(store, name, [KEY.name]))


def succeed(store: Store, old: str, keys: frozenset[str]) -> str:
    """Publish what is left of a release under the next number; returns the new name. `latest` is not moved."""
    note = store.get_json(f"{RELEASES}/{old}/{NOTE}")
    number = max(int(name[:4]) for name in store.names(RELEASES) if name[:4].isdigit()) + 1
    name = f"{number:04d}-{note['fingerprint'][:8]}"
    target = f"_work/takeback/{name}" if store.is_local else f"{RELEASES}/{name}"
    store.remove_tree(target)
    note["predecessor"] = old
    with ExitStack() as stack:
        handle = stack.enter_context(store.open(f"{RELEASES}/{old}/{MANIFEST}"))
        source = stack.enter_context(pq.ParquetFile(handle))
        pieces = _pieces(source, note, keys)
        local = stack.enter_context(store.staged(f"{target}/{MANIFEST}"))
        with pq.ParquetWriter(local, source.schema_arrow, compression="zstd") as writer:
            for subset in sorted(note["subsets"]):
                facts = note["subsets"][subset]
                place = f"{RELEASES}/{old}/{subset}", f"{target}/{subset}"
                _subset(store, place, subset, facts, pieces[subset], source, writer, keys)
        with local.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    rows = sum(facts["samples"] for facts in note["subsets"].values())
    note["manifest"] = {"sha256": digest, "rows": rows}
    readme = card(note, _features(store, old)).encode()
    store.put_bytes(f"{target}/README.md", readme)
    note["card"] = {"sha256": hashlib.sha256(readme).hexdigest()}
    note[SEAL] = seal_of(note)
    store.put_json(f"{target}/{NOTE}", note)
    if store.is_local:
        Path(store.full(target)).rename(store.full(f"{RELEASES}/{name}"))
    return name


def withdraw(store: Store, name: str, keys: frozenset[str]) -> None:
    """Take the tars with these samples out of a release, and say where to go instead."""
    folder = f"{RELEASES}/{name}"
    use = [None, *followers(store, name)][-1]
    store.put_json(f"{folder}/{WITHDRAWN}", {"reason": "samples were taken back", "use": use})
    columns = ["subset", "tar", KEY.name]
    touched = set()
    for number, rows in enumerate(groups_of(store, name, columns)):
        if _hit(rows, keys).any():
            touched.add(number)
            store.remove(f"{folder}/{rows.column('subset')[0].as_py()}/{rows.column('tar')[0].as_py()}")
    with (
        store.open(f"{folder}/{MANIFEST}") as handle,
        pq.ParquetFile(handle) as file,
        store.staged(f"{folder}/{MANIFEST}") as local,
        pq.ParquetWriter(local, file.schema_arrow, compression="zstd") as writer,
    ):
        for number in range(file.metadata.num_row_groups):
            if number not in touched:
                rows = file.read_row_group(number)
                writer.write_table(rows, row_group_size=max(1, rows.num_rows))


def followers(store: Store, name: str) -> list[str]:
    """Releases that name this one as their predecessor, oldest first."""
    notes = {other: store.get_json(f"{RELEASES}/{other}/{NOTE}") for other in releases(store)}
    return [other for other, note in notes.items() if note.get("predecessor") == name]


def _hit(rows: pa.Table, keys: frozenset[str]) -> np.ndarray:
    return np.array([key in keys for key in rows.column(KEY.name).to_pylist()], np.bool_)


def _pieces(source: pq.ParquetFile, note: Mapping[str, Any], keys: frozenset[str]) -> dict[str, list[Piece]]:
    """The tars of each subset, in order."""
    found: dict[str, list[Piece]] = {name: [] for name in note["subsets"]}
    for group in range(source.metadata.num_row_groups):
        rows = source.read_row_group(group, columns=["subset", "tar", KEY.name])
        if rows.num_rows:
            subset, tar = rows.column("subset")[0].as_py(), rows.column("tar")[0].as_py()
            (file,) = [file for file in note["subsets"][subset]["files"] if file["name"] == tar]
            found[subset].append(Piece(group, file, rows.num_rows - int(_hit(rows, keys).sum())))
    return found


def _renumbered(pieces: Sequence[Piece]) -> list[Piece]:
    """Tars that are not empty, in the order of their new numbers: each keeps its own but those that fill a gap."""
    count = sum(piece.left > 0 for piece in pieces)
    spare = [piece for piece in pieces[count:] if piece.left]
    return [piece if piece.left else spare.pop() for piece in pieces[:count]]


def _subset(
    store: Store, place: tuple[str, str], subset: str, facts: dict[str, Any], pieces: Sequence[Piece],
    source: pq.ParquetFile, writer: pq.ParquetWriter, keys: frozenset[str],
) -> None:  # fmt: skip
    """Write or link a subset's tars and rows, and change its facts to what is left."""
    old, new = place
    files: list[dict[str, Any]] = []
    silent = 0
    scores = Summary(facts.get("scores", ()))
    for number, piece in enumerate(_renumbered(pieces)):
        name = f"{number:05d}.tar"
        rows = source.read_row_group(piece.group)
        paths = f"{old}/{piece.file['name']}", f"{new}/{name}"
        if piece.touched:
            rows = rows.filter(pa.array(~_hit(rows, keys)))
            offsets, sums = _rewrite(store, *paths, keys)
            places = pa.array([offsets[key] for key in rows.column(KEY.name).to_pylist()], pa.int64())
            rows = rows.set_column(rows.schema.get_field_index("offset"), rows.schema.field("offset"), places)
        else:
            sums = {"bytes": piece.file["bytes"], "sha256": piece.file["sha256"]}
            carry(store, *paths)
        tar = pa.array([name] * rows.num_rows, pa.string())
        rows = rows.set_column(rows.schema.get_field_index("tar"), rows.schema.field("tar"), tar)
        writer.write_table(rows, row_group_size=max(1, rows.num_rows))
        scores.add(rows)
        files.append({"name": name, "samples": rows.num_rows, **sums})
        silent += rows.column("text").null_count if "text" in rows.column_names else 0
    samples = sum(file["samples"] for file in files)
    gone = facts["samples"] - samples
    if gone:
        facts["refused"][f"status: {REMOVED}"] = facts["refused"].get(f"status: {REMOVED}", 0) + gone
    facts |= {
        "samples": samples, "without_text": silent, "tars": len(files), "files": files,
        "bytes": sum(file["bytes"] for file in files), "scores": scores.note(),
    }  # fmt: skip
    store.put_json(f"{new}/sizes.json", {file["name"]: file["samples"] for file in files})
    store.put_bytes(f"{new}/__len__", str(samples).encode())


def _rewrite(store: Store, old: str, new: str, keys: frozenset[str]) -> tuple[dict[str, int], dict[str, Any]]:
    """Copy the members of the samples that stay; returns where each image now starts, and the tar's sums."""
    offsets: dict[str, int] = {}
    with store.open(old) as source, store.staged(new) as local, local.open("wb") as stream:
        hashed = Hashed(stream)
        tar = TarWriter(cast(BinaryIO, hashed))
        for name, offset, size in members(source):
            key = name.partition(".")[0]
            if key in keys:
                continue
            source.seek(offset)
            start = tar.add(name, source.read(size))
            offsets.setdefault(key, start)  # the image is a sample's first member
        tar.finish()
    return offsets, {"bytes": hashed.bytes, "sha256": hashed.hexdigest()}


def carry(store: Store, old: str, new: str) -> None:
    """The same bytes under a second name."""
    if not store.is_local:
        store.fs.cp_file(store.full(old), store.full(new))
        return
    target = Path(store.full(new))
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(store.full(old), target)
    except OSError:  # a disk without hard links
        with store.staged(new) as local, Path(store.full(old)).open("rb") as source, local.open("wb") as copy:
            while block := source.read(2**20):
                copy.write(block)


def _features(store: Store, name: str) -> list[dict[str, Any]] | None:
    """The types of a sample's members, as the card of the old release has them."""
    parts = store.get_bytes(f"{RELEASES}/{name}/README.md").decode().split("---\n", maxsplit=2)
    matter = yaml.safe_load(parts[1]) if len(parts) == 3 else {}
    described = matter.get("dataset_info") or []
    return described[0]["features"] if described else None
