"""Copies across all shards: one of each group stays, and every other row says which, why and by what rule.

Rules are applied in the order of the recipe, each to the rows that the rules before it left. A rule brings rows with
one value together across shards (`curate.across`); a rule with a radius first finds groups of near values (`near`),
whose name is then the value. Only rows with an image (status ok) take part.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate.across import ROW, SHARD, VALUE, decide_across, verdicts_on
from curate.config import DedupSettings
from curate.dedup.near import Near, group_hashes, hashes_of, read_groups
from curate.errors import PlanError
from curate.metrics import Ticker
from curate.rows import Column, columns_of, names_in, read_rows, readable, schema_of
from curate.schema import KEY, OK, Shard, TableSpec, inputs_of, pool_digest
from curate.stage import CrossStep, Map
from curate.store import Store

HASH_BITS = 64

# What a rule compares: the columns whose values must all be equal.
EXACT = {
    "sha256": ("sha256",),
    "image_phash": ("image_phash",),
    "image_phash_text": ("image_phash", "text"),
}

_FIELDS = (
    pa.field("is_duplicate", pa.bool_(), nullable=False),
    pa.field("duplicate_of", pa.string()),  # key of the row that was kept instead
    pa.field("duplicate_kind", pa.string()),  # the rule: sha256, image_phash, …
    pa.field("duplicate_similarity", pa.float32()),  # to its nearest in the group; 1: equal, less a 64th per bit
    pa.field("duplicate_reason", pa.string()),
)


@dataclass(frozen=True)
class _Rule:
    """A rule with everything a worker needs to apply it to a shard."""

    number: int
    settings: DedupSettings
    columns: Mapping[str, Column]
    keep_columns: tuple[str, ...]
    work: str  # the rule's folder

    @property
    def values(self) -> tuple[str, ...]:
        """Columns that must be equal, or nearly."""
        return EXACT[self.settings.by]

    @property
    def words(self) -> str:
        """What the rows of a group share, for people."""
        same = " and ".join(self.values)
        return f"same {same}" if not self.settings.radius else f"{same} within {self.settings.radius} bits"


class DedupStep(CrossStep):
    """See the module's docstring. Writes the table `duplicates`."""

    name = "dedup"

    def __init__(self, rules: Sequence[DedupSettings], tables: Sequence[TableSpec], shards: Sequence[Shard]) -> None:
        columns = columns_of(tables)
        schema = schema_of(columns)
        self._rules: list[_Rule] = []
        for number, rule in enumerate(rules):
            needed = EXACT.get(rule.by)
            if needed is None:
                raise PlanError(f"dedup.{number}.by: {rule.by!r} is not one of {', '.join(EXACT)}")
            if rule.radius and rule.by != "image_phash":
                raise PlanError(f"dedup.{number}.radius: only image_phash has one; {rule.by} compares exactly")
            for name in needed:
                if name not in columns:
                    raise PlanError(
                        f"dedup.{number}.by: {rule.by} needs the column {name}, which no table has; "
                        "add the scorer that writes it, e.g. score: {phash: {scorer: phash}}"
                    )
            if rule.threshold is not None:
                raise PlanError(f"dedup.{number}.threshold: {rule.by} compares without one; leave it out")
            keep = _checked(number, rule.keep, schema)
            self._rules.append(_Rule(number, rule, columns, keep, ""))
        used = {columns[name].table.name: columns[name].table for name in self._names(columns)}
        self._spec = TableSpec(
            "duplicates", 1, pa.schema([KEY, *_FIELDS]),
            settings={"rules": [rule.model_dump(mode="json") for rule in rules], "pool": pool_digest(shards)},
            inputs=inputs_of(used.values()),
        )  # fmt: skip
        self._any = tables[0]
        self.tables = (self._spec,)

    def _names(self, columns: Mapping[str, Column]) -> list[str]:
        names = {"status"}
        for rule in self._rules:
            names.update(rule.values, rule.keep_columns)
        return sorted(names & set(columns))

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether every shard has its verdicts."""
        return {shard.name for shard in shards} <= store.done(self._spec)

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Apply the rules in order; counts duplicates by rule."""
        work = f"_work/duplicates/{self._spec.fingerprint}"
        rules = [replace(rule, work=f"{work}/{rule.number}") for rule in self._rules]
        for number, rule in enumerate(rules):
            before = rules[:number]
            if rule.settings.radius:
                names = tuple(shard.name for shard in shards)
                firsts = tuple(accumulate((shard.rows for shard in shards[:-1]), initial=0))
                hashes = partial(_hashes, store, rule, before)
                group_hashes(Near(store, rule.work, hashes, rule.settings.radius, names, firsts), shards, map_items)
            candidates = partial(_candidates, store, rule, before)
            decide_across(store, rule.work, shards, map_items, candidates, partial(_first_of_each, rule.settings.keep))
        counts: Counter[str] = Counter()
        for count in map_items(partial(_commit, store, self._spec, self._any, rules), list(shards)):
            counts.update(count)
            ticker.advance(1)
        store.remove_tree(work)
        return counts


def dedup_step(rules: Sequence[DedupSettings], tables: Sequence[TableSpec], shards: Sequence[Shard]) -> DedupStep:
    """The step for these rules over these tables. Raises PlanError for an unknown rule or column."""
    return DedupStep(rules, tables, shards)


