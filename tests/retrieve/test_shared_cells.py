"""One partition for all of it: dedup compares in the cells that retrieval searches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curate.config import CellsSettings, DedupSettings, parse_recipe
from curate.dedup.step import DedupStep
from curate.engine.job import Job
from curate.errors import ConfigError, PlanError
from curate.retrieve import cells as kernels
from curate.retrieve.step import cells_step
from curate.schema import Shard
from curate.store import Store
from curate.vectors import get_arrays
from pipelines.frame import find_copies
from tests.retrieve.pool import TABLES, Row, build, go, rows_of, shuffled_map

CELLS = {"by": "toy", "count": 6, "points_per_cell": 20, "where": "NOT is_duplicate"}
RULE = {"by": "embedding_toy", "threshold": 0.8, "keep": "key", "cells": "pool"}


def _copies(store: Store, shards: list[Shard], rule: dict[str, Any], cells: dict[str, Any] | None) -> Job:
    recipe = {"root": store.root, "ingest": {"sources": ["none"]}, "engine": {"driver": "inline"}, "dedup": [rule]}
    job = Job(parse_recipe({**recipe, "cells": cells} if cells else recipe))
    job.shards = shards
    find_copies(job, TABLES)
    return job


def _vectors(rows: list[Row]) -> dict[str, np.ndarray]:
    held = {row.key: row.vector.astype(np.float64) for row in rows if row.vector is not None and row.vector.any()}
    return {key: vector / np.linalg.norm(vector) for key, vector in held.items()}


def test_dedup_compares_in_the_cells_of_retrieval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards "one vector structure": k-means runs once, before dedup; both use its file; a refresh keeps it."""
    store = Store(str(tmp_path))
    shards, rows = build(store, shards=6)
    trained: list[int] = []
    train = kernels.train
    monkeypatch.setattr(kernels, "train", lambda *args: trained.append(len(args[0])) or train(*args))
    job = _copies(store, shards[:5], RULE, CELLS)
    spec = job.tables["duplicates"]
    cells = cells_step(CellsSettings.model_validate(CELLS), store, [*TABLES, spec], shards[:5])
    go(cells, store, shards[:5], shuffled_map)
    assert len(trained) == 1
    duplicates = rows_of(store, spec, shards[:5])
    gone = sum(row["is_duplicate"] for row in duplicates)
    assert store.get_json(cells.facts)["rows"] == len(_vectors(rows[:400])) - gone

    again = _copies(store, shards, RULE, CELLS)
    grown = cells_step(CellsSettings.model_validate(CELLS), store, [*TABLES, again.tables["duplicates"]], shards)
    assert len(trained) == 1 and grown.tables[0].fingerprint == cells.tables[0].fingerprint
    (known,) = (name for name in store.names("_near"))
    assert known


@pytest.mark.parametrize("form", ["threshold", "semdedup"])
def test_pairs_are_those_of_a_shared_cell(tmp_path: Path, form: str) -> None:
    """Guards the verdicts: threshold's pairs share one of six nearest cells, here of six, so all are found; SemDeDup's
    rows meet in their own cell alone."""
    store = Store(str(tmp_path))
    shards, rows = build(store)
    rule = {**RULE, "form": form} | ({"threshold": None, "eps": 0.2} if form == "semdedup" else {})
    job = _copies(store, shards, rule, CELLS)
    found = {row["key"]: row for row in rows_of(store, job.tables["duplicates"], shards)}
    vectors = _vectors(rows)
    centroids = get_arrays(store, f"_cells/{store.names('_cells')[0]}/centroids.npz")["centroids"]
    home = {key: int((centroids @ vector).argmax()) for key, vector in vectors.items()}
    keys, matrix = list(vectors), np.array(list(vectors.values()))
    near = matrix @ matrix.T
    gone = {key for key, row in found.items() if row["is_duplicate"]}
    assert 20 < len(gone) < len(keys)
    for at, key in enumerate(keys):
        others = [other for place, other in enumerate(keys) if place != at and near[at, place] > 0.8]
        mates = [other for other in others if home[other] == home[key]]
        if key in gone:
            assert found[key]["duplicate_of"] in (mates if form == "semdedup" else keys)
        if form == "threshold":
            assert (found[key]["duplicate_group"] is not None) == bool(others)
    if form == "semdedup":
        for cell in set(home.values()):  # what stays of a cell has nobody near in it who stays
            stay = [at for at, key in enumerate(keys) if home[key] == cell and key not in gone]
            assert (near[np.ix_(stay, stay)] - np.eye(len(stay)) <= 0.8 + 1e-6).all()


def test_wrong_pools_of_cells_are_refused(tmp_path: Path) -> None:
    """Guards against cells of another space, or none, found after a night of scoring."""
    store = Store(str(tmp_path))
    shards, _ = build(store, shards=2)
    with pytest.raises(ConfigError, match="no section `cells`"):
        _copies(store, shards, RULE, None)
    with pytest.raises(PlanError, match=r"cells\.metric: cosine"):
        _copies(store, shards, RULE, {**CELLS, "metric": "l2"})
    rule = DedupSettings.model_validate(RULE)
    with pytest.raises(PlanError, match="trains no cells before"):
        DedupStep([rule], TABLES, shards)
    with pytest.raises(PlanError, match="is of other_image, and embedding_toy of toy"):
        DedupStep([rule], TABLES, shards, centroids=("other_image", "x.npz"))
    with pytest.raises(PlanError, match="compares without one"):
        DedupStep([DedupSettings(by="url", cells="pool", keep="key")], TABLES, shards)
