"""Search over codes of the pool instead of its vectors, and the exact comparison afterwards.

    <work>/codec.npz                                    FAISS's codec, trained on a sample of the pool
    <work>/sets/<set>/coarse/<chunk>/<part>.npz         neighbours of a chunk of seeds among the codes of a part
    <work>/sets/<set>/pairs/<shards>/<chunk>.npz        their rows in a chunk of shards, and the seeds to compare with
    <work>/sets/<set>/found/<chunk>/<shards>.npz        exact neighbours among those, and the truth as without codes

Codes take d bytes (SQ8) or m (PQm) where float16 takes 2 d, so a worker holds many times the rows. What is near by code
is scored again with the vectors at rest, which stream past once; recall@k is measured against an exact search as ever.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.config import SeedSet
from curate.engine.driver import OnDevice
from curate.retrieve import search as kernels
from curate.retrieve.cells import usable
from curate.retrieve.levels import GPU_OF_A_PASS, device
from curate.retrieve.search import Codes, Neighbours, exact, merged
from curate.retrieve.seeds import Retrieval, chunk_names
from curate.stage import Map
from curate.store import Store
from curate.vectors import Int64, chunks_of, draw, drawn, finish, get_arrays, put_arrays

SAMPLE = 1 << 16  # vectors that a codec is trained on: 256 for each of a product quantiser's 256 centroids


def codec_path(work: Retrieval) -> str | None:
    """Where the codec is, if codes are searched."""
    return f"{work.work}/codec.npz" if work.settings.codes else None


def train(work: Retrieval, map_items: Map) -> None:
    """Write the codec."""
    path = codec_path(work)
    if path is not None and not work.pool.store.exists(path):
        draw(work.pool, f"{work.work}/codec", SAMPLE, work.settings.seed, map_items)
        finish(map_items(partial(_train, work), [path]))


def _train(work: Retrieval, path: str) -> None:
    points = drawn(work.pool, f"{work.work}/codec", SAMPLE)[1]
    put_arrays(work.pool.store, path, codec=Codes.trained(points[usable(points)], str(work.settings.codes)).packed())


def rescore(work: Retrieval, map_items: Map) -> None:
    """Turn the neighbours by code of all sample sets into exact ones."""
    store, spans = work.pool.store, chunks_of(len(work.pool.names))
    for one in work.named("sample"):
        done = set(store.names(f"{work.folder(one)}/paired"))
        todo = [name for name in chunk_names(work, one) if name.replace(".npz", ".json") not in done]
        finish(map_items(partial(_pair, work, one, spans), [int(name.removesuffix(".npz")) for name in todo]))
    done = set(store.names(f"{work.work}/rescored"))
    shards = [span for span in spans if f"{span.start:08d}.json" not in done]
    finish(map_items(OnDevice(partial(_rescore, work), GPU_OF_A_PASS), shards))


def best_of(store: Store, folder: str, seeds: int, k: int) -> Neighbours:
    """The k nearest of each seed of a chunk, from the files of all parts."""
    best = Neighbours(np.full((seeds, k), -1, np.int64), np.full((seeds, k), np.nan))
    for part in store.names(folder):
        held = get_arrays(store, f"{folder}/{part}")
        mine = held["numbers"]
        before = Neighbours(best.rows[mine], best.similarity[mine])
        both = merged([before, Neighbours(held["rows"], held["similarity"])], k)
        best.rows[mine], best.similarity[mine] = both.rows, both.similarity
    return best


def _pair(work: Retrieval, one: SeedSet, spans: Sequence[range], start: int) -> None:
    """Deal a chunk's candidates to the shards that they stand in."""
    store, name = work.pool.store, f"{start:010d}"
    vectors, _ = work.read(one, next(chunk for chunk in work.chunks(one) if chunk.start == start))
    vectors = vectors[usable(vectors)]
    width = min(work.width_of(one) * work.settings.rerank, work.pool.starts[-1])
    best = best_of(store, f"{work.folder(one)}/coarse/{name}", len(vectors), width)
    seed, place = np.nonzero(best.rows >= 0)
    rows = best.rows[seed, place]
    for shards in spans:
        mine = (rows >= work.pool.starts[shards.start]) & (rows < work.pool.starts[shards.stop])
        if mine.any():
            numbers, asking = np.unique(seed[mine], return_inverse=True)
            path = f"{work.folder(one)}/pairs/{shards.start:08d}/{name}.npz"
            put_arrays(store, path, numbers=numbers, vectors=vectors[numbers], asking=asking, rows=rows[mine])
    store.put_json(f"{work.folder(one)}/paired/{name}.json", {"pairs": len(rows)})


def _rescore(work: Retrieval, shards: range) -> None:
    """Compare the candidates in a chunk of shards exactly; the watched seeds with all rows there."""
    store, pool = work.pool.store, work.pool
    held = [pool.read(number) for number in shards]
    rows, vectors = np.concatenate([part.rows for part in held]), np.concatenate([part.vectors for part in held])
    members = np.concatenate([
        work.place.read(store, pool.names[number])[0][part.rows - pool.starts[number]]
        for number, part in zip(shards, held, strict=True)
    ])  # fmt: skip
    del held
    for one in work.named("sample"):
        k, folder = work.width_of(one), work.folder(one)
        for name in store.names(f"{folder}/pairs/{shards.start:08d}"):
            pairs = get_arrays(store, f"{folder}/pairs/{shards.start:08d}/{name}")
            found = _exactly(pairs["vectors"], pairs["asking"], pairs["rows"], rows, vectors, k)
            path = f"{folder}/found/{name.removesuffix('.npz')}/{shards.start:08d}.npz"
            put_arrays(store, path, numbers=pairs["numbers"], rows=found.rows, similarity=found.similarity)
        watched = get_arrays(store, f"{folder}/watched.npz")["vectors"]
        truth = exact(watched, kernels.by_cell(members, rows, vectors), k, device())
        put_arrays(store, f"{folder}/truth/{shards.start:08d}.npz", rows=truth.rows, similarity=truth.similarity)
    store.put_json(f"{work.work}/rescored/{shards.start:08d}.json", {"rows": len(rows)})


def _exactly(
    seeds: npt.NDArray[Any], asking: Int64, wanted: Int64, rows: Int64, vectors: npt.NDArray[Any], k: int
) -> Neighbours:
    """The k best of each seed among the rows that it asks for."""
    place = np.arange(len(wanted)) - np.searchsorted(asking, asking)  # `asking` ascends
    lists = np.full((len(seeds), int(place.max()) + 1), -1, np.int64)
    lists[asking, place] = wanted
    candidates = Neighbours(lists, np.full(lists.shape, np.nan))

    def fetch(some: Int64) -> npt.NDArray[Any]:
        return vectors[np.searchsorted(rows, some)]

    return kernels.reranked(seeds, candidates, fetch, k)


def load(store: Store, path: str) -> Codes:
    """The codec."""
    return Codes.unpacked(get_arrays(store, path)["codec"])
