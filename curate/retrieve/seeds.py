"""Seed sets in chunks, and how their vectors are handed to the tasks that need them.

    <work>/sets/<set>/seeds/<part>/<chunk>.npz     sample: seeds that probe a part's cells
    <work>/sets/<set>/met/<chunk>.npz              pool rows that seeds are (-1: none); cluster: cells they are in
    <work>/sets/<set>/watched.npz                  sample: seeds whose lists are compared with the truth

A set is a file of vectors, files of them that the pipeline had made of images, or rows of the pool that a condition
names. No process holds more than a chunk of seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.config import RetrieveSettings, SeedSet
from curate.engine.driver import OnDevice
from curate.errors import PlanError
from curate.retrieve import vector_files
from curate.retrieve.cells import assign, nearest, usable
from curate.retrieve.levels import GPU_OF_A_PASS, device
from curate.retrieve.partition import Place
from curate.stage import Map
from curate.vectors import Int64, Pool, chunks_of, get_arrays, hashed, put_arrays

SEEDS_PER_CHUNK = 1 << 15  # 64 MB of float16 vectors of 1024 numbers


@dataclass(frozen=True)
class Retrieval:
    """What every pass of a retrieval shares. `parts`: the part of the pool in which each cell is searched."""

    pool: Pool
    place: Place
    settings: RetrieveSettings
    parts: Int64
    work: str
    embedded: Mapping[str, str] = field(default_factory=dict)  # folder of the vectors of each set of images

    def named(self, how: str) -> list[SeedSet]:
        """The sets that are retrieved in this way."""
        return [one for one in self.settings.sets if one.how == how]

    def folder(self, one: SeedSet) -> str:
        """What belongs to one set; apart from the other folders, whose names a set may have."""
        return f"{self.work}/sets/{one.name}"

    def chunks(self, one: SeedSet) -> list[range]:
        """Seeds of a file or of files, or shards whose rows are seeds."""
        if one.name in self.embedded:
            rows = self.pool.store.get_json(f"{self.embedded[one.name]}/rows.json")["rows"]
            return [range(last - count, last) for last, count in zip(accumulate(rows), rows, strict=True) if count]
        if one.embeddings is None:
            return chunks_of(len(self.pool.names))
        return chunks_of(vector_files.length_of(one.embeddings, one.array), SEEDS_PER_CHUNK)

    def read(self, one: SeedSet, chunk: range) -> tuple[npt.NDArray[Any], Int64]:
        """(vectors [n, d], the pool row that each seed is int64[n], -1 for none) of a chunk."""
        if one.name in self.embedded:
            folder = self.embedded[one.name]
            rows = self.pool.store.get_json(f"{folder}/rows.json")["rows"]
            number = int(np.searchsorted(np.cumsum(rows), chunk.start, side="right"))
            vectors = get_arrays(self.pool.store, f"{folder}/{number:08d}.npz")["vectors"]
            return vectors, np.full(len(vectors), -1, np.int64)
        if one.embeddings is not None:
            vectors = vector_files.read_span(one.embeddings, one.array, chunk.start, chunk.stop)
            vector_files.check_width(vectors.shape[1], self.pool.width, one.embeddings, f"retrieve.sets.{one.name}")
            if not vectors.shape[1]:  # a chunk of nulls
                vectors = np.full((len(vectors), self.pool.width), np.nan, np.float32)
            return vectors, np.full(len(vectors), -1, np.int64)
        seeds = replace(self.pool, where=one.where)
        held = [seeds.read(number) for number in chunk]
        return np.concatenate([part.vectors for part in held]), np.concatenate([part.rows for part in held])

    def width_of(self, one: SeedSet) -> int:
        """Neighbours to look for: a seed that is a pool row finds itself, which does not count. No more than the pool
        has, since memory goes by them."""
        return min(one.k + (one.where is not None), self.pool.starts[-1])


@dataclass(frozen=True)
class Met:
    """What is known of a set after its seeds were handed out. `seeded`: cluster sets' seeds in each cell."""

    seeds: int
    seeded: Int64


