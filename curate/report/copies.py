"""Who is a copy of whom: the group of a row, with pictures, similarity, and why each stayed or went.

A row that one rule kept another may have removed, so a group is followed from rule to rule until it closes. Only the
committed table `duplicates` is asked; nothing is compared here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import duckdb
from rich.console import Console
from rich.table import Table

from curate.report.pictures import STYLE, Picture, gallery
from curate.report.terminal import shown
from curate.rows import recall_path
from curate.schema import TableSpec
from curate.store import Store

TABLE = "duplicates"
GROUPS = 12  # in the report: the largest
IN_REPORT = 8  # pictures of a group
IN_GROUP = 200  # rows of a group that are shown of one row


@dataclass(frozen=True)
class Member:
    """A row of a group."""

    key: str
    url: str | None
    text: str | None
    kind: str | None  # None: it stays
    similarity: float | None
    kept: str | None
    reason: str | None
    location: Mapping[str, Any]  # tar, offset, length

    @property
    def words(self) -> str:
        """What became of it and why, for people."""
        if self.kind is None:
            return "kept: it stays for the others"
        similar = "" if self.similarity is None else f", similarity {self.similarity:.4f}"
        return f"dropped by {self.kind}{similar}: {self.reason}"


def group_of(connection: duckdb.DuckDBPyConnection, key: str, most: int = IN_GROUP) -> list[Member]:
    """The rows that rules found near this one, directly or through others, what stays first; none: it has no copies."""
    connection.execute("CREATE OR REPLACE TEMP TABLE family AS SELECT ? AS key", [key])
    size = 0
    while size != (size := _count(connection)):
        connection.execute(
            "INSERT INTO family SELECT DISTINCT key FROM duplicates ANTI JOIN family USING (key) WHERE duplicate_group "
            "IN (SELECT duplicate_group FROM duplicates SEMI JOIN family USING (key) UNION SELECT key FROM family) "
            "OR key IN (SELECT duplicate_group FROM duplicates SEMI JOIN family USING (key)) "
            f"ORDER BY key LIMIT {most}"
        )
        if _count(connection) >= most:
            break
    if _count(connection) == 1:
        return []
    return _members(connection, "key IN (SELECT key FROM family)", most)


def print_copies(out: Console, members: Sequence[Member]) -> None:
    """The rows of a group as a table: which, why kept or dropped, how similar to what stays."""
    if not members:
        return
    table = Table("key", "url", "kind", "similarity", "why", title=f"copies: a group of {len(members):,}")
    for one in members:
        similar = "" if one.similarity is None else f"{one.similarity:.4f}"
        url = shown(one.url) if one.url is not None else ""
        table.add_row(one.key, url, one.kind or "kept", similar, shown(one.words))
    out.print(table)


def write_group(store: Store, key: str, members: Sequence[Member]) -> str:
    """A contact sheet of a group as one HTML page."""
    body = f"<h1>Copies of {escape(key)}</h1><p>{len(members):,} rows{_sheet(store, members)}"
    return f"<!doctype html><meta charset=utf-8><title>curate</title><style>{STYLE}</style>{body}"


def copies_html(store: Store, connection: duckdb.DuckDBPyConnection, tables: Sequence[TableSpec]) -> Iterator[str]:
    """The report's part on copies: recall of the searches, and the largest groups with their pictures."""
    yield "<h2>Copies</h2>"
    for spec in tables:
        if spec.name == TABLE:
            for rule, told in (store.get_json(recall_path(spec)) or {}).items():
                yield f"<p>{escape(recall_words(rule, told))}"
    largest = connection.execute(
        "SELECT duplicate_of, count(*) AS n FROM duplicates WHERE is_duplicate GROUP BY 1 ORDER BY n DESC, 1 "
        f"LIMIT {GROUPS}"
    ).fetchall()
    for name, count in largest:
        members = _members(connection, "key = $name OR duplicate_of = $name", IN_REPORT, {"name": name})
        yield f"<div class=group>{count:,} copies of {escape(str(name))}{_sheet(store, members)}</div>"


def recall_words(rule: str, told: Mapping[str, Any]) -> str:
    """What a search among vectors measured of itself."""
    found = f"{told['found']:,} of {told['true']:,} near pairs of {told['rows']:,} sampled rows found"
    least = f", at least {told['at_least']:.4f} (95 %)" if told["true"] else ""
    return f"{rule.partition(':')[2]}: {found}, recall {told['rate']:.4f}{least}"


def _sheet(store: Store, members: Sequence[Member]) -> str:
    pictures = [
        Picture(dict(one.location), f"{one.words} — {one.key} — {one.url or ''} — {one.text or ''}")
        for one in members if one.location["tar"] is not None
    ]  # fmt: skip
    return gallery(store, pictures)


def _members(
    connection: duckdb.DuckDBPyConnection, where: str, most: int, values: Mapping[str, Any] | None = None
) -> list[Member]:
    found = connection.execute(
        "SELECT key, url, text, duplicate_kind, duplicate_similarity, duplicate_of, duplicate_reason, tar, "
        f'"offset", length FROM rows WHERE {where} ORDER BY is_duplicate, duplicate_similarity DESC, key LIMIT {most}',
        dict(values or {}),
    ).fetchall()
    return [
        Member(key, url, text, kind, similarity, kept, reason, {"tar": tar, "offset": offset, "length": length})
        for key, url, text, kind, similarity, kept, reason, tar, offset, length in found
    ]


def _count(connection: duckdb.DuckDBPyConnection) -> int:
    found = connection.execute("SELECT count(*) FROM family").fetchone()
    return int(found[0]) if found else 0
