"""Cells, retrieval and balanced sampling over a committed pool, row by row against exact brute force."""

import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import curate.vectors
from curate import across
from curate.config import CellsSettings, HierarchySettings, LevelSettings, RetrieveSettings, SeedSet
from curate.errors import PlanError
from curate.retrieve import gather, partition, seeds
from curate.retrieve.hierarchy import Tree, allocate
from curate.retrieve.step import CellsStep, cells_step, hierarchy_step, retrieve_step
from curate.schema import Shard
from curate.stage import CrossStep
from curate.store import Store
from curate.vectors import hashed, key_numbers
from tests.retrieve.pool import TABLES, WIDTH, Killed, Row, build, dying_map, go, rows_of, shuffled_map

CELLS = CellsSettings(by="toy", count=10, metric="cosine", points_per_cell=20, seed=1)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks, parts and partitions, as a large pool has them."""
    monkeypatch.setattr(curate.vectors, "SHARDS_PER_CHUNK", 2)
    monkeypatch.setattr(gather, "SHARDS_PER_RETURN", 2)
    monkeypatch.setattr(seeds, "SEEDS_PER_CHUNK", 7)
    monkeypatch.setattr(partition, "PART_BYTES", 2 * WIDTH * 60)
    monkeypatch.setattr(across, "ROWS_PER_PARTITION", 100)
    monkeypatch.setattr(across, "CHUNKS", 3)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _usable(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, vectors float64) of the rows that can take part."""
    numbers = [at for at, row in enumerate(rows) if row.vector is not None and row.vector.any()]
    return np.array(numbers), np.array([rows[at].vector for at in numbers], np.float64)


def _cells(store: Store, shards: list[Shard], settings: CellsSettings = CELLS, mapper: Any = map) -> CellsStep:
    step = cells_step(settings, store, TABLES, shards)
    go(step, store, shards, mapper)
    return step


def _centroids(store: Store, step: CellsStep) -> np.ndarray:
    path = f"_cells/{step.tables[0].fingerprint}/centroids.npz"
    return np.asarray(curate.vectors.get_arrays(store, path)["centroids"], np.float64)


