"""`curate remove` and `export` as people type them."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from curate.cli import app
from curate.emit.step import latest_release
from curate.emit.verify import verify_release
from curate.engine.job import pack_spec
from curate.store import Store
from tests.emit.pool import SAMPLES, emitter, make_pool, recipe_with, run


def test_remove_and_export(tmp_path: Path) -> None:
    """Guards against a word whose options do not reach what it does, and a list that cannot be read."""
    store = Store(str(tmp_path / "run"))
    shards = make_pool(store, shards=2)
    run(emitter(store, shards, recipe_with({"all": {}})), store, shards)
    (tmp_path / "domains.txt").write_text("# asked for by mail\nhost-1.example\n")
    words = ["remove", store.root, "--domains", str(tmp_path / "domains.txt")]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "60 samples removed" in found.output and "withdrawn: releases/0001" in found.output
    assert str(latest_release(store)).startswith("0002")
    assert CliRunner().invoke(app, ["verify", store.root]).exit_code == 0
    assert CliRunner().invoke(app, ["verify", f"{store.root}/releases/{store.names('releases')[0]}"]).exit_code == 2
    for form in ("coyo", "urls", "entries", "croissant", "datasets"):
        found = CliRunner().invoke(app, ["export", store.root, "--as", form, "--out", str(tmp_path / form)])
        assert found.exit_code == 0, found.output
        assert any((tmp_path / form).iterdir())


@pytest.mark.parametrize("words", [["remove", "ROOT", "--keys", "missing.txt"], ["export", "ROOT", "--as", "coyo",
                                   "--out", "x", "--push", "a/b"], ["export", "ROOT", "--as", "datasets",
                                   "--out", "ROOT/releases/NAME"]])  # fmt: skip
def test_what_cannot_be_done_is_said(tmp_path: Path, words: list[str]) -> None:
    """Guards against a traceback for a mistyped file, and a release that its own export overwrites."""
    store = Store(str(tmp_path))
    shards = make_pool(store, shards=1)
    run(emitter(store, shards, recipe_with({"all": {}})), store, shards)
    name = str(latest_release(store))
    typed = [word.replace("ROOT", store.root).replace("NAME", name) for word in words]
    found = CliRunner().invoke(app, typed)
    assert found.exit_code == 2 and "PlanError" in found.output
    verify_release(store.root, name)


def test_status_tells_of_a_killed_removal(tmp_path: Path) -> None:
    """Guards against pictures that stay for months because nobody knew that a removal was cut short."""
    store = Store(str(tmp_path))
    make_pool(store, shards=1)
    store.put_json("plan.json", {"tables": [pack_spec(SAMPLES)], "set_aside": {}})
    store.put_json("_removed/000000-abc/tombstones.json", {"domains": ["host-0.example"]})
    told = CliRunner().invoke(app, ["status", store.root])
    assert told.exit_code == 0 and "removal 000000-abc is not finished" in told.output
    assert CliRunner().invoke(app, ["remove", store.root]).exit_code == 0
    assert "removal" not in CliRunner().invoke(app, ["status", store.root]).output
