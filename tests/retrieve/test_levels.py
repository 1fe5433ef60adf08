"""Levels of hierarchical k-means against restatements of Vo et al. 2024, over pools in pieces."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import curate.vectors
from curate.config import CellsSettings, HierarchySettings, LevelSettings
from curate.errors import PlanError
from curate.retrieve import cells as kernels
from curate.retrieve import levels, partition, splits
from curate.retrieve.levels import Centroids, KMeans
from curate.retrieve.step import cells_step, hierarchy_step
from curate.schema import KEY, SAMPLE_FIELDS, Shard, TableSpec, inputs_of, keys_of
from curate.store import Store
from curate.vectors import get_arrays, put_arrays
from tests.retrieve.pool import TABLES, WIDTH, build, go, rows_of, shuffled_map

L2 = CellsSettings(by="toy", count=6, metric="l2", points_per_cell=40, seed=1)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks, pieces and parts, as a large pool has them."""
    monkeypatch.setattr(curate.vectors, "SHARDS_PER_CHUNK", 2)
    monkeypatch.setattr(levels, "ROWS_PER_PIECE", 50)
    monkeypatch.setattr(partition, "PART_BYTES", 2 * WIDTH * 60)
    monkeypatch.setattr(splits, "SHARDS_PER_RETURN", 2)


@pytest.mark.parametrize("mapper", [map, shuffled_map])
def test_resampling_trains_on_the_closest_of_every_cluster(tmp_path: Path, mapper: Any) -> None:
    """Guards the loop that evens out concepts: r closest points of each cluster, k-means on those, all over again."""
    store = Store(str(tmp_path))
    vectors = np.random.default_rng(1).normal(size=(430, 8)).astype(np.float32)
    vectors[7] = np.nan
    put_arrays(store, "below.npz", centroids=vectors)
    points = Centroids(store, 8, (("below.npz", len(vectors)),))
    how = KMeans(12, "l2", "kmeans++", 5, 20, seed=3, resampling=2, sample_size=4)
    levels.train(points, how, "out.npz", "work", mapper)

    marks = curate.vectors.hashed(np.arange(430, dtype=np.uint64), 3)
    centroids = how.cells(vectors[np.argsort(marks)[: 12 * 20]], 0).centroids
    for turn in (1, 2):
        away = np.linalg.norm(vectors[:, None].astype(np.float64) - centroids[None], axis=2)
        nearest = np.where(np.isnan(away[:, 0]), -1, np.nan_to_num(away).argmin(axis=1))
        closest = [
            sorted(np.flatnonzero(nearest == cluster), key=lambda row, at=cluster: away[row, at])[:4]
            for cluster in range(12)
        ]
        centroids = how.cells(vectors[np.sort(np.concatenate(closest)).astype(int)], turn).centroids
    assert np.array_equal(get_arrays(store, "out.npz")["centroids"], centroids)


def test_empty_clusters_do_not_starve_the_next_turn(tmp_path: Path) -> None:
    """Guards against a turn with fewer points than clusters, which a small r and an empty cluster leave."""
    store = Store(str(tmp_path))
    vectors = np.repeat(np.random.default_rng(1).normal(size=(5, 8)), 20, axis=0).astype(
        np.float32
    )  # 5 places, 100 rows
    put_arrays(store, "below.npz", centroids=vectors)
    how = KMeans(12, "l2", "kmeans++", 5, 8, seed=3, resampling=1, sample_size=1)
    levels.train(Centroids(store, 8, (("below.npz", 100),)), how, "out.npz", "work", map)
    assert get_arrays(store, "out.npz")["centroids"].shape == (12, 8)


