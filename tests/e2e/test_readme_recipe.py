"""The README's recipe of your own, exactly as it is written there, on the demo's web."""

import re
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curate.demo.paths import weights_dir
from tests.e2e.conftest import Web, curate

README = Path(__file__).parents[2] / "README.md"


def blocks(heading: str) -> list[tuple[str, str]]:
    """(language, code) of the blocks of a section."""
    section = README.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)


def test_the_recipe_of_the_readme_runs_as_written(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a README that describes another program."""
    (_, recipe), (_, pipeline), (shell, commands) = blocks("A recipe of your own")
    assert shell == "sh"
    assert len(recipe.splitlines()) + len(pipeline.splitlines()) <= 40
    (tmp_path / "even.yaml").write_text(recipe)
    (tmp_path / "even.py").write_text(pipeline)
    shutil.copytree(weights_dir(), tmp_path / "models" / "clip")
    (tmp_path / "urls").mkdir()
    shutil.copy(web.table, tmp_path / "urls" / "urls.parquet")
    monkeypatch.chdir(tmp_path)
    for line in commands.splitlines():
        words = line.split("#")[0].split()
        curate(*words[1:], "--set", "fetch.allow_networks=[127.0.0.1/32]", "--set", "engine.driver=inline")
    curate("sql", "SELECT * FROM rows", "--root", "out/even", "--out", "rows.parquet")
    names = ["status", "is_duplicate", "word_count", "clip_similarity_own", "cell", "hierarchical_sample_60"]
    rows = pq.read_table("rows.parquet", columns=["key", *names]).to_pylist()
    some = [
        row for row in rows
        if row["status"] == "ok" and not row["is_duplicate"] and row["word_count"] >= 3
        and row["clip_similarity_own"] is not None and row["clip_similarity_own"] > 0.5
    ]  # fmt: skip
    assert all(row["cell"] is not None for row in some)
    sizes = Counter(row["cell"] for row in some)
    given = Counter(row["cell"] for row in some if row["hierarchical_sample_60"])
    most = max(given.values())
    assert given.total() == 60 < len(some)
    assert all(
        given[cell] == size or most - given[cell] <= 1 for cell, size in sizes.items()
    )  # all of it, or its share
    (manifest,) = Path("out/even/releases").glob("0*/manifest.parquet")
    released = pq.read_table(manifest, columns=["subset", "key"]).to_pylist()
    assert {row["key"] for row in released if row["subset"] == "even"} == {
        row["key"] for row in some if row["hierarchical_sample_60"]
    }
    assert sum(row["subset"] == "copies" for row in released) == sum(
        row["status"] == "ok" and row["is_duplicate"] for row in rows
    )
