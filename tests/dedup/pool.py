"""A small pool on disk with embeddings and hashes, and what brute force says of it."""

import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch

from curate import across
from curate.config import DedupSettings
from curate.dedup import cells, near_vectors
from curate.dedup.step import DedupStep, dedup_step
from curate.metrics import progress
from curate.schema import KEY, SAMPLE_FIELDS, Shard, TableSpec, inputs_of, keys_of
from curate.store import Store

SAMPLES = TableSpec("samples", 1, pa.schema(SAMPLE_FIELDS), open_schema=True)
IMAGES = TableSpec(
    "images", 1, pa.schema([KEY, ("status", pa.string()), ("width", pa.int32()), ("height", pa.int32())]),
    inputs=inputs_of([SAMPLES]),
)  # fmt: skip
HASHES = TableSpec(
    "scores_phash", 1, pa.schema([KEY, pa.field("image_phash", pa.string())]), inputs=inputs_of([IMAGES])
)
Vectors = npt.NDArray[np.floating[Any]]

# Small products and k-means: idle threads that wait for each other cost more than they give, on a busy machine most.
torch.set_num_threads(1)
faiss.omp_set_num_threads(1)


def embeddings(width: int, dtype: pa.DataType) -> TableSpec:
    """`embeddings_toy` of this width."""
    column = pa.field("toy_image", pa.list_(dtype, width))
    return TableSpec("embeddings_toy", 1, pa.schema([KEY, column]), inputs=inputs_of([IMAGES]))


class VectorPool:
    """Vectors dealt to shards in order; null where the row has no image, and `null` says so."""

    def __init__(
        self, root: Path, vectors: Vectors, per_shard: int, *, null: Sequence[int] = (), failed: Sequence[int] = (),
        hashes: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self.store = Store(str(root))
        self.spec = embeddings(vectors.shape[1], pa.float16() if vectors.dtype == np.float16 else pa.float32())
        self.tables = [SAMPLES, IMAGES, HASHES, self.spec]
        self.shards: list[Shard] = []
        self.keys: list[str] = []
        for at in range(0, len(vectors), per_shard):
            rows = list(range(at, min(at + per_shard, len(vectors))))
            urls = [str(row) for row in rows]
            keys = keys_of(urls, urls)
            shard = Shard(f"{len(self.shards):04d}", len(rows))
            self.store.write(SAMPLES, shard, pa.table([keys, urls, urls], schema=pa.schema(SAMPLE_FIELDS)))
            status = ["timeout" if row in failed else "ok" for row in rows]
            ones = [1] * len(rows)
            self.store.write(IMAGES, shard, pa.table([keys, status, ones, ones], schema=IMAGES.schema), SAMPLES)
            told = [None if hashes is None else hashes[row] for row in rows]
            self.store.write(HASHES, shard, pa.table([keys, told], schema=HASHES.schema), SAMPLES)
            lists = [None if row in null or row in failed else vectors[row] for row in rows]
            column = pa.array(lists, self.spec.schema.field("toy_image").type)
            self.store.write(self.spec, shard, pa.table([keys, column], schema=self.spec.schema), SAMPLES)
            self.shards.append(shard)
            self.keys += keys

    def run(
        self, *rules: DedupSettings, map_items: Callable[..., Iterator[Any]] = map, store: Store | None = None,
        measured: Mapping[str, str] | None = None,
    ) -> tuple[DedupStep, dict[str, int]]:  # fmt: skip
        """Run the step; returns it and its counts."""
        step = dedup_step(rules, self.tables, self.shards, store, measured)
        with progress("dedup", len(self.shards)) as ticker:
            return step, dict(step.run(self.store, self.shards, map_items, ticker))

    def rows(self, step: DedupStep) -> list[dict[str, Any]]:
        """The table that the step wrote."""
        return [row for shard in self.shards for row in self.store.read(step.tables[0], shard.name).to_pylist()]

    def gone(self, step: DedupStep) -> dict[str, str]:
        """key -> key kept."""
        return {row["key"]: row["duplicate_of"] for row in self.rows(step) if row["is_duplicate"]}

    def firsts(self, group: npt.NDArray[np.int64]) -> dict[str, str]:
        """key -> lowest key of its group, for every group of two or more; the order `keep: key`."""
        members: dict[int, list[str]] = {}
        for row, name in enumerate(group.tolist()):
            members.setdefault(name, []).append(self.keys[row])
        return {key: min(keys) for keys in members.values() for key in keys if key != min(keys)}


def shuffled(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """A map in another order, by workers that get everything through a pickle."""
    order = list(items)
    random.Random(len(order)).shuffle(order)
    return (pickle.loads(pickle.dumps(function))(item) for item in order)  # our own


def cosines(vectors: Vectors) -> npt.NDArray[np.float32]:
    """float32[n, n]; -2 where a row has no direction."""
    wide = vectors.astype(np.float64)
    with np.errstate(all="ignore"):
        unit = wide / np.sqrt((wide * wide).sum(axis=1, keepdims=True))
        return np.asarray(np.nan_to_num((unit @ unit.T).astype(np.float32), nan=-2))


def planted(n: int = 900, width: int = 24, dtype: str = "float16") -> Vectors:
    """Chains of near copies, equal rows, and rows 3, 5, 7 zero, NaN, infinite."""
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((n, width))
    for link in range(1, 4):
        at = draw.permutation(n)[: n // 5]
        vectors[at] = vectors[(at * 7 + link) % n] + 0.15 * draw.standard_normal((len(at), width))
    equal = draw.permutation(n)[: n // 6]
    vectors[equal] = vectors[equal[0]]
    vectors[3], vectors[5, 0], vectors[7, 0] = 0, np.nan, np.inf
    return vectors.astype(dtype)


def in_small_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells, partitions and chunks as a large pool has them."""
    for module in (cells, near_vectors):
        monkeypatch.setattr(module, "ROWS_PER_CELL", 100)
    monkeypatch.setattr(
        cells.train_cells, "__kwdefaults__", {**(cells.train_cells.__kwdefaults__ or {}), "rows_per_cell": 100}
    )
    monkeypatch.setattr(near_vectors, "ONE_CELL", 0)
    monkeypatch.setattr(near_vectors, "PARTS", 5)
    monkeypatch.setattr(near_vectors, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(near_vectors, "LEAST_PER_CELL", 5)
    monkeypatch.setattr(across, "CHUNKS", 3)
