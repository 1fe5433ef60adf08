"""The pool's cells and seed sets as people see them: how widely each subset is spread, which seed sets retrieved it,
and pictures of large and of usual cells.

The effective number of cells is exp of the entropy of a subset's rows over them: as many equally filled cells would be
as diverse. Pictures are those nearest to the centroid.
"""

from collections.abc import Iterator, Sequence
from html import escape

import duckdb

from curate.catalog import quoted
from curate.report.funnel import MEMBER
from curate.report.pictures import Picture, gallery
from curate.store import Store

CELLS = 8  # the largest, and as many of middling size
PICTURES = 8  # of each


def cells_html(store: Store, connection: duckdb.DuckDBPyConnection, members: Sequence[str]) -> Iterator[str]:
    """Sections of the page; `members` are the tables of the subsets. The view `rows` must have the column cell."""
    lines = [_spread(connection, "the pool", "TRUE")]
    lines += [_spread(connection, name.removeprefix(MEMBER), quoted(name)) for name in members]
    head = "<tr><th>rows<th>in cells<th>cells covered<th>effective cells"
    yield f"<h2>Cells</h2><table>{head}{''.join(lines)}</table>"
    sizes = connection.execute("SELECT cell, count(*) FROM rows WHERE cell IS NOT NULL GROUP BY 1 ORDER BY 2 DESC, 1")
    found: list[tuple[int, int]] = sizes.fetchall()
    middle = max((len(found) - CELLS) // 2, CELLS)
    for cell, rows in [*found[:CELLS], *found[middle : middle + CELLS]]:
        nearest = connection.execute(
            'SELECT tar, "offset", length, text FROM rows WHERE cell = ? AND tar IS NOT NULL '
            f"ORDER BY distance, key LIMIT {PICTURES}", [cell],
        ).fetchall()  # fmt: skip
        pictures = [Picture({"tar": tar, "offset": at, "length": size}, text or "") for tar, at, size, text in nearest]
        yield f"<div class=group>cell {cell}: {rows:,} rows{gallery(store, pictures)}</div>"


def sets_html(connection: duckdb.DuckDBPyConnection, members: Sequence[str]) -> Iterator[str]:
    """For the pool and each subset, rows that each seed set retrieved and their share of its retrieved rows; a row that
    several sets retrieve counts for each. The view `rows` must have the column retrieved_by."""
    yield "<h2>Seed sets</h2><table><tr><th>rows<th>seed set<th>retrieved by it<th>of those retrieved"
    for name in ("the pool", *members):
        where = "is_retrieved" if name == "the pool" else f"is_retrieved AND {quoted(name)}"
        (whole,) = connection.execute(f"SELECT count(*) FROM rows WHERE {where}").fetchone() or (0,)
        each = f"SELECT unnest(retrieved_by) AS one FROM rows WHERE {where}"
        sets = connection.execute(f"SELECT one, count(*) FROM ({each}) GROUP BY 1 ORDER BY 2 DESC, 1").fetchall()
        for one, rows in sets:
            told = f"<td>{escape(one)}<td class=n>{rows:,}<td class=n>{100 * rows / whole:.1f} %"
            yield f"<tr><td>{escape(name.removeprefix(MEMBER))}{told}"
    yield "</table>"


def _spread(connection: duckdb.DuckDBPyConnection, name: str, where: str) -> str:
    told = connection.execute(
        "SELECT coalesce(sum(n), 0), count(*), exp(-sum(n / total * ln(n / total))) FROM (SELECT n, sum(n) OVER () AS "
        f"total FROM (SELECT count(*)::DOUBLE AS n FROM rows WHERE cell IS NOT NULL AND {where} GROUP BY cell))"
    ).fetchone()
    rows, covered, effective = told or (0, 0, None)
    return f"<tr><td>{escape(name)}<td class=n>{int(rows):,}<td class=n>{covered:,}<td class=n>{effective or 0:,.1f}"
