"""Where the subsets of a run agree: how many rows each combination of them holds, and how alike any two are.

Several ways to one subset (Web-SSL's light by a model's answers, by a threshold, by a share) are judged by looking at
what one way takes and another does not. Counted from the committed tables; which way is right is not said.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations

import duckdb

from curate.catalog import quoted

SHOWN = 24  # combinations: six subsets have up to 64, most of them of a few rows


@dataclass(frozen=True)
class Agreement:
    """`rows` maps each combination, the names of the subsets that a row is in, to its number of rows; none empty."""

    subsets: tuple[str, ...]
    rows: Mapping[tuple[str, ...], int]

    def size(self, *names: str) -> int:
        """Rows that are in all of these subsets."""
        return sum(rows for combination, rows in self.rows.items() if set(names) <= set(combination))

    def jaccard(self, one: str, other: str) -> float | None:
        """Rows in both by rows in either, 0 to 1; None when both are empty."""
        both = self.size(one, other)
        either = self.size(one) + self.size(other) - both
        return both / either if either else None


def agreement(connection: duckdb.DuckDBPyConnection, subsets: Sequence[str]) -> Agreement:
    """Count the rows of each combination of subsets, over the view `rows` of a catalog; commonest first.

    Rows that no subset chose are left out.
    """
    columns = ", ".join(quoted(f"member_{name}") for name in subsets)
    anywhere = " OR ".join(quoted(f"member_{name}") for name in subsets)
    found = connection.execute(
        f"SELECT {columns}, count(*) AS n FROM rows WHERE {anywhere} GROUP BY ALL ORDER BY n DESC, {columns}"
    ).fetchall()
    named = {
        tuple(name for name, member in zip(subsets, members, strict=True) if member): rows for *members, rows in found
    }
    return Agreement(tuple(subsets), named)


def agreement_html(found: Agreement) -> Iterator[str]:
    """Two tables: a dot for each subset of a combination with a bar for its rows, and Jaccard for every two."""
    heads = "".join(f"<th>{escape(name)}" for name in found.subsets)
    yield f"<h3>Rows of each combination</h3><table class=sets><tr>{heads}<th>rows<th>"
    most = max(found.rows.values(), default=1)
    for combination, rows in list(found.rows.items())[:SHOWN]:
        dots = "".join(f"<td>{'●' if name in combination else '<i>○</i>'}" for name in found.subsets)
        yield f'<tr>{dots}<td class=n>{rows:,}<td><span class=bar style="width:{20 * rows / most:.2f}rem"></span>'
    yield "</table>"
    rest = list(found.rows.values())[SHOWN:]
    if rest:
        yield f"<p>and {len(rest):,} more combinations with {sum(rest):,} rows"
    yield f"<h3>Rows in both, by rows in either (Jaccard)</h3><table class=sets><tr><th>{heads}"
    alike = {pair: found.jaccard(*pair) for pair in combinations(found.subsets, 2)}
    for one in found.subsets:
        cells = (_cell(alike.get((one, other), alike.get((other, one))), one == other) for other in found.subsets)
        yield f"<tr><th>{escape(one)} ({found.size(one):,}){''.join(cells)}"
    yield "</table>"


def _cell(jaccard: float | None, same: bool) -> str:
    """A number on a ground that is the darker, the more alike the two are."""
    if same:
        return "<td>"
    if jaccard is None:
        return "<td>–"
    return f'<td class=n style="background:rgba(74,126,187,{jaccard:.2f})">{jaccard:.3f}'
