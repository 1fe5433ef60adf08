"""The demo as one act: draw the web, serve it, run the main job on it, and say what was found of what was planted.

The main job itself is handed in (`execute`), so that the demo runs the same code and configuration as a real run. It
refuses to end well when a page's fate was misread: a status that differs from the planted one is an error.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from curate.demo.compare import Finding, compare, print_findings
from curate.demo.paths import weights_dir
from curate.demo.server import WebServer
from curate.demo.web import build
from curate.engine.job import Job
from curate.errors import CurateError

WEIGHTS_NOTE = (
    "The CLIP weights of this demo are for the demo only: the project trained them on its own drawings "
    "(python -m curate.demo.train), and they know nothing else. Real runs name a real model in `score:`."
)


def run_demo(root: Path, port: int, execute: Callable[[list[str]], Job], out: Console) -> None:
    """Run the demo under `root` (`web/` and `run/`); `execute` takes recipe overrides and runs the main job.

    A second call draws nothing and fetches nothing anew.

    Raises:
        PlanError: the port is taken.
        CurateError: a planted fate (dead, hanging, opted out, …) was given another status than it must have.
    """
    began = time.monotonic()
    web = root / "web"
    out.print(
        f"the demo's small web: {web} (drawn where it is not there yet, about 15 s)", markup=False, soft_wrap=True
    )
    table = build(web, port)
    rows = pq.read_metadata(table).num_rows
    with WebServer(web) as server:
        out.print(f"serving {rows:,} planted rows at {server.url}", markup=False)
        job = execute(
            [
                f"root={json.dumps(str(root / 'run'))}",  # JSON is YAML, whatever stands in the path
                f"ingest.sources={json.dumps([str(table)])}",
                f"score.clip_demo.model={json.dumps(f'local-dir:{weights_dir()}')}",
            ]
        )
    findings = [*found_by(job, pq.read_table(web / "truth.parquet")), *trespasses(server)]
    print_findings(findings, out)
    out.print(WEIGHTS_NOTE, markup=False, soft_wrap=True)
    out.print(f"demo: {time.monotonic() - began:.0f} s", markup=False)
    wrong = [f"{f.kind} ({f.question}: {f.found} of {f.planted})" for f in findings if f.is_exact and not f.is_right]
    if wrong:
        raise CurateError(f"the run misread what was planted: {'; '.join(wrong)}; see `curate sql` on {root / 'run'}")


def found_by(job: Job, truth: pa.Table) -> list[Finding]:
    """Compare the tables of a finished job with the truth."""
    members = {name: whole(job, name, ["key", "member"]) for name in job.tables if name.startswith("member_")}
    copies = whole(job, "duplicates", ["key", "is_duplicate", "duplicate_of"]) if "duplicates" in job.tables else None
    return compare(truth, whole(job, "samples", ["key"]), whole(job, "images", ["key", "status"]), copies, members)


def whole(job: Job, name: str, columns: list[str]) -> pa.Table:
    """These columns of a table over all shards that have it; a shard that was set aside counts as not found."""
    spec = job.tables[name]
    shards = [shard.name for shard in job.store.shards(job.tables["samples"]) if job.store.has(spec, shard.name)]
    empty = pa.schema([spec.schema.field(column) for column in columns]).empty_table()
    return pa.concat_tables([empty, *(job.store.read(spec, shard, columns).select(columns) for shard in shards)])


def trespasses(server: WebServer) -> Iterator[Finding]:
    """Requests that must never have been made: to the forbidden address, and to what robots.txt disallows."""
    if server.private_hits is not None:
        yield Finding(
            "redirect_private", "asked the forbidden address", 0, server.private_hits.total(), right=0, is_exact=True
        )
    asked = sum(count for path, count in server.hits.items() if path.startswith("/members/"))
    yield Finding("robots", "asked what robots.txt disallows", 0, asked, right=0, is_exact=True)