def test_splits_cut_every_cell_and_keep_its_rows(tmp_path: Path) -> None:
    """Guards the web recipe's first level: each of 100,000 cells cut into 100, whose images stay in their cell."""
    store = Store(str(tmp_path))
    shards, rows = build(store)
    cells = cells_step(L2, store, TABLES, shards)
    go(cells, store, shards)
    place = cells.place
    settings = HierarchySettings(splits=4, targets=[9], iterations=5, seed=2)
    names = [shard.name for shard in shards]
    found = splits.split(cells.pool, place, settings, names, "w", shuffled_map)
    cell = np.concatenate([place.read(store, name)[0] for name in names])
    finer, away = (np.concatenate(part) for part in zip(*(found.read(store, name) for name in names), strict=True))
    assert np.array_equal(finer < 0, cell < 0) and np.array_equal(np.isnan(away), cell < 0)
    centroids = np.concatenate([get_arrays(store, path)["centroids"] for path, _ in found.files(store)])
    assert np.array_equal(found.sizes(store), np.bincount(finer[finer >= 0], minlength=len(centroids)))
    assert (found.sizes(store) > 0).all() and 6 < len(centroids) <= 24
    for one in range(6):
        inside = np.flatnonzero(cell == one)
        mine = np.unique(finer[inside])
        assert not set(mine) & set(finer[cell != one]) and len(mine) <= 4
        vectors = np.array([rows[at].vector for at in inside], np.float64)
        gaps = np.linalg.norm(vectors[:, None] - centroids[mine][None], axis=2)
        assert np.array_equal(mine[gaps.argmin(axis=1)], finer[inside])
        assert np.allclose(gaps.min(axis=1), away[inside], atol=1e-5)
        trained = kernels.train(vectors.astype(np.float16), 4, "l2", "kmeans++", 5, 2).centroids
        assert {tuple(row) for row in centroids[mine]} <= {tuple(row) for row in trained}


def test_splits_exclude_resampling(tmp_path: Path) -> None:
    """Guards the published rule: a level has one or the other."""
    cells = cells_step(L2.model_copy(update={"resampling": 1}), Store(str(tmp_path)), TABLES, [])
    with pytest.raises(PlanError, match="either splits or resampling"):
        hierarchy_step(HierarchySettings(splits=2, targets=[3]), cells)


def test_levels_need_fewer_clusters_upwards(tmp_path: Path) -> None:
    """Guards against a tree that widens towards its top, named with the numbers that the pool gave it."""
    store = Store(str(tmp_path))
    shards, _ = build(store)
    cells = cells_step(L2, store, TABLES, shards)
    go(cells, store, shards)
    levels = [LevelSettings(count=500)]  # more than there are images; cells of few are split into fewer
    step = hierarchy_step(HierarchySettings(splits=100, levels=levels, targets=[3]), cells)
    with pytest.raises(PlanError, match=r"\[[123]?\d\d, 500\] clusters"):
        go(step, store, shards)


def test_rare_concepts_get_their_share(tmp_path: Path) -> None:
    """Guards the purpose: of 20 concepts whose sizes differ 40-fold, the sample takes about equally many of each."""
    rng = np.random.default_rng(3)
    sizes = np.linspace(20, 800, 20).astype(int)
    centres = 4 * rng.standard_normal((20, WIDTH))
    concept = rng.permutation(np.repeat(np.arange(20), sizes))
    vectors = (centres[concept] + 0.3 * rng.standard_normal((len(concept), WIDTH))).astype(np.float16)
    store = Store(str(tmp_path))
    samples = TableSpec("samples", 1, pa.schema(SAMPLE_FIELDS))
    table = TableSpec("embeddings_toy", 1, pa.schema([KEY, TABLES[2].schema.field("toy")]), inputs=inputs_of([samples]))
    shards = []
    for at in range(0, len(concept), 1000):
        mine = list(range(at, min(at + 1000, len(concept))))
        shards.append(Shard(f"{at:05d}", len(mine)))
        keys = keys_of([str(row) for row in mine], [""] * len(mine))
        store.write(
            samples, shards[-1], pa.table([keys, [str(row) for row in mine], [""] * len(mine)], schema=samples.schema)
        )
        lists = pa.array(list(vectors[mine]), table.schema.field("toy").type)
        store.write(table, shards[-1], pa.table([keys, lists], schema=table.schema), samples)
    cells = cells_step(L2.model_copy(update={"count": 100}), store, [samples, table], shards)
    go(cells, store, shards)
    settings = HierarchySettings(
        levels=[LevelSettings(count=20, resampling=2, sample_size=3)], targets=[300], iterations=10
    )
    step = hierarchy_step(settings, cells)
    go(step, store, shards, shuffled_map)
    taken = np.array([row["hierarchical_sample_300"] for row in rows_of(store, step.tables[0], shards)])
    share = np.bincount(concept, weights=taken, minlength=20)
    # 15 each, but for two that lie close and share a cluster; by size the rarest three would have 1, 2 and 4.
    assert taken.sum() == 300 and np.sort(share)[2] >= 12 and share.max() <= 45
