"""Pools that someone else downloaded, indexed where they lie."""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate.config import IngestSettings
from curate.engine.inline import InlineDriver
from curate.errors import PlanError, SourceError
from curate.ingest.adopt import adopt_stage, status_of
from curate.ingest.features import adopt_features_stage
from curate.schema import TableSpec
from curate.stage import Stage
from curate.store import Store
from tests.ingest.pool import ingest, rows_of, tree, write_parquet

FAILED = {3: ("failed_to_download", "HTTP Error 404: Not Found"), 5: ("failed_to_resize", "image too small")}


def _jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 30 + seed, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def _tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _img2dataset_pool(folder: Path, shards: int = 2, rows: int = 8, sidecar: bool = True) -> dict[str, bytes]:
    """The layout of img2dataset: tars in the order of download, a Parquet file of all rows beside each."""
    folder.mkdir(exist_ok=True)
    images: dict[str, bytes] = {}
    for shard in range(shards):
        table: list[dict[str, Any]] = []
        samples: list[list[tuple[str, bytes]]] = []
        for row in range(rows):
            seed = shard * rows + row
            url, caption, key = f"http://h/{seed}.jpg", f"caption {seed}", f"{shard * 10**4 + row:09d}"
            status, message = FAILED.get(row, ("success", None))
            facts = {"url": url, "caption": caption, "key": key, "status": status, "error_message": message,
                     "width": None, "height": None, "original_width": None, "original_height": None, "exif": None,
                     "sha256": None, "similarity": seed / 100}  # fmt: skip
            if status == "success":
                images[url] = _jpeg(seed)
                facts |= {"width": 30 + seed, "height": 20 + seed, "original_width": 300, "original_height": 200}
                facts |= {"exif": "{}", "sha256": hashlib.sha256(b"as served" + images[url]).hexdigest()}
                samples.append([(f"{key}.jpg", images[url]), (f"{key}.txt", caption.encode()),
                                (f"{key}.json", json.dumps(facts).encode())])  # fmt: skip
            table.append(facts)
        _tar(folder / f"{shard:05d}.tar", [member for sample in reversed(samples) for member in sample])
        if sidecar:
            pq.write_table(pa.Table.from_pylist(table), folder / f"{shard:05d}.parquet")
    return images


def _run(store: Store, stage: Stage, samples: TableSpec) -> list[dict[str, Any]]:
    stage.check(store)
    shards = store.shards(samples)
    for reports in InlineDriver().run(store, [stage], shards):
        assert reports[0].set_aside is None, reports[0].set_aside
    return [row for shard in shards for row in store.read(stage.tables[0], shard.name).to_pylist()]


def test_a_pool_is_indexed_with_its_failures_and_no_byte_copied(tmp_path: Path) -> None:
    """Guards against a pool that must be downloaded or copied again, and against failures that vanish."""
    images = _img2dataset_pool(tmp_path / "pool")
    before = tree(tmp_path / "pool")
    store = Store(str(tmp_path / "root"))
    samples, counts = ingest(store, [tmp_path / "pool"], adopt=True)
    assert (counts["rows_in"], counts["samples"]) == (16, 16)
    assert [shard.rows for shard in store.shards(samples)] == [8, 8]
    rows = rows_of(store, samples)
    found = _run(store, adopt_stage(samples), samples)
    assert [row["status"] for row in found[:8]] == ["ok", "ok", "ok", "http_4xx", "ok", "too_small", "ok", "ok"]
    assert found[3]["error"] == "HTTP Error 404: Not Found"
    for row, image in zip(rows, found, strict=True):
        assert row["key"] == image["key"]
        data = store.read_images(pa.Table.from_pylist([image]))[0]
        assert data == images.get(row["url"])
        if data is not None:
            assert image["sha256"] == hashlib.sha256(b"as served" + data).hexdigest()
            with Image.open(io.BytesIO(data)) as opened:
                assert opened.size == (image["width"], image["height"])
            assert (image["original_width"], image["ext"]) == (300, "jpg")
    assert rows[1]["similarity"] == pytest.approx(0.01)
    assert rows[1]["pool_key"] == "000000001" and rows[1]["pool_tar"].endswith("pool/00000.tar")
    assert tree(tmp_path / "pool") == before
    assert not list((tmp_path / "root").rglob("*.tar"))


