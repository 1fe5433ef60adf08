"""Every recipe of `configs/` that needs no retrieval: it plans, it runs, and each row's fate is what its rules say.

The rules stand a second time in recipe_rules.py, in Python, in their order. Models whose weights cannot be had offline
are replaced by columns of the source table, drawn around the thresholds; where CLIP runs, it is the demo's tiny one.
"""

import hashlib
import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

import configs
from curate.config import Recipe, load_recipe
from curate.demo.paths import weights_dir
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
from tests.e2e.recipe_rules import EXPECTED, Expected, Row, Truth
from tests.e2e.test_realdata import Quiet

FOLDER = Path(str(configs.__path__[0]))
EVERY = sorted(file for file in FOLDER.glob("*.yaml") if file.stem != "demo")
# The recipes that image_text.py runs. Those of vectors and of other pipelines: test_recipes_vectors.py.
FILES = sorted(file for file in EVERY if file.stem != "semdedup" and load_recipe(file).pipeline == "image_text")

# Scorers that need no weights; all others become columns of the source, with values on both sides of these numbers.
REAL = {"text_stats", "text_facts", "text_count", "url_count", "rare_words", "phash"}
AROUND = {
    "clip_similarity_vitb32": (0.28, 0.3), "clip_similarity_vitl14": (0.243,), "clip_similarity_multilingual": (0.26,),
    "clip_similarity_text_masked": (0.3,), "clip_similarity_dfn": (0.2,), "punsafe": (0.1, 0.1, 0.1, 0.45, 0.5, 0.95),
    "watermark_score": (0.8,), "nsfw_score_opennsfw2": (0.5,), "nsfw_score_gantman": (0.5,),
    "text_density": (0.03, 0.4), "p_yes_webssl_light": (0.5,), "p_yes_webssl_heavy": (0.5,),
    "aesthetic_score_laion_v1": (7, 8), "aesthetic_score_laion_v2": (4.5, 4.75, 5, 6, 6.25, 6.5),
}  # fmt: skip
# `{n}` differs from row to row, so that these texts stand once; {m} makes small groups. The rest stand often.
TEXTS = [
    "a red car on the street", "a  red car\non the street ", "it is what it was", "is it", "a b c", "", None,
    "two dogs play in the park near house {n}", "sunset over the mountains near lake {n}", "a boat on the water {m}",
    "a  boat on the\twater {m} ", "a boat on the water {m}", "a crap day at the beach {n}", "car{n} park",
    "ein rotes Auto steht auf der Straße {n}", "我喜欢吃苹果和香蕉 {n}", "xyzzy qwrt {n}", "picture 3 of 4 {n}",
    "little kid with a ball {n}", "a teenager and a bird {n}", "many words in a caption " * 5 + "{n}",
    "the cat and the dog " * 60 + "{n}", "representation of internationalisation " * 30 + "{n}",
]  # fmt: skip


