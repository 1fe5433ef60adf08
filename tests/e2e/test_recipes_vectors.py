"""The recipes that choose by vectors and by entries: each config runs, and each row's fate is recomputed here.

The configs are taken as they are in `configs/`; only models (the demo's tiny CLIP for all), sources and sizes are
smaller. Seeds are vectors of the pool itself, a little moved.
"""

import json
import shutil
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import configs
from curate.balance.metaclip import kept
from curate.config import parse_recipe
from curate.demo.paths import weights_dir
from curate.engine.driver import Driver
from curate.engine.inline import InlineDriver
from curate.engine.job import Job
from curate.retrieve.hierarchy import Tree, allocate
from curate.rows import columns_of, read_rows
from curate.vectors import get_arrays, hashed, key_numbers
from pipelines import datacomp, image_text, lvd142m, lvd1689m, metaclip, mode
from tests.e2e.conftest import Web, release_of

CONFIGS = Path(str(configs.__path__[0]))
PIPELINES = {
    "lvd142m": lvd142m, "lvd1689m": lvd1689m, "datacomp": datacomp, "metaclip": metaclip, "mode": mode,
    "semdedup": image_text,
}  # fmt: skip
SCORE = {
    "clip_vitl14": {"scorer": "clip", "model": f"local-dir:{weights_dir()}"}, "phash": {"scorer": "phash"},
    "text": {"scorer": "text_stats"}, "facts": {"scorer": "text_facts"},
}  # fmt: skip
FETCH = {"allow_networks": ["127.0.0.1/32"], "timeout_s": 60, "retries": 0, "image_size": 128, "min_image_size": 32}
ENTRIES = ["red", "blue", "circle", "square", "a red", "house", "tree", "on", "white", "unheard of", "with", "two"]

SAME, SAME_AS_REFERENCE = 0.97, 0.95  # cosine; in the place of SSCD's 0.6 and 0.45

Row = dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """The web fetched and scored once, with a table of its own: `dataset`, `punsafe` and NSFW scores are drawn."""

    table: Path
    root: Path
    vectors: Mapping[int, np.ndarray]  # by id, float64


