"""Sources, pools and the store itself on object storage, over real HTTP."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from curate.ingest.adopt import adopt_stage
from curate.store import Store
from tests.ingest.pool import ingest, rows_of, write_parquet
from tests.ingest.test_adopt import _img2dataset_pool, _run


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A server that speaks S3 (moto), with keys that are nobody's."""
    from moto.server import ThreadedMotoServer

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    if not fs.exists("ingest"):
        fs.mkdir("ingest")
    return "s3://ingest"


def test_tables_and_store_on_s3(bucket: str, tmp_path: Path) -> None:
    """Guards against what only works on a disk: globs, replaced objects, removal of folders, renames."""
    fs = fsspec.filesystem("s3")
    table = {"url": ["http://a", "http://b", "http://a"], "text": ["x", "y", "x"]}
    fs.put_file(str(write_parquet(tmp_path / "a.parquet", table)), "ingest/t/a.parquet")
    fs.pipe_file("ingest/t/b.jsonl", json.dumps({"url": "http://c", "text": "z"}).encode())
    store = Store(f"{bucket}/root")
    samples, counts = ingest(store, [f"{bucket}/t/*"])
    assert (counts["samples"], counts["duplicates"]) == (3, 1)
    assert ingest(store, [f"{bucket}/t/*"])[1] == {}
    fs.pipe_file("ingest/t/b.jsonl", json.dumps({"url": "http://d", "text": "z"}).encode())
    samples, counts = ingest(store, [f"{bucket}/t/*"])
    assert counts["samples"] == 1
    assert [row["url"] for row in rows_of(store, samples)] == ["http://a", "http://b", "http://c", "http://d"]
    assert [source["path"] for batch in store.batches(samples) for source in batch["sources"]] == [
        "s3://ingest/t/a.parquet", "s3://ingest/t/b.jsonl", "s3://ingest/t/b.jsonl",
    ]  # fmt: skip


def test_a_pool_on_s3_is_adopted(bucket: str, tmp_path: Path) -> None:
    """Guards against offsets that mean nothing where files are objects."""
    images = _img2dataset_pool(tmp_path / "pool")
    fs = fsspec.filesystem("s3")
    for path in (tmp_path / "pool").iterdir():
        fs.put_file(str(path), f"ingest/pool/{path.name}")
    store = Store(str(tmp_path / "root"))
    samples, _ = ingest(store, [f"{bucket}/pool"], adopt=True)
    found = _run(store, adopt_stage(samples), samples)
    data = store.read_images(pa.Table.from_pylist(found))
    assert data == [images.get(row["url"]) for row in rows_of(store, samples)]
