"""Copies by embedding across shards: brute force, the published forms, references, kills, and bounded memory."""

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curate.config import DedupSettings, ReferenceSettings
from curate.dedup import near_vectors
from curate.dedup.components import groups
from curate.errors import PlanError
from tests.dedup.pool import VectorPool, Vectors, cosines, in_small_cells, planted, shuffled

RULE = DedupSettings(by="embedding_toy", threshold=0.9, keep="key")


def _components(vectors: Vectors, threshold: float, without: Sequence[int] = (), strict: bool = False) -> Any:
    matrix = cosines(vectors)
    matrix[list(without)] = -2
    matrix[:, list(without)] = -2
    near = matrix > np.float32(threshold) if strict else matrix >= np.float32(threshold)
    return groups(len(vectors), np.argwhere(np.triu(near, 1)))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_one_cell_is_brute_force(tmp_path: Path, dtype: str) -> None:
    """Guards against near copies that fall on different shards, and rows without a vector that take part."""
    vectors = planted(dtype=dtype)
    pool = VectorPool(tmp_path, vectors, 130, null=range(20, 40), failed=range(60, 80))
    step, counts = pool.run(RULE)
    expected = pool.firsts(_components(vectors, 0.9, without=[*range(20, 40), *range(60, 80)]))
    assert pool.gone(step) == expected and len(expected) > 200
    assert counts["duplicate by embedding_toy"] == len(expected)
    place, true = {key: row for row, key in enumerate(pool.keys)}, cosines(vectors)
    for row in pool.rows(step):
        if row["is_duplicate"]:
            similar = true[place[row["key"]], place[row["duplicate_of"]]]
            assert row["duplicate_similarity"] == pytest.approx(similar, abs=1e-6)
    told = pool.store.get_json(f"{pool.store.folder(step.tables[0])}/_recall.json")["0:embedding_toy"]
    assert told["rate"] == 1 and told["true"] == told["found"] > 100
    assert pool.store.names("_work/duplicates") == []


def test_over_cells_and_partitions_nearly_all_and_nothing_false(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against pairs lost between partitions, a recall that is not the true one, and an order that matters."""
    in_small_cells(monkeypatch)
    vectors = planted(3_000)
    pool = VectorPool(tmp_path / "a", vectors, 130)
    step, _ = pool.run(RULE)
    found, exact = pool.gone(step), pool.firsts(_components(vectors, 0.9))
    assert set(found) <= set(exact) and len(found) >= 0.98 * len(exact)
    told = pool.store.get_json(f"{pool.store.folder(step.tables[0])}/_recall.json")["0:embedding_toy"]
    assert 0.97 <= told["rate"] <= 1 and told["rows"] > 500
    other = VectorPool(tmp_path / "b", vectors, 130)
    again, _ = other.run(RULE, map_items=shuffled)
    assert other.rows(again) == pool.rows(step)


def test_killed_anywhere_and_run_again_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against intermediate files that a kill leaves half, or that a second run counts twice."""
    in_small_cells(monkeypatch)
    vectors = planted(450)
    np.save(tmp_path / "eval.npy", vectors[::90].astype(np.float32))
    set_ = ReferenceSettings(name="eval", embeddings=str(tmp_path / "eval.npy"), threshold=0.8)
    rules = [RULE, DedupSettings(by="embedding_toy", within=False, against=[set_])]
    whole = VectorPool(tmp_path / "whole", vectors, 120)
    step, _ = whole.run(*rules)
    for limit in (1, 4, 9, 15, 22, 30, 40):
        pool = VectorPool(tmp_path / f"killed{limit}", vectors, 120)
        budget = [limit]

        def mortal(function: Callable[[Any], Any], items: Sequence[Any], left: list[int] = budget) -> Iterator[Any]:
            for item in items:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                yield function(item)

        try:
            again, _ = pool.run(*rules, map_items=mortal)
        except KeyboardInterrupt:
            again, _ = pool.run(*rules)
        assert pool.rows(again) == whole.rows(step)


def test_dinov2_form_is_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """k nearest, edges above 0.6, components (arXiv 2304.07193, App. A.3), restated; copies are folded, not counted."""
    monkeypatch.setattr(near_vectors, "CHUNK_BYTES", 20_000)
    vectors = planted(500, width=8)
    matrix = cosines(vectors)
    np.fill_diagonal(matrix, -2)
    for neighbours in (1, 3, 64):
        pool = VectorPool(tmp_path / str(neighbours), vectors, 60)
        step, _ = pool.run(DedupSettings(by="embedding_toy", form="dinov2", neighbours=neighbours, keep="key"))
        edges = []
        for row in range(500):
            nearest = np.lexsort((np.arange(500), -matrix[row]))[:neighbours]
            edges += [(row, at) for at in nearest if matrix[row, at] > np.float32(0.6)]
        assert pool.gone(step) == pool.firsts(groups(500, np.array(edges, np.int64)))


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.4])
def test_semdedup_form_is_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eps: float) -> None:
    """Cells, farthest first, upper triangle, largest cosine above 1 - eps (arXiv 2303.09540, A7), restated."""
    monkeypatch.setattr(near_vectors, "CHUNK_BYTES", 20_000)
    vectors = planted(600, width=8, dtype="float32")
    seen: dict[str, Any] = {}
    train = near_vectors._train

    def spy(*args: Any) -> Any:
        seen["centres"], drawn = train(*args)
        return seen["centres"], drawn

    monkeypatch.setattr(near_vectors, "_train", spy)
    pool = VectorPool(tmp_path, vectors, 60)
    step, _ = pool.run(DedupSettings(by="embedding_toy", form="semdedup", eps=eps, cells=4))
    matrix, centres = cosines(vectors), seen["centres"].astype(np.float64)
    usable = np.flatnonzero(np.isfinite(vectors.astype(np.float64)).all(axis=1) & (vectors != 0).any(axis=1))
    wide = vectors[usable].astype(np.float64)
    to_centre = (wide / np.sqrt((wide * wide).sum(axis=1, keepdims=True))) @ centres.T
    gone = set()
    for cell in range(4):
        mine = np.flatnonzero(to_centre.argmax(axis=1) == cell)
        order = usable[mine[np.argsort(to_centre[mine, cell].astype(np.float32), kind="stable")]]
        largest = np.triu(matrix[order][:, order], 1).max(axis=0)
        gone |= {pool.keys[row] for row in order[largest > np.float32(1 - eps)]}
    rows = {row["key"]: row for row in pool.rows(step) if row["is_duplicate"]}
    assert set(rows) == gone and (len(gone) > 100 or not eps)
    place = {key: row for row, key in enumerate(pool.keys)}
    for key, row in rows.items():
        true = matrix[place[key], place[row["duplicate_of"]]]
        assert row["duplicate_similarity"] == pytest.approx(true, abs=1e-6) and true > 1 - eps


