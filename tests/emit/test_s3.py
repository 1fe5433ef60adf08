"""Emission where nothing can be renamed and every read is a request: S3 (moto's server over real HTTP)."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from curate.emit.step import latest_release
from curate.emit.verify import verify_release
from curate.store import Store
from tests.emit.pool import emitter, make_pool, recipe_with, run


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 bucket on this machine, with keys that are nobody's."""
    import s3fs
    from moto.server import ThreadedMotoServer

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("emission")
    yield "s3://emission/root"
    server.stop()


def test_same_release_on_s3_with_few_requests(bucket: str, tmp_path: Path) -> None:
    """Guards against a request per sample, and against bytes that depend on where they lie."""
    from curate.torch import ReleaseDataset

    recipe = recipe_with({"good": {"where": "score > 0.2"}}, samples_per_shard=40, group_samples=80)
    notes = []
    for root in (str(tmp_path), bucket):
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
    data = ReleaseDataset(f"{bucket}/releases/{name}", "good")
    assert data[5][0].size == (24, 16)