@dataclass(frozen=True)
class Site:
    """Served pictures and the table of their URLs. `rows` are in no order; `files` by the URL's path."""

    table: Path
    rows: Mapping[tuple[str, str | None], Row]  # by URL and text
    files: Mapping[str, Path]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Pictures of chosen shapes and 480 rows that point to them, with drawn scores; some stand at many URLs."""
    folder, draw = tmp_path_factory.mktemp("site"), random.Random(8)
    shapes = [(240, 220), (300, 200), (600, 200), (604, 200), (240, 199), (201, 201), (603, 201), (602, 201),
              (360, 300), (1030, 1024), (1024, 1023), (330, 280), (280, 330), (150, 120)]  # fmt: skip
    shapes += [(draw.randrange(202, 300), draw.randrange(202, 300)) for _ in range(60)]
    files = {f"/{number}.jpg": folder / f"{number}.jpg" for number in range(len(shapes) + 2)}
    for number, (width, height) in enumerate([*shapes, (320, 320), (320, 320)]):
        _picture(number, width, height, plain=number >= len(shapes)).save(folder / f"{number}.jpg", quality=90)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        rows = []
        chosen = [*list(files)[:14], *list(files)[-2:]]  # half of the rows point to the first shapes and the plain two
        for number in range(480):
            path = draw.choice([chosen[number % 16], draw.choice([*files, "/gone.jpg", "/gone.jpg", "/gone.jpg"])])
            text = draw.choice(TEXTS)
            if text and "{m}" in text:
                path = f"/{number % 2}.jpg"
            text = text and text.format(n=number, m=number % 12)
            url = f"{address}{path}?{number}"
            if number % 6 == 5:  # another text of a URL; some have four
                url = draw.choice(rows[-24::4] if number % 4 else rows[-6:])["url"]
            if any((row["url"], row["text"]) == (url, text) for row in rows):
                url = f"{address}{path}?{number}"
            rows.append({"url": url, "text": text} | _scores(draw))
        kinds = {name: pa.float32() for name in AROUND}
        schema = pa.schema({"url": pa.string(), "text": pa.string(), **kinds})
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / "urls.parquet")
        read = pq.read_table(folder / "urls.parquet").to_pylist()  # the numbers as float32 holds them
        yield Site(folder / "urls.parquet", {(row["url"], row["text"]): row for row in read}, files)
        server.shutdown()


def _picture(number: int, width: int, height: int, *, plain: bool) -> Image.Image:
    """Soft noise, large as a file; or a plain picture of less than 5,000 bytes."""
    noise = np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    if plain:
        image = Image.new("RGB", (width, height), (200, 200 - number, 190))
        ImageDraw.Draw(image).rectangle((40, 40, 40 + 9 * number, 200), fill=(20, 30, 160))
        return image
    grain = np.random.default_rng(number).integers(-30, 30, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(image).astype(int) + grain, 0, 255).astype(np.uint8))


def _scores(draw: random.Random) -> Row:
    """Values near each threshold, and now and then none at all."""
    near = {
        name: draw.choice(limits) + draw.choice([-0.2, -0.01, 0.01, 0.04]) + draw.uniform(-0.005, 0.005)  # few ties
        for name, limits in AROUND.items()
    }
    for name in ("nsfw_score_opennsfw2", "nsfw_score_gantman"):  # most pass, so that later rules have rows to refuse
        near[name] = 0.5 + draw.choice([-0.4, -0.2, -0.1, 0, 0.01])
    for name in ("aesthetic_score_laion_v1", "aesthetic_score_laion_v2"):
        near[name] = draw.choice(AROUND[name]) + draw.choice([-0.125, 0, 0.125])  # exact in float32: >= and > differ
    return {name: None if draw.random() < 0.03 else value for name, value in near.items()}


def small(file: Path, root: Path, site: Site, *extra: str, clip: bool = False) -> Recipe:
    """The recipe as it stands in `configs/`, on the small site and without weights. `clip`: with the demo's CLIP."""
    expected = EXPECTED[file.stem]
    text = file.read_text()
    for words, fewer in expected.smaller.items():
        assert words in text
        text = text.replace(words, fewer)
    root.parent.mkdir(parents=True, exist_ok=True)
    file = root.parent / file.name
    file.write_text(text)
    if expected.references:  # as `curate score <folder> --with image_phash` leaves it
        hashes = [imagehash.phash(Image.open(site.files[name]).convert("RGB")) for name in expected.references]
        (root.parent / "reference_phashes.txt").write_text("".join(f"{one}\n" for one in hashes))
        extra = (*extra, f"fetch.block_phashes=[{root.parent / 'reference_phashes.txt'}]")
    score: dict[str, dict[str, Any]] = {}
    for name, entry in load_recipe(file).score.items():
        if entry["scorer"] == "clip" and clip:
            score[name] = {"scorer": "clip", "model": f"local-dir:{weights_dir()}"}
        elif entry["scorer"] in REAL or (entry["scorer"] == "clip_zero_shot" and clip):
            score[name] = entry
    return load_recipe(file, [
        f"root={root}", f"ingest.sources=[{site.table}]", "ingest.rows_per_shard=240",
        "fetch.allow_networks=[127.0.0.1/32]", f"score={json.dumps(score)}", "engine={driver: inline}", *extra,
    ])  # fmt: skip


def _rows(job: Job, expected: Expected, site: Site) -> list[Row]:
    """Every row with what the job says of it, and the facts of its picture and text, taken anew."""
    columns = columns_of(list(job.tables.values()))
    known = {"language", "language_confidence", "profanity", "has_content_word"} & set(columns)
    known |= {name for name in columns if name.startswith(("p_", "clip_similarity", "member_", "reason_"))}
    text = "source_text" if "source_text" in columns else "text"
    names = ["url", "status", "width", "height", text, *sorted(known)]
    found = [row for shard in job.shards for row in read_rows(job.store, columns, names, shard.name).to_pylist()]
    rows = [site.rows[row["url"], row[text]] | row for row in found]
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
    if path is None:
        return {"expected_status": "http_4xx"}
    with Image.open(path) as image:
        (w, h), phash = image.size, str(imagehash.phash(image.convert("RGB")))
    shape = {"w": w, "h": h, "bytes": path.stat().st_size, "phash": phash}
    shape["digest"] = hashlib.sha256(path.read_bytes()).hexdigest()
    small, long = min(w, h) < expected.least_side, max(w, h) / min(w, h) > expected.ratio
    listed = any(path == site.files[name] for name in expected.references)  # no two of the site have one pHash
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
    file: Path, site: Site, tmp_path: Path, ray_driver: Driver
) -> None:
    """Guards against a wrong number or a wrong order in a recipe, and against rows that go for another reason."""
    expected = EXPECTED[file.stem]
    recipe = small(file, tmp_path / "run", site, clip=expected.clip)
    assert set(recipe.subsets) == set(expected.subsets)
    job = Job(recipe, driver=lambda: ray_driver)
    image_text.run(job)
    rows = _rows(job, expected, site)
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
    scores = [name for name in COYO.names if name in AROUND]
    assert len(scores) == 6
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
    assert table["num_faces"].null_count == table.num_rows  # no scorer of this run gave it, and nothing is made up


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
    recipe = small(file, tmp_path / "run", site, clip=True)
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
