"""k-means over points of any number: trained in one task on what was drawn, resampled as Vo et al. 2024 do it.

    <work>/sample/<chunk>.npz              the sample that the first k-means sees
    <work>/turn<n>.npz                     centroids of turn n; those of the last turn go to the caller's path
    <work>/turn<n>/closest/<chunk>.npz     the points that are closest to each centroid of the turn before
    <work>/turn<n>/chosen.npz              their rows, out of all chunks
    <work>/turn<n>/points/<chunk>.npz      their vectors

Resampling evens out what k-means sees: r closest points of each cluster, however large it is, then k-means on those,
repeatedly (arXiv 2405.15613, section 3.2). Training is an item of the engine's map and asks for a GPU where there is
one. No process holds more than the sample, which k-means holds once more as float32, or a piece of the points and the
centroids. It refuses fewer usable points than clusters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from curate.engine.driver import OnDevice
from curate.retrieve import cells as kernels
from curate.retrieve.cells import Cells
from curate.retrieve.draw import Smallest, ordered
from curate.stage import Map
from curate.store import Store
from curate.vectors import Int64, Points, Vectors, draw, drawn, finish, get_arrays, pieces_of, put_arrays

GPU_OF_A_PASS = 0.25  # of a GPU: four tasks hide one another's reading, and hold 2 GB each
ROWS_PER_PIECE = 1 << 13  # 32 MB of float32 centroids of 1024 numbers
TURN_SEED = 7919  # apart, so that no turn draws as another does


@dataclass(frozen=True)
class KMeans:
    """`count` clusters, trained on `points_per_cell` points for each; then `resampling` times on the `sample_size`
    points that are closest to each centroid. "ip" trains as "l2"."""

    count: int
    metric: Literal["cosine", "l2", "ip"]
    init: Literal["kmeans++", "random"]
    iterations: int
    points_per_cell: int
    seed: int
    resampling: int = 0
    sample_size: int = 1
    batch: int | None = None

    def cells(self, points: npt.NDArray[Any], turn: int) -> Cells:
        """The clusters of these points."""
        way: Literal["cosine", "l2"] = "cosine" if self.metric == "cosine" else "l2"
        seed = self.seed + TURN_SEED * turn
        return kernels.train(points, self.count, way, self.init, self.iterations, seed, device(), self.batch)


def device() -> str:
    """Where products are computed."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def train(points: Points, how: KMeans, path: str, work: str, map_items: Map) -> None:
    """Write the centroids float32[count, d] to `path`, unless they are there. Raises PlanError for too few points."""
    if points.store.exists(path):
        return
    size = how.count * how.points_per_cell
    draw(points, work, size, how.seed, map_items)
    for turn in range(how.resampling + 1):
        here = path if turn == how.resampling else f"{work}/turn{turn}.npz"
        if points.store.exists(here):
            continue
        folder = f"{work}/turn{turn}"
        if turn:
            _resample(points, how, f"{work}/turn{turn - 1}.npz", work, folder, map_items)
        finish(map_items(OnDevice(partial(_train, points, how, work, folder, turn)), [here]))


def _train(points: Points, how: KMeans, work: str, folder: str, turn: int, path: str) -> None:
    if turn == 0:
        seen = drawn(points, work, how.count * how.points_per_cell)[1]
    else:
        names = points.store.names(f"{folder}/points")
        seen = np.concatenate([get_arrays(points.store, f"{folder}/points/{name}")["vectors"] for name in names])
    centroids = how.cells(seen, turn).centroids
    if not points.store.exists(path):  # by another run, that has swept away what this one read
        put_arrays(points.store, path, centroids=centroids)


def _resample(points: Points, how: KMeans, centroids: str, work: str, folder: str, map_items: Map) -> None:
    """Gather the points that the next turn's k-means sees."""
    _pass(points, f"{folder}/closest", partial(_closest, points, how, centroids), map_items)
    if not points.store.exists(f"{folder}/chosen.npz"):
        finish(map_items(partial(_choose, points, how, work), [folder]))
    _pass(points, f"{folder}/points", partial(_gather, points, f"{folder}/chosen.npz"), map_items)


def _pass(points: Points, folder: str, function: Callable[[str, range], None], map_items: Map) -> None:
    """Write the files of a folder that are missing, one for each chunk of pieces."""
    done = set(points.store.names(folder))
    todo = [chunk for chunk in pieces_of(points) if f"{chunk.start:08d}.npz" not in done]
    finish(map_items(OnDevice(partial(function, folder), GPU_OF_A_PASS), todo))


