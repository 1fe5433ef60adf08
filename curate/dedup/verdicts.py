"""What is decided of rows that came together (`across`), and in which words: three kinds of decision.

    copies       of each group the first by the rule's ordering stays; released rows come before all others
    SemDeDup     each redundant row names the earlier row that it is most similar to
    references   where a group holds a row that reaches a reference, none of it stays

All are exact and depend on nothing but the rows that came together.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate.across import ROW, SHARD, VALUE
from curate.dedup.firsts import COUNT, GONE, PAYLOAD, firsts_here, order_of, ordering_errors, payload_of
from curate.dedup.near import IntArray, read_groups
from curate.dedup.participants import taking_part
from curate.dedup.references import kept_reference
from curate.dedup.released import released_rows
from curate.dedup.rules import Rule, key_columns
from curate.errors import PlanError
from curate.rows import readable
from curate.schema import KEY
from curate.store import Store
from curate.vectors import get_arrays

SIMILARITY = pa.field("similarity_", pa.float32())
RELEASED = pa.field("released_", pa.bool_())
REFERENCE = pa.field("reference_", pa.int64())  # place in the set; -1: reaches none itself
ROLE = pa.field("role_", pa.int64())  # 1: redundant; 0: made another row redundant
KEPT = pa.field("kept", pa.string())
DIRECT = pa.field("direct_", pa.bool_())

GROUP = pa.field("group_", pa.string())

# Names that are taken.
_OF_COPIES = pa.schema([KEY, SHARD, ROW, VALUE, SIMILARITY, RELEASED, ROLE, REFERENCE, PAYLOAD, COUNT, GROUP])
VERDICT = pa.schema([SHARD, ROW, KEPT, SIMILARITY, DIRECT, GROUP, PAYLOAD, GONE])


def check_ordering(rule: Rule) -> None:
    """Try the ordering on no rows. Raises PlanError."""
    place = f"dedup.{rule.entry}.keep: {rule.settings.keep}"
    fields = [pa.field(name, rule.columns[name].type) for name in key_columns(rule)]
    taken = {field.name.lower() for field in fields} & {name.lower() for name in _OF_COPIES.names}
    if taken:
        raise PlanError(f"{place}: columns named {', '.join(sorted(taken))} cannot be ordered by; rename them")
    try:
        first_of_each(rule.settings.keep, pa.schema([*_OF_COPIES, *fields]).empty_table())
    except PlanError as error:
        raise PlanError(f"dedup.{rule.entry}.{error}") from None


def copies_on(store: Store, rule: Rule, before: Sequence[Rule], shard: str) -> pa.Table:
    """Candidates: the first row of each group in the shard, under what the rule compares, or the group it is in."""
    exact = rule.search == "exact"
    table = taking_part(store, rule, [*(rule.values if exact else ()), *rule.keep_columns], before, shard)
    if exact:
        values: list[Any] = list(zip(*(table[name].to_pylist() for name in rule.values), strict=True))
    else:
        near = read_groups(store, rule.work, shard)
        table = table.filter(pc.is_in(table[ROW.name], pa.array(near["row"])))
        values = near["group"].tolist()
    candidates = table.select([KEY.name, ROW.name, *key_columns(rule)]).append_column(VALUE, _digests(values))
    released = pa.array([False] * table.num_rows, pa.bool_())
    if rule.released:
        released = released_rows(store, rule.released, shard, table[ROW.name].to_numpy())
    candidates = candidates.append_column(RELEASED, released).append_column(PAYLOAD, payload_of(rule, table))
    return firsts_here(store, rule, shard, candidates)


def first_of_each(keep: str, rows: pa.Table) -> pa.Table:
    """Verdict on every candidate of a group of two rows or more: which stays. Raises PlanError."""
    query = f"""
        WITH grouped AS (
          SELECT * FROM candidates
          WHERE value_ IN (SELECT value_ FROM candidates GROUP BY value_ HAVING sum(count_) > 1)
        )
        SELECT shard_, row_, first_value(key) OVER w AS kept, CAST(NULL AS FLOAT) AS similarity_, true AS direct_,
          first_value(key) OVER w AS group_, first_value(payload_) OVER w AS payload_,
          row_number() OVER w > 1 AS gone_
        FROM grouped WINDOW w AS (PARTITION BY value_ ORDER BY {order_of(keep)}, shard_, row_) ORDER BY shard_, row_
        """
    with ordering_errors(keep):
        return _query(query, rows)


def redundant_on(store: Store, rule: Rule, before: Sequence[Rule], shard: str) -> pa.Table:
    """Candidates of SemDeDup: redundant rows under the number of the row that made them so, and those rows."""
    near = read_groups(store, rule.work, shard)
    values = np.concatenate([near["group"], near["named"] + near["start"]])
    rows = np.concatenate([near["row"], near["named"]])
    similarity = np.concatenate([near["similarity"], np.ones(len(near["named"]), np.float32)])
    role = np.repeat([1, 0], [len(near["row"]), len(near["named"])])
    table = _rows(store, rule, before, shard, rows)
    table = table.append_column(VALUE, _digests(values.tolist())).append_column(SIMILARITY, pa.array(similarity))
    return table.append_column(ROLE, pa.array(role, pa.int64()))


def earlier_of_each(rows: pa.Table) -> pa.Table:
    """Verdict on every redundant row."""
    return _query(
        """
        SELECT gone.shard_, gone.row_, earlier.key AS kept, gone.similarity_, true AS direct_, earlier.key AS group_,
          CAST(NULL AS BLOB) AS payload_, true AS gone_
        FROM candidates gone JOIN candidates earlier ON gone.value_ = earlier.value_ AND earlier.role_ = 0
        WHERE gone.role_ = 1 ORDER BY gone.shard_, gone.row_
        """,
        rows,
    )


def reaching_on(store: Store, rule: Rule, before: Sequence[Rule], shard: str) -> pa.Table:
    """Candidates against a reference: rows that reach it, and rows in groups, whose fate is one."""
    direct = get_arrays(store, f"{rule.work}/direct/{shard}.npz")
    value = {row: int(direct["start"][0]) + row for row in direct["row"].tolist()}
    if rule.grouped:
        near = read_groups(store, rule.work, shard)
        value |= dict(zip(near["row"].tolist(), near["group"].tolist(), strict=True))
    similarity = dict(zip(direct["row"].tolist(), direct["similarity"].tolist(), strict=True))
    reference = dict(zip(direct["row"].tolist(), direct["reference"].tolist(), strict=True))
    rows = sorted(value)
    table = _rows(store, rule, before, shard, np.array(rows, np.int64))
    table = table.append_column(VALUE, _digests([value[row] for row in rows]))
    table = table.append_column(SIMILARITY, pa.array([similarity.get(row) for row in rows], pa.float32()))
    return table.append_column(REFERENCE, pa.array([reference.get(row, -1) for row in rows], pa.int64()))


def touching(store: Store, reference_path: str, rows: pa.Table) -> pa.Table:
    """Verdict on every row of a group that holds a row which reaches a reference."""
    found = _query(
        """
        WITH ranked AS (
          SELECT *, first_value(reference_) OVER w AS nearest_,
            first_value(key) OVER (PARTITION BY value_ ORDER BY shard_, row_) AS group_ FROM candidates
          WINDOW w AS (PARTITION BY value_ ORDER BY reference_ < 0, similarity_ DESC, reference_, shard_, row_)
        )
        SELECT shard_, row_, CAST(CASE WHEN reference_ < 0 THEN nearest_ ELSE reference_ END AS VARCHAR) AS kept,
          similarity_, reference_ >= 0 AS direct_, group_, CAST(NULL AS BLOB) AS payload_, true AS gone_
        FROM ranked WHERE nearest_ >= 0 ORDER BY shard_, row_
        """,
        rows,
    )
    places = np.array([int(place) for place in found[KEPT.name].to_pylist()], np.int64)
    ids = kept_reference(store, reference_path).ids[places].tolist()
    return found.set_column(found.schema.get_field_index(KEPT.name), KEPT, pa.array(ids, pa.string()))


def reason(rule: Rule, kept: str, direct: bool) -> str:
    """Why a row is not kept, for people."""
    if rule.reference is None and rule.semdedup:
        return f"{rule.words} to {kept}, which is farther from the centre of their cell"
    if rule.reference is None:
        first = "was released or " if rule.released else ""
        return f"{rule.words} as {kept}, which {first}is first by {rule.settings.keep}"
    of = f"{kept} of {rule.reference.name}"
    if not direct:
        return f"connected with a row that reaches {of}: {rule.words}"
    return f"{rule.words} as {of}" if rule.search == "hashes" else f"cosine above {rule.threshold:g} to {of}"


def _rows(store: Store, rule: Rule, before: Sequence[Rule], shard: str, rows: IntArray) -> pa.Table:
    """`key` and `row_` of these rows, in their order."""
    table = taking_part(store, rule, [], before, shard).select([KEY.name, ROW.name])
    at = np.searchsorted(table[ROW.name].to_numpy(), rows)
    return table.take(pa.array(at, pa.int64()))


def _digests(values: Sequence[Any]) -> pa.Array:
    return pa.array([hashlib.blake2b(repr(value).encode(), digest_size=16).digest() for value in values], VALUE.type)


def _query(query: str, rows: pa.Table) -> pa.Table:
    with duckdb.connect(config={"threads": "1"}) as connection:
        connection.register("candidates", readable(rows))
        return connection.sql(query).to_arrow_table().cast(VERDICT)
