"""Fetching again only what failed: the rest keeps its bytes, and what was computed from it is computed again."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pytest

from curate.errors import ConfigError
from curate.retry import check_statuses, reopen, revised
from curate.schema import Shard, pool_digest
from curate.stage import Task, run_shard
from curate.store import Store
from tests.engine.toy import ToyFetch, ToyScore, fill_pool


class Healed(ToyFetch):
    """The server answers now; says which URLs it was asked for. `die` stops it in the middle."""

    def __init__(self, asked: list[str], die: bool = False) -> None:
        super().__init__()
        self.asked, self.die = asked, die
        self.batch_rows = 50

    def process(self, task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[Mapping[str, pa.RecordBatch]]:
        for batch in batches:
            self.asked += batch.column("url").to_pylist()
            outputs = next(super().process(task, iter([batch])))
            images = outputs["images"]
            status = pa.array(["ok"] * batch.num_rows)
            names = images.schema.names
            columns = [status if name == "status" else images.column(name) for name in names]
            columns[names.index("image")] = pa.array([b"late " + url.encode() for url in batch["url"].to_pylist()])
            columns[names.index("ext")] = pa.array(["png"] * batch.num_rows)
            yield {"images": pa.RecordBatch.from_arrays(columns, schema=images.schema)}
            if self.die:
                raise RuntimeError("killed")


def _ready(tmp_path: Path) -> tuple[Store, list[Shard]]:
    store = Store(str(tmp_path))
    shards = fill_pool(store, shards=2, rows=700)
    for stage in (ToyFetch(), ToyScore()):
        for spec in stage.tables:
            store.describe(spec)
        for shard in shards:
            run_shard(store, stage, shard)
    return store, shards


@pytest.mark.parametrize("die", [False, True])
def test_only_failed_rows_are_asked_for_again(tmp_path: Path, die: bool) -> None:
    """Guards against a retry that downloads a pool again, loses what it had, or leaves stale scores."""
    store, shards = _ready(tmp_path)
    images = ToyFetch.tables[0]
    before = {shard.name: store.read(images, shard.name) for shard in shards}
    kept = {shard.name: store.read_images(before[shard.name]) for shard in shards}
    assert [reopen(store, images, shard, ["timeout", "dns"]) for shard in shards] == [142, 142]
    assert store.done(images) == set()
    assert store.done(ToyScore().tables[0]) == set()
    asked: list[str] = []
    for shard in shards:
        if die:
            with pytest.raises(RuntimeError):
                run_shard(store, Healed([], die=True), shard)
        run_shard(store, Healed(asked), shard)
        run_shard(store, ToyScore(), shard)
    assert len(asked) == 284
    for shard in shards:
        after = store.read(images, shard.name)
        assert set(after.column("status").to_pylist()) == {"ok"}
        old, new = kept[shard.name], store.read_images(after)
        urls = [row["url"] for row in _samples(store, shard)]
        fresh = [b"late " + url.encode() if image is None else image for url, image in zip(urls, old, strict=True)]
        assert new == fresh
        assert store.read(ToyScore().tables[0], shard.name).column("length_bytes").null_count == 0
    tars = [name for name in store.names(store.folder(images)) if name.endswith(".tar")]
    assert tars == ["0000.r1.tar", "0001.r1.tar"]
    assert store.names(f"{store.folder(images)}/_previous") == []


def _samples(store: Store, shard: Shard) -> list[dict[str, str]]:
    from tests.engine.toy import SAMPLES

    return list(store.read(SAMPLES, shard.name).to_pylist())


def test_a_reopened_pool_is_another_pool(tmp_path: Path) -> None:
    """Guards against duplicates and releases that were decided before the missing images came."""
    store, shards = _ready(tmp_path)
    images = ToyFetch.tables[0]
    before = pool_digest(revised(store, images, shards))
    assert before == pool_digest(shards)
    reopen(store, images, shards[0], ["timeout"])
    assert pool_digest(revised(store, images, shards)) != before


def test_nothing_to_retry_touches_nothing(tmp_path: Path) -> None:
    """Guards against a scheduled `--retry` that rebuilds a healthy pool."""
    store, shards = _ready(tmp_path)
    assert reopen(store, ToyFetch.tables[0], shards[0], ["dns"]) == 0
    assert store.done(ToyFetch.tables[0]) == {"0000", "0001"}


def test_unknown_statuses_are_refused() -> None:
    """Guards against `--retry timeouts`, which would retry nothing and say nothing."""
    with pytest.raises(ConfigError, match="timeouts"):
        check_statuses(["timeouts"])
