"""The main job on real files that nobody here made, served over HTTP on loopback, on the Ray engine."""

import csv
import http.server
import io
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import imagehash
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate.config import parse_recipe
from curate.demo.paths import weights_dir
from curate.demo.web import COYO_SCHEMA
from curate.engine.driver import Driver
from curate.engine.job import Job
from curate.rows import columns_of, read_rows
from pipelines import image_text

Server = http.server.ThreadingHTTPServer


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Connections kept open, no log lines."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def address(shared: Path) -> Iterator[str]:
    """The real images, served."""
    with Server(("127.0.0.1", 0), partial(Quiet, directory=str(shared / "realdata"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def _table(shared: Path, address: str) -> tuple[pa.Table, dict[str, Path]]:
    """COYO's schema: every image with its caption, and the real COYO rows moved to the local server, where they 404."""
    folder = shared / "realdata"
    captions = {row["path"]: row["caption"] for row in csv.DictReader((folder / "captions.csv").open(encoding="utf-8"))}
    files = {f"{address}/{path.relative_to(folder)}": path for path in sorted(folder.glob("images/*/*"))}
    rows = [
        {"id": number, "url": url, "text": captions.get(str(path.relative_to(folder)))}
        for number, (url, path) in enumerate(files.items())
    ]
    for row in csv.DictReader((folder / "metadata" / "coyo700m_rows.csv").open(encoding="utf-8")):
        known = {name: row.get(name) or None for name in COYO_SCHEMA.names}
        moved = f"{address}/gone/{row['id']}.jpg"
        rows.append({**_typed(known), "url": moved})
    return pa.Table.from_pylist(
        [{**dict.fromkeys(COYO_SCHEMA.names), **row} for row in rows], schema=COYO_SCHEMA
    ), files


def _typed(row: dict[str, str | None]) -> dict[str, object]:
    kinds = {name: COYO_SCHEMA.field(name).type for name in COYO_SCHEMA.names}
    typed: dict[str, object] = {}
    for name, text in row.items():
        if text is None or pa.types.is_string(kinds[name]):
            typed[name] = text
        else:
            typed[name] = int(float(text)) if pa.types.is_integer(kinds[name]) else float(text)
    return typed


def test_real_images_run_through_the_whole_line(shared: Path, address: str, tmp_path: Path, ray_driver: Driver) -> None:
    """Guards against a line that only works on pictures which the project drew itself."""
    table, files = _table(shared, address)
    pq.write_table(table, tmp_path / "coyo.parquet")
    recipe = parse_recipe({
        "root": str(tmp_path / "run"), "ingest": {"sources": [str(tmp_path / "coyo.parquet")], "rows_per_shard": 100},
        "fetch": {"allow_networks": ["127.0.0.1/32"], "resize_mode": "no", "timeout_s": 20},
        "score": {
            "clip_demo": {"scorer": "clip", "model": f"local-dir:{weights_dir()}"}, "phash": {"scorer": "phash"},
            "text": {"scorer": "text_stats"},
        },
        "dedup": [{"by": "sha256"}],
        "subsets": {"all": {}, "top": {"keep_top": {"by": "clip_similarity_demo", "fraction": 0.3}}},
        "emit": {"samples_per_shard": 100},
    })  # fmt: skip
    job = Job(recipe, driver=lambda: ray_driver)
    image_text.run(job)

    rows = _rows(job, ["url", "status", "original_width", "original_height", "image_phash", "is_duplicate"])
    assert len(rows) == table.num_rows
    by_url = {row["url"]: row for row in rows}
    gone = [row["status"] for url, row in by_url.items() if "/gone/" in url]
    assert gone == ["http_4xx"] * 8
    sizes = {row["path"]: row for row in csv.DictReader((shared / "realdata" / "manifest.csv").open(encoding="utf-8"))}
    failed = {}
    for url, path in files.items():
        row, fact = by_url[url], sizes[str(path.relative_to(shared / "realdata"))]
        if row["status"] != "ok":
            failed[path.name] = row["status"]
            continue
        upright = {(row["original_width"], row["original_height"]), (row["original_height"], row["original_width"])}
        assert (int(fact["width"]), int(fact["height"])) in upright, url
    assert len(failed) <= 0.02 * len(files), failed
    _check_release(job, len(files) - len(failed))
    _check_hashes(job)


def _rows(job: Job, names: list[str]) -> list[dict[str, object]]:
    columns = columns_of(list(job.tables.values()))
    shards = job.store.shards(job.tables["samples"])
    return [row for shard in shards for row in read_rows(job.store, columns, names, shard.name).to_pylist()]


def _check_hashes(job: Job) -> None:
    """Our pHash is imagehash's on what was stored."""
    columns = columns_of(list(job.tables.values()))
    shard = job.store.shards(job.tables["samples"])[0]
    table = read_rows(job.store, columns, ["image_phash", "tar", "offset", "length"], shard.name)
    checked = 0
    for found, data in zip(table["image_phash"].to_pylist(), job.store.read_images(table), strict=True):
        if data is not None and checked < 40:
            with Image.open(io.BytesIO(data)) as image:
                assert found == str(imagehash.phash(image.convert("RGB")))
            checked += 1
    assert checked == 40


def _check_release(job: Job, fetched: int) -> None:
    import webdataset

    latest = job.store.get_bytes("releases/latest").decode().strip()
    release = job.store.get_json(f"releases/{latest}/release.json")
    assert release["subsets"]["all"]["samples"] == fetched
    tars = sorted(Path(job.store.full(f"releases/{latest}/all")).glob("*.tar"))
    samples = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False).decode("pil"))
    assert len(samples) == fetched
    assert len({sample["__key__"] for sample in samples}) == fetched