@pytest.fixture(scope="module")
def pool(web: Web, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """What all recipes start from, so that each only does what is its own."""
    folder = tmp_path_factory.mktemp("pool")
    table = pq.read_table(web.table)
    rng = np.random.default_rng(1)
    sets = ["imagenet22k", "gldv2", "mapillary_sls", "imagenet1k", *[None] * 20]
    drawn = {
        "dataset": pa.array([sets[at] for at in rng.integers(0, len(sets), table.num_rows)], pa.string()),
        "punsafe": pa.array(rng.random(table.num_rows) * 0.12, pa.float32()),
        "text_unsafe": pa.array(rng.random(table.num_rows) * 0.11, pa.float32()),
        "face_boxes": pa.array(
            [[[0.1, 0.2, 0.6, 0.8]] * int(count) for count in rng.integers(0, 2, table.num_rows)],
            pa.list_(pa.list_(pa.float32())),
        ),
        "synset_words": pa.array(rng.integers(0, 3, table.num_rows), pa.int32()),
        "nsfw_score_opennsfw2": pa.array(rng.random(table.num_rows) * 0.6, pa.float32()),
    }
    table = table.drop_columns(["nsfw_score_opennsfw2"])
    for name, values in drawn.items():
        table = table.append_column(name, values)
    pq.write_table(table, folder / "urls.parquet")
    tree = {"root": str(folder / "run"), "ingest": _ingest(folder / "urls.parquet"), "fetch": FETCH, "score": SCORE,
            "engine": {"driver": "inline"}}  # fmt: skip
    job = Job(parse_recipe(tree))
    image_text.run(job)
    held = _rows(job, "id", "clip_vitl14_image")
    vectors = {row["id"]: np.array(row["clip_vitl14_image"], np.float64) for row in held if row["clip_vitl14_image"]}
    return Pool(folder / "urls.parquet", folder / "run", vectors)


def _ingest(table: Path) -> dict[str, Any]:
    return {"sources": [str(table)], "rows_per_shard": 100}


def _rows(job: Job, *names: str) -> list[Row]:
    """The named columns of all rows, in pool order."""
    columns = columns_of([spec for name, spec in job.tables.items() if not name.startswith("member_")])
    return [row for shard in job.shards for row in read_rows(job.store, columns, names, shard.name).to_pylist()]


def _own(name: str, folder: Path) -> dict[str, Any]:
    """A config with its own files in `folder`, since a worker of Ray stands elsewhere, and one CLIP for all models."""
    text = (CONFIGS / f"{name}.yaml").read_text().replace("dinov2_image", "clip_vitl14_image")
    text = text.replace("clip_similarity_vitb32", "clip_similarity_vitl14")
    for place in ("seeds/", "in1k.npy", "metadata.json"):
        text = text.replace(f" {place}", f" {folder}/{place}")
    tree: dict[str, Any] = yaml.safe_load(text)
    return tree


def _run(name: str, pool: Pool, root: Path, driver: Driver | None = None, **sections: Any) -> Job:
    """Run a config on the pool; `sections` replace keys of its sections."""
    if not root.exists():
        shutil.copytree(pool.root, root)
    tree = _own(name, root.parent)
    tree |= {"root": str(root), "ingest": _ingest(pool.table), "fetch": FETCH, "score": SCORE}
    for section, keys in sections.items():
        tree[section] = keys if section in ("subsets", "dedup") else tree[section] | keys
    job = Job(parse_recipe(tree), driver=lambda: driver or InlineDriver())
    PIPELINES[name].run(job)
    job.note()
    return job


def _released(job: Job) -> dict[str, set[str]]:
    """Keys by subset."""
    (path,) = Path(job.recipe.root).glob("releases/0*/manifest.parquet")
    manifest = pq.read_table(path, columns=["subset", "key"])
    found: dict[str, set[str]] = {name: set() for name in job.recipe.subsets}
    for subset, key in zip(manifest["subset"].to_pylist(), manifest["key"].to_pylist(), strict=True):
        found[subset].add(key)
    return found


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _centroids(job: Job) -> np.ndarray:
    held = get_arrays(job.store, f"_cells/{job.tables['cells'].fingerprint}/centroids.npz")
    return np.asarray(held["centroids"], np.float64)


def _first_copies(rows: list[Row], by: str) -> set[str]:
    """Keys of the rows that a rule `{by}` keeps, largest first; rows without a value are no copies."""
    best: dict[str, Row] = {}
    for row in rows:
        if row["status"] == "ok" and row[by] is not None:
            held = best.setdefault(row[by], row)
            if (-row["width"] * row["height"], row["key"]) < (-held["width"] * held["height"], held["key"]):
                best[row[by]] = row
    return {row["key"] for row in best.values()} | {row["key"] for row in rows if row[by] is None}


def _components(near: np.ndarray) -> np.ndarray:
    """A number for each row of a symmetric bool[n, n]: the smallest row that it is connected with."""
    group = np.arange(len(near))
    while True:
        least = np.where(near | np.eye(len(near), dtype=bool), group[None, :], len(near)).min(axis=1)
        if (least == group).all():
            return group
        group = least


def _without_near(rows: list[Row], kept: set[str], references: np.ndarray) -> set[str]:
    """DINOv2's App. A.3: one of each component stays, then no component with a reference."""
    some = [row for row in rows if row["status"] == "ok" and row["key"] in kept and row["clip_vitl14_image"]]
    some.sort(key=lambda row: (-row["width"] * row["height"], row["key"]))  # the first of a component is its least row
    vectors = _unit(np.array([row["clip_vitl14_image"] for row in some], np.float64))
    first = _components(vectors @ vectors.T > SAME) == np.arange(len(some))
    some, vectors = [row for row, one in zip(some, first, strict=True) if one], vectors[first]
    group = _components(vectors @ vectors.T > SAME_AS_REFERENCE)
    hit = (vectors @ _unit(references).T > SAME_AS_REFERENCE).any(axis=1)
    gone = set(group[hit].tolist())
    return {row["key"] for row, one in zip(some, group.tolist(), strict=True) if one not in gone}


def _seeds(pool: Pool, folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Write seeds/<name>.parquet for each set; the vectors as they stand there."""
    rng = np.random.default_rng(4)
    (folder / "seeds").mkdir(parents=True)
    ids = sorted(pool.vectors)
    made = {}
    for number, name in enumerate(names):
        some = [pool.vectors[at] for at in ids[number :: 2 * len(names)]] * (1 if number % 3 else 2)
        vectors = (np.array(some) + rng.normal(size=(len(some), len(some[0]))) * 0.02).astype(np.float32)
        lists = pa.array([None, *vectors.tolist()], pa.list_(pa.float32()))  # one file of the folder was no image
        pq.write_table(pa.table({"path": [str(at) for at in range(len(lists))], "v": lists}),
                       folder / "seeds" / f"{name}.parquet")  # fmt: skip
        made[name] = vectors.astype(np.float64)
    return made


def _nearest(pool_rows: list[Row], seeds: np.ndarray, k: int) -> set[str]:
    """Keys of the k nearest rows of each seed."""
    vectors = _unit(np.array([row["clip_vitl14_image"] for row in pool_rows], np.float64))
    order = np.argsort(-(_unit(seeds) @ vectors.T), axis=1, kind="stable")[:, :k]
    return {pool_rows[at]["key"] for at in order.ravel()}


def _of_cells(job: Job, rows: list[Row], home: np.ndarray, seeds: np.ndarray, one: Any) -> tuple[set[str], int]:
    """(keys, images before the cap) of a cluster set: `home` is the cell of each row, -1 for none."""
    counts = np.bincount((_unit(seeds) @ _unit(_centroids(job)).T).argmax(axis=1), minlength=len(_centroids(job)))
    seed = zlib.crc32(one.name.encode())
    marks = hashed(key_numbers([row["key"] for row in rows]), seed)
    drawn: list[int] = []
    for cell in np.flatnonzero(counts > one.more_than):
        drawn += sorted(np.flatnonzero(home == cell).tolist(), key=lambda at: int(marks[at]))[: one.per_cell]
    cut = hashed(np.arange(len(rows)), seed, salt=1)
    return {rows[at]["key"] for at in sorted(drawn, key=lambda at: int(cut[at]))[: one.cap]}, len(drawn)


def test_lvd142m(pool: Pool, tmp_path: Path, capsys: Any, ray_driver: Driver) -> None:
    """Guards against table 15's sets that retrieve what another rule would."""
    sets = _own("lvd142m", tmp_path)["retrieve"]["sets"]
    seeds = _seeds(pool, tmp_path, [one["name"] for one in sets if one["how"] != "as_is"])
    small = {"sample": {"nprobe": 6, "k": 2}, "cluster": {"per_cell": 6, "cap": 20}, "as_is": {}}
    smaller = [one | small[one["how"]] for one in sets]
    dedup = _own("lvd142m", tmp_path)["dedup"]
    dedup[1] |= {
        "by": "embedding_clip_vitl14",
        "threshold": SAME,
    }  # the tiny CLIP knows little: most drawings are alike
    dedup[1]["against"][0]["threshold"] = SAME_AS_REFERENCE
    references = np.array([pool.vectors[at] for at in sorted(pool.vectors)[5::60]])
    lists = pa.array(references.tolist(), pa.list_(pa.float32()))
    pq.write_table(pa.table({"v": lists}), tmp_path / "seeds" / "evaluation_sscd.parquet")
    job = _run(
        "lvd142m", pool, tmp_path / "run", ray_driver, dedup=dedup, cells={"count": 6}, retrieve={"sets": smaller}
    )
    names = ("id", "status", "dataset", "width", "height", "image_phash", "nsfw_score_opennsfw2",
             "clip_vitl14_image", "retrieved_by", "retrieved_count")  # fmt: skip
    rows = _rows(job, *names)
    fresh = _without_near(rows, _first_copies(rows, "image_phash"), references)
    assert 150 < len(fresh) < len(_first_copies(rows, "image_phash")) - 20
    inside = np.array([
        row["clip_vitl14_image"] is not None and row["status"] == "ok" and row["dataset"] is None
        and row["key"] in fresh and row["nsfw_score_opennsfw2"] < 0.5
        for row in rows
    ])  # fmt: skip
    some = [row for row, held in zip(rows, inside, strict=True) if held]
    home = np.full(len(rows), -1)
    vectors = _unit(np.array([row["clip_vitl14_image"] for row in some], np.float64))
    home[inside] = (vectors @ _unit(_centroids(job)).T).argmax(axis=1)
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
    assert sum(line["final"] > 0 for line in report.values()) > 15
    assert _released(job) == {"lvd142m": expected}
    assert 100 < len(expected) < sum(row["status"] == "ok" for row in rows)
    assert "fgvc_aircraft" in capsys.readouterr().out


def test_lvd142m_on_ray_gives_the_same_release(pool: Pool, tmp_path: Path, ray_driver: Driver) -> None:
    """Guards against rows that depend on where and how widely the steps ran."""
    seeds = _seeds(pool, tmp_path, ["file"])
    sets = [
        {"name": "file", "how": "sample", "embeddings": str(tmp_path / "seeds" / "file.parquet"), "k": 1},
        {"name": "own", "how": "cluster", "where": "id % 3 = 0", "per_cell": 9, "cap": 30},
    ]
    for root, driver in (("inline", None), ("ray", ray_driver)):
        _run(
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
    subsets = _own("lvd1689m", tmp_path)["subsets"]
    subsets["sampled"]["where"] = subsets["sampled"]["where"].replace("1689000000", "120")
    job = _run("lvd1689m", pool, tmp_path / "run", ray_driver, cells={"count": 20}, subsets=subsets,
               hierarchy={"splits": 1, "levels": levels, "targets": [120], "iterations": 5})  # fmt: skip
    rows = _rows(job, "dataset", "status", "sha256", "width", "height", "cell", "distance", "hierarchical_sample_120",
                 "retrieved_by")  # fmt: skip
    fresh = _first_copies(rows, "sha256")
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
    released = _released(job)
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
    rng = np.random.default_rng(6)
    vectors = np.array([pool.vectors[at] for at in sorted(pool.vectors)])
    np.save(tmp_path / "in1k.npy", (vectors[::40] + rng.normal(size=vectors[::40].shape) * 0.02).astype(np.float16))
    (tmp_path / "seeds").mkdir()
    evaluation = vectors[5::60]
    np.save(tmp_path / "seeds" / "eval_dedup.npy", evaluation)
    dedup = _own("datacomp", tmp_path)["dedup"]
    dedup[0] |= {"by": "embedding_clip_vitl14"}
    dedup[0]["against"][0]["threshold"] = SAME
    cells: dict[str, Any] = {"count": 40}
    if ready:
        np.save(
            tmp_path / "centroids.npy",
            vectors[rng.choice(len(vectors), 40, replace=False)] * rng.uniform(0.7, 1.3, (40, 1)),
        )
        cells["centroids"] = str(tmp_path / "centroids.npy")
    subsets = _own("datacomp", tmp_path)["subsets"]
    job = _run("datacomp", pool, tmp_path / "run", ray_driver, dedup=dedup, cells=cells, subsets=subsets)
    rows = _rows(job, "status", "clip_vitl14_image", "clip_similarity_vitl14", "language", "word_count", "text_length",
                 "punsafe", "text_unsafe", "synset_words", "original_width", "original_height")  # fmt: skip
    centroids = _centroids(job)
    wanted = set((np.load(tmp_path / "in1k.npy").astype(np.float64) @ centroids.T).argmax(axis=1).tolist())
    assert 2 < len(wanted) < 30
    for row in rows:
        held = row["clip_vitl14_image"]
        row["evaluated"] = bool(held) and bool((_unit(evaluation) @ _unit(np.array(held, np.float64)) > SAME).any())
        row["near"] = bool(held) and int((centroids @ np.array(held, np.float64)).argmax()) in wanted
    good = [
        row for row in rows
        if row["status"] == "ok" and row["punsafe"] <= 0.1 and row["text_unsafe"] <= 0.1 and not row["evaluated"]
    ]  # fmt: skip
    scores = sorted(row["clip_similarity_vitl14"] for row in good if row["clip_similarity_vitl14"] is not None)[::-1]
    top = scores[int(len(scores) * 0.3)]
    tops = {row["key"] for row in good if (row["clip_similarity_vitl14"] or -1) >= top}
    english = [row for row in good if row["language"] == "en"]
    image_based = {row["key"] for row in english if row["near"] and row["word_count"] > 1 and row["text_length"] > 5}
    released = _released(job)
    assert released == {
        "pool": {row["key"] for row in good},
        "basic": {
            row["key"] for row in english
            if row["word_count"] >= 3 and row["text_length"] > 5
            and min(row["original_width"], row["original_height"]) >= 200
            and max(row["original_width"], row["original_height"])
            <= 3 * min(row["original_width"], row["original_height"])
        },
        "clip_l14_30": tops, "clip_b32_30": tops,
        "laion2b": {row["key"] for row in english if (row["clip_similarity_vitl14"] or -1) >= 0.28},
        "text_based": {row["key"] for row in english if row["synset_words"] > 0},
        "image_based": image_based, "datacomp_1b": image_based & tops,
    }  # fmt: skip
    assert len({frozenset(keys) for keys in released.values()}) == 7
    assert all(len(keys) > 20 for keys in released.values())
    assert sum(row["evaluated"] for row in rows) > 10


def test_semdedup(pool: Pool, tmp_path: Path, ray_driver: Driver) -> None:
    """Guards against components where SemDeDup takes each row alone, an order turned round, and eps mixed up."""
    dedup = _own("semdedup", tmp_path)["dedup"]
    dedup[0] |= {"by": "embedding_clip_vitl14", "cells": 1}
    job = _run("semdedup", pool, tmp_path / "run", ray_driver, dedup=dedup)
    rows = _rows(job, "status", "clip_vitl14_image")
    some = [row for row in rows if row["status"] == "ok" and row["clip_vitl14_image"]]
    vectors = np.array([row["clip_vitl14_image"] for row in some], np.float64)
    centre = _unit(_unit(np.unique(vectors, axis=0)).mean(axis=0))  # of the one cell
    vectors = _unit(vectors)
    order = np.argsort(vectors @ centre, kind="stable")  # the farthest first
    near = np.tril(vectors[order] @ vectors[order].T, -1).max(axis=1)  # to the rows before
    expected = {
        name: {some[at]["key"] for at, most in zip(order.tolist(), near.tolist(), strict=True) if most <= 1 - eps}
        | {row["key"] for row in rows if row["status"] == "ok" and not row["clip_vitl14_image"]}
        for name, eps in {
            "eps_00095": 0.00095,
            "eps_0395": 0.0395,
            "eps_07": 0.07,
            "eps_124": 0.124,
            "eps_26": 0.26,
        }.items()
    }
    released = _released(job)
    for name, keys in expected.items():
        assert len(released[name] ^ keys) == 0, (name, len(released[name]), len(keys))
    sizes = [len(released[name]) for name in expected]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) >= 3


def test_metaclip(pool: Pool, tmp_path: Path, ray_driver: Driver) -> None:
    """Guards against balance over rows that safety or language dropped, and against captions kept without an entry."""
    (tmp_path / "metadata.json").write_text(json.dumps(ENTRIES))
    job = _run("metaclip", pool, tmp_path / "run", ray_driver, balance={"t": 20})
    rows = _rows(
        job, "status", "text", "language", "punsafe", "image_phash", "width", "height", "matches", "is_balanced"
    )
    fresh = _first_copies(rows, "image_phash")
    some = [
        row for row in rows
        if row["status"] == "ok" and row["language"] == "en" and row["punsafe"] <= 0.1 and row["key"] in fresh
    ]  # fmt: skip
    spaced = [" " + (row["text"] or "") + " " for row in some]
    for mark in ",.;:?!`":
        spaced = [text.replace(mark, f" {mark} ") for text in spaced]
    pairs = np.array(
        [(at, e) for at, text in enumerate(spaced) for e, entry in enumerate(ENTRIES) if f" {entry} " in text]
    )
    counts = Counter(pairs[:, 1].tolist())
    p = np.array([20 / max(counts[e], 20) for e in range(len(ENTRIES))])
    drawn = kept(pairs, p, key_numbers([row["key"] for row in some]), 0)
    assert max(counts.values()) > 40
    assert _released(job) == {"metaclip": {row["key"] for row, one in zip(some, drawn, strict=True) if one}}
    assert 30 < drawn.sum() < len({at for at, _ in pairs.tolist()})
    matches = Counter(pairs[:, 0].tolist())
    expected = {row["key"]: matches[at] for at, row in enumerate(some)}
    assert all(row["matches"] == expected.get(row["key"]) for row in rows)


def test_mode(pool: Pool, tmp_path: Path, ray_driver: Driver) -> None:
    """Guards against experts that train on one another's captions, and captions of no expert."""
    job = _run("mode", pool, tmp_path / "run", ray_driver, experts={"fine": 16, "sample": 400})
    rows = _rows(job, "status", "clip_vitl14_text", "expert")
    held = get_arrays(job.store, f"_experts/{job.tables['experts'].fingerprint}/experts.npz")
    released = _released(job)
    expected: dict[str, set[str]] = {f"expert{number}": set() for number in range(4)}
    for row in rows:
        if row["status"] == "ok" and row["clip_vitl14_text"] is not None:
            vector = _unit(np.array(row["clip_vitl14_text"], np.float64))
            cell = int(np.linalg.norm(held["fine"] - vector, axis=1).argmin())
            expected[f"expert{held['expert_of_fine'][cell]}"].add(row["key"])
    assert released == expected
    assert all(expected.values())


def test_second_run_does_nothing(pool: Pool, tmp_path: Path) -> None:
    """Guards against steps that retrieve, balance or emit again what is there."""
    (tmp_path / "metadata.json").write_text(json.dumps(ENTRIES))
    sets = [{"name": "own", "how": "sample", "where": "id % 50 = 0", "k": 2}]
    for _ in range(2):
        job = _run(
            "lvd142m",
            pool,
            tmp_path / "run",
            dedup=[{"by": "image_phash"}],
            cells={"count": 5},
            retrieve={"sets": sets},
        )
    assert {record.name: record.todo for record in job.records} == {record.name: 0 for record in job.records}
    for _ in range(2):
        job = _run("metaclip", pool, tmp_path / "run", balance={"t": 20})
    assert {record.name: record.todo for record in job.records} == {record.name: 0 for record in job.records}
