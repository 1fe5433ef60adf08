"""A subset as its settings say it, bound to the columns of a run: what must hold for a row to be a member.

Membership is decided in three steps, and the first that fails is a row's reason: the image's status is ok, every clause
of `where` is true (false refuses, null is unknown), and the `keep_top` score reaches the resolved threshold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate.config import SubsetSettings
from curate.errors import PlanError
from curate.removed import REMOVED, WATCHED, Tombstones
from curate.rows import SAMPLES, Column, columns_of
from curate.schema import KEY, OK, Shard, TableSpec, inputs_of, pool_digest
from curate.select.clauses import Clause, evaluate_clauses, parse_score, split_where

VERSION = 1
STATUS = "status"
MEMBER = pa.field("member", pa.bool_(), nullable=False)
REASON = pa.field("reason", pa.string())  # null for members; else the first clause that refused the row
_PREFIX = "member_"


@dataclass(frozen=True)
class SubsetRule:
    """One subset, checked against the columns. `spec` is the table `member_<name>` that it gives."""

    name: str
    where: tuple[Clause, ...]
    score: Clause | None  # of keep_top
    fraction: float | None
    share_of: tuple[Clause, ...]  # of these rows: keep_top.of, else `where`
    columns: tuple[Column, ...]  # that it reads, `status` among them where there is one
    spec: TableSpec
    anchor: TableSpec  # any table of the run: its keys, where a subset reads no column
    watched: tuple[Column, ...] = ()  # beside those it reads: what tombstones may name

    @property
    def threshold_path(self) -> str:
        """Where the number rests that its fraction was resolved to."""
        return f"_thresholds/{self.spec.fingerprint}.json"

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the columns it reads."""
        return tuple(column.name for column in self.columns)


@dataclass(frozen=True)
class Judged:
    """A subset's values for n rows: status, each clause as a boolean with nulls, the score as float64 with nulls."""

    status: pa.ChunkedArray | None
    clauses: tuple[pa.ChunkedArray, ...]
    score: pa.ChunkedArray | None


def subset_rules(
    subsets: Mapping[str, SubsetSettings], tables: Sequence[TableSpec], shards: Sequence[Shard]
) -> list[SubsetRule]:
    """The subsets in their order. Raises PlanError that names subset and clause."""
    tables = [spec for spec in tables if not spec.name.startswith(_PREFIX)]
    columns = columns_of(tables)
    return [_rule(name, settings, tables, columns, pool_digest(shards)) for name, settings in subsets.items()]


def _rule(
    name: str, settings: SubsetSettings, tables: Sequence[TableSpec], columns: Mapping[str, Column], pool: str
) -> SubsetRule:
    where = split_where(settings.where, columns, f"subsets.{name}.where") if settings.where is not None else ()
    top = settings.keep_top
    score = parse_score(top.by, columns, f"subsets.{name}.keep_top.by") if top else None
    share_of = where
    if top is not None and top.of is not None:
        share_of = split_where(top.of, columns, f"subsets.{name}.keep_top.of")
    clauses = (*where, *share_of, *([score] if score else []))
    names = dict.fromkeys(column for clause in clauses for column in clause.columns)
    if len({column.lower() for column in names}) < len(names):
        raise PlanError(f"subsets.{name}: {', '.join(names)}: SQL cannot tell names apart that differ only in case")
    status = columns.get(STATUS)
    if status is not None and status.table.name != SAMPLES:
        names[STATUS] = None
    used = tuple(columns[column] for column in names)
    read = {column.table.name: column.table for column in used} or {tables[0].name: tables[0]}
    plain: dict[str, object] = {
        "where": settings.where,
        "keep_top": top.model_dump(mode="json", exclude_none=True) if top else None,
    }
    spec = TableSpec(
        f"{_PREFIX}{name}", VERSION, pa.schema([KEY, MEMBER, REASON]),
        settings=plain | ({"pool": pool} if top else {}), inputs=inputs_of(read.values()),
    )  # fmt: skip
    watched = tuple(columns[column] for column in WATCHED if column in columns and column not in names)
    return SubsetRule(name, where, score, top.fraction if top else None, share_of, used, spec, tables[0], watched)


