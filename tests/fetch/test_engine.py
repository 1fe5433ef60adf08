"""img2dataset's own Downloader under our guard, beside ours on the same table; and the stage around both."""

import asyncio
import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curate.config import FetchSettings
from curate.engine.job import progress_note
from curate.errors import PlanError
from curate.fetch.spool import Spool
from curate.fetch.stage import fetch_stage
from curate.schema import IMAGES_SCHEMA, SAMPLE_FIELDS, Shard, TableSpec, keys_of
from curate.scratch import Parts
from curate.stage import FETCHED_BYTES, ShardReport, run_shard
from curate.store import Store
from curate.tar import members
from tests.fetch.conftest import ALLOWED, encoded, scene
from tests.fetch.hostile_server import HostileServer, Request, answer

SAMPLES = TableSpec("samples", 1, pa.schema([*SAMPLE_FIELDS, pa.field("sha256", pa.string())]))
SETTINGS = {
    "allow_networks": [ALLOWED], "timeout_s": 20.0, "first_byte_timeout_s": 15.0, "retries": 0, "decoders": 1,
    "image_size": 48, "max_bytes": 3_000_000, "max_pixels": 20_000_000, "min_image_size": 20, "max_aspect_ratio": 8,
    "min_rate_bytes_s": 0, "skip_reencode": False,
}  # fmt: skip


def store_with(
    root: Path | str, urls: list[str | None], digests: list[str | None] | None = None
) -> tuple[Store, Shard]:
    """A store whose one shard has these URLs."""
    store, shard = Store(str(root)), Shard("a", len(urls))
    texts = [f"caption {number}" for number in range(len(urls))]
    store.write(SAMPLES, shard, pa.table(
        [keys_of(urls, texts), urls, texts, digests or [None] * len(urls)], schema=SAMPLES.schema
    ))  # fmt: skip
    return store, shard


def run(store: Store, shard: Shard, **settings: object) -> pa.Table:
    """The images table of the shard."""
    stage = pickle.loads(pickle.dumps(fetch_stage(FetchSettings.model_validate({**SETTINGS, **settings}), SAMPLES)))
    stage.check(store)
    stage.setup()
    try:
        run_shard(store, stage, shard)
    finally:
        stage.teardown()
    return store.read(stage.tables[0], shard.name)


