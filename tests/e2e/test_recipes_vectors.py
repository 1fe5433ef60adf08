"""The recipes that choose by vectors: each config runs, and each row's fate is recomputed here.

Seeds are vectors of the pool itself (recipe_pool.py), a little moved.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.engine.driver import Driver
from curate.engine.job import Job
from curate.retrieve.hierarchy import Tree, allocate
from curate.vectors import get_arrays, hashed, key_numbers
from tests.e2e.conftest import release_of
from tests.e2e.recipe_pool import Pool, Row, config_of, first_copies, released_of, rows_of, run_recipe, unit


def _gap(values: np.ndarray, share: float) -> float:
    """A number below about this share of the values, in the middle of the widest gap nearby: no rounding crosses it."""
    ascending = np.sort(values)
    place = int((1 - share) * len(values))
    some = ascending[max(0, place - 8) : place + 8]
    at = int(np.diff(some).argmax())
    return float((some[at] + some[at + 1]) / 2)


def _centroids(job: Job) -> np.ndarray:
    held = get_arrays(job.store, f"_cells/{job.tables['cells'].fingerprint}/centroids.npz")
    return np.asarray(held["centroids"], np.float64)


def _components(near: np.ndarray) -> np.ndarray:
    """A number for each row of a symmetric bool[n, n]: the smallest row that it is connected with."""
    group = np.arange(len(near))
    while True:
        least = np.where(near | np.eye(len(near), dtype=bool), group[None, :], len(near)).min(axis=1)
        if (least == group).all():
            return group
        group = least


def _without_near(
    rows: list[Row], kept: set[str], references: np.ndarray, same: float, as_reference: float
) -> set[str]:
    """DINOv2's App. A.3: one of each component stays, then no component with a reference."""
    some = [row for row in rows if row["status"] == "ok" and row["key"] in kept and row["sscd_image"]]
    some.sort(key=lambda row: (-row["width"] * row["height"], row["key"]))  # the first of a component is its least row
    vectors = unit(np.array([row["sscd_image"] for row in some], np.float64))
    first = _components(vectors @ vectors.T > same) == np.arange(len(some))
    some, vectors = [row for row, one in zip(some, first, strict=True) if one], vectors[first]
    group = _components(vectors @ vectors.T > as_reference)
    hit = (vectors @ unit(references).T > as_reference).any(axis=1)
    gone = set(group[hit].tolist())
    return {row["key"] for row, one in zip(some, group.tolist(), strict=True) if one not in gone}


