"""A run as one HTML page: the funnel, how scores are spread, where subsets agree, and pictures to look at.

People find what is wrong with a recipe by looking: at what was kept, dropped, called a copy, and chosen by one subset
alone. The page is one file without scripts or requests; everything that came from the web is escaped, and pictures are
small JPEGs of our own encoding.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import duckdb
import pyarrow as pa
from PIL import Image

from curate.catalog import open_catalog, quoted, views_of
from curate.report.agreement import Agreement, agreement, agreement_html
from curate.report.funnel import MEMBER, Line, funnel
from curate.schema import TableSpec
from curate.store import Store

PICTURES = 24  # per gallery: a screenful
GROUPS = 12
SIDE = 128  # pixels of a thumbnail
BINS = 40
MAX_PIXELS = 50_000_000  # a stored image above this is not decoded for a thumbnail

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#222}
table{border-collapse:collapse}td{padding:.1rem .8rem .1rem 0}td.n{text-align:right;font-variant-numeric:tabular-nums}
.sub td:first-child{padding-left:1.6rem;color:#666}.bar{background:#dbe7f5;height:.7rem;display:inline-block}
.gallery{display:flex;flex-wrap:wrap;gap:.6rem}figure{margin:0;width:9rem;font-size:12px;overflow-wrap:anywhere}
img{max-width:8rem;max-height:8rem;background:#eee}h2{margin-top:2rem}.group{border-left:3px solid #ccc;padding-left:.6rem;margin:.6rem 0}
svg{background:#f7f7f7;margin-right:1rem}.sets th{font-weight:normal;padding:.1rem .8rem .1rem 0;text-align:left}.sets i{color:#bbb}
"""  # noqa: E501


@dataclass(frozen=True)
class Picture:
    """A stored image with what to say under it."""

    location: dict[str, Any]
    words: str


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
            if "duplicates" in views:
                body += list(_groups(store, connection))
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
    yield f"<h2>Subset {escape(name)}: kept</h2>" + _gallery(store, kept)
    yield f"<h2>Subset {escape(name)}: dropped</h2>" + _gallery(store, dropped)


def _apart(store: Store, connection: duckdb.DuckDBPyConnection, found: Agreement) -> Iterator[str]:
    """Pictures of the commonest combinations: what one way took and another did not is best looked at."""
    for combination in list(found.rows)[:GROUPS]:
        where = " AND ".join(
            f"{'' if name in combination else 'NOT '}{quoted(MEMBER + name)}" for name in found.subsets
        )
        pictures = _rows(connection, "rows", f"tar IS NOT NULL AND {where}", "coalesce(text, '')", most=8)
        words = f"{escape(' and '.join(combination))} alone: {found.rows[combination]:,} rows"
        yield f"<div class=group>{words}{_gallery(store, pictures)}</div>"


def _groups(store: Store, connection: duckdb.DuckDBPyConnection) -> Iterator[str]:
    yield "<h2>Copies: the first was kept</h2>"
    firsts = connection.execute(
        "SELECT duplicate_of, count(*) AS n FROM duplicates WHERE is_duplicate GROUP BY 1 ORDER BY n DESC, 1 "
        f"LIMIT {GROUPS}"
    ).fetchall()
    for key, count in firsts:
        where = f"key = '{key}' OR duplicate_of = '{key}'"  # a key is hexadecimal digits of our own
        words = "CASE WHEN is_duplicate THEN duplicate_kind ELSE 'kept' END || ' — ' || coalesce(text, '')"
        pictures = _rows(connection, "rows", f"tar IS NOT NULL AND ({where})", words, "is_duplicate, key", 8)
        yield f"<div class=group>{count:,} copies{_gallery(store, pictures)}</div>"


def _rows(
    connection: duckdb.DuckDBPyConnection, source: str, where: str, words: str, order: str = "key", most: int = PICTURES
) -> list[Picture]:
    found = connection.execute(
        f'SELECT tar, "offset", length, {words} AS words FROM {source} WHERE {where} ORDER BY {order} LIMIT {most}'
    ).fetchall()
    return [Picture({"tar": tar, "offset": at, "length": size}, str(words)) for tar, at, size, words in found]


def _gallery(store: Store, pictures: Sequence[Picture]) -> str:
    if not pictures:
        return "<p>none"
    table = pa.Table.from_pylist([picture.location for picture in pictures])
    figures = (
        f'<figure><img alt="" src="{_thumbnail(data)}"><figcaption>{escape(picture.words[:160])}</figcaption></figure>'
        for picture, data in zip(pictures, store.read_images(table), strict=True)
    )
    return f"<div class=gallery>{''.join(figures)}</div>"


def _thumbnail(data: bytes | None) -> str:
    """A data URL of a small JPEG; empty when the bytes cannot be shown."""
    if data is None:
        return ""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                return ""
            image.draft("RGB", (SIDE, SIDE))
            small = image.convert("RGB")
            small.thumbnail((SIDE, SIDE))
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    out = io.BytesIO()
    small.save(out, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