def test_a_pool_that_grows_is_taken_up(tmp_path: Path) -> None:
    """Guards against adopting anew what is there already."""
    _img2dataset_pool(tmp_path / "pool", shards=1)
    store = Store(str(tmp_path / "root"))
    ingest(store, [tmp_path / "pool" / "*.tar"], adopt=True)
    _img2dataset_pool(tmp_path / "pool", shards=3)
    samples, counts = ingest(store, [tmp_path / "pool" / "*.tar"], adopt=True)
    assert (counts["rows_in"], counts["sources"], len(store.shards(samples))) == (16, 2, 3)


def test_tars_alone(tmp_path: Path) -> None:
    """Guards against a pool without tables: captions and URLs are then in the tar."""
    images = _img2dataset_pool(tmp_path / "pool", shards=1, sidecar=False)
    plain = _jpeg(40)
    _tar(tmp_path / "pool" / "x.tar", [
        ("dir/a.b.jpg", b"no image"), ("dir/a.jpg", plain), ("dir/a.txt", b"by hand"), ("dir/a.json", b"{broken"),
        ("c.cls", b"3"), ("d.jpg", plain), ("d.jpg", plain),
    ])  # fmt: skip
    store = Store(str(tmp_path / "root"))
    samples, _ = ingest(store, [tmp_path / "pool"], adopt=True)
    rows, found = rows_of(store, samples), _run(store, adopt_stage(samples), samples)
    assert {row["url"]: store.read_images(pa.Table.from_pylist([image]))[0]
            for row, image in zip(rows, found, strict=True) if row["url"].startswith("http")} == images  # fmt: skip
    assert {row["text"] for row in rows} >= {"caption 0", "by hand"}
    by_key = {row["pool_key"]: image for row, image in zip(rows, found, strict=True)}
    assert [by_key[key]["status"] for key in ("dir/a", "c", "d", "d#2")] == ["ok", "removed", "ok", "ok"]
    assert by_key["d#2"]["sha256"] == hashlib.sha256(plain).hexdigest()
    assert (by_key["d"]["width"], by_key["d"]["height"]) == (70, 60)


def test_a_cut_tar_is_statuses_and_not_a_crash(tmp_path: Path) -> None:
    """Guards against one broken tar of ten thousand that ends a run."""
    _img2dataset_pool(tmp_path / "pool", shards=3)
    first, second = tmp_path / "pool" / "00000.tar", tmp_path / "pool" / "00001.tar"
    first.write_bytes(first.read_bytes()[:6_000])
    second.write_bytes(b"<html>" * 300)
    store = Store(str(tmp_path / "root"))
    samples, _ = ingest(store, [tmp_path / "pool"], adopt=True)
    (tmp_path / "pool" / "00002.tar").unlink()
    statuses = [row["status"] for row in _run(store, adopt_stage(samples), samples)]
    assert 0 < statuses[:8].count("ok") < 6 and "decode_error" in statuses[:8]
    assert statuses[8:16].count("decode_error") == statuses[16:].count("decode_error") == 6


def test_broken_tars_alone(tmp_path: Path) -> None:
    """Guards against the same where no table says what should be there."""
    _img2dataset_pool(tmp_path / "pool", shards=2, sidecar=False)
    first = tmp_path / "pool" / "00000.tar"
    first.write_bytes(first.read_bytes()[:6_000])
    (tmp_path / "pool" / "00001.tar").write_bytes(b"")
    store = Store(str(tmp_path / "root"))
    samples, counts = ingest(store, [tmp_path / "pool"], adopt=True)
    assert 0 < counts["samples"] < 6
    assert {row["status"] for row in _run(store, adopt_stage(samples), samples)} == {"ok"}


