"""A scored pool that several recipes start from, and how a config is run on it.

The configs are taken as they are in `configs/`; models (small_models.py), sources and sizes are smaller, and limits
stand where the small models' scores lie.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import configs
from curate.config import load_recipe, parse_recipe
from curate.engine.driver import Driver
from curate.engine.inline import InlineDriver
from curate.engine.job import Job
from curate.rows import columns_of, read_rows
from pipelines import datacomp, image_text, lvd142m, lvd1689m, metaclip, mode
from tests.e2e.conftest import Web
from tests.e2e.small_models import SmallModels

CONFIGS = Path(str(configs.__path__[0]))
PIPELINES = {
    "lvd142m": lvd142m, "lvd1689m": lvd1689m, "datacomp": datacomp, "metaclip": metaclip, "mode": mode,
    "semdedup": image_text,
}  # fmt: skip
TRAINED = ("ViT-L-14-quickgelu", "ViT-B-16-quickgelu")
FETCH = {"allow_networks": ["127.0.0.1/32"], "timeout_s": 60, "retries": 0, "image_size": 128, "min_image_size": 32}

Row = dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """Every second row of the web with a column `dataset`, fetched and scored once with what all configs ask for."""

    table: Path
    root: Path
    score: Mapping[str, Mapping[str, Any]]
    limits: Mapping[tuple[str, float], float]  # (column, published number): the number in its place
    vectors: Mapping[str, Mapping[int, np.ndarray]]  # by column and id, float64


def make_pool(web: Web, folder: Path, driver: Driver) -> Pool:
    """What all recipes start from, so that each only does what is its own."""
    table = pq.read_table(web.table, columns=["id", "url", "text"])
    table = table.take(pa.array(range(0, table.num_rows, 2)))
    sets = ["imagenet22k", "gldv2", "mapillary_sls", "imagenet1k", *[None] * 20]
    drawn = np.random.default_rng(1).integers(0, len(sets), table.num_rows)
    table = table.append_column("dataset", pa.array([sets[at] for at in drawn], pa.string()))
    pq.write_table(table, folder / "urls.parquet")
    models, score = SmallModels(folder / "models", TRAINED), {}
    for name in PIPELINES:
        score |= models.section(load_recipe(CONFIGS / f"{name}.yaml").score)
    tree = {"root": str(folder / "run"), "ingest": ingest_of(folder / "urls.parquet"), "fetch": FETCH, "score": score,
            "engine": {"driver": "inline"}}  # fmt: skip
    job = Job(parse_recipe(tree), driver=lambda: driver)
    image_text.run(job)
    limits, vectors = {}, {}
    for column, number in (("punsafe", 0.1), ("text_unsafe", 0.1), ("nsfw_score_opennsfw2", 0.5)):
        scores = sorted(row[column] for row in rows_of(job, column) if row[column] is not None)
        assert len(set(scores)) > 9, column
        limits[column, number] = scores[int(0.85 * len(scores))]
    scores = sorted(row["clip_similarity_vitb32"] or -1 for row in rows_of(job, "clip_similarity_vitb32"))
    limits["clip_similarity_vitb32", 0.28] = scores[int(0.6 * len(scores))]
    for column in ("clip_vitl14_image", "dinov2_image", "sscd_image", "isc_image"):
        held = rows_of(job, "id", column)
        vectors[column] = {row["id"]: np.array(row[column], np.float64) for row in held if row[column]}
    return Pool(folder / "urls.parquet", folder / "run", score, limits, vectors)


def ingest_of(table: Path) -> dict[str, Any]:
    """The section, for a table of URLs."""
    return {"sources": [str(table)], "rows_per_shard": 100}


def rows_of(job: Job, *names: str) -> list[Row]:
    """The named columns of all rows, in pool order."""
    columns = columns_of([spec for name, spec in job.tables.items() if not name.startswith("member_")])
    return [row for shard in job.shards for row in read_rows(job.store, columns, names, shard.name).to_pylist()]


def config_of(name: str, folder: Path, pool: Pool) -> dict[str, Any]:
    """A config with its own files in `folder`, since a worker of Ray stands elsewhere, and with the pool's limits."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    for place in ("seeds/", "in1k.npy", "metadata.json"):
        text = text.replace(f" {place}", f" {folder}/{place}")
    for (column, number), moved in pool.limits.items():
        text = re.sub(rf"\b({column} [<>]=?) {number}\b", rf"\1 {moved!r}", text)
    tree: dict[str, Any] = yaml.safe_load(text)
    return tree


def run_recipe(name: str, pool: Pool, root: Path, driver: Driver | None = None, **sections: Any) -> Job:
    """Run a config on the pool; `sections` replace keys of its sections."""
    if not root.exists():
        shutil.copytree(pool.root, root)
    tree = config_of(name, root.parent, pool)
    where = {"where": tree["fetch"]["where"]} if "where" in tree["fetch"] else {}
    tree |= {"root": str(root), "ingest": ingest_of(pool.table), "fetch": FETCH | where}
    tree["score"] = {entry: pool.score[entry] for entry in tree["score"]}
    for section, keys in sections.items():
        tree[section] = keys if section in ("subsets", "dedup") else tree[section] | keys
    job = Job(parse_recipe(tree), driver=lambda: driver or InlineDriver())
    PIPELINES[name].run(job)
    job.note()
    return job


def released_of(job: Job) -> dict[str, set[str]]:
    """Keys by subset."""
    (path,) = Path(job.recipe.root).glob("releases/0*/manifest.parquet")
    manifest = pq.read_table(path, columns=["subset", "key"])
    found: dict[str, set[str]] = {name: set() for name in job.recipe.subsets}
    for subset, key in zip(manifest["subset"].to_pylist(), manifest["key"].to_pylist(), strict=True):
        found[subset].add(key)
    return found


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def first_copies(rows: list[Row], by: str) -> set[str]:
    """Keys of the rows that a rule `{by}` keeps, largest first; rows without a value are no copies."""
    best: dict[str, Row] = {}
    for row in rows:
        if row["status"] == "ok" and row[by] is not None:
            held = best.setdefault(row[by], row)
            if (-row["width"] * row["height"], row["key"]) < (-held["width"] * held["height"], held["key"]):
                best[row[by]] = row
    return {row["key"] for row in best.values()} | {row["key"] for row in rows if row[by] is None}