def table(server: HostileServer, decoy: HostileServer, jpeg: bytes) -> list[tuple[str | None, str]]:
    """URLs on whose status both engines must agree."""

    async def drip(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"", length=len(jpeg)))
        for byte in jpeg[:30]:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.3)

    async def hang(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    server.static("/robots.txt", answer(b"User-agent: *\nDisallow: /private\n"))
    bomb = encoded(Image.new("1", (8000, 8000)), "PNG")
    urls: list[tuple[str | None, str]] = [
        (server.static(f"/{number}.jpg", answer(encoded(scene(60 + number, 50, number)))), "ok") for number in range(20)
    ]
    return [
        *urls,
        (server.static("/grey.png", answer(encoded(scene().convert("L"), "PNG"))), "ok"),
        (server.static("/alpha.webp", answer(encoded(scene().convert("RGBA"), "WEBP"))), "ok"),
        (server.static("/moved.jpg", answer(b"", "302 Found", "Location: /3.jpg")), "ok"),
        (server.base + "/404.jpg", "http_4xx"),
        (server.static("/500.jpg", answer(b"", "500 Oops")), "http_5xx"),
        (server.static("/html.jpg", answer(b"<html>", "200 OK", "Content-Type: image/jpeg")), "not_image"),
        (server.static("/broken.png", answer(encoded(scene(), "PNG")[:200])), "decode_error"),
        (server.static("/noai.jpg", answer(jpeg, "200 OK", "X-Robots-Tag: noai")), "opted_out"),
        (server.static("/tdm.jpg", answer(jpeg, "200 OK", "tdm-reservation: 1")), "opted_out"),
        (server.static("/mnoai.jpg", answer(b"", "302 Found", "Location: /3.jpg", "X-Robots-Tag: noai")), "opted_out"),
        (server.static("/private/x.jpg", answer(jpeg)), "robots"),
        (server.static("/tiny.jpg", answer(encoded(scene(10, 10)))), "too_small"),
        (server.static("/banner.jpg", answer(encoded(scene(400, 30)))), "bad_ratio"),
        (server.static("/bomb.png", answer(bomb)), "too_many_pixels"),
        (server.static("/large.jpg", answer(bytes(4_000_000))), "too_large"),
        (server.static("/empty.jpg", answer(b"")), "empty"),
        (server.static("/loop.jpg", answer(b"", "302 Found", "Location: /loop.jpg")), "bad_url"),
        (server.static("/file.jpg", answer(b"", "302 Found", "Location: file:///etc/passwd")), "bad_url"),
        (server.static("/in.jpg", answer(b"", "302 Found", f"Location: {decoy.base}/x")), "blocked_address"),
        (decoy.base + "/x.jpg", "blocked_address"), (f"http://2130706434:{decoy.port}/", "blocked_address"),
        ("file:///etc/passwd", "bad_url"), (None, "bad_url"), ("http://dead.invalid/x.jpg", "dns"),
        ("http://127.0.0.1:1/x.jpg", "connect"),
        (server.route("/hang.jpg", hang), "timeout"), (server.route("/drip.jpg", drip), "slow"),
    ]  # fmt: skip


def test_both_engines_agree(server: HostileServer, decoy: HostileServer, jpeg: bytes, tmp_path: Path) -> None:
    """The other engine copies files, reaches inside, ignores wishes, or gives another table."""
    rows = table(server, decoy, jpeg)
    store, shard = store_with(tmp_path, [url for url, _ in rows])
    short = {"timeout_s": 3.0, "first_byte_timeout_s": 2.5}
    ours, theirs = run(store, shard, **short), run(store, shard, engine="img2dataset", **short)
    assert ours.schema.equals(theirs.schema) and ours.schema.remove_metadata().equals(IMAGES_SCHEMA)
    assert ours.column("key").equals(theirs.column("key"))
    expected = [status for _, status in rows]
    slow = {"timeout", "too_slow", "connect"}  # urllib cannot tell a drip from a hang
    for found in (ours, theirs):
        wrong = [
            (url, status, error, want)
            for (url, want), status, error in zip(
                rows, found["status"].to_pylist(), found["error"].to_pylist(), strict=True
            )
            if status != want and not (want in ("slow", "timeout") and status in slow)
        ]
        assert not wrong
    assert len(expected) == ours.num_rows == theirs.num_rows
    good = [number for number, status in enumerate(expected) if status == "ok"]
    for name in ("width", "height", "original_width", "original_height", "original_bytes", "sha256", "ext"):
        assert ours[name].take(good).equals(theirs[name].take(good)), name
    import cv2

    for one, other in zip(store.read_images(ours), store.read_images(theirs), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            pair = [
                cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).astype(float) for data in (one, other)
            ]
            assert ((pair[0] - pair[1]) ** 2).mean() < 65, "less than 30 dB apart"
    assert decoy.connections == 0


def test_rows_of_the_same_bytes_all_have_their_size(server: HostileServer, jpeg: bytes, tmp_path: Path) -> None:
    """Of two addresses of one picture, downloaded side by side, one lost its original size."""
    urls = [server.static(f"/same{number}.jpg", answer(jpeg)) for number in range(12)]
    store, shard = store_with(tmp_path, urls)
    found = run(store, shard, engine="img2dataset")
    assert found["original_bytes"].to_pylist() == [len(jpeg)] * 12


def test_only_rows_that_where_leaves_are_asked_for(server: HostileServer, jpeg: bytes, tmp_path: Path) -> None:
    """Traffic for images that nobody wants, an answer at another row, or a row that vanishes."""
    urls = [server.static(f"/{number}.jpg", answer(encoded(scene(40 + number, 30, number)))) for number in range(12)]
    store, shard = store_with(tmp_path, [*urls, None], [None, *["a", "b"] * 6])
    for engine in ("curate", "img2dataset"):
        server.asked.clear()
        found = run(store, shard, engine=engine, where="sha256 = 'b' AND length(text) = 9")  # one digit
        assert {path for path in server.asked if path != "/robots.txt"} == {f"/{number}.jpg" for number in (2, 4, 6, 8)}
        assert found["status"].to_pylist() == ["ok" if number in (2, 4, 6, 8) else "not_asked" for number in range(13)]
        assert [width for width in found["width"].to_pylist() if width] == [42, 44, 46, 48]
        assert found["error"].to_pylist()[0] == "fetch.where is not true of it"  # null = 'b'
    for where, words in (("width > 3", "texts and no images"), ("sha256 =", "fetch.where")):
        with pytest.raises(PlanError, match=words):
            fetch_stage(FetchSettings.model_validate({**SETTINGS, "where": where}), SAMPLES)


def test_their_engine_sees_hashes(server: HostileServer, jpeg: bytes, tmp_path: Path) -> None:
    """verify_hash is dropped by one of the engines."""
    url = server.static("/a.jpg", answer(jpeg))
    sha256 = hashlib.sha256(jpeg).hexdigest()
    store, shard = store_with(tmp_path, [url, url], [sha256, "0" * 64])
    for engine in ("curate", "img2dataset"):
        found = run(store, shard, engine=engine, verify_hash={"column": "sha256"})
        assert found["status"].to_pylist() == ["ok", "hash_mismatch"]
        assert found["sha256"].to_pylist()[0] == sha256
    with pytest.raises(PlanError, match="no column md5"):
        fetch_stage(FetchSettings.model_validate({**SETTINGS, "verify_hash": {"column": "md5"}}), SAMPLES).check(store)


def test_the_stage_writes_what_its_table_says(server: HostileServer, jpeg: bytes, tmp_path: Path) -> None:
    """A row points at another row's picture, or a failed row at bytes."""
    urls: list[str | None] = [
        url for n in range(60)
        for url in (server.static(f"/{n}.jpg", answer(encoded(scene(50 + n, 40, n)))), f"{server.base}/gone{n}")
    ]  # fmt: skip
    store, shard = store_with(tmp_path, urls)
    found = run(store, shard, image_size=4096)
    assert found["status"].to_pylist() == ["ok", "http_4xx"] * 60
    rows, images = found.to_pylist(), store.read_images(found)
    assert [image is None for image in images] == [False, True] * 60
    assert [row["width"] for row in rows[::2]] == [50 + n for n in range(60)]
    assert all(row["original_bytes"] and row["sha256"] and row["error"] is None for row in rows[::2])
    assert all(row["error"] == "HTTP 404" and row["tar"] is None for row in rows[1::2])
    with store.open(rows[0]["tar"]) as stream:
        names = [name for name, _, _ in members(stream)]
    assert names == [f"{row['key']}.{ext}" for row in rows[::2] for ext in ("jpg", "txt", "json")]
    again, _ = store_with(tmp_path / "again", urls)
    assert again.read_images(run(again, shard, image_size=4096)) == images, "other bytes from the same input"


def test_progress_says_how_it_goes() -> None:
    """A run of days shows neither how many are lost nor why, nor whether it crawls."""
    counts = [{"ok": 70, "dns": 10, "timeout": 13, "http_4xx": 4, "tls": 3, "fetched_bytes": 30_000_000}, {"ok": 100}]
    reports = [ShardReport("fetch", "a", 100, ("images",), count) for count in counts]
    skipped = ShardReport("fetch", "b", 5000)
    told = progress_note([*reports, skipped], 2.0)
    assert told == "85 % ok, 100/s, 15 MB/s; timeout 6 %, dns 5 %, http_4xx 2 %"
    assert progress_note([ShardReport("score", "a", 100, ("scores",))], 2.0) == "50/s"
    assert progress_note([skipped], 2.0) == ""


def test_bytes_and_the_decoders_time_are_counted(server: HostileServer, jpeg: bytes, tmp_path: Path) -> None:
    """The dearest part of fetching, in processes of its own, is missing from the bill."""
    store, shard = store_with(tmp_path, [server.static("/a.jpg", answer(jpeg)), server.base + "/gone.jpg"])
    stage = fetch_stage(FetchSettings.model_validate(SETTINGS), SAMPLES)
    stage.setup()
    start = time.process_time()
    report = run_shard(store, stage, shard)
    own_s = time.process_time() - start
    stage.teardown()
    assert report.counts == {"ok": 1, "http_4xx": 1, FETCHED_BYTES: len(jpeg)}
    assert report.cost.cpu_s > own_s + 0.1, "the imports of a decoder alone take longer"


_S3_CHILD = """
import sys
import pyarrow as pa
from curate.config import FetchSettings
from curate.engine.attempts import run_bounded
from curate.fetch import spool
from curate.fetch.stage import fetch_stage
from curate.schema import Shard
from curate.store import Store
from tests.fetch.test_engine import SAMPLES

spool.PART_S = 0.1
stage = fetch_stage(FetchSettings(allow_networks=["127.0.0.1/32"], image_size=64, decoders=1, retries=0), SAMPLES)
stage.setup()
run_bounded(Store(sys.argv[1]), stage, Shard("a", int(sys.argv[2])), sys.argv[3], "here", lambda: [])
stage.teardown()
"""


def test_a_node_that_dies_leaves_its_pictures_in_the_store(
    server: HostileServer, jpeg: bytes, s3_bucket: str, tmp_path: Path
) -> None:
    """A root on S3: the shard begins again with every lost machine."""

    async def short(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)
        number = int(request.path.rsplit("/", 1)[1])
        writer.write(answer(jpeg + b"%d" % number) if number % 5 else answer(b"", "404 Gone"))

    base = server.route("/n/*", short)
    count = 400
    store, _ = store_with(f"{s3_bucket}/run", [f"{base}{number}" for number in range(count)])
    (images,) = fetch_stage(FetchSettings(allow_networks=["127.0.0.1/32"], image_size=64), SAMPLES).tables
    scratch = f"_scratch/fetch/{images.fingerprint}/a"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path]), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", _S3_CHILD, f"{s3_bucket}/run", str(count)]
    child = subprocess.Popen([*command, "first"], env=environment)
    while len(store.names(scratch)) < 3 and child.poll() is None:
        time.sleep(0.01)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    shutil.rmtree(tmp_path)  # the machine's disk is gone
    tmp_path.mkdir()
    asked = sum(server.asked.values()) - 1  # robots.txt
    with Parts(store, scratch) as parts, Spool(tmp_path / "look", images.fingerprint, parts) as spool:
        saved = spool.resumed
    assert 0 < saved < count
    subprocess.run([*command, "second"], env=environment, check=True)
    assert sum(server.asked.values()) - 2 == asked + count - saved, "what lay in the store was asked for again"
    found = store.read(images, "a")
    assert found["status"].to_pylist() == ["ok" if number % 5 else "http_4xx" for number in range(count)]
    assert found["sha256"].to_pylist()[1] == hashlib.sha256(jpeg + b"1").hexdigest()
    assert not store.names(scratch), "what is committed is kept twice"


def test_patience_does_not_change_the_fingerprint() -> None:
    """A longer timeout fetches a whole pool again."""

    def name(**settings: object) -> str:
        return fetch_stage(FetchSettings.model_validate({**SETTINGS, **settings}), SAMPLES).tables[0].fingerprint

    assert name() == name(timeout_s=9.0, retries=5, concurrency=9, per_host=2, decoders=7, contact="a@b.c")
    others = [
        name(image_size=49), name(robots=False), name(strip_metadata=False), name(engine="img2dataset"),
        name(where="length(text) > 3"),
    ]  # fmt: skip
    assert len({name(), *others}) == 6