def _checked(number: int, keep: str, schema: pa.Schema) -> tuple[str, ...]:
    """The columns that an ordering reads, after trying it on no rows. Raises PlanError."""
    try:
        names = tuple(names_in(keep, schema))
        taken = {name.lower() for name in _DECIDED.names} & {name.lower() for name in names if name != KEY.name}
        if taken:
            raise PlanError(f"columns named {', '.join(sorted(taken))} cannot be ordered by; rename them in the source")
        fields = [schema.field(name) for name in names if name != KEY.name]
        _first_of_each(keep, pa.schema([*_DECIDED, *fields]).empty_table())
    except PlanError as error:
        raise PlanError(f"dedup.{number}.keep: {error}") from None
    return names


def _taking_part(store: Store, rule: _Rule, names: Sequence[str], before: Sequence[_Rule], shard: str) -> pa.Table:
    """Rows that have an image and a value, and that no earlier rule removed; `row_` is their number in the shard."""
    table = read_rows(store, rule.columns, list(dict.fromkeys(["status", *names])), shard)
    table = table.append_column(ROW, pa.array(range(table.num_rows), ROW.type))
    mask = pc.equal(table["status"], OK)
    mask = pc.and_(mask, pc.is_valid(table[rule.values[0]]))  # (pHash, null text) is a pair, a null pHash is nothing
    for earlier in before:
        gone = verdicts_on(store, earlier.work, shard)[ROW.name]
        mask = pc.and_(mask, pc.invert(pc.is_in(table[ROW.name], gone)))
    return table.filter(pc.fill_null(mask, False))


def _hashes(store: Store, rule: _Rule, before: Sequence[_Rule], shard: str) -> tuple[Any, Any]:
    """(uint64 hashes, row numbers) of the rows that take part."""
    table = _taking_part(store, rule, rule.values, before, shard)
    return hashes_of(table[rule.values[0]].to_pylist()), table[ROW.name].to_numpy()


def _candidates(store: Store, rule: _Rule, before: Sequence[_Rule], shard: str) -> pa.Table:
    """The rows that take part, with the hash of what the rule compares, or of the group they are in."""
    table = _taking_part(store, rule, [*rule.values, *rule.keep_columns], before, shard)
    if rule.settings.radius:
        rows, groups, distance = read_groups(store, rule.work, shard)
        table = table.filter(pc.is_in(table[ROW.name], pa.array(rows)))
        values: list[Any] = groups.tolist()
        similarity = 1 - distance.astype(np.float32) / HASH_BITS
    else:
        values = list(zip(*(table[name].to_pylist() for name in rule.values), strict=True))
        similarity = np.ones(len(values), np.float32)
    digests = [hashlib.blake2b(repr(value).encode(), digest_size=16).digest() for value in values]
    table = table.select([KEY.name, ROW.name, *(name for name in rule.keep_columns if name != KEY.name)])
    table = table.append_column(VALUE, pa.array(digests, VALUE.type))
    return table.append_column("similarity_", pa.array(similarity, pa.float32()))


_DECIDED = pa.schema([KEY, SHARD, ROW, VALUE, pa.field("similarity_", pa.float32())])
_VERDICT = pa.schema([SHARD, ROW, ("kept", pa.string()), ("similarity_", pa.float32())])


def _first_of_each(keep: str, rows: pa.Table) -> pa.Table:
    """(shard, row, key kept instead) of every row that is not the first of its group. Raises PlanError."""
    with duckdb.connect(config={"threads": "1"}) as connection:
        connection.register("candidates", readable(rows))
        query = f"""
            WITH grouped AS (
              SELECT * FROM candidates
              WHERE value_ IN (SELECT value_ FROM candidates GROUP BY value_ HAVING count(*) > 1)
            ), ranked AS (
              SELECT shard_, row_, key, similarity_,
                first_value(key) OVER w AS kept, row_number() OVER w AS place
              FROM grouped WINDOW w AS (PARTITION BY value_ ORDER BY {keep}, key, shard_, row_)
            )
            SELECT shard_, row_, kept, similarity_ FROM ranked WHERE place > 1 ORDER BY shard_, row_
            """
        try:
            found = connection.sql(query).to_arrow_table()
        except duckdb.Error as error:
            cause = " ".join(str(error).split("\n\n", maxsplit=1)[0].split())
            raise PlanError(
                f"{keep}: {cause}; expected an ordering that holds for every row, e.g. with TRY_CAST"
            ) from None
    return found.cast(_VERDICT)


def _apply(rule: _Rule, verdicts: pa.Table, rows: list[dict[str, Any]]) -> None:
    told = (verdicts[name].to_pylist() for name in (ROW.name, "kept", "similarity_"))
    for row, kept, similarity in zip(*told, strict=True):
        rows[row] = {
            "is_duplicate": True, "duplicate_of": kept, "duplicate_kind": rule.settings.by,
            "duplicate_similarity": similarity,
            "duplicate_reason": f"{rule.words} as {kept}, which is first by {rule.settings.keep}",
        }  # fmt: skip


def _commit(store: Store, spec: TableSpec, aligned: TableSpec, rules: Sequence[_Rule], shard: Shard) -> dict[str, int]:
    """Write a shard's `duplicates` from the verdicts of all rules; counts them by rule."""
    nothing: dict[str, Any] = {**dict.fromkeys((field.name for field in _FIELDS), None), "is_duplicate": False}
    rows = [nothing] * shard.rows
    for rule in rules:
        _apply(rule, verdicts_on(store, rule.work, shard.name), rows)
    keys = store.read(aligned, shard.name, [KEY.name]).column(KEY.name)
    told = pa.Table.from_pylist(rows, schema=pa.schema(_FIELDS))
    store.write(spec, shard, pa.table([keys, *told.columns], schema=spec.schema), aligned_with=aligned)
    counts = Counter(told.column("duplicate_kind").drop_null().to_pylist())
    return {f"duplicate by {kind}": count for kind, count in counts.items()}
