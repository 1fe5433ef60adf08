"""Emission where nothing can be renamed and every read is a request: S3 (moto's server over real HTTP)."""

from pathlib import Path

import pyarrow as pa
import pytest

from curate.emit.step import latest_release
from curate.emit.takeback import Lists, take_back
from curate.emit.verify import verify_release
from curate.errors import ReleaseError
from curate.store import Store
from tests.emit.nursery import nursery
from tests.emit.pool import IMAGES, SAMPLES, SCORES, emitter, make_pool, recipe_with, run


def test_same_release_on_s3_with_few_requests(s3_bucket: str, tmp_path: Path) -> None:
    """Guards against a request per sample, and against bytes that depend on where they lie."""
    from curate.torch import ReleaseDataset

    recipe = recipe_with({"good": {"where": "score > 0.2"}}, samples_per_shard=40, group_samples=80)
    notes = []
    for root in (str(tmp_path), f"{s3_bucket}/root"):
        store = Store(root)
        shards = make_pool(store, shards=3, rows=50)
        step = emitter(store, shards, recipe)
        counts = run(step, store, shards)
        assert step.done(store, shards)
        name = str(latest_release(store))
        assert verify_release(root, name).samples == counts["samples"]
        notes.append(store.get_bytes(f"releases/{name}/release.json"))
    assert notes[0] == notes[1]
    assert counts["requests"] <= 2 * len(shards)
    data = ReleaseDataset(f"{s3_bucket}/root/releases/{name}", "good")
    assert data[5][0].size == (24, 16)


def test_take_back_on_s3(s3_bucket: str) -> None:
    """Guards against an erasure that relies on renames, hard links or writing in place."""
    from curate.torch import ReleaseDataset

    store = Store(f"{s3_bucket}/taken")
    shards = make_pool(store, shards=2, rows=40)
    step = emitter(store, shards, recipe_with({"good": {"where": "score > 0.2"}}, samples_per_shard=10))
    run(step, store, shards)
    old = str(latest_release(store))
    before = store.get_json(f"releases/{old}/release.json")["subsets"]["good"]
    rows = store.read_joined([(IMAGES, None), (SCORES, ["score"])], shards[0].name).to_pylist()
    (row, *_) = [row for row in rows if (row["score"] or 0) > 0.2]
    (image,) = store.read_images(pa.Table.from_pylist([row]))
    assert image is not None
    report = take_back(store, Lists(keys=[row["key"]]))
    assert report.samples == 1 and report.withdrawn == [old]
    new = str(latest_release(store))
    after = store.get_json(f"releases/{new}/release.json")["subsets"]["good"]
    kept = {file["sha256"] for file in before["files"]} & {file["sha256"] for file in after["files"]}
    assert len(kept) == before["tars"] - 1 and after["samples"] == before["samples"] - 1
    assert verify_release(store.root, new).samples == after["samples"]
    everything = [store.fs.cat_file(path) for path in store.fs.find(store.full(""))]
    assert not any(image[-100:-20] in data for data in everything)
    assert step.done(store, shards)
    with pytest.raises(ReleaseError, match=f"withdrawn: .* use {new}"):
        ReleaseDataset(store.url(f"releases/{old}"), "good")


def test_killed_and_doubled_runs_on_s3_leave_whole_releases(s3_bucket: str, tmp_path: Path) -> None:
    """Guards against a release that is seen before it is whole where nothing can be renamed, and against a mix."""
    subsets, settings = {"good": {"where": "score > 0.2"}}, {"samples_per_shard": 10}
    whole = Store(str(tmp_path))
    run(
        emitter(whole, make_pool(whole, shards=2, rows=30), recipe_with(subsets, **settings)),
        whole,
        whole.shards(SAMPLES),
    )
    expected = whole.get_bytes(f"releases/{latest_release(whole)}/release.json")
    store = Store(f"{s3_bucket}/killed")
    make_pool(store, shards=2, rows=30)
    order = ["emit", store.root, subsets, settings]
    with nursery() as forks:
        for kill_s in (0.4, 0.7, 1.0):
            forks.do(order, kill_s=kill_s)
            for name in store.names("releases"):
                if store.exists(f"releases/{name}/release.json"):
                    verify_release(store.root, name)
        assert [code for code, _ in forks.do(order, order)] == [0, 0]
    names = [name for name in store.names("releases") if name != "latest"]
    assert [store.get_bytes(f"releases/{name}/release.json") for name in names] == [expected] * len(names)
    assert latest_release(store) in names and store.names("_work/emit") == []
    for name in names:
        assert verify_release(store.root, name).samples > 0