def _tree(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*")) if path.is_file()}  # fmt: skip


def test_cells_are_the_nearest_centroids(tmp_path: Path) -> None:
    """Guards against rows in the cell of their neighbour, and against failed rows in any."""
    store = Store(str(tmp_path))
    shards, rows = build(store)
    step = _cells(store, shards)
    found = rows_of(store, step.tables[0], shards)
    numbers, vectors = _usable(rows)
    cosine = _unit(vectors) @ _unit(_centroids(store, step)).T
    assert [found[at]["cell"] for at in numbers] == cosine.argmax(axis=1).tolist()
    assert np.allclose([found[at]["distance"] for at in numbers], 1 - cosine.max(axis=1), atol=1e-6)
    rest = set(range(len(rows))) - set(numbers.tolist())
    assert {(found[at]["cell"], found[at]["distance"]) for at in rest} == {(None, None)}
    facts = store.get_json(step.facts)
    assert (facts["rows"], facts["rows_without_cell"]) == (len(numbers), len(rest))
    held = curate.vectors.get_arrays(store, step.facts.replace("facts.json", "sizes.npz"))
    away = 1 - cosine.max(axis=1)
    for cell in range(10):
        inside = cosine.argmax(axis=1) == cell
        assert held["sizes"][cell] == inside.sum() and held["radius"][cell] == pytest.approx(away[inside].max(), 1e-4)
    assert facts["imbalance"] == pytest.approx(10 * (held["sizes"] ** 2).sum() / len(numbers) ** 2, abs=1e-4)
    assert step.done(store, shards)


def test_the_sample_is_drawn_by_keys_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the first step of determinism: other chunks or another order must not train other cells."""
    store = Store(str(tmp_path))
    shards, rows = build(store)
    pool = curate.vectors.pool_of(store, TABLES, shards, "toy", None, "cells")

    def sample(work: str, size: int, seed: int, mapper: Any = map) -> np.ndarray:
        curate.vectors.draw(pool, work, size, seed, mapper)
        return curate.vectors.drawn(pool, work, size)[1]

    whole = sample("w1", 100, 3)
    monkeypatch.setattr(curate.vectors, "SHARDS_PER_CHUNK", 3)
    assert np.array_equal(whole, sample("w2", 100, 3, shuffled_map))
    assert not np.array_equal(whole, sample("w3", 100, 4))
    there = [at for at, row in enumerate(rows) if row.vector is not None]
    marks = hashed(key_numbers([rows[at].key for at in there]), 3)
    assert np.array_equal(whole, np.array([rows[there[at]].vector for at in np.argsort(marks)[:100]]))
    assert len(sample("w4", 9999, 3)) == len(there)


def _brute_sample(rows: list[Row], queries: np.ndarray, own: list[int], k: int) -> dict[int, tuple[float, int, int]]:
    """row: (best similarity, best rank, times), over the k nearest of every query that is not the row itself."""
    numbers, vectors = _usable(rows)
    out: dict[int, tuple[float, int, int]] = {}
    for query, itself in zip(_unit(queries), own, strict=True):
        cosine = _unit(vectors) @ query
        order = [at for at in np.lexsort((numbers, -cosine)) if numbers[at] != itself][:k]
        for rank, at in enumerate(order, start=1):
            best, first, times = out.get(int(numbers[at]), (-2.0, 10**9, 0))
            out[int(numbers[at])] = (max(best, float(cosine[at])), min(first, rank), times + 1)
    return out


def _brute_cluster(
    step: CellsStep, store: Store, rows: list[Row], chosen: list[int], per_cell: int, cap: int, seed: int
) -> tuple[set[int], int]:
    """(rows, before the cap): the rows with the smallest hashes of each chosen cell, then of all of them."""
    cells = [row["cell"] for row in rows_of(store, step.tables[0], list(step.shards))]
    marks = hashed(key_numbers([row.key for row in rows]), seed)
    drawn: list[int] = []
    for cell in chosen:
        inside = [at for at, held in enumerate(cells) if held == cell]
        drawn += sorted(inside, key=lambda at: int(marks[at]))[:per_cell]
    cut = hashed(np.arange(len(rows)), seed, salt=1)
    return set(sorted(drawn, key=lambda at: int(cut[at]))[:cap]), len(drawn)


SETS = RetrieveSettings(
    sets=[
        SeedSet(name="file", how="sample", embeddings="FILE", k=3, nprobe=10),
        SeedSet(name="own", how="sample", where="folder = 'b'", k=2, nprobe=10),
        SeedSet(name="small", how="cluster", embeddings="SMALL", array="emb", more_than=3, per_cell=12, cap=20),
        SeedSet(name="folder", how="cluster", where="folder = 'c'", more_than=9, per_cell=5, cap=1000),
        SeedSet(name="kept", how="as_is", where="folder = 'a'"),
    ],
    recall_seeds=9,
    seed=3,
)


def _sets(tmp_path: Path) -> RetrieveSettings:
    rng = np.random.default_rng(5)
    queries = rng.normal(size=(20, WIDTH)).astype(np.float32)
    queries[4] = 0  # a seed without a direction finds nothing
    np.save(tmp_path / "file.npy", queries)
    np.savez(tmp_path / "small.npz", emb=np.repeat(queries[:3], 6, axis=0), other=np.zeros((1, 1)))
    paths = {"FILE": str(tmp_path / "file.npy"), "SMALL": str(tmp_path / "small.npz")}
    chosen = [one.model_copy(update={"embeddings": paths.get(one.embeddings or "")}) for one in SETS.sets]
    return SETS.model_copy(update={"sets": chosen})


@pytest.mark.parametrize("mapper", [map, shuffled_map])
def test_retrieved_equals_brute_force(tmp_path: Path, mapper: Any) -> None:
    """Guards against neighbours, cells or sets that get lost between shards, parts of the pool and chunks of seeds."""
    store = Store(str(tmp_path / "run"))
    shards, rows = build(store)
    cells = _cells(store, shards, mapper=mapper)
    settings = _sets(tmp_path)
    step = retrieve_step(settings, cells)
    counts = go(step, store, shards, mapper)
    found = rows_of(store, step.tables[0], shards)

    centroids = _unit(_centroids(store, cells))
    queries = np.load(tmp_path / "file.npy").astype(np.float64)
    usable = np.delete(queries, 4, axis=0)
    numbers, vectors = _usable(rows)
    own = [at for at in numbers if rows[at].folder == "b"]
    own_vectors = np.array([rows[at].vector for at in own], np.float64)
    small = np.bincount((np.repeat(_unit(queries[:3]), 6, axis=0) @ centroids.T).argmax(axis=1), minlength=10)
    inside = vectors[[rows[at].folder == "c" for at in numbers]]
    folder = np.bincount((_unit(inside) @ centroids.T).argmax(axis=1), minlength=10)
    name_seed = {name: 3 + zlib.crc32(name.encode()) for name in ("small", "folder")}
    expected: dict[str, Any] = {
        "file": _brute_sample(rows, usable, [-1] * 19, 3),
        "own": _brute_sample(rows, own_vectors, own, 2),
        "small": _brute_cluster(cells, store, rows, np.flatnonzero(small > 3).tolist(), 12, 20, name_seed["small"]),
        "folder": _brute_cluster(cells, store, rows, np.flatnonzero(folder > 9).tolist(), 5, 1000, name_seed["folder"]),
        "kept": {at for at, row in enumerate(rows) if row.folder == "a" and row.status == "ok"},
    }
    for name in ("file", "own"):
        got = {
            at: (row["retrieved_similarity"][place], row["retrieved_rank"][place], row["retrieved_times"][place])
            for at, row in enumerate(found) if name in row["retrieved_by"]
            for place in [row["retrieved_by"].index(name)]
        }  # fmt: skip
        assert got.keys() == expected[name].keys()
        for at, (similarity, rank, times) in expected[name].items():
            assert got[at][1:] == (rank, times)
            assert got[at][0] == pytest.approx(similarity, abs=1e-6)
    for name, wanted in (
        ("small", expected["small"][0]),
        ("folder", expected["folder"][0]),
        ("kept", expected["kept"]),
    ):
        assert {at for at, row in enumerate(found) if name in row["retrieved_by"]} == wanted
        assert len(wanted) > 4
    order = [one.name for one in settings.sets]
    for row in found:
        assert row["is_retrieved"] == bool(row["retrieved_by"])
        assert row["retrieved_count"] == sum(row["retrieved_times"])
        assert row["retrieved_by"] == sorted(row["retrieved_by"], key=order.index)

    table = step.report(store)
    assert table is not None
    lines = {line["set"]: line for line in table["sets"]}
    assert lines["file"]["seeds"] == 19
    assert lines["file"]["retrieved"] == lines["file"]["final"] == 19 * 3
    assert lines["own"]["final"] == len(own) * 2
    assert lines["file"]["recall"] == lines["own"]["recall"] == 1.0  # all ten cells were searched
    assert (lines["small"]["retrieved"], lines["small"]["final"]) == (expected["small"][1], len(expected["small"][0]))
    assert (lines["folder"]["cells"], lines["folder"]["seeds"]) == (int((folder > 9).sum()), len(inside))
    assert table["different_images"] == sum(row["is_retrieved"] for row in found)
    assert counts["retrieved by kept"] == len(expected["kept"])
    assert store.names("_work/retrieved") == []


def test_recall_is_measured_honestly(tmp_path: Path) -> None:
    """Guards against a run that searches one cell and calls it exact."""
    store = Store(str(tmp_path / "run"))
    shards, rows = build(store)
    cells = _cells(store, shards)
    settings = _sets(tmp_path)
    narrow = settings.sets[0].model_copy(update={"nprobe": 1, "k": 10})
    step = retrieve_step(settings.model_copy(update={"sets": [narrow], "recall_seeds": 20}), cells)
    go(step, store, shards)
    report = step.report(store)
    assert report is not None
    _, vectors = _usable(rows)
    centroids = _unit(_centroids(store, cells))
    home = (_unit(vectors) @ centroids.T).argmax(axis=1)
    hits = wanted = 0
    for query in _unit(np.delete(np.load(tmp_path / "file.npy").astype(np.float64), 4, axis=0)):
        cosine = _unit(vectors) @ query
        mine = np.flatnonzero(home == (centroids @ query).argmax())
        near = set(mine[np.argsort(-cosine[mine])[:10]].tolist())
        truth = set(np.argsort(-cosine)[:10].tolist())
        hits, wanted = hits + len(near & truth), wanted + 10
    assert 0 < hits < wanted
    assert report["sets"][0]["recall"] == pytest.approx(hits / wanted, abs=1e-4)


def test_codes_and_exact_comparison_give_the_exact_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the search over codes: what it finds is compared with the vectors at rest, and its recall is its own."""
    store = Store(str(tmp_path / "run"))
    shards, _ = build(store)
    cells = _cells(store, shards)
    monkeypatch.setattr(seeds, "SEEDS_PER_CHUNK", 11)
    settings = _sets(tmp_path)
    settings = settings.model_copy(update={"sets": [settings.sets[0], settings.sets[2]]})

    def run(**update: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        step = retrieve_step(settings.model_copy(update=update), cells)
        go(step, store, shards, shuffled_map)
        report = step.report(store)
        assert report is not None
        return rows_of(store, step.tables[0], shards), report

    exact, told = run()
    assert run(codes="SQ8", rerank=10) == (exact, told)
    rough, worse = run(codes="PQ1", rerank=1)
    lines = {line["set"]: line for line in worse["sets"]}
    assert rough != exact and 0 < lines["file"]["recall"] < 1
    for row, other in zip(rough, exact, strict=True):
        assert ("small" in row["retrieved_by"]) == ("small" in other["retrieved_by"])  # cells need no codes
    with pytest.raises(PlanError, match="expected a divisor"):
        run(codes="PQ5")


def test_embedded_images_retrieve_as_a_file_of_their_vectors(tmp_path: Path) -> None:
    """Guards against seeds that get lost between the files that a pipeline embedded."""
    store = Store(str(tmp_path / "run"))
    shards, rows = build(store)
    cells = _cells(store, shards)
    vectors = _usable(rows)[1][:30].astype(np.float16)
    for number, part in enumerate((vectors[:13], vectors[:0], vectors[13:])):
        curate.vectors.put_arrays(store, f"_seeds/x/{number:08d}.npz", vectors=part)
    store.put_json("_seeds/x/rows.json", {"rows": [13, 0, 17]})
    np.save(tmp_path / "same.npy", vectors)
    found = []
    for update in ({"images": "folder"}, {"embeddings": str(tmp_path / "same.npy")}):
        one = SeedSet.model_validate({"name": "set", "how": "sample", "k": 3, "nprobe": 10, **update})
        step = retrieve_step(RetrieveSettings(sets=[one]), cells, {"set": "_seeds/x"})
        go(step, store, shards)
        found.append((rows_of(store, step.tables[0], shards), step.report(store)))
    assert found[0] == found[1]
    with pytest.raises(PlanError, match="embeds no seed sets"):
        retrieve_step(RetrieveSettings(sets=[SeedSet(name="set", how="sample", images="folder")]), cells)


def test_killed_anywhere_goes_on_to_the_same_rows(tmp_path: Path) -> None:
    """Guards against half of a pass that a second run takes for the whole."""
    settings = _sets(tmp_path).model_copy(update={"codes": "SQ8"})
    l2 = CELLS.model_copy(update={"metric": "l2"})
    upper = LevelSettings(count=3, resampling=1, sample_size=2)
    hierarchy = HierarchySettings(splits=2, levels=[upper], targets=[90], iterations=3)

    def steps(store: Store, shards: list[Shard]) -> Iterator[Callable[[], CrossStep]]:
        yield lambda: cells_step(l2, store, TABLES, shards)
        yield lambda: retrieve_step(settings, cells_step(l2, store, TABLES, shards))
        yield lambda: hierarchy_step(hierarchy, cells_step(l2, store, TABLES, shards))

    trees = []
    for name in ("whole", "killed"):
        store = Store(str(tmp_path / name))
        shards, _ = build(store)
        for make in steps(store, shards):
            for survives in itertools.count(1, 13) if name == "killed" else ():
                try:
                    go(make(), store, shards, dying_map(survives))
                except Killed:
                    continue
                assert survives > 3
                break
            go(make(), store, shards)
        trees.append(_tree(tmp_path / name))
    assert trees[0] == trees[1]


def test_hierarchical_sample_follows_the_quotas(tmp_path: Path) -> None:
    """Guards against samples that follow the pool's frequencies, and against quotas that workers count twice."""
    store = Store(str(tmp_path))
    shards, _ = build(store)
    cells = _cells(store, shards, CELLS.model_copy(update={"metric": "l2"}))
    settings = HierarchySettings(targets=[50, 5000], how="closest", multiplier=2, seed=4)
    step = hierarchy_step(settings, cells)
    counts = go(step, store, shards, shuffled_map)
    found = rows_of(store, step.tables[0], shards)
    held = rows_of(store, cells.tables[0], shards)
    sizes = np.bincount([row["cell"] for row in held if row["cell"] is not None], minlength=10)
    for target in settings.targets:
        share = allocate(Tree(sizes), target, 2, 4)
        for cell in range(10):
            inside = sorted(
                (at for at, row in enumerate(held) if row["cell"] == cell), key=lambda at: (held[at]["distance"], at)
            )
            whole, rest = divmod(int(share[cell]), max(len(inside), 1))
            expected = [whole + (place < rest) for place in range(len(inside))]
            assert [found[at][f"hierarchical_sample_{target}"] for at in inside] == expected
    assert counts == {"hierarchical_sample_50": 50, "hierarchical_sample_5000": 2 * int(sizes.sum())}
    assert all(found[at]["hierarchical_sample_5000"] == 0 for at, row in enumerate(held) if row["cell"] is None)


def test_parquet_seeds(tmp_path: Path) -> None:
    """Guards against row groups that are read twice or not at all, and nulls that shift the rest."""
    store = Store(str(tmp_path / "run"))
    shards, rows = build(store)
    cells = _cells(store, shards)
    _, vectors = _usable(rows)
    lists = [None if at == 5 else vector.astype(np.float32).tolist() for at, vector in enumerate(vectors[:30])]
    pq.write_table(pa.table({"name": list(range(30)), "v": lists}), tmp_path / "seeds.parquet", row_group_size=11)
    one = SeedSet(name="set", how="sample", embeddings=str(tmp_path / "seeds.parquet"), k=1, nprobe=10)
    step = retrieve_step(RetrieveSettings(sets=[one]), cells)
    go(step, store, shards)
    numbers = _usable(rows)[0]
    found = {at for at, row in enumerate(rows_of(store, step.tables[0], shards)) if row["is_retrieved"]}
    assert found == set(numbers[:30].tolist()) - {int(numbers[5])}
