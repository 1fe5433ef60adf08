"""The three passes of emission, each a function from one item to one file, so that any worker may run any item.

    pick     a chunk of source shards  -> its chosen rows of every subset, and counts by reason
    order    a group of chunks         -> its rows in the order of the release, a row group for each tar
    write    tars of a group           -> the tars, and the part of the manifest that each makes

Every file is written whole under its final name, and one that is there is not made again: a killed run is taken up
where it stopped, and gives the same bytes.
"""

import hashlib
import io
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curate.config import EmitSettings
from curate.emit.facts import FACES, PLACE, Facts, json_records
from curate.emit.privacy import blur_faces, mask_rows, strip_metadata
from curate.emit.ranges import Direct, Spool, source_of
from curate.emit.shuffle import Chunk, Group, permutation
from curate.errors import StoreError
from curate.rows import read_rows
from curate.schema import KEY, TableSpec
from curate.store import Store
from curate.tar import TarWriter

ROWS_AT_ONCE = 128  # 13 MB of 100 kB images in flight per worker


@dataclass(frozen=True)
class Build:
    """What every item of a release shares. `work` is scratch, `target` is where the release grows."""

    store: Store
    settings: EmitSettings
    facts: Facts
    members: Mapping[str, TableSpec]
    work: str
    target: str

    def picked(self, subset: str, chunk: int) -> str:
        """Chosen rows of a chunk."""
        return f"{self.work}/pick/{chunk:05d}-{subset}.parquet"

    def ordered(self, subset: str, group: int) -> str:
        """Rows of a group in the order of the release."""
        return f"{self.work}/order/{subset}-{group:05d}.parquet"

    def part(self, subset: str, tar: int) -> str:
        """The manifest of one tar."""
        return f"{self.work}/part/{subset}-{tar:05d}.parquet"

    def note(self, subset: str, tar: int) -> str:
        """Says that a tar is there: its sha256, bytes, samples."""
        return f"{self.work}/tar/{subset}-{tar:05d}.json"

    def tar(self, subset: str, tar: int) -> str:
        """The tar itself."""
        return f"{self.target}/{subset}/{tar:05d}.tar"


def pick(build: Build, chunk: Chunk) -> dict[str, Any]:
    """Copy the chosen rows of a chunk's shards into one file per subset; returns counts by subset."""
    path = f"{build.work}/pick/{chunk.number:05d}.json"
    done = build.store.get_json(path)
    if done is not None:
        return cast(dict[str, Any], done)
    found: dict[str, Any] = {
        name: {"samples": 0, "bytes": 0, "without_text": 0, "clauses": Counter()} for name in build.members
    }
    with ExitStack() as stack:
        writers: dict[str, pq.ParquetWriter] = {}
        for shard in chunk.shards:
            masks = {name: _mask(build.store, spec, shard, found[name]) for name, spec in build.members.items()}
            if not any(mask.true_count for mask in masks.values()):
                continue
            rows = read_rows(build.store, build.facts.columns, build.facts.read, shard)
            for name, mask in masks.items():
                chosen = rows.filter(mask)
                if not chosen.num_rows:
                    continue
                if name not in writers:
                    local = stack.enter_context(build.store.staged(build.picked(name, chunk.number)))
                    writers[name] = stack.enter_context(pq.ParquetWriter(local, chosen.schema, compression="zstd"))
                writers[name].write_table(chosen)
                found[name]["samples"] += chosen.num_rows
                found[name]["bytes"] += int(np.asarray(chosen.column("length").to_numpy()).sum())
                found[name]["without_text"] += chosen.column("text").null_count
    build.store.put_json(path, {"chunk": chunk.number, "subsets": found})
    return {"chunk": chunk.number, "subsets": found}


def _mask(store: Store, spec: TableSpec, shard: str, counts: dict[str, Any]) -> pa.BooleanArray:
    table = store.read(spec, shard, ["member", "reason"])
    counts["clauses"].update(table.column("reason").drop_null().to_pylist())
    return table.column("member").combine_chunks()


def order(build: Build, group: Group) -> None:
    """Write a group's rows in the order of the release, one row group for each of its tars."""
    path = build.ordered(group.subset, group.number)
    if build.store.exists(path):
        return
    tables = []
    for chunk in group.chunks:
        with build.store.open(build.picked(group.subset, chunk)) as handle:
            tables.append(pq.read_table(handle))
    rows = pa.concat_tables(tables)
    del tables
    keys = rows.column(KEY.name).to_pylist()
    places = permutation(keys, build.settings.seed, group.subset)
    _refuse_twins(keys, places)
    with (
        build.store.staged(path) as local,
        pq.ParquetWriter(local, rows.schema, compression="zstd", use_dictionary=False) as writer,
    ):
        start = 0
        for samples in group.tar_samples:
            piece = rows.take(pa.array(places[start : start + samples]))
            writer.write_table(piece, row_group_size=samples)
            start += samples


def _refuse_twins(keys: Sequence[str], places: np.ndarray) -> None:
    for one, other in itertools.pairwise(places):
        if keys[one] == keys[other]:
            raise StoreError(f"two samples have the key {keys[one]}; a trainer would take them for one")


