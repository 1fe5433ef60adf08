"""From rows to subsets, in numbers: what came in, what failed and how, what is a copy, what was chosen.

Everything is counted from the committed tables, never from memory of a run, so that it is the same at any time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb

from curate.catalog import count_by, open_catalog, views_of
from curate.metrics import total
from curate.rows import SAMPLES
from curate.schema import OK, STATUSES, TableSpec
from curate.store import Store

MEMBER = "member_"


@dataclass(frozen=True)
class Line:
    """A step of the funnel; `depth` 1 is a part of the line above."""

    label: str
    rows: int
    depth: int = 0


def funnel(store: Store, tables: Sequence[TableSpec], shards: Sequence[str]) -> list[Line]:
    """The lines of the funnel, in the order of the tables."""
    by_name = {spec.name: spec for spec in tables}
    lines = _ingested(store, by_name[SAMPLES])
    with open_catalog(store, tables, shards) as connection:
        views = views_of(connection)
        if "images" in views:
            lines += _statuses(connection)
        for spec in tables:
            if spec.name.startswith("scores_") and spec.name in views:
                lines += _scored(connection, spec)
        if "duplicates" in views:
            kinds = count_by(connection, "duplicates WHERE is_duplicate", "duplicate_kind")
            lines.append(Line("duplicates", sum(kinds.values())))
            lines += [Line(f"by {kind}", rows, 1) for kind, rows in kinds.items()]
        for spec in tables:
            if spec.name.startswith(MEMBER) and spec.name in views:
                lines += _members(connection, spec)
    return lines


def _ingested(store: Store, samples: TableSpec) -> list[Line]:
    counts = total([batch.get("counts", {}) for batch in store.batches(samples)])
    rows = sum(shard.rows for shard in store.shards(samples))
    lines = [Line("rows in", counts.pop("rows_in", rows))]
    lines += [Line(name.replace("_", " "), count, 1) for name, count in counts.items() if count and name != SAMPLES]
    return [*lines, Line("samples", rows)]


def _statuses(connection: duckdb.DuckDBPyConnection) -> list[Line]:
    found = dict(count_by(connection, "images", "status"))
    fetched = Line("fetched", found.pop(OK, 0))
    failures = sorted(found.items(), key=lambda item: STATUSES.index(item[0]) if item[0] in STATUSES else 99)
    return [fetched, Line("failed", sum(found.values())), *(Line(name, rows, 1) for name, rows in failures)]


def _scored(connection: duckdb.DuckDBPyConnection, spec: TableSpec) -> list[Line]:
    counted = ", ".join(f'count("{name}")' for name in spec.columns)
    found = connection.execute(f'SELECT {counted} FROM "{spec.name}"').fetchone()  # our own names
    return [Line(f"scored {name}", rows) for name, rows in zip(spec.columns, found or (), strict=True)]


def _members(connection: duckdb.DuckDBPyConnection, spec: TableSpec) -> list[Line]:
    reasons = dict(count_by(connection, f'"{spec.name}" WHERE NOT member', "reason"))
    chosen = connection.execute(f'SELECT count(*) FROM "{spec.name}" WHERE member').fetchone()
    lines = [Line(f"subset {spec.name.removeprefix(MEMBER)}", chosen[0] if chosen else 0)]
    return lines + [Line(f"refused by {reason}", rows, 1) for reason, rows in reasons.items()]
