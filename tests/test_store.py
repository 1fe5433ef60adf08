"""Tables at rest: the three invariants, atomic commits, ranges; on a disk and on S3 over real HTTP."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.errors import MissingTable, StoreError
from curate.schema import KEY, SAMPLE_FIELDS, Shard, TableSpec, key_of, keys_of
from curate.stage import run_shard
from curate.store import Store
from curate.tar import TarWriter, members
from tests.engine.toy import SAMPLES, ToyFetch, ToyScore, fill_pool

SCORES = TableSpec("scores_a", 1, pa.schema([KEY, pa.field("a", pa.float32())]))


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same tests on every kind of storage."""
    return str(tmp_path / "root") if request.param == "local" else f"{request.getfixturevalue('s3_bucket')}/root"


def _samples(store: Store, rows: int = 5) -> tuple[Shard, list[str]]:
    urls, texts = [f"u{row}" for row in range(rows)], [f"t{row}" for row in range(rows)]
    keys = keys_of(urls, texts)
    store.write(SAMPLES, Shard("s", rows), pa.table([keys, urls, texts], schema=pa.schema(SAMPLE_FIELDS)))
    return Shard("s", rows), keys


def test_a_shard_goes_through_two_stages(root: str) -> None:
    """Guards against storage that works on a disk only."""
    store = Store(root)
    (shard,) = fill_pool(store, shards=1, rows=300)
    for stage in (ToyFetch(), ToyScore()):
        report = run_shard(store, stage, shard)
        assert report.computed == (stage.tables[0].name,)
    images = store.read(ToyFetch.tables[0], shard.name)
    row = images.to_pylist()[7]
    assert store.read_images(images)[7] == b"http://127.0.0.1/0/7.jpg"
    assert row["tar"] == store.shard_path(ToyFetch.tables[0], shard.name, ".tar")
    assert store.done(ToyScore().tables[0]) == {shard.name}
    with store.open(row["tar"]) as handle, tarfile.open(fileobj=io.BytesIO(handle.read())) as archive:
        names = archive.getnames()
        at = names.index(f"{images.to_pylist()[8]['key']}.jpg")
        assert [name.split(".")[1] for name in names[at : at + 3]] == ["jpg", "txt", "json"]
        assert archive.extractfile(f"{row['key']}.jpg").read() == b"http://127.0.0.1/0/7.jpg"  # type: ignore[union-attr]


def test_invariants_are_checked_at_the_commit(root: str) -> None:
    """Guards against tables that do not line up: every later join by position would be wrong without a sign."""
    store = Store(root)
    shard, keys = _samples(store)
    good = pa.table([keys, pa.array([1.0] * 5, pa.float32())], schema=SCORES.schema)
    store.write(SCORES, shard, good, SAMPLES)
    with pytest.raises(StoreError, match="4 rows"):
        store.write(SCORES, shard, good.slice(1), SAMPLES)
    with pytest.raises(StoreError, match="same order"):
        store.write(SCORES, shard, good.take([1, 0, 2, 3, 4]), SAMPLES)
    with pytest.raises(StoreError, match="columns differ"):
        store.write(SCORES, shard, good.cast(pa.schema([KEY, ("a", pa.float64())])), SAMPLES)


def test_missing_tables_and_columns_raise(root: str) -> None:
    """Guards against a missing attribute that only warns and then drops every row."""
    store = Store(root)
    shard, _ = _samples(store)
    with pytest.raises(MissingTable, match="scores_a"):
        store.read(SCORES, shard.name)
    with pytest.raises(StoreError, match="no column nope"):
        store.read(SAMPLES, shard.name, ["nope"])


def test_foreign_and_torn_files_are_refused(tmp_path: Path) -> None:
    """Guards against a Parquet file that somebody put or cut there."""
    store = Store(str(tmp_path))
    shard, keys = _samples(store)
    path = tmp_path / store.shard_path(SCORES, shard.name)
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"key": keys, "a": pa.array([1.0] * 5, pa.float32())}), path)
    with pytest.raises(StoreError, match="key digest"):
        store.read(SCORES, shard.name)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match="not a Parquet file"):
        store.read(SCORES, shard.name)


def test_ranges_come_back_in_the_order_asked(root: str) -> None:
    """Guards against coalesced reads that hand image A to row B."""
    store = Store(root)
    data = bytes(range(256)) * 4000
    store.put_bytes("blob", data)
    offsets, lengths = [900_000, 3, 0, 500_000, 10], [100, 4, 2, 70_000, 1]
    parts = store.read_ranges("blob", offsets, lengths)
    assert parts == [data[at : at + length] for at, length in zip(offsets, lengths, strict=True)]
    with pytest.raises(StoreError, match="cut or replaced"):
        store.read_ranges("blob", [len(data) - 5], [10])


def test_keys_tell_every_pair_apart() -> None:
    """Guards against two samples that share an identity."""
    pairs = [("ab", "c"), ("a", "bc"), ("a", None), ("a", ""), (None, "a"), (None, None), ("", ""), ("\ud800", "x")]
    assert len({key_of(*pair) for pair in pairs}) == len(pairs)
    assert (
        key_of("http://a/b.jpg", "a cat") == "a92321ed833b1ed8b806942fa90161f6"
    )  # identity must never change between versions


def test_fingerprint_follows_content_and_nothing_else() -> None:
    """Guards against recomputing a pool for nothing, and against reusing what a new setting has made stale."""
    spec = TableSpec("t", 1, SCORES.schema, {"a": 1, "b": [1, 2]}, {"x": "1"})
    assert spec.fingerprint == TableSpec("t", 1, SCORES.schema, {"b": [1, 2], "a": 1}, {"x": "1"}).fingerprint
    changed = [
        TableSpec("t", 2, SCORES.schema, spec.settings, spec.inputs),
        TableSpec("t", 1, SCORES.schema, {"a": 1, "b": [2, 1]}, spec.inputs),
        TableSpec("t", 1, SCORES.schema, spec.settings, {"x": "2"}),
        TableSpec("u", 1, SCORES.schema, spec.settings, spec.inputs),
    ]
    assert len({spec.fingerprint, *(other.fingerprint for other in changed)}) == 5


def test_tars_are_plain_and_repeatable() -> None:
    """Guards against tars whose bytes depend on the clock, and against readers that cannot open them."""
    streams = [io.BytesIO(), io.BytesIO()]
    for stream in streams:
        writer = TarWriter(stream)
        offsets = [writer.add(f"{n}.jpg", b"x" * n) for n in (0, 1, 511, 512, 513)]
        writer.finish()
        assert stream.getvalue()[offsets[3] : offsets[3] + 512] == b"x" * 512
    assert streams[0].getvalue() == streams[1].getvalue()
    streams[0].seek(0)
    assert [size for _, _, size in members(streams[0])] == [0, 1, 511, 512, 513]
    with pytest.raises(StoreError):
        TarWriter(io.BytesIO()).add("é" * 60, b"")
