"""The demo's frame around the main job: right overrides, honest comparison, and an error where a fate was misread."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from curate.config import load_recipe
from curate.demo.run import run_demo
from curate.engine.job import Job
from curate.errors import CurateError
from curate.schema import KEY, OK, SAMPLE_FIELDS, Shard, TableSpec

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"


class PerfectRun:
    """Stands in for the main job: commits tables that say exactly what was planted, but for `misread` kinds."""

    def __init__(self, misread: str = "") -> None:
        self.misread = misread
        self.job: Job | None = None

    def __call__(self, overrides: list[str]) -> Job:
        """Write the tables below the root that the overrides name, in two shards."""
        recipe = load_recipe(CONFIG, [*overrides, "engine.driver=inline"])
        table = Path(recipe.ingest.sources[0])
        assert table.is_file() and str(recipe.score["clip_demo"]["model"]).startswith("local-dir:")
        truth = list(
            {row["key"]: row for row in pq.read_table(table.parent / "truth.parquet").to_pylist()[::-1]}.values()
        )
        job = self.job = Job(recipe)
        fields = {
            "samples": SAMPLE_FIELDS,
            "images": (KEY, pa.field("status", pa.string())),
            "duplicates": (KEY, pa.field("is_duplicate", pa.bool_()), pa.field("duplicate_of", pa.string())),
            "member_pairs": (KEY, pa.field("member", pa.bool_())),
        }
        job.tables = {name: TableSpec(name, 1, pa.schema(list(schema))) for name, schema in fields.items()}
        first: dict[str, str] = {}
        for row in truth:
            row["status"] = OK if row["kind"] == self.misread else row["expected_status"][0]
            kept = first.setdefault(row["duplicate_group"] or row["key"], row["key"])
            row |= {"is_duplicate": kept != row["key"], "duplicate_of": kept}
            row["member"] = row["status"] == OK and row["caption_is_true"] and kept == row["key"]
        shards = [Shard("a", 400), Shard("b", len(truth) - 400)]
        for shard, rows in zip(shards, (truth[:400], truth[400:]), strict=True):
            for spec in job.tables.values():
                chosen = [{name: row[name] for name in spec.schema.names} for row in rows]
                job.store.write(spec, shard, pa.Table.from_pylist(chosen, schema=spec.schema))
        job.store.add_batch(job.tables["samples"], 0, {"shards": [{"name": s.name, "rows": s.rows} for s in shards]})
        return job


@pytest.fixture
def root(folder: Path, tmp_path: Path) -> Path:
    """A demo's root where the web is drawn already."""
    (tmp_path / "web").symlink_to(folder)
    return tmp_path


def port_of(root: Path) -> int:
    """The port that the web was drawn for."""
    port: int = json.loads((root / "web" / "web.json").read_text("utf-8"))["settings"]["port"]
    return port


def test_right_run_ends_well_and_twice(root: Path) -> None:
    """Guards a right run against being blamed, and the web against being drawn anew."""
    said, drawn = io.StringIO(), (root / "web" / "web.json").stat().st_mtime_ns
    for _ in range(2):
        run_demo(root, port_of(root), PerfectRun(), Console(file=said, width=120))
    text = said.getvalue()
    assert "missed" not in text and "false" not in text and "36 / 36" in text
    assert "for the demo only" in " ".join(text.split())
    assert (root / "web" / "web.json").stat().st_mtime_ns == drawn


def test_misread_fate_is_an_error(root: Path) -> None:
    """Guards against a demo that ends with success although a page that opted out was taken."""
    with pytest.raises(CurateError, match="opted_out"):
        run_demo(root, port_of(root), PerfectRun(misread="opted_out"), Console(file=io.StringIO()))
