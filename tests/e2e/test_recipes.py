"""Every recipe of `configs/` that needs no retrieval: it plans, it runs, and each row's fate is what its rules say.

The rules stand a second time in recipe_rules.py, in Python, in their order. Every scorer runs, with a small model, and
limits stand where its scores lie (recipe_site.py).
"""

import hashlib
import json
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import configs
from curate.config import load_recipe
from curate.emit.exports import COYO, export_coyo
from curate.engine.driver import Driver
from curate.engine.job import Job
from curate.errors import WeightsError
from curate.rows import columns_of, read_rows
from curate.score.pool_counts import is_pool_count
from curate.score.registry import build
from curate.score.weight_manifest import MANIFEST
from curate.select.clauses import split_where
from pipelines import image_text
from tests.e2e.conftest import curate
from tests.e2e.recipe_rules import EXPECTED, Expected, Limits, Row, Truth
from tests.e2e.recipe_site import OWN_FETCH, Site, given, limits_of, serve_site, small
from tests.e2e.test_realdata import Quiet

FOLDER = Path(str(configs.__path__[0]))
EVERY = sorted(file for file in FOLDER.glob("*.yaml") if file.stem != "demo")
# The recipes that image_text.py runs. Those of vectors and of other pipelines: test_recipes_vectors.py.
FILES = sorted(file for file in EVERY if file.stem != "semdedup" and load_recipe(file).pipeline == "image_text")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Drawn and served once."""
    with serve_site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(scope="module")
def scored(site: Site, tmp_path_factory: pytest.TempPathFactory, ray_driver: Driver) -> Path:
    """A root with what the recipes ask of the shared pool, fetched and scored once, on Ray."""
    folder = tmp_path_factory.mktemp("scored")
    score: dict[str, dict[str, Any]] = {}
    for file in FILES:
        own = small(file, folder / "none", site).score if file.stem not in OWN_FETCH else {}
        score |= {name: entry for name, entry in own.items() if not is_pool_count(entry)}
    plain = [f"score={json.dumps(score)}", "dedup=[]", "subsets={}"]
    job = Job(small(FOLDER / "metadata_only.yaml", folder / "run", site, *plain), driver=lambda: ray_driver)
    image_text.run(job)
    return folder / "run"


def _rows(job: Job, expected: Expected, site: Site, limits: Limits) -> list[Row]:
    """Every row with what the job says of it, and the facts of its picture and text, taken anew."""
    columns = columns_of(list(job.tables.values()))
    known = {"language", "language_confidence", "profanity", "has_content_word"} & set(columns)
    known |= {*given(job), *(name for name in columns if name.startswith(("member_", "reason_")))}
    text = "source_text" if "source_text" in columns else "text"
    names = ["url", "status", "width", "height", text, *sorted(known)]
    found = [row for shard in job.shards for row in read_rows(job.store, columns, names, shard.name).to_pylist()]
    rows = [site.rows[row["url"], row[text]] | row | {"limits": limits} for row in found]
    counts = Counter(" ".join(row["text"].split()) for row in rows if row["text"] is not None)
    texts, words = Counter(row["url"] for row in rows), Counter(word for row in rows for word in _words(row["text"]))
    least = sorted(words.values(), reverse=True)[131]
    for row in rows:
        row.update(_facts_of_text(row["text"], counts) | _facts_of_picture(row["url"], site, expected))
        row["texts"] = texts[row["url"]]
        row["rare"] = None if row["text"] is None else sum(words[word] < least for word in _words(row["text"]))
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        row["copy"] = False
        if expected.same is not None and row["expected_status"] == "ok":
            groups.setdefault(expected.same(row), []).append(row)
    for group in groups.values():
        for row in sorted(group, key=expected.best)[1:]:
            row["copy"] = True
    return rows


def _words(text: str | None) -> list[str]:
    words = (text or "").lower().split()
    return words + [" ".join(words[at : at + 2]) for at in range(len(words) - 1)]


def _facts_of_text(text: str | None, counts: Mapping[str, int]) -> Row:
    if text is None:
        return dict.fromkeys(("collapsed", "length", "words", "count"))
    collapsed = " ".join(text.split())
    return {"collapsed": collapsed, "length": len(collapsed), "words": len(text.split()), "count": counts[collapsed]}


def _facts_of_picture(url: str, site: Site, expected: Expected) -> Row:
    path = site.files.get(re.sub(r"^http://[^/]+|\?.*$", "", url))
    if expected.listed_url(url):
        return {"expected_status": "blocked_list"}
    if path is None:
        return {"expected_status": "http_4xx"}
    with Image.open(path) as image:
        (w, h), phash = image.size, str(imagehash.phash(image.convert("RGB")))
    shape = {"w": w, "h": h, "bytes": path.stat().st_size, "phash": phash}
    shape["digest"] = hashlib.sha256(path.read_bytes()).hexdigest()
    small, long = min(w, h) < expected.least_side, max(w, h) / min(w, h) > expected.ratio
    refused = (*expected.references, *expected.listed_bytes)  # no two of the site have one pHash
    listed = any(path == site.files[name] for name in refused)
    return shape | {
        "expected_status": "too_small" if small else "bad_ratio" if long else "blocked_list" if listed else "ok"
    }


def _verdict(row: Row, clauses: Sequence[Callable[[Row], Truth]]) -> tuple[str, int] | None:
    """(false or unknown, which clause) of the first that refuses; None for none."""
    for number, clause in enumerate(clauses):
        answer = clause(row)
        if not answer:
            return ("unknown" if answer is None else "where", number)
    return None


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_row_meets_the_fate_that_its_rules_say(
    file: Path, site: Site, scored: Path, tmp_path: Path, ray_driver: Driver
) -> None:
    """Guards against a wrong number or a wrong order in a recipe, and against rows that go for another reason."""
    expected, root = EXPECTED[file.stem], tmp_path / "run"
    if file.stem not in OWN_FETCH:
        shutil.copytree(scored, root)
    first = Job(small(file, root, site, "dedup=[]", "subsets={}"), driver=lambda: ray_driver)
    image_text.run(first)
    limits = limits_of(file, first)
    recipe = small(file, root, site, limits=limits)
    assert set(recipe.subsets) == set(expected.subsets)
    job = Job(recipe, driver=lambda: ray_driver)
    image_text.run(job)
    assert {record.todo for record in job.records if record.name in ("fetch", "score", "score_text")} == {0}
    rows = _rows(job, expected, site, limits)
    assert len(rows) == len(site.rows)
    assert [row["status"] for row in rows] == [row["expected_status"] for row in rows]
    columns = columns_of([spec for spec in job.tables.values() if not spec.name.startswith("member_")])
    members = {}
    for name, clauses in expected.subsets.items():
        sql = [clause.sql for clause in split_where(recipe.subsets[name].where or "true", columns, name)]
        members[name] = _check_subset(name, rows, clauses, sql, expected)
    if not expected.subsets:
        assert not (tmp_path / "run" / "releases").exists()
        return
    latest = job.store.get_bytes("releases/latest").decode().strip()
    release = job.store.get_json(f"releases/{latest}/release.json")
    assert {name: facts["samples"] for name, facts in release["subsets"].items()} == members
    if file.stem == "coyo700m":
        _check_coyo(job.store.full(f"releases/{latest}"), rows, tmp_path)


def _check_coyo(release: str, rows: Sequence[Row], folder: Path) -> None:
    """The 17 columns of its table, row by row."""
    table = pq.read_table(export_coyo(release, "coyo", folder / "coyo"))
    assert table.schema.names == COYO.names
    assert len(COYO.names) == 17
    scores = [
        name for name in COYO.names if name.startswith(("num_faces", "clip_", "nsfw_", "watermark_", "aesthetic_"))
    ]
    assert len(scores) == 7
    expected = {
        (row["url"], row["collapsed"]): (
            row["w"],
            row["h"],
            row["phash"],
            row["length"],
            row["words"],
            *(row[name] for name in scores),
        )
        for row in rows
        if row["member_coyo"]
    }
    names = ["width", "height", "image_phash", "text_length", "word_count", *scores]
    found = {(row["url"], row["text"]): tuple(row[name] for name in names) for row in table.to_pylist()}
    assert found == expected
    assert table["num_tokens_bert"].null_count == table.num_rows  # no tokenizer was named, and nothing is made up


def _check_subset(
    name: str, rows: Sequence[Row], clauses: Sequence[Callable[[Row], Truth]], sql: Sequence[str], expected: Expected
) -> int:
    verdicts = [_verdict(row, clauses) if row["expected_status"] == "ok" else None for row in rows]
    open_ = [row for row, verdict in zip(rows, verdicts, strict=True) if row["status"] == "ok" and verdict is None]
    threshold = -np.inf
    if name in expected.top:
        by, fraction = expected.top[name]
        scores = sorted((row[by] for row in open_ if row[by] is not None), reverse=True)
        threshold = scores[min(int(len(scores) * fraction), len(scores) - 1)]
    hit = set()
    for row, verdict in zip(rows, verdicts, strict=True):
        reason = None
        if row["status"] != "ok":
            reason = f"status: {row['status']}"
        elif verdict is not None:
            reason = f"{verdict[0]}: {sql[verdict[1]]}"
            hit.add(verdict[1])
        elif name in expected.top and row[by] is None:
            reason = f"unknown: {by}"
        elif name in expected.top and row[by] < threshold:
            reason = "keep_top"
        told = (row[f"member_{name}"], row[f"reason_{name}"])
        assert told == (reason is None, reason), (name, row["url"], row["text"])
    # No clause may pass this test only because nothing of the site ever came to fail it.
    assert hit == set(range(len(clauses))) - expected.untouched.get(name, set()), name
    kept = sum(bool(row[f"member_{name}"]) for row in rows)
    assert kept > 0, name
    return kept


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_plans_with_small_models(file: Path, site: Site, tmp_path: Path) -> None:
    """Guards against a recipe that names an unknown key, scorer, column or pipeline, or plans by writing."""
    recipe = small(file, tmp_path / "run", site)
    job = Job(recipe, dry=True)
    image_text.run(job)
    assert {name.removeprefix("member_") for name in job.tables if name.startswith("member_")} == set(recipe.subsets)
    assert not (tmp_path / "run" / "samples").exists()


@pytest.mark.parametrize("file", EVERY, ids=lambda file: file.stem)
def test_full_size_scorers_are_known(file: Path) -> None:
    """Guards against a scorer's key that only the run at full size would find wrong; weights may be missing here."""
    recipe = load_recipe(file)
    score = {name: entry for name, entry in recipe.score.items() if not is_pool_count(entry)}
    hub = [name for name, entry in score.items() if "/" in str(entry.get("model", ""))]
    for name in hub:
        with pytest.raises(WeightsError, match="hf download"):
            build({name: score[name]})
    build({name: entry for name, entry in score.items() if name not in hub})
    assert recipe.about is not None
    pulled = [
        word for need in recipe.about.needs if "curate weights pull" in need for word in re.split(r"[,( ]+", need)
    ]
    assert {word for word in pulled if "-" in word or word == "opennsfw2"} <= set(MANIFEST)