@pytest.mark.parametrize("match", ["component", "direct"])
def test_what_touches_a_reference_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, match: Any) -> None:
    """DINOv2's relative dedup: rows whose component holds an evaluation image, and which image it is."""
    in_small_cells(monkeypatch)
    monkeypatch.setattr(near_vectors, "ONE_CELL", 1_000)
    vectors = planted(800)
    wanted = [row for row in range(0, 800, 50) if np.isfinite(vectors[row].astype(np.float64)).all()]
    evaluation = vectors[wanted] + np.float16(0.05)
    np.savez(tmp_path / "eval.npz", vectors=evaluation, ids=np.array([f"val/{row}.jpg" for row in wanted]))
    set_ = ReferenceSettings(name="val", embeddings=str(tmp_path / "eval.npz"), threshold=0.8, match=match)
    pool = VectorPool(tmp_path / "pool", vectors, 130)
    step, counts = pool.run(RULE.model_copy(update={"against": [set_]}))
    both = cosines(np.concatenate([vectors, evaluation]))
    self_gone = pool.firsts(_components(vectors, 0.9))
    left = np.array([key not in self_gone for key in pool.keys])
    reach = (both[:800, 800:] > np.float32(0.8)) & left[:, None]
    hit = reach.any(axis=1)
    if match == "component":
        pairs = np.argwhere(np.triu((both[:800, :800] >= np.float32(0.8)) & left & left[:, None], 1))
        group = groups(800, pairs)
        hit = np.isin(group, group[hit]) & left
    rows = pool.rows(step)
    marked = [row["duplicate_kind"] == "reference:val" for row in rows]
    assert marked == hit.tolist() and sum(marked) == counts["duplicate by reference:val"] > 5
    assert {row["key"] for row in rows if row["duplicate_kind"] == "embedding_toy"} == set(self_gone)
    for at, row in enumerate(rows):
        if marked[at] and reach[at].any():
            assert row["duplicate_of"] == f"val/{wanted[int(both[at, 800:].argmax())]}.jpg"
            assert row["duplicate_similarity"] == pytest.approx(both[at, 800:].max(), abs=1e-6)
        elif marked[at]:
            assert row["duplicate_of"].startswith("val/") and "connected" in row["duplicate_reason"]


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in bytes elsewhere")
def test_half_of_all_rows_one_image_costs_no_memory(tmp_path: Path) -> None:
    """Guards against a placeholder image that fills a process: peak memory as without it."""
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((24_000, 64)).astype(np.float16)
    vectors[1::2] = vectors[1]
    pool = VectorPool(tmp_path, vectors, 2_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step, counts = pool.run(RULE)
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert counts["duplicate by embedding_toy"] == 11_999
    assert len(set(pool.gone(step).values())) == 1
    assert grown_mb < 400  # all pairs of the copies would be 1.1 GB, and their matrix 576 MB


def test_wrong_settings_fail_in_the_plan(tmp_path: Path) -> None:
    """Guards against a typo that is found after the fetch."""
    pool = VectorPool(tmp_path, planted(20), 10)
    np.save(tmp_path / "narrow.npy", np.ones((3, 5), np.float32))
    narrow = ReferenceSettings(name="val", embeddings=str(tmp_path / "narrow.npy"), threshold=0.5)
    missing = ReferenceSettings(name="val", embeddings=str(tmp_path / "none.npy"), threshold=0.5)
    for wrong, says in (
        ({"by": "embedding_tay", "threshold": 0.5}, "embeddings_toy"),
        ({"by": "embedding_toy"}, "threshold: required"),
        ({"by": "embedding_toy", "form": "semdedup"}, "eps: required"),
        ({"by": "embedding_toy", "form": "semdedup", "eps": 0.1, "threshold": 0.5}, "threshold"),
        ({"by": "embedding_toy", "threshold": 0.5, "radius": 2}, "radius"),
        ({"by": "image_phash", "form": "dinov2"}, "form"),
        ({"by": "image_phash", "against": [narrow]}, "hashes"),
        ({"by": "embedding_toy", "threshold": 0.5, "against": [narrow]}, "vectors of 5"),
        ({"by": "embedding_toy", "threshold": 0.5, "against": [missing]}, "cannot be read"),
        ({"by": "embedding_toy", "within": False}, "within"),
    ):
        with pytest.raises(PlanError, match=says):
            pool.run(DedupSettings.model_validate(wrong))
