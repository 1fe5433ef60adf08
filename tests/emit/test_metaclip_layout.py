"""A release in MetaCLIP's shard layout, read back by its rules."""

import hashlib
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curate.emit import metaclip
from curate.emit.exports import EXPORTS
from curate.emit.step import latest_release
from curate.errors import PlanError
from curate.store import Store
from tests.emit.pool import emitter, make_pool, recipe_with, run


def test_metaclip_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against members out of turn, other names than the URL's, and texts of another picture."""
    monkeypatch.setattr(metaclip, "PICTURES_PER_TAR", 25)
    store = Store(str(tmp_path / "root[1]"))
    shards = make_pool(store)
    run(emitter(store, shards, recipe_with({"good": {"where": "score > 0.3"}}, samples_per_shard=40)), store, shards)
    release = tmp_path / "root[1]" / "releases" / str(latest_release(store))
    beside = tmp_path / "root1" / "releases" / release.name  # which DuckDB takes root[1] for
    beside.mkdir(parents=True)
    (beside / "manifest.parquet").write_bytes(b"of another run")
    out = tmp_path / "out"
    for number in range(30):  # of an earlier, longer export
        (out / str(number)).mkdir(parents=True)
        (out / str(number) / f"{number}.tar").write_bytes(b"")
    EXPORTS["metaclip"](str(release), "good", out)
    rows = [row for row in pq.read_table(release / "manifest.parquet").to_pylist() if row["text"] is not None]
    by_url = {row["url"]: row for row in rows}
    found = {}
    tars = sorted(out.glob("*/*.tar"), key=lambda path: int(path.stem))
    assert [path.relative_to(out).as_posix() for path in tars] == [f"{at % 100}/{at}.tar" for at in range(len(tars))]
    assert len(tars) == -(-len(by_url) // 25) > 2
    for path in tars:
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            for one, two in zip(members[::2], members[1::2], strict=True):
                uuid, kind = one.name.split(".")
                assert (kind, two.name) == ("json", f"{uuid}.jpeg")
                note = json.loads(tar.extractfile(one).read())  # type: ignore[union-attr]
                assert uuid == hashlib.sha224(note["url"].encode()).hexdigest()[:24]
                found[note["url"]] = (note["texts"], hashlib.sha256(tar.extractfile(two).read()).hexdigest())  # type: ignore[union-attr]
    assert found == {url: ([[row["key"], row["text"]]], row["member_sha256"]) for url, row in by_url.items()}
    with pytest.raises(PlanError, match="no subset other"):
        EXPORTS["metaclip"](str(release), "other", tmp_path / "none")
