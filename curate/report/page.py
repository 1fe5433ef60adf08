"""A run as one HTML page: funnel, how scores are spread, where subsets agree, cells, and pictures to look at.

People find what is wrong with a recipe by looking: at what was kept, dropped, called a copy, and chosen by one subset
alone. The page is one file without scripts or requests; everything that came from the web is escaped, and pictures are
small JPEGs of our own encoding.
"""

from collections.abc import Iterator, Sequence
from html import escape

import duckdb
import pyarrow as pa

from curate.catalog import open_catalog, quoted, views_of
from curate.report.agreement import Agreement, agreement, agreement_html
from curate.report.cells import cells_html, sets_html
from curate.report.copies import copies_html
from curate.report.funnel import MEMBER, Line, funnel
from curate.report.pictures import STYLE, Picture, gallery
from curate.schema import TableSpec
from curate.store import Store

GROUPS = 12
PICTURES = 24  # per gallery: a screenful
BINS = 40


def write_page(store: Store, tables: Sequence[TableSpec], shards: Sequence[str]) -> str:
    """The whole page as HTML text. Counts and pictures are of the committed tables; raises MissingTable for none."""
    body = [f"<h1>{escape(store.root)}</h1>", _funnel_table(funnel(store, tables, shards))]
    with open_catalog(store, tables, shards) as connection:
        views = views_of(connection)
        if "rows" in views:
            body += list(_histograms(connection, tables))
            members = [spec.name for spec in tables if spec.name.startswith(MEMBER)]
            if len(members) > 1:
                found = agreement(connection, [name.removeprefix(MEMBER) for name in members])
                body += ["<h2>Where the subsets agree</h2>", *agreement_html(found)]
                body += list(_apart(store, connection, found))
            for name in members:
                body += list(_subset(store, connection, name))
            if "cells" in views:
                body += list(cells_html(store, connection, members))
            if "retrieved" in views:
                body += list(sets_html(connection, members))
            if "duplicates" in views:
                body += list(copies_html(store, connection, tables))
    return f"<!doctype html><meta charset=utf-8><title>curate</title><style>{STYLE}</style>" + "\n".join(body)


def _funnel_table(lines: Sequence[Line]) -> str:
    most = max((line.rows for line in lines), default=1) or 1
    rows = (
        f"<tr class={'sub' if line.depth else 'top'}><td>{escape(line.label)}<td class=n>{line.rows:,}"
        f'<td><span class=bar style="width:{20 * line.rows / most:.2f}rem"></span>'
        for line in lines
    )
    return f"<h2>Funnel</h2><table>{''.join(rows)}</table>"


def _histograms(connection: duckdb.DuckDBPyConnection, tables: Sequence[TableSpec]) -> Iterator[str]:
    yield "<h2>Scores</h2>"
    for spec in tables:
        if not spec.name.startswith("scores_"):
            continue
        for name in spec.columns:
            if pa.types.is_floating(spec.schema.field(name).type) or pa.types.is_integer(spec.schema.field(name).type):
                yield _histogram(connection, spec.name, name)


def _histogram(connection: duckdb.DuckDBPyConnection, table: str, name: str) -> str:
    found = connection.execute(
        f'SELECT min("{name}")::DOUBLE, max("{name}")::DOUBLE, count("{name}"), count(*) FROM "{table}"'
    ).fetchone()
    low, high, known, rows = found or (None, None, 0, 0)
    if low is None:
        return f"<p>{escape(name)}: null in all {rows:,} rows"
    width = (high - low) / BINS or 1.0
    counts = dict(
        connection.execute(
            f'SELECT least(floor(("{name}" - ?) / ?), {BINS - 1})::INT AS bin, count(*) FROM "{table}" '
            f'WHERE "{name}" IS NOT NULL GROUP BY 1',
            [low, width],
        ).fetchall()
    )
    top = max(counts.values())
    bars = "".join(
        f'<rect x="{8 * at}" y="{60 - 60 * count / top:.1f}" width="7" height="{60 * count / top:.1f}" fill="#4a7ebb"/>'
        for at, count in counts.items()
    )
    return (
        f"<p><b>{escape(name)}</b> {low:.4g} … {high:.4g}, {known:,} of {rows:,} rows<br>"
        f'<svg width="{8 * BINS}" height="60" role="img">{bars}</svg>'
    )


def _subset(store: Store, connection: duckdb.DuckDBPyConnection, view: str) -> Iterator[str]:
    name = view.removeprefix(MEMBER)
    kept = _rows(connection, f'"{view}" AS m JOIN rows USING (key)', "m.member", "coalesce(text, '')")
    # Keys are hashes, so the first by key are a fair sample.
    dropped = _rows(
        connection, f'"{view}" AS m JOIN rows USING (key)', "NOT m.member AND tar IS NOT NULL", "m.reason || ' — ' || "
        "coalesce(text, '')",
    )  # fmt: skip
    yield f"<h2>Subset {escape(name)}: kept</h2>" + gallery(store, kept)
    yield f"<h2>Subset {escape(name)}: dropped</h2>" + gallery(store, dropped)


def _apart(store: Store, connection: duckdb.DuckDBPyConnection, found: Agreement) -> Iterator[str]:
    """Pictures of the commonest combinations: what one way took and another did not is best looked at."""
    for combination in list(found.rows)[:GROUPS]:
        where = " AND ".join(
            f"{'' if name in combination else 'NOT '}{quoted(MEMBER + name)}" for name in found.subsets
        )
        pictures = _rows(connection, "rows", f"tar IS NOT NULL AND {where}", "coalesce(text, '')", most=8)
        words = f"{escape(' and '.join(combination))} alone: {found.rows[combination]:,} rows"
        yield f"<div class=group>{words}{gallery(store, pictures)}</div>"


def _rows(
    connection: duckdb.DuckDBPyConnection, source: str, where: str, words: str, order: str = "key", most: int = PICTURES
) -> list[Picture]:
    found = connection.execute(
        f'SELECT tar, "offset", length, {words} AS words FROM {source} WHERE {where} ORDER BY {order} LIMIT {most}'
    ).fetchall()
    return [Picture({"tar": tar, "offset": at, "length": size}, str(words)) for tar, at, size, words in found]