def _seeds(pool: Pool, folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Write seeds/<name>.parquet for each set; the vectors as they stand there."""
    rng = np.random.default_rng(4)
    (folder / "seeds").mkdir(parents=True)
    held = pool.vectors["dinov2_image"]
    ids = sorted(held)
    made = {}
    for number, name in enumerate(names):
        some = [held[at] for at in ids[number :: 2 * len(names)]] * (1 if number % 3 else 2)
        vectors = (np.array(some) + rng.normal(size=(len(some), len(some[0]))) * 0.02).astype(np.float32)
        lists = pa.array([None, *vectors.tolist()], pa.list_(pa.float32()))  # one file of the folder was no image
        pq.write_table(pa.table({"path": [str(at) for at in range(len(lists))], "v": lists}),
                       folder / "seeds" / f"{name}.parquet")  # fmt: skip
        made[name] = vectors.astype(np.float64)
    return made


def _nearest(pool_rows: list[Row], seeds: np.ndarray, k: int) -> set[str]:
    """Keys of the k nearest rows of each seed."""
    vectors = unit(np.array([row["dinov2_image"] for row in pool_rows], np.float64))
    order = np.argsort(-(unit(seeds) @ vectors.T), axis=1, kind="stable")[:, :k]
    return {pool_rows[at]["key"] for at in order.ravel()}


def _of_cells(job: Job, rows: list[Row], home: np.ndarray, seeds: np.ndarray, one: Any) -> tuple[set[str], int]:
    """(keys, images before the cap) of a cluster set: `home` is the cell of each row, -1 for none."""
    counts = np.bincount((unit(seeds) @ unit(_centroids(job)).T).argmax(axis=1), minlength=len(_centroids(job)))
    seed = zlib.crc32(one.name.encode())
    marks = hashed(key_numbers([row["key"] for row in rows]), seed)
    drawn: list[int] = []
    for cell in np.flatnonzero(counts > one.more_than):
        drawn += sorted(np.flatnonzero(home == cell).tolist(), key=lambda at: int(marks[at]))[: one.per_cell]
    cut = hashed(np.arange(len(rows)), seed, salt=1)
    return {rows[at]["key"] for at in sorted(drawn, key=lambda at: int(cut[at]))[: one.cap]}, len(drawn)


def _limits_of_copies(vectors: np.ndarray, references: np.ndarray) -> tuple[float, float]:
    """In the place of SSCD's 0.6 and 0.45: a fifth of the rows have a copy, another tenth is near a reference."""
    own, others = unit(vectors), unit(references)
    near = np.tril(own @ own.T, -1).max(axis=1)
    return _gap(near[1:], 0.2), _gap((own @ others.T).max(axis=1), 0.1)


def test_lvd142m(pool: Pool, tmp_path: Path, capsys: Any, ray_driver: Driver) -> None:
    """Guards against table 15's sets that retrieve what another rule would."""
    own = config_of("lvd142m", tmp_path, pool)
    sets, dedup = own["retrieve"]["sets"], own["dedup"]
    seeds = _seeds(pool, tmp_path, [one["name"] for one in sets if one["how"] != "as_is"])
    small = {"sample": {"nprobe": 6, "k": 2}, "cluster": {"per_cell": 6, "cap": 20}, "as_is": {}}
    smaller = [one | small[one["how"]] for one in sets]
    held = pool.vectors["sscd_image"]
    references = np.array([held[at] for at in sorted(held)[5::60]])
    same, as_reference = _limits_of_copies(np.array(list(held.values())), references)
    dedup[1] |= {"threshold": same}
    dedup[1]["against"][0]["threshold"] = as_reference
    lists = pa.array(references.tolist(), pa.list_(pa.float32()))
    pq.write_table(pa.table({"v": lists}), tmp_path / "seeds" / "evaluation_sscd.parquet")
    job = run_recipe(
        "lvd142m", pool, tmp_path / "run", ray_driver, dedup=dedup, cells={"count": 6}, retrieve={"sets": smaller}
    )
    names = ("id", "status", "dataset", "width", "height", "image_phash", "nsfw_score_opennsfw2", "sscd_image",
             "dinov2_image", "retrieved_by", "retrieved_count", "num_faces")  # fmt: skip
    rows = rows_of(job, *names)
    unhashed = first_copies(rows, "image_phash")
    fresh = _without_near(rows, unhashed, references, same, as_reference)
    assert 60 < len(fresh) < len(unhashed) - 20
    unsafe = pool.limits["nsfw_score_opennsfw2", 0.5]
    inside = np.array([
        row["dinov2_image"] is not None and row["status"] == "ok" and row["dataset"] is None
        and row["key"] in fresh and row["nsfw_score_opennsfw2"] < unsafe
        for row in rows
    ])  # fmt: skip
    some = [row for row, held in zip(rows, inside, strict=True) if held]
    home = np.full(len(rows), -1)
    vectors = unit(np.array([row["dinov2_image"] for row in some], np.float64))
    home[inside] = (vectors @ unit(_centroids(job)).T).argmax(axis=1)
    report = {
        line["set"]: line
        for line in json.loads(next((tmp_path / "run").glob("_retrieved/*/*.json")).read_text())["sets"]
    }
    expected: set[str] = set()
    assert job.recipe.retrieve is not None
    for one in job.recipe.retrieve.sets:
        if one.how == "as_is":
            wanted = {row["key"] for row in rows if row["status"] == "ok" and f"{row['dataset']}_as_is" == one.name}
        elif one.how == "sample":
            wanted = _nearest(some, seeds[one.name], one.k)
            assert report[one.name]["final"] == one.k * len(seeds[one.name])
            assert report[one.name]["recall"] == 1.0
        else:
            wanted, before = _of_cells(job, rows, home, seeds[one.name], one)
            assert (report[one.name]["retrieved"], report[one.name]["final"]) == (before, len(wanted))
        assert {row["key"] for row in rows if one.name in row["retrieved_by"]} == wanted, one.name
        expected |= wanted
    assert len(report) == 27
    assert sum(line["final"] > 0 for line in report.values()) > 9
    assert released_of(job) == {"lvd142m": expected}
    assert 60 < len(expected) < sum(row["status"] == "ok" for row in rows)
    assert any(row["num_faces"] for row in rows if row["key"] in expected)  # some are blurred in the release
    assert "fgvc_aircraft" in capsys.readouterr().out


def test_lvd142m_on_ray_gives_the_same_release(pool: Pool, tmp_path: Path, ray_driver: Driver) -> None:
    """Guards against rows that depend on where and how widely the steps ran."""
    seeds = _seeds(pool, tmp_path, ["file"])
    sets = [
        {"name": "file", "how": "sample", "embeddings": str(tmp_path / "seeds" / "file.parquet"), "k": 1},
        {"name": "own", "how": "cluster", "where": "id % 3 = 0", "per_cell": 9, "cap": 30},
    ]
    for root, driver in (("inline", None), ("ray", ray_driver)):
        run_recipe(
            "lvd142m",
            pool,
            tmp_path / root,
            driver,
            dedup=[{"by": "image_phash"}],
            cells={"count": 5},
            retrieve={"sets": sets},
        )
    assert len(seeds["file"]) > 5
    assert release_of(tmp_path / "inline") == release_of(tmp_path / "ray")


def test_lvd1689m(pool: Pool, tmp_path: Path, ray_driver: Driver) -> None:
    """Guards against a balanced sample that ignores its quotas, and parts that are mixed up."""
    _seeds(pool, tmp_path, ["imagenet22k", "gldv2"])
    levels = [{"count": 6, "resampling": 2, "sample_size": 2}, {"count": 3}]
    subsets = config_of("lvd1689m", tmp_path, pool)["subsets"]
    subsets["sampled"]["where"] = subsets["sampled"]["where"].replace("1689000000", "120")
    job = run_recipe("lvd1689m", pool, tmp_path / "run", ray_driver, cells={"count": 20}, subsets=subsets,
               hierarchy={"splits": 1, "levels": levels, "targets": [120], "iterations": 5})  # fmt: skip
    rows = rows_of(job, "dataset", "status", "sha256", "width", "height", "cell", "distance", "hierarchical_sample_120",
                 "retrieved_by")  # fmt: skip
    fresh = first_copies(rows, "sha256")
    assert all((row["cell"] is not None) == (row["status"] == "ok") for row in rows)
    cells = np.array([
        row["cell"] if row["status"] == "ok" and row["dataset"] is None and row["key"] in fresh else -1 for row in rows
    ])  # fmt: skip
    taken = np.array([row["hierarchical_sample_120"] for row in rows])
    sizes = np.bincount(cells[cells >= 0], minlength=20)
    given = np.bincount(cells[cells >= 0], weights=taken[cells >= 0], minlength=20)
    assert taken.sum() == 120
    assert taken[cells < 0].sum() == 0
    for cell in range(20):  # the closest of each cell
        inside = sorted(np.flatnonzero(cells == cell).tolist(), key=lambda at: (rows[at]["distance"], at))
        assert [int(taken[at]) for at in inside] == [int(place < given[cell]) for place in range(len(inside))]
    flat = allocate(Tree(sizes), 120, 1, 0)
    assert np.abs(given - flat).max() <= 40  # the tree moves shares between concepts, not out of them
    shares = given[sizes > 0] / sizes[sizes > 0]
    assert np.ptp(shares) > 0.3  # a sample that takes 29 % of every cell has no concepts; here some keep most of theirs
    released = released_of(job)
    assert released["sampled"] == {rows[at]["key"] for at in np.flatnonzero(taken)}
    assert released["curated"] == {
        row["key"]
        for row in rows
        if row["status"] == "ok" and row["dataset"] in ("imagenet1k", "imagenet22k", "mapillary_sls")
    }
    assert released["imagenet1k"] == {
        row["key"] for row in rows if row["status"] == "ok" and row["dataset"] == "imagenet1k"
    }
    near = {"imagenet22k", "gldv2"}
    assert released["retrieved"] == {row["key"] for row in rows if near & set(row["retrieved_by"])}
    assert len(released["retrieved"]) > 30


@pytest.mark.parametrize("ready", [False, True])
def test_datacomp(pool: Pool, tmp_path: Path, ray_driver: Driver, *, ready: bool) -> None:
    """Guards against cells by cosine where DataComp takes inner products, cells with a seed that are left out, unsafe
    rows in a baseline, and a share of the wrong rows."""
    rng, held = np.random.default_rng(6), pool.vectors["clip_vitl14_image"]
    vectors = np.array([held[at] for at in sorted(held)])
    np.save(tmp_path / "in1k.npy", (vectors[::40] + rng.normal(size=vectors[::40].shape) * 0.02).astype(np.float16))
    (tmp_path / "seeds").mkdir()
    copies = pool.vectors["isc_image"]
    evaluation = np.array([copies[at] for at in sorted(copies)[5::60]])
    np.save(tmp_path / "seeds" / "eval_dedup.npy", evaluation)
    own = config_of("datacomp", tmp_path, pool)
    dedup, subsets = own["dedup"], own["subsets"]
    same = _gap((unit(np.array(list(copies.values()))) @ unit(evaluation).T).max(axis=1), 0.1)
    dedup[0]["against"][0]["threshold"] = same
    cells: dict[str, Any] = {"count": 40}
    if ready:
        np.save(
            tmp_path / "centroids.npy",
            vectors[rng.choice(len(vectors), 40, replace=False)] * rng.uniform(0.7, 1.3, (40, 1)),
        )
        cells["centroids"] = str(tmp_path / "centroids.npy")
    job = run_recipe("datacomp", pool, tmp_path / "run", ray_driver, dedup=dedup, cells=cells, subsets=subsets)
    rows = rows_of(job, "status", "clip_vitl14_image", "isc_image", "clip_similarity_vitl14", "clip_similarity_vitb32",
                 "language", "word_count", "text_length", "punsafe", "text_unsafe", "synset_words", "original_width",
                 "original_height")  # fmt: skip
    centroids = _centroids(job)
    wanted = set((np.load(tmp_path / "in1k.npy").astype(np.float64) @ centroids.T).argmax(axis=1).tolist())
    assert 2 < len(wanted) < 30
    for row in rows:
        held, copied = row["clip_vitl14_image"], row["isc_image"]
        row["evaluated"] = bool(copied) and bool((unit(evaluation) @ unit(np.array(copied, np.float64)) > same).any())
        row["near"] = bool(held) and int((centroids @ np.array(held, np.float64)).argmax()) in wanted
    limits = pool.limits["punsafe", 0.1], pool.limits["text_unsafe", 0.1]
    safe = [row for row in rows if row["status"] == "ok" and row["punsafe"] <= limits[0]]
    good = [row for row in safe if row["text_unsafe"] is not None and row["text_unsafe"] <= limits[1]]
    assert len(good) < len(safe) < sum(row["status"] == "ok" for row in rows)
    good = [row for row in good if not row["evaluated"]]
    tops = [_top(good, name, 0.3) for name in ("clip_similarity_vitl14", "clip_similarity_vitb32")]
    english = [row for row in good if row["language"] == "en"]
    image_based = {row["key"] for row in english if row["near"] and row["word_count"] > 1 and row["text_length"] > 5}
    released, least = released_of(job), pool.limits["clip_similarity_vitb32", 0.28]
    assert released == {
        "pool": {row["key"] for row in good},
        "basic": {
            row["key"] for row in english
            if row["word_count"] >= 3 and row["text_length"] > 5
            and min(row["original_width"], row["original_height"]) >= 200
            and max(row["original_width"], row["original_height"])
            <= 3 * min(row["original_width"], row["original_height"])
        },
        "clip_l14_30": tops[0], "clip_b32_30": tops[1],
        "laion2b": {row["key"] for row in english if (row["clip_similarity_vitb32"] or -1) >= least},
        "text_based": {row["key"] for row in english if row["synset_words"] > 0},
        "image_based": image_based, "datacomp_1b": image_based & tops[0],
    }  # fmt: skip
    assert len({frozenset(keys) for keys in released.values()}) == 8
    assert min(len(keys) for keys in released.values()) > 3
    assert sum(row["evaluated"] for row in rows) > 10


def _top(rows: Sequence[Row], by: str, fraction: float) -> set[str]:
    """Keys of DataComp's share: the value at int(N * f) in descending order, ties kept."""
    scores = sorted((row[by] for row in rows if row[by] is not None), reverse=True)
    return {row["key"] for row in rows if row[by] is not None and row[by] >= scores[int(len(scores) * fraction)]}


def test_semdedup(pool: Pool, tmp_path: Path, ray_driver: Driver) -> None:
    """Guards against components where SemDeDup takes each row alone, an order turned round, and eps mixed up."""
    dedup = config_of("semdedup", tmp_path, pool)["dedup"]
    dedup[0] |= {"cells": 1}
    job = run_recipe("semdedup", pool, tmp_path / "run", ray_driver, dedup=dedup)
    rows = rows_of(job, "status", "clip_image")
    some = [row for row in rows if row["status"] == "ok" and row["clip_image"]]
    vectors = np.array([row["clip_image"] for row in some], np.float64)
    centre = unit(unit(np.unique(vectors, axis=0)).mean(axis=0))  # of the one cell
    vectors = unit(vectors)
    order = np.argsort(vectors @ centre, kind="stable")  # the farthest first
    near = np.tril(vectors[order] @ vectors[order].T, -1).max(axis=1)  # to the rows before
    expected = {
        name: {some[at]["key"] for at, most in zip(order.tolist(), near.tolist(), strict=True) if most <= 1 - eps}
        | {row["key"] for row in rows if row["status"] == "ok" and not row["clip_image"]}
        for name, eps in {
            "eps_00095": 0.00095,
            "eps_0395": 0.0395,
            "eps_07": 0.07,
            "eps_124": 0.124,
            "eps_26": 0.26,
        }.items()
    }
    released = released_of(job)
    for name, keys in expected.items():
        assert len(released[name] ^ keys) == 0, (name, len(released[name]), len(keys))
    sizes = [len(released[name]) for name in expected]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) >= 3


def test_second_run_does_nothing(pool: Pool, tmp_path: Path) -> None:
    """Guards against steps that retrieve, balance or emit again what is there."""
    sets = [{"name": "own", "how": "sample", "where": "id % 50 = 0", "k": 2}]
    for _ in range(2):
        job = run_recipe(
            "lvd142m",
            pool,
            tmp_path / "run",
            dedup=[{"by": "image_phash"}],
            cells={"count": 5},
            retrieve={"sets": sets},
        )
    assert {record.name: record.todo for record in job.records} == {record.name: 0 for record in job.records}