def test_recipes_are_listed() -> None:
    """Guards against a recipe that nobody finds."""
    told = curate("recipes").stdout
    assert all(file.stem in told for file in EVERY)
    assert "arXiv 2504.01017" in told
    one = curate("recipes", "coyo700m").stdout
    assert "laion-watermark" in one
    assert "profanity" in one
    wrong = curate("recipes", "coyo70m", check=False)
    assert wrong.returncode == 2
    assert "coyo700m" in wrong.stderr


def test_density_agrees_with_labels_on_real_pictures(shared: Path, tmp_path: Path) -> None:
    """Guards against thresholds that hold on drawings alone; a few real pictures of each kind, by the real detector."""
    folder = shared / "realdata" / "images"
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        kinds = ("text_none", "text_light", "text_heavy")
        chosen = [path for kind in kinds for path in sorted((folder / kind).iterdir())[::9][:6]]
        urls = [f"{address}/{path.relative_to(folder)}" for path in chosen]
        pq.write_table(pa.table({"url": urls, "text": [None] * len(urls)}), tmp_path / "urls.parquet")
        recipe, by_threshold = load_recipe(FOLDER / "webssl.yaml"), ("light_threshold", "heavy_threshold")
        job = Job(load_recipe(FOLDER / "webssl.yaml", [
            "score={text_regions: {scorer: text_density}}",
            f"subsets={json.dumps({name: {'where': recipe.subsets[name].where} for name in by_threshold})}",
            f"root={tmp_path / 'run'}", f"ingest.sources=[{tmp_path / 'urls.parquet'}]", "engine={driver: inline}",
            "fetch.allow_networks=[127.0.0.1/32]", "fetch.timeout_s=30",
        ]))  # fmt: skip
        image_text.run(job)
        server.shutdown()
    names = ["url", "text_density", *(f"member_{name}" for name in by_threshold)]
    columns = columns_of(list(job.tables.values()))
    rows = [row for shard in job.shards for row in read_rows(job.store, columns, names, shard.name).to_pylist()]
    light = {kind: sum(row["member_light_threshold"] for row in rows if kind in row["url"]) for kind in kinds}
    heavy = {kind: sum(row["member_heavy_threshold"] for row in rows if kind in row["url"]) for kind in kinds}
    assert light["text_none"] <= 1, light
    assert min(light["text_light"], light["text_heavy"]) >= 5, light
    assert heavy["text_none"] == 0, heavy
    assert heavy["text_light"] <= 1, heavy
    assert heavy["text_heavy"] >= 5, heavy