def mark_removed(rows: pa.Table, removed: Tombstones) -> pa.Table:
    """The same rows, with status `removed` where tombstones name them, whatever their tables say."""
    if not removed or STATUS not in rows.column_names:
        return rows
    hit = pa.chunked_array([pa.array(removed.hits(rows))])
    status = pc.if_else(hit, pa.scalar(REMOVED), rows.column(STATUS))
    return rows.set_column(rows.schema.get_field_index(STATUS), STATUS, status)


def judge(rule: SubsetRule, rows: pa.Table) -> Judged:
    """Evaluate a subset's clauses over rows that have its columns under their names in the wide table."""
    sql = [clause.sql for clause in rule.where]
    scores = [rule.score.sql] if rule.score else []
    found = evaluate_clauses(rows, sql, scores)
    by_place = [found.column(str(number)) for number in range(len(sql) + len(scores))]
    reads_status = STATUS in rule.labels and STATUS in rows.column_names
    return Judged(
        rows.column(STATUS) if reads_status else None,
        tuple(by_place[: len(sql)]),
        by_place[len(sql)] if scores else None,
    )


def eligible_scores(rule: SubsetRule, rows: pa.Table) -> np.ndarray:
    """The scores, float64, of the rows whose share is kept: status ok, `keep_top.of` or `where` true, score known."""
    judged = judge(replace(rule, where=rule.share_of), rows)
    assert judged.score is not None, f"{rule.name} has no keep_top"
    chosen = pc.is_valid(judged.score)
    for held in _held(judged):
        chosen = pc.and_(chosen, held)
    # Adding 0.0 turns -0.0 into 0.0: equal numbers must have equal bits.
    return np.asarray(judged.score.filter(chosen).to_numpy(), dtype=np.float64) + 0.0


def decide(rule: SubsetRule, rows: pa.Table, threshold: float | None) -> tuple[pa.Array, pa.Array]:
    """(member, reason) of every row. `threshold` belongs to `keep_top`; infinity keeps nothing."""
    judged = judge(rule, rows)
    count = rows.num_rows
    reason = np.full(count, None, dtype=object)
    open_ = np.ones(count, dtype=bool)  # rows that nothing refused so far
    if judged.status is not None:
        refused = open_ & ~_true(pc.equal(judged.status, OK))
        for row in np.flatnonzero(refused):
            reason[row] = f"status: {judged.status[int(row)].as_py()}"
        open_ &= ~refused
    for clause, values in zip(rule.where, judged.clauses, strict=True):
        _refuse(reason, open_, values, f"where: {clause.sql}", f"unknown: {clause.sql}")
    if rule.score is not None and judged.score is not None:
        if threshold is None:
            raise PlanError(f"subsets.{rule.name}.keep_top: its fraction was never resolved to a number")
        _refuse(reason, open_, pc.greater_equal(judged.score, threshold), "keep_top", f"unknown: {rule.score.sql}")
    return pa.array(open_, pa.bool_()), pa.array(reason, pa.string())


def _held(judged: Judged) -> list[pa.ChunkedArray]:
    conditions = [pc.fill_null(values, False) for values in judged.clauses]
    return conditions if judged.status is None else [pc.fill_null(pc.equal(judged.status, OK), False), *conditions]


def _true(values: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(pc.fill_null(values, False).to_numpy(), dtype=bool)


def _refuse(reason: np.ndarray, open_: np.ndarray, values: pa.ChunkedArray, false: str, unknown: str) -> None:
    """Give rows that are still open and not true their reason, in place."""
    null = np.asarray(pc.is_null(values).to_numpy(), dtype=bool)
    true = _true(values)
    reason[open_ & null] = unknown
    reason[open_ & ~true & ~null] = false
    open_ &= true
