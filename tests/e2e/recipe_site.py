"""A small site for the recipes that choose row by row, and their configs as they run on it.

Models are small (small_models.py). What a random model says does not lie around the published limits, so these are
moved to where its scores lie: in the recipe and in the rules alike, by (column, published number).
"""

import hashlib
import json
import random
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from curate.config import Recipe, load_recipe
from curate.engine.job import Job
from curate.rows import columns_of, read_rows
from tests.e2e.recipe_rules import EXPECTED, Expected, Limits, Row
from tests.e2e.small_models import SmallModels
from tests.e2e.test_realdata import Quiet

# Their rules are of the fetch too, so that they run from the first URL on; the others share one fetched, scored pool.
OWN_FETCH = {"align", "coyo700m", "relaion"}
FETCH = ["fetch.allow_networks=[127.0.0.1/32]", "fetch.timeout_s=60", "fetch.first_byte_timeout_s=60"]
SHARED_FETCH = "fetch={image_size: 512, allow_networks: [127.0.0.1/32], timeout_s: 60, first_byte_timeout_s: 60}"
ROWS = 220
# No models: what they say is computed anew, or a rule that a number of the config is right for as it stands.
RULES = {"text_stats", "text_facts", "phash", "text_count", "url_count", "rare_words", None}
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
    models: SmallModels


@contextmanager
def serve_site(folder: Path) -> Iterator[Site]:
    """Pictures of chosen shapes and rows that point to them; some stand at many URLs. `punsafe` is a column of theirs,
    as Re-LAION's tables have it."""
    draw = random.Random(8)
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
        for number in range(ROWS):
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
            limit = draw.choice([0.1, 0.45, 0.45, 0.95])
            unsafe = None if draw.random() < 0.05 else limit + draw.uniform(-0.05, 0.05)
            rows.append({"url": url, "text": text, "punsafe": unsafe})
        schema = pa.schema({"url": pa.string(), "text": pa.string(), "punsafe": pa.float32()})
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / "urls.parquet")
        read = pq.read_table(folder / "urls.parquet").to_pylist()  # the numbers as float32 holds them
        by_pair = {(row["url"], row["text"]): row for row in read}
        yield Site(folder / "urls.parquet", by_pair, files, SmallModels(folder / "models"))
        server.shutdown()


def _picture(number: int, width: int, height: int, *, plain: bool) -> Image.Image:
    """Soft noise, large as a file, some with lines of text; or a plain picture of less than 5,000 bytes."""
    noise = np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    if plain:
        image = Image.new("RGB", (width, height), (200, 200 - number, 190))
        ImageDraw.Draw(image).rectangle((40, 40, 40 + 9 * number, 200), fill=(20, 30, 160))
        return image
    for line in range(number % 4 * 2):
        ImageDraw.Draw(image).text((12, 10 + 24 * line), "words in a picture", fill=(255, 255, 255), font_size=20)
    grain = np.random.default_rng(number).integers(-30, 30, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(image).astype(int) + grain, 0, 255).astype(np.uint8))


def small(file: Path, root: Path, site: Site, *extra: str, limits: Limits | None = None) -> Recipe:
    """The recipe as it stands in `configs/`, on the small site, with small models and its limits moved."""
    expected = EXPECTED[file.stem]
    text = file.read_text()
    for words, fewer in expected.smaller.items():
        assert words in text
        text = text.replace(words, fewer)
    for (column, number), moved in (limits or {}).items():
        text = re.sub(_compared([column]), lambda found, at=(number, moved): _moved(found, *at), text)
    root.parent.mkdir(parents=True, exist_ok=True)
    copy = root.parent / file.name
    copy.write_text(text)
    lists = _lists(expected, site, root.parent)
    fetch = FETCH if file.stem in OWN_FETCH else [SHARED_FETCH]
    score = site.models.section(load_recipe(copy).score)
    return load_recipe(copy, [
        f"root={root}", f"ingest.sources=[{site.table}]", f"ingest.rows_per_shard={ROWS // 2}", *fetch, *lists,
        f"score={json.dumps(score)}", "engine={driver: inline}", *extra,
    ])  # fmt: skip


def _compared(columns: Sequence[str]) -> str:
    """A column of these against a number, as recipes write it."""
    return rf"\b({'|'.join(columns)}) (<=|>=|<|>) ([0-9.]+)"


def _moved(found: re.Match[str], number: float, moved: float) -> str:
    return f"{found[1]} {found[2]} {moved!r}" if float(found[3]) == number else found[0]


def _lists(expected: Expected, site: Site, folder: Path) -> list[str]:
    """Settings for the lists that guard the fetch, and their files."""
    refused = [url for url, _ in site.rows if expected.listed_url(url)]
    found = {
        # as `curate score <folder> --with image_phash` leaves it
        "block_phashes": [str(imagehash.phash(Image.open(site.files[name]).convert("RGB")))
                          for name in expected.references],
        "block_hashes": [hashlib.md5(site.files[name].read_bytes()).hexdigest() for name in expected.listed_bytes],
        "block_url_hashes": [hashlib.sha1(url.encode()).hexdigest() for url in refused],
    }  # fmt: skip
    for name, lines in found.items():
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return [f"fetch.{name}=[{folder / name}.txt]" for name, lines in found.items() if lines]


def limits_of(file: Path, job: Job) -> Limits:
    """Where the published numbers go among the different scores: a single one to where it refuses 0.4 (>=) or 0.15 (<=)
    of them, several to equal steps. Each is a score that some row has."""
    columns_given = given(job)
    numbers: dict[str, dict[float, str]] = {}
    for column, sign, number in re.findall(_compared(columns_given), file.read_text()) if columns_given else ():
        numbers.setdefault(column, {})[float(number)] = sign
    columns = columns_of(list(job.tables.values()))
    moved = {}
    for column, signs in numbers.items():
        tables = [read_rows(job.store, columns, [column], shard.name) for shard in job.shards]
        scores = sorted({score for table in tables for score in table[column].to_pylist() if score is not None})
        assert len(scores) > 3, f"{column}: the small model says the same of all"
        for place, number in enumerate(sorted(signs), 1):
            share = place / (len(signs) + 1) if len(signs) > 1 else 0.4 if ">" in signs[number] else 0.85
            moved[column, number] = scores[int(share * len(scores))]
    return moved


def given(job: Job) -> list[str]:
    """The columns that models wrote."""
    models = (spec for spec in job.tables.values() if spec.name.startswith("scores_"))
    return [name for spec in models if spec.settings.get("scorer") not in RULES for name in spec.columns]
