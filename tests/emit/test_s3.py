"""Emission where nothing can be renamed and every read is a request: S3 (moto's server over real HTTP)."""

from pathlib import Path

from curate.emit.step import latest_release
from curate.emit.verify import verify_release
from curate.store import Store
from tests.emit.pool import emitter, make_pool, recipe_with, run


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