def hand_out(work: Retrieval, map_items: Map) -> Mapping[str, Met]:
    """Read all seeds once: deal those of sample sets to parts of the pool, count those of cluster sets by cell."""
    count = len(work.place.sizes(work.pool.store))
    met: dict[str, Met] = {}
    for one in (*work.named("sample"), *work.named("cluster")):
        seeds, seeded = 0, np.zeros(count, np.int64)
        for usable_seeds, cells, held in map_items(
            OnDevice(partial(_meet, work, one), GPU_OF_A_PASS), work.chunks(one)
        ):
            seeds += usable_seeds
            seeded[cells] += held
        if not seeds:
            raise PlanError(f"retrieve.sets.{one.name}: no seed has a usable vector; check `where` or the file")
        met[one.name] = Met(seeds, seeded)
        if one.how == "sample":
            _watch(work, one)
    return met


def _meet(work: Retrieval, one: SeedSet, chunk: range) -> tuple[int, Int64, Int64]:
    """(usable seeds, cells they are in, seeds in each) of a chunk."""
    store, path = work.pool.store, f"{work.folder(one)}/met/{chunk.start:010d}.npz"
    if not store.exists(path):
        vectors, own = work.read(one, chunk)
        good = usable(vectors)
        vectors, own = vectors[good], own[good]
        cells = np.empty(0, np.int32)
        if one.how == "cluster":
            (found,) = assign(work.place.cells(store), [vectors], device())
            cells = found[0]
        else:
            _deal(work, one, chunk, vectors)
            numbers = np.where(own >= 0, own, chunk.start + np.flatnonzero(good))
            _candidates(work, one, chunk, numbers, vectors, own)
        put_arrays(store, path, own=own, cells=cells)
    held = get_arrays(store, path)
    found_cells, counts = np.unique(held["cells"], return_counts=True)
    return len(held["own"]), found_cells.astype(np.int64), counts.astype(np.int64)


def _deal(work: Retrieval, one: SeedSet, chunk: range, vectors: npt.NDArray[Any]) -> None:
    cells = work.place.cells(work.pool.store)
    probes = nearest(cells, vectors, min(one.nprobe, len(cells.centroids)), device())
    parts = np.where(probes >= 0, work.parts[probes], -1)
    for part in np.unique(parts[parts >= 0]).tolist():
        mine = np.flatnonzero((parts == part).any(axis=1))
        path = f"{work.folder(one)}/seeds/{part:05d}/{chunk.start:010d}.npz"
        put_arrays(work.pool.store, path, numbers=mine, vectors=vectors[mine], probes=probes[mine])


def _candidates(
    work: Retrieval, one: SeedSet, chunk: range, numbers: Int64, vectors: npt.NDArray[Any], own: Int64
) -> None:
    marks = hashed(numbers, work.settings.seed)
    first = np.argsort(marks, kind="stable")[: work.settings.recall_seeds]
    path = f"{work.folder(one)}/candidates/{chunk.start:010d}.npz"
    chunks = np.full(len(first), chunk.start, np.int64)
    put_arrays(
        work.pool.store, path, marks=marks[first], chunks=chunks, numbers=first, vectors=vectors[first], own=own[first]
    )


def _watch(work: Retrieval, one: SeedSet) -> None:
    """Choose, among all candidates, the seeds whose lists are compared with the truth."""
    store, folder = work.pool.store, f"{work.folder(one)}/candidates"
    best: dict[str, npt.NDArray[Any]] = {}
    for file in store.names(folder):
        held = get_arrays(store, f"{folder}/{file}")
        joined = {name: np.concatenate([best[name], held[name]]) if best else held[name] for name in held}
        first = np.argsort(joined["marks"], kind="stable")[: work.settings.recall_seeds]
        best = {name: values[first] for name, values in joined.items()}
    put_arrays(store, f"{work.folder(one)}/watched.npz", **best)


def chunk_names(work: Retrieval, one: SeedSet) -> Sequence[str]:
    """File names of the chunks of a set that have been handed out."""
    return work.pool.store.names(f"{work.folder(one)}/met")
