"""What was taken back stays away: new tables, new captions for the same URL, the same bytes from elsewhere."""

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.config import IngestSettings
from curate.emit.step import latest_release
from curate.emit.takeback import Lists, take_back
from curate.errors import PlanError, StageError
from curate.ingest.step import ingest_step
from curate.metrics import progress
from curate.schema import IMAGE, IMAGE_FIELDS, IMAGES_SCHEMA, KEY, Shard, TableSpec, inputs_of
from curate.stage import Read, Stage, Task, run_shard
from curate.store import Store
from tests.emit.pool import SAMPLES, emitter, make_pool, picture, recipe_with, run


def _ingest(store: Store, files: Sequence[Path], **settings: object) -> tuple[TableSpec, list[dict[str, object]]]:
    step = ingest_step(IngestSettings.model_validate({"sources": [str(file) for file in files], **settings}), store)
    with progress("ingest", 1) as ticker:
        step.run(store, [], map, ticker)
    (samples,) = step.tables
    return samples, [row for shard in store.shards(samples) for row in store.read(samples, shard.name).to_pylist()]


def _table(path: Path, pairs: Sequence[tuple[str, str]]) -> Path:
    urls, texts = zip(*pairs, strict=True)
    pq.write_table(pa.table({"url": urls, "text": texts}), path)
    return path


def test_new_crawls_do_not_bring_it_back(tmp_path: Path) -> None:
    """Guards against a removed URL that returns with another caption, in another table, under other settings."""
    store = Store(str(tmp_path / "root"))
    gone, kept = "http://a.example/1.jpg", "http://b.example/2.jpg"
    first = _table(tmp_path / "one.parquet", [(gone, "one"), (kept, "two"), ("http://c.d.example/3.jpg", "three")])
    samples, rows = _ingest(store, [first])
    (tmp_path / "list").write_text("d.example\n")
    assert take_back(store, Lists(urls=[gone], domains=["D.example"])).samples == 2
    (shard,) = store.shards(samples)
    erased = store.read(samples, shard.name).to_pylist()
    assert [row["key"] for row in erased] == [row["key"] for row in rows]
    assert [row["url"] for row in erased] == [None, kept, None]
    again = _table(
        tmp_path / "two.parquet", [(gone, "one"), (gone, "new words"), ("http://d.example/x", "y"), (kept, "z")]
    )
    _, rows = _ingest(store, [first, again])
    assert [(row["url"], row["text"]) for row in rows] == [(None, None), (kept, "two"), (None, None), (kept, "z")]
    _, rows = _ingest(store, [first, again], where="url IS NOT NULL")  # another table of samples, from the start
    assert [row["url"] for row in rows] == [kept, kept]


class _Served(Stage):
    """Gives each sample the picture of its number."""

    name = "served"

    def __init__(self) -> None:
        super().__init__()
        spec = TableSpec("images", 2, IMAGES_SCHEMA, {"toy": 1}, inputs_of([SAMPLES]), with_images=True)
        self.tables = (spec,)

    def reads(self, missing: frozenset[str]) -> Sequence[Read]:
        return [Read(SAMPLES, ("url", "text"))]

    def process(self, task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[Mapping[str, pa.RecordBatch]]:
        schema = pa.schema([*IMAGE_FIELDS, pa.field(IMAGE, pa.large_binary())])
        for batch in batches:
            bodies = [picture(row, "PNG") for row in range(batch.num_rows)]
            facts = [
                {"status": "ok", "ext": "png", "sha256": hashlib.sha256(body).hexdigest(), IMAGE: body}
                for body in bodies
            ]
            yield {"images": pa.RecordBatch.from_pylist(facts, schema=schema)}


def test_the_same_bytes_are_not_stored_again(tmp_path: Path) -> None:
    """Guards against a removed picture that comes back from another address."""
    store = Store(str(tmp_path))
    (shard,) = make_pool(store, shards=1, rows=20)
    take_back(store, Lists(hashes=[hashlib.sha256(picture(3, "PNG")).hexdigest()]))
    stage = _Served()
    report = run_shard(store, stage, shard)
    assert report.counts == {"ok": 19, "removed": 1}
    rows = store.read(stage.tables[0], shard.name).to_pylist()
    assert [row["status"] for row in rows].index("removed") == 3 and rows[3]["tar"] is None
    tar = store.get_bytes(store.shard_path(stage.tables[0], shard.name, ".tar"))
    assert picture(3, "PNG") not in tar and picture(4, "PNG") in tar
    assert take_back(store, Lists()).samples == 1  # its caption and address go when it is swept
    url = store.read(SAMPLES, shard.name, ["url"]).column("url").to_pylist()
    assert url.count(None) == 1 and url[3] is None


def test_a_worker_that_outlived_its_run_commits_nothing(tmp_path: Path) -> None:
    """Guards against a picture that is stored after the removal that looked for it has passed."""

    class Overtaken(_Served):
        def process(self, task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[Mapping[str, pa.RecordBatch]]:
            for outputs in super().process(task, batches):
                take_back(store, Lists(domains=["host-0.example"]))
                yield outputs

    store = Store(str(tmp_path))
    (shard,) = make_pool(store, shards=1, rows=20)
    stage = Overtaken()
    with pytest.raises(StageError, match="samples were removed while pool-0000 was in work"):
        run_shard(store, stage, shard)
    assert store.names(store.folder(stage.tables[0])) == []


def test_alike_pictures_go_by_phash(tmp_path: Path) -> None:
    """Guards against a radius that is not kept, and against hashes where nothing computes them."""
    store = Store(str(tmp_path))
    (shard,) = make_pool(store, shards=1, rows=20)
    for table in ("samples", "images", "scores_toy", "embeddings_toy"):
        for print_ in store.names(table):
            store.put_json(f"{table}/{print_}/_table.json", {"columns": {"key": "string"}, "inputs": {}})
    with pytest.raises(PlanError, match="no table here has image_phash"):
        take_back(store, Lists(phashes=["00000000000000ff"]))
    assert not store.exists("_removed")
    spec = TableSpec("scores_phash", 1, pa.schema([KEY, pa.field("image_phash", pa.string())]))
    keys = store.read(SAMPLES, shard.name, ["key"]).column("key")
    hashes = [f"{0xFF ^ (2**row - 1):016x}" for row in range(20)]
    store.write(spec, shard, pa.table([keys, hashes], schema=spec.schema), SAMPLES)
    store.describe(spec)
    assert take_back(store, Lists(phashes=["00000000000000FF"], phash_radius=2)).samples == 3
    text = store.read(SAMPLES, shard.name, ["url"]).column("url").to_pylist()
    assert [row for row, url in enumerate(text) if url is None] == [0, 1, 2]


def test_what_killed_runs_left_is_swept(tmp_path: Path) -> None:
    """Guards against scratch of given-up releases that stays for ever, and that of a run beside ours that goes."""
    store = Store(str(tmp_path))
    shards = make_pool(store, shards=1)
    for name in ("old", "young"):
        store.put_bytes(f"_work/emit/{name}/pick/x", b"x")
    past = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / "_work/emit/old/pick/x", (past, past))
    run(emitter(store, shards, recipe_with({"all": {}})), store, shards)
    assert latest_release(store) is not None
    assert store.names("_work/emit") == ["young"]
    assert isinstance(shards[0], Shard)