def _closest(points: Points, how: KMeans, centroids: str, folder: str, chunk: range) -> None:
    cells = Cells(get_arrays(points.store, centroids)["centroids"], how.metric)
    nearest = Smallest(np.full(how.count, how.sample_size))
    for piece in chunk:
        part = points.read(piece)
        for members, distances in kernels.assign(cells, [part.vectors], device()):
            nearest.add(members, ordered(distances), part.rows)
    groups, priorities, rows = nearest.kept()
    put_arrays(points.store, f"{folder}/{chunk.start:08d}.npz", groups=groups, marks=priorities, rows=rows)


def _choose(points: Points, how: KMeans, work: str, folder: str) -> None:
    """The closest of all chunks; where they are fewer than the clusters, since some are empty, the sample's first."""
    nearest = Smallest(np.full(how.count, how.sample_size))
    for name in points.store.names(f"{folder}/closest"):
        held = get_arrays(points.store, f"{folder}/closest/{name}")
        nearest.add(held["groups"], held["marks"], held["rows"])
    rows = np.sort(nearest.result()[1])
    if len(rows) < how.count:
        rest = drawn(points, work, how.count * how.points_per_cell)[0]
        rest = rest[np.isin(rest, rows, invert=True)]
        rows = np.sort(np.concatenate([rows, rest[: how.count - len(rows)]]))
    put_arrays(points.store, f"{folder}/chosen.npz", rows=rows)


def _gather(points: Points, choice: str, folder: str, chunk: range) -> None:
    chosen = get_arrays(points.store, choice)["rows"]
    vectors = [np.empty((0, points.width), np.float16)]
    for piece in chunk:
        first, last = np.searchsorted(chosen, [points.starts[piece], points.starts[piece + 1]])
        if last > first:
            part = points.read(piece)
            vectors.append(part.vectors[np.isin(part.rows, chosen[first:last], assume_unique=True)])
    put_arrays(points.store, f"{folder}/{chunk.start:08d}.npz", vectors=np.concatenate(vectors))


def members(points: Points, centroids: str, work: str, map_items: Map) -> npt.NDArray[np.int32]:
    """int32[rows]: the Euclidean cluster of every point, -1 for one without a usable vector."""
    store = points.store
    _pass(points, f"{work}/members", partial(_assign, points, centroids), map_items)
    out = np.full(points.starts[-1], -1, np.int32)
    for name in store.names(f"{work}/members"):
        held = get_arrays(store, f"{work}/members/{name}")
        out[held["rows"]] = held["members"]
    return out


def _assign(points: Points, centroids: str, folder: str, chunk: range) -> None:
    cells = Cells(get_arrays(points.store, centroids)["centroids"], "l2")
    rows: list[Int64] = [np.empty(0, np.int64)]
    found: list[npt.NDArray[np.int32]] = [np.empty(0, np.int32)]
    for piece in chunk:
        part = points.read(piece)
        rows.append(part.rows)
        found.append(next(kernels.assign(cells, [part.vectors], device()))[0])
    path = f"{folder}/{chunk.start:08d}.npz"
    put_arrays(points.store, path, rows=np.concatenate(rows), members=np.concatenate(found))


@dataclass(frozen=True)
class Centroids:
    """The centroids of a level as points; `files` are (path, how many it holds), numbered through."""

    store: Store
    width: int
    files: tuple[tuple[str, int], ...]

    @property
    def _pieces(self) -> list[tuple[int, int]]:
        """(file, first row in it) of every piece."""
        spans = ((number, range(0, rows, ROWS_PER_PIECE)) for number, (_, rows) in enumerate(self.files))
        return [(number, start) for number, span in spans for start in span]

    @property
    def starts(self) -> Sequence[int]:
        """See `Points`."""
        sizes = [min(ROWS_PER_PIECE, self.files[number][1] - start) for number, start in self._pieces]
        return [0, *accumulate(sizes)]

    def count(self, piece: int) -> int:
        """All of a piece."""
        return self.starts[piece + 1] - self.starts[piece]

    def read(self, piece: int) -> Vectors:
        """All of a piece; a centroid's key is its number."""
        number, start = self._pieces[piece]
        rows = np.arange(self.starts[piece], self.starts[piece + 1])
        held = _load(self.store.root, self.files[number][0])[start : start + len(rows)]
        return Vectors(rows, rows.astype(np.uint64), held)


@lru_cache(maxsize=1)  # pieces of one file are read one after the other
def _load(root: str, path: str) -> npt.NDArray[np.float32]:
    return np.asarray(get_arrays(Store(root), path)["centroids"])
