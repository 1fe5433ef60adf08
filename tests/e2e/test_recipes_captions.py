"""The recipes that choose by captions: each config runs, and each row's fate is recomputed here."""

import json
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq

from curate.balance.metaclip import kept
from curate.engine.driver import Driver
from curate.vectors import get_arrays, key_numbers
from tests.e2e.conftest import Web
from tests.e2e.recipe_pool import Pool, first_copies, released_of, rows_of, run_recipe, unit

ENTRIES = ["red", "blue", "circle", "square", "a red", "house", "tree", "on", "white", "unheard of", "with", "two"]


def test_metaclip(web: Web, pool: Pool, tmp_path: Path, ray_driver: Driver) -> None:
    """Guards against requests for images whose captions no entry matches, balance over rows that safety or language
    dropped, and captions kept without an entry."""
    (tmp_path / "metadata.json").write_text(json.dumps(ENTRIES))
    (tmp_path / "run").mkdir()
    before = web.server.hits.copy()
    job = run_recipe("metaclip", pool, tmp_path / "run", ray_driver, balance={"t": 20})
    asked = web.server.hits - before
    rows = rows_of(job, "url", "status", "error", "text", "language", "punsafe", "image_phash", "width", "height",
                 "matched_entries", "matches", "is_balanced")  # fmt: skip
    given = pq.read_table(pool.table, columns=["url", "text"]).to_pylist()
    assert {(row["url"], row["text"]) for row in rows} == {(row["url"] or None, row["text"]) for row in given}
    for row in rows:
        row["found"] = _entries_in(row["text"])
        assert (row["matched_entries"] or []) == row["found"]
        row["wanted"] = row["language"] == "en" and bool(row["found"])
        assert (row["status"] == "not_asked") != row["wanted"]
    paths = {wanted: {urlsplit(row["url"]).path for row in rows if row["wanted"] is wanted} for wanted in (True, False)}
    assert len(paths[False] - paths[True]) > 50
    assert not (paths[False] - paths[True]) & set(asked)
    assert sum(asked[path] > 0 for path in paths[True]) > 100
    fresh = first_copies(rows, "image_phash")
    safe = [row for row in rows if row["status"] == "ok" and row["key"] in fresh]
    some = [row for row in safe if row["punsafe"] <= pool.limits["punsafe", 0.1]]
    assert len(some) < len(safe) < sum(row["status"] == "ok" for row in rows)
    pairs = np.array([(at, entry) for at, row in enumerate(some) for entry in row["found"]])
    counts = Counter(pairs[:, 1].tolist())
    p = np.array([20 / max(counts[e], 20) for e in range(len(ENTRIES))])
    drawn = kept(pairs, p, key_numbers([row["key"] for row in some]), 0)
    assert max(counts.values()) > 30
    assert released_of(job) == {"metaclip": {row["key"] for row, one in zip(some, drawn, strict=True) if one}}
    assert 20 < drawn.sum() < len(some)
    expected = {row["key"]: len(row["found"]) for row in some}
    assert all(row["matches"] == expected.get(row["key"]) for row in rows)
    again = run_recipe("metaclip", pool, tmp_path / "run", ray_driver, balance={"t": 20})
    assert {record.name: record.todo for record in again.records} == {record.name: 0 for record in again.records}


def _entries_in(text: str | None) -> list[int]:
    """Places of the entries in a caption, by the published loop."""
    spaced = f" {text or ''} "
    for mark in ",.;:?!`":
        spaced = spaced.replace(mark, f" {mark} ")
    return [place for place, entry in enumerate(ENTRIES) if text and f" {entry} " in spaced]


def test_mode(pool: Pool, tmp_path: Path, ray_driver: Driver) -> None:
    """Guards against experts that train on one another's captions, and captions of no expert."""
    job = run_recipe("mode", pool, tmp_path / "run", ray_driver, experts={"fine": 16, "sample": 400})
    rows = rows_of(job, "status", "simcse_text", "expert")
    held = get_arrays(job.store, f"_experts/{job.tables['experts'].fingerprint}/experts.npz")
    released = released_of(job)
    expected: dict[str, set[str]] = {f"expert{number}": set() for number in range(4)}
    for row in rows:
        if row["status"] == "ok" and row["simcse_text"] is not None:
            vector = unit(np.array(row["simcse_text"], np.float64))
            cell = int(np.linalg.norm(held["fine"] - vector, axis=1).argmin())
            expected[f"expert{held['expert_of_fine'][cell]}"].add(row["key"])
    assert released == expected
    assert all(expected.values())
