"""A subset's SQL taken apart: its clauses, the columns they read, and why they cannot be evaluated.

DuckDB's own parser splits a condition at its top-level ANDs, so that every row can be told which clause refused it.
Refused here, before anything runs: unknown columns (with near names), conditions that are not true-or-false, and
whatever looks beyond one row or changes from run to run (subqueries, aggregates, windows, random(), now()).
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from curate.errors import PlanError
from curate.rows import Column, connect, readable

_NUMBERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE", "DECIMAL", "UTINYINT",
            "USMALLINT", "UINTEGER", "UBIGINT")  # fmt: skip


@dataclass(frozen=True)
class Clause:
    """One condition or score: its SQL as DuckDB writes it, and the names of the wide table that it reads."""

    sql: str
    columns: tuple[str, ...]


def split_where(where: str, columns: Mapping[str, Column], place: str) -> tuple[Clause, ...]:
    """The top-level AND clauses of a condition, in their order, each checked to give true, false or null.

    `place` starts the text of errors, e.g. `subsets.light.where`. Raises PlanError.
    """
    with _connection() as connection:
        tree = _parsed(connection, where, place)
        clauses = []
        for node in _conjuncts(_expression(tree)):
            sql = _written(connection, tree, node)
            names = _bound(connection, sql, node, columns, f"{place}: {sql}", ("BOOLEAN",), "a true-or-false condition")
            clauses.append(Clause(sql, names))
    return tuple(clauses)


def parse_score(by: str, columns: Mapping[str, Column], place: str) -> Clause:
    """The numeric expression of a `keep_top`. Raises PlanError."""
    with _connection() as connection:
        tree = _parsed(connection, by, place)
        node = _expression(tree)
        sql = _written(connection, tree, node)
        return Clause(sql, _bound(connection, sql, node, columns, f"{place}: {sql}", _NUMBERS, "a number"))


def evaluate_clauses(table: pa.Table, conditions: Sequence[str], scores: Sequence[str] = ()) -> pa.Table:
    """Every condition as a boolean and every score as a float64 for every row, in columns 0, 1, …; null where unknown.

    NaN counts as null: DuckDB orders it above all numbers, and an unknown score must never pass `score > 0.5`.
    Raises PlanError with DuckDB's words for a value that cannot be converted.
    """
    table = pa.table({name: _without_nan(table.column(name)) for name in table.column_names})
    chosen = [f"CAST(({sql}) AS BOOLEAN)" for sql in conditions] + [f"CAST(({sql}) AS DOUBLE)" for sql in scores]
    if not chosen:
        return pa.table({})
    listed = ", ".join(f'{sql} AS "{number}"' for number, sql in enumerate(chosen))
    with _connection() as connection:
        connection.register("rows", readable(table))
        try:
            found: pa.Table = connection.sql(f"SELECT {listed} FROM rows").to_arrow_table()  # the recipe's
        except duckdb.Error as error:
            raise PlanError(f"{'; '.join([*conditions, *scores])}: {_first_lines(error)}; try TRY_CAST") from None
    return pa.table({name: _without_nan(found.column(name)) for name in found.column_names})


def near(name: str, columns: Sequence[str]) -> str:
    """`did you mean …` for a misspelt name, or all names when none is near."""
    lower = {column.lower(): column for column in columns}
    close = [lower[match] for match in difflib.get_close_matches(name.lower(), list(lower), n=3, cutoff=0.5)]
    return f"did you mean {' or '.join(close)}?" if close else f"columns: {', '.join(columns)}"


@cache
def _database() -> duckdb.DuckDBPyConnection:
    return connect()  # opening one takes 20 ms, and a pass over a pool would open one per shard and subset


def _connection() -> duckdb.DuckDBPyConnection:
    connection = _database().cursor()  # with its own `rows`, so that threads do not see each other's
    connection.execute("SET python_enable_replacements=false")
    return connection


def _without_nan(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)


def _parsed(connection: duckdb.DuckDBPyConnection, text: str, place: str) -> dict[str, Any]:
    # The line breaks keep a trailing `-- comment` inside the brackets.
    parsed = connection.execute("SELECT json_serialize_sql(?)", [f"SELECT (\n{text}\n) FROM rows"])
    tree: dict[str, Any] = json.loads(parsed.fetchall()[0][0])
    if tree["error"]:
        raise PlanError(f"{place}: {text}: not SQL: {tree['error_message']}")
    if len(tree["statements"]) != 1 or len(tree["statements"][0]["node"].get("select_list", ())) != 1:
        raise PlanError(f"{place}: {text}: expected one SQL expression")
    return tree


def _expression(tree: Mapping[str, Any]) -> dict[str, Any]:
    node: dict[str, Any] = tree["statements"][0]["node"]["select_list"][0]
    return node


def _conjuncts(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if node["class"] == "CONJUNCTION" and node["type"] == "CONJUNCTION_AND":
        for child in node["children"]:
            yield from _conjuncts(child)
    else:
        yield node


def _written(connection: duckdb.DuckDBPyConnection, tree: Mapping[str, Any], node: dict[str, Any]) -> str:
    """SQL of one node of the tree, without brackets around the whole."""
    copy = json.loads(json.dumps(tree))
    copy["statements"][0]["node"]["select_list"] = [node]
    ((written,),) = connection.execute("SELECT json_deserialize_sql(?)", [json.dumps(copy)]).fetchall()
    text = str(written).removeprefix("SELECT ").removesuffix(' FROM "rows"').removesuffix(" FROM rows")
    inner = text[1:-1]
    return inner if text.startswith("(") and text.endswith(")") and _is_closed(inner) else text


def _is_closed(text: str) -> bool:
    """Whether no bracket of the text reaches out of it; brackets inside quotes are ignored."""
    depth, quote = 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter == "(") - (letter == ")")
            if depth < 0:
                return False
    return depth == 0


def _bound(
    connection: duckdb.DuckDBPyConnection, sql: str, node: dict[str, Any], columns: Mapping[str, Column], place: str,
    types: Sequence[str], wanted: str,
) -> tuple[str, ...]:  # fmt: skip
    """The columns that an expression reads, after checking that it binds, depends on its row alone, and its type."""
    if any(part.get("class") == "SUBQUERY" for part in _nodes(node)):
        raise PlanError(f"{place}: a subquery looks beyond the row; compute it as a column first")
    _refuse_volatile(connection, node, place)
    names, unknown = _names(node, columns)
    clashing = {name.lower() for name in names}
    if len(clashing) < len(names):
        raise PlanError(f"{place}: {', '.join(names)} differ only in case; SQL cannot tell them apart")
    empty = pa.schema([pa.field(name, columns[name].type) for name in names or ("key",)]).empty_table()
    connection.register("rows", readable(empty))
    try:
        # As a WHERE the expression may not hold aggregates or windows.
        connection.execute(f"EXPLAIN SELECT 1 FROM rows WHERE ({sql}) IS NOT NULL").fetchall()
        ((_, kind, *_),) = connection.execute(f"DESCRIBE SELECT ({sql}) AS x FROM rows").fetchall()
    except duckdb.Error as error:
        hints = "; ".join(f"{name} is no column, {near(name, list(columns))}" for name in dict.fromkeys(unknown))
        told = hints if hints and "not found" in str(error) else _first_lines(error)
        raise PlanError(f"{place}: {told}") from None
    if kind.split("(", maxsplit=1)[0] not in types:
        raise PlanError(f"{place}: gives {kind}, expected {wanted}")
    return names


def _names(node: Any, columns: Mapping[str, Column]) -> tuple[tuple[str, ...], list[str]]:
    """(columns that an expression refers to, names in it that are no columns); SQL names know no case."""
    lower: dict[str, str] = {}
    for name in columns:
        lower.setdefault(name.lower(), name)
    known: dict[str, None] = {}
    unknown: list[str] = []
    for part in _nodes(node):
        if part.get("class") == "COLUMN_REF":
            path = [name for name in part["column_names"] if name != "rows"] or part["column_names"]
            found = path[0] if path[0] in columns else lower.get(path[0].lower())
            if found is None:
                unknown.append(path[0])
            else:
                known[found] = None
    return tuple(known), unknown


def _refuse_volatile(connection: duckdb.DuckDBPyConnection, node: Any, place: str) -> None:
    called = sorted({part["function_name"].lower() for part in _nodes(node) if part.get("class") == "FUNCTION"})
    if not called:
        return
    marks = ", ".join("?" for _ in called)
    volatile = connection.execute(
        f"SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_name IN ({marks}) "
        "AND stability <> 'CONSISTENT'", called,
    ).fetchall()  # fmt: skip
    if volatile:
        raise PlanError(f"{place}: {volatile[0][0]}() changes from run to run; a subset must not")


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, list):
        for child in node:
            yield from _nodes(child)
    elif isinstance(node, dict):
        yield node
        for child in node.values():
            yield from _nodes(child)


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split("\n\n", maxsplit=1)[0].split())
