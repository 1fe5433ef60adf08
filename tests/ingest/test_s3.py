"""Sources, pools and the store itself on object storage, over real HTTP."""

import json
from pathlib import Path

import fsspec
import pyarrow as pa

from curate.ingest.adopt import adopt_stage
from curate.store import Store
from tests.ingest.pool import ingest, rows_of, write_parquet
from tests.ingest.test_adopt import _img2dataset_pool, _run


def test_tables_and_store_on_s3(s3_bucket: str, tmp_path: Path) -> None:
    """Guards against what only works on a disk: globs, replaced objects, removal of folders, renames."""
    fs = fsspec.filesystem("s3")
    table = {"url": ["http://a", "http://b", "http://a"], "text": ["x", "y", "x"]}
    fs.put_file(str(write_parquet(tmp_path / "a.parquet", table)), f"{s3_bucket}/t/a.parquet")
    fs.pipe_file(f"{s3_bucket}/t/b.jsonl", json.dumps({"url": "http://c", "text": "z"}).encode())
    store = Store(f"{s3_bucket}/root")
    samples, counts = ingest(store, [f"{s3_bucket}/t/*"])
    assert (counts["samples"], counts["duplicates"]) == (3, 1)
    assert ingest(store, [f"{s3_bucket}/t/*"])[1] == {}
    fs.pipe_file(f"{s3_bucket}/t/b.jsonl", json.dumps({"url": "http://d", "text": "z"}).encode())
    samples, counts = ingest(store, [f"{s3_bucket}/t/*"])
    assert counts["samples"] == 1
    assert [row["url"] for row in rows_of(store, samples)] == ["http://a", "http://b", "http://c", "http://d"]
    assert [source["path"] for batch in store.batches(samples) for source in batch["sources"]] == [
        f"{s3_bucket}/t/a.parquet", f"{s3_bucket}/t/b.jsonl", f"{s3_bucket}/t/b.jsonl",
    ]  # fmt: skip


def test_a_pool_on_s3_is_adopted(s3_bucket: str, tmp_path: Path) -> None:
    """Guards against offsets that mean nothing where files are objects."""
    images = _img2dataset_pool(tmp_path / "pool")
    fs = fsspec.filesystem("s3")
    for path in (tmp_path / "pool").iterdir():
        fs.put_file(str(path), f"{s3_bucket}/pool/{path.name}")
    store = Store(str(tmp_path / "root"))
    samples, _ = ingest(store, [f"{s3_bucket}/pool"], adopt=True)
    found = _run(store, adopt_stage(samples), samples)
    data = store.read_images(pa.Table.from_pylist(found))
    assert data == [images.get(row["url"]) for row in rows_of(store, samples)]