def write(build: Build, group: Group, tars: Sequence[int]) -> list[dict[str, Any]]:
    """Write some tars of a group (numbers within the group); returns their notes."""
    notes = {tar: build.store.get_json(build.note(group.subset, group.first_tar + tar)) for tar in tars}
    todo = [tar for tar in tars if notes[tar] is None]
    if todo:
        with build.store.open(build.ordered(group.subset, group.number)) as handle, pq.ParquetFile(handle) as file:
            traffic: Counter[str] = Counter()
            places = file.read_row_groups(todo, columns=["tar", "offset", "length"])
            with source_of(build.store, places, traffic) as source:
                first = 0
                for tar in todo:
                    before = Counter(traffic) if tar != todo[0] else Counter[str]()
                    rows = file.read_row_group(tar)
                    note = _write_tar(build, group.subset, group.first_tar + tar, rows, source, first)
                    notes[tar] = note | dict(traffic - before)
                    build.store.put_json(build.note(group.subset, group.first_tar + tar), notes[tar])
                    first += rows.num_rows
    return [cast(dict[str, Any], notes[tar]) for tar in tars]


def _write_tar(
    build: Build, subset: str, number: int, rows: pa.Table, source: Direct | Spool, first: int
) -> dict[str, Any]:
    path = build.tar(subset, number)
    offsets: list[int] = []
    digests: list[str] = []
    lengths: list[int] = []
    if build.settings.mask_contacts:
        rows = mask_rows(rows)
    with build.store.staged(path) as local, local.open("wb") as stream:
        hashed = Hashed(stream)
        tar = TarWriter(cast(BinaryIO, hashed))
        for at in range(0, rows.num_rows, ROWS_AT_ONCE):
            batch = rows.slice(at, ROWS_AT_ONCE)
            images = _shown(build.settings, batch, source.images(batch, first + at))
            for image, place in zip(images, _add_members(build, tar, batch, images), strict=True):
                offsets.append(place)
                lengths.append(len(image))
                digests.append(hashlib.sha256(image).hexdigest())
        tar.finish()
    _write_part(build, subset, number, rows, (offsets, lengths, digests))
    return {
        "subset": subset, "tar": f"{number:05d}.tar", "samples": rows.num_rows, "bytes": hashed.bytes,
        "sha256": hashed.hexdigest(), "image_bytes": sum(lengths),
    }  # fmt: skip


def _shown(settings: EmitSettings, batch: pa.Table, images: list[bytes]) -> list[bytes]:
    """The bytes that are emitted: as they are stored, but for what the recipe hides of people."""
    if settings.blur_faces:
        boxes, exts = batch.column(FACES).to_pylist(), batch.column("ext").to_pylist()
        images = [
            blur_faces(image, faces or [], ext or "jpg") for image, faces, ext in zip(images, boxes, exts, strict=True)
        ]
    return [strip_metadata(image) for image in images] if settings.strip_metadata else images


def _add_members(build: Build, tar: TarWriter, batch: pa.Table, images: Sequence[bytes]) -> Iterator[int]:
    """Append the members of a batch, those of a sample side by side; yields the offset of each image."""
    keys, exts, texts = (batch.column(name).to_pylist() for name in (KEY.name, "ext", "text"))
    names, captions = build.facts.json, build.settings.captions
    records = json_records(batch, names) if names else [b""] * len(keys)
    features = [(name, batch.column(name).to_pylist()) for name in build.facts.features]
    for row, (key, image) in enumerate(zip(keys, images, strict=True)):
        ext = "jpg" if build.settings.image_names == "jpg" else exts[row] or "jpg"
        yield tar.add(f"{key}.{ext}", image)
        if (
            captions and texts[row] is not None
        ):  # a trainer on pairs skips samples without .txt; an empty one it would train on
            tar.add(f"{key}.txt", texts[row].encode("utf-8", "replace"))
        if names:
            tar.add(f"{key}.json", records[row])
        for name, vectors in features:
            if vectors[row] is not None:
                tar.add(f"{key}.{name}.npy", _npy(vectors[row]))


def _npy(vector: Sequence[float]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(vector, dtype=np.float16), allow_pickle=False)
    return buffer.getvalue()


def _write_part(
    build: Build, subset: str, number: int, rows: pa.Table, made: tuple[list[int], list[int], list[str]]
) -> None:
    schema = build.facts.manifest_schema()
    count = rows.num_rows
    tar = pa.array([f"{number:05d}.tar"] * count, PLACE[0].type)
    places = [tar, *(pa.array(values, field.type) for values, field in zip(made, PLACE[1:], strict=True))]
    facts = [rows.column(name) for name in build.facts.manifest]
    table = pa.table([pa.array([subset] * count, pa.string()), *facts, *places], schema=schema)
    with build.store.staged(build.part(subset, number)) as local:
        pq.write_table(table, local, compression="zstd", row_group_size=max(1, count))


class Hashed:
    """A stream that knows the sha256 and the length of what was written to it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._digest = stream, hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        """Write and remember."""
        self._digest.update(data)
        self.bytes += len(data)
        return self._stream.write(data)

    def hexdigest(self) -> str:
        """sha256 so far."""
        return self._digest.hexdigest()
