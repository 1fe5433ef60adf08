"""What the command prints: plans, funnels, samples and releases as tables for a terminal or a log."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from curate.engine.job import Job
from curate.report.funnel import funnel
from curate.schema import TableSpec
from curate.store import Store


def print_plan(out: Console, job: Job) -> None:
    """Steps, tables, fingerprints, and what is left to do."""
    table = Table("step", "writes", "fingerprint", "to do", "of", title=f"{job.recipe.pipeline} → {job.store.root}")
    for record in job.records:
        prints = "\n".join(job.tables[name].fingerprint for name in record.tables)
        todo, of = (f"{record.todo:,}", f"{record.of:,}") if job.shards else ("all", "not ingested yet")
        table.add_row(record.name, "\n".join(record.tables), prints, todo, of)
    out.print(table)
    for record in job.records:
        if record.note:
            out.print(record.note, markup=False, soft_wrap=True)


def print_funnel(out: Console, store: Store, tables: Sequence[TableSpec], shards: Sequence[str]) -> None:
    """From rows to subsets, in numbers."""
    table = Table("funnel", "rows", show_edge=False)
    table.columns[1].justify = "right"
    for line in funnel(store, tables, shards):
        table.add_row(escape("  " * line.depth + line.label), f"{line.rows:,}")
    out.print(table)


def print_release(out: Console, store: Store, latest: str) -> None:
    """Where a release lies and the line that loads each subset."""
    url = store.url(f"releases/{latest}")
    out.print(f"release: {url}", markup=False, soft_wrap=True)
    release = store.get_json(f"releases/{latest}/release.json")
    for name, facts in release["subsets"].items():
        tars = facts["tars"]
        span = f"{{00000..{tars - 1:05d}}}.tar" if tars > 1 else "00000.tar"
        out.print(f"  {name}: {facts['samples']:,} samples in {tars:,} tars", markup=False)
        if tars:
            out.print(f"    webdataset.WebDataset('{url}/{name}/{span}')", markup=False, soft_wrap=True)


def print_sample(out: Console, store: Store, tables: Sequence[TableSpec], shard: str, row: int) -> None:
    """All columns of one sample."""
    table = Table("table", "column", "value", title=f"{shard}, row {row}", show_lines=False)
    for spec in tables:
        if not store.has(spec, shard):
            table.add_row(spec.name, "", "not computed yet")
            continue
        values = store.read(spec, shard).slice(row, 1).to_pylist()[0]
        for name, value in values.items():
            table.add_row(spec.name, name, shown(value))
    out.print(table)


def shown(value: Any) -> str:
    """A value for a table on a terminal: long vectors by their length, long texts cut, markup escaped."""
    if isinstance(value, float):
        return f"{value:.4g}"
    words = f"{len(value)} numbers" if isinstance(value, list) and len(value) > 16 else str(value)
    return escape(printable(words[:300]))


def printable(text: str, keep: str = "") -> str:
    """Text from the web without what would drive a terminal: control characters and direction marks as escapes."""
    return "".join(one if one.isprintable() or one in keep else one.encode("unicode_escape").decode() for one in text)


def complain(kind: str, words: str) -> None:
    """An error on the standard error."""
    console = Console(stderr=True, soft_wrap=True, emoji=False)
    console.print(f"[bold red]{kind}[/]: {escape(printable(words, keep=chr(10)))}")