@pytest.mark.parametrize(("status", "message", "ours"), [
    ("success", None, "ok"),
    ("failed_to_download", "HTTP Error 503: Service Unavailable", "http_5xx"),
    ("failed_to_download", "<urlopen error timed out>", "timeout"),
    ("failed_to_download", "<urlopen error [Errno -2] Name or service not known>", "dns"),
    ("failed_to_download", "<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", "tls"),
    ("failed_to_download", "<urlopen error [Errno 111] Connection refused>", "connect"),
    ("failed_to_download", "unknown url type: 'abc'", "bad_url"),
    ("failed_to_download", "Use of image disallowed by X-Robots-Tag directive", "opted_out"),
    ("failed_to_download", "hash mismatch", "hash_mismatch"),
    ("failed_to_resize", "Image decoding error", "decode_error"),
    ("failed_to_resize", "aspect ratio too large", "bad_ratio"),
    (None, None, "ok"),
])  # fmt: skip
def test_img2dataset_s_words_become_our_statuses(status: str | None, message: str | None, ours: str) -> None:
    """Guards against a funnel that says `connect` for everything."""
    assert status_of(status, message) == ours


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_features_follow_their_rows(save: Any, tmp_path: Path) -> None:
    """Guards against embeddings of another image: rows are pruned, repeated and cut into shards on the way."""
    rng = np.random.default_rng(0)
    expected: dict[str, np.ndarray] = {}
    (tmp_path / "meta").mkdir()
    for number in range(2):
        ids = [number * 50 + row - (row % 7 == 0) * number * 50 for row in range(60)]
        values = rng.standard_normal((60, 8)).astype(np.float16)
        table = {"uid": [f"{i:032x}" for i in ids], "url": [f"http://{i}" for i in ids], "text": ["t"] * 60, "n": ids}
        write_parquet(tmp_path / "meta" / f"{number}.parquet", table)
        save(tmp_path / "meta" / f"{number}.npz", l14_img=values, b32_txt=values[:, :4].astype(np.float32))
        for place, name in enumerate(ids):
            expected.setdefault(f"http://{name}", values[place])
    features = {"embeddings_clip_vitl14": "l14_img", "embeddings_clip_vitb32": "b32_txt"}
    settings = IngestSettings(sources=[str(tmp_path / "meta" / "*.parquet")], where="n % 3 <> 0", features=features)
    store = Store(str(tmp_path / "root"))
    planned = adopt_features_stage(settings, store, ingest_spec(settings, store)).tables[0]
    assert planned.schema.field(1).type.list_size == 8
    samples, _ = ingest(store, settings.sources, where=settings.where, rows_per_shard=17, features=features)
    stage = adopt_features_stage(settings, store, samples)
    assert [spec.schema.names for spec in stage.tables] == [["key", "clip_vitl14_image"], ["key", "clip_vitb32_text"]]
    found = _run(store, stage, samples)
    rows = rows_of(store, samples)
    assert len(rows) > 50
    for row, vector in zip(rows, found, strict=True):
        assert np.array_equal(np.array(vector["clip_vitl14_image"], np.float16), expected[row["url"]])


def ingest_spec(settings: IngestSettings, store: Store) -> TableSpec:
    """`samples` as a plan sees it, before anything is ingested."""
    from curate.ingest.step import ingest_step

    return ingest_step(settings, store).tables[0]


def test_features_that_are_not_there_are_refused_in_the_plan(tmp_path: Path) -> None:
    """Guards against a pool without its features that is noticed after the download."""
    write_parquet(tmp_path / "a.parquet", {"url": ["http://a"], "text": ["x"]})
    store = Store(str(tmp_path / "root"))
    samples, _ = ingest(store, [tmp_path / "a.parquet"])
    sources = [str(tmp_path / "a.parquet")]
    with pytest.raises(SourceError, match="wants it beside"):
        adopt_features_stage(IngestSettings(sources=sources, features={"embeddings_x": "l14"}), store, samples)
    np.savez(tmp_path / "a.npz", b32=np.zeros((1, 2), np.float32))
    with pytest.raises(SourceError, match="no array l14; it has b32"):
        adopt_features_stage(IngestSettings(sources=sources, features={"embeddings_x": "l14"}), store, samples)
    with pytest.raises(PlanError, match="embeddings_<name>"):
        adopt_features_stage(IngestSettings(sources=sources, features={"x": "b32"}), store, samples)
    with pytest.raises(PlanError, match="no pool_tar"):
        adopt_stage(samples).check(store)
