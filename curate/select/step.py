"""Subsets as steps of a run: fractions become numbers, and every row learns whether it is a member, and why not.

    _thresholds/<fingerprint of member_<subset>>.json    the number of a subset's keep_top
    _clauses/<fingerprint>-<pool>.json                   how often each of its clauses is true, false, unknown
    member_<subset>                                      key, member, reason (null for members)

Thresholds stand in the recipe and the release and nowhere else: a new one makes new member tables, and no scorer runs.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from curate.config import SubsetSettings
from curate.metrics import Ticker
from curate.removed import Tombstones, tombstones_of
from curate.rows import SAMPLES, Column, clauses_path, read_rows
from curate.schema import OK, Shard, TableSpec
from curate.select.rules import MEMBER, REASON, SubsetRule, decide, eligible_scores, judge, mark_removed, subset_rules
from curate.select.top import Part, Search, look, merge, resolve
from curate.stage import CrossStep, Map, Read, Stage, Task
from curate.store import Store

SHARDS_PER_LOOK = 16  # one task's share of a pass: long enough to hide a task's cost, short enough to spread


class ThresholdStep(CrossStep):
    """Resolves every `keep_top.fraction` to a number and counts what each clause says, over the whole pool.

    Writes no table. Clauses are counted each on its own, whatever the others say, over rows whose image is ok.
    """

    name = "thresholds"

    def __init__(self, rules: Sequence[SubsetRule]) -> None:
        self._rules = [rule for rule in rules if rule.fraction is not None]
        self._counted = [rule for rule in rules if rule.where]

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether every fraction has its number, and every clause its counts."""
        counted = all(store.exists(clauses_path(rule.spec, shards)) for rule in self._counted)
        return counted and all(store.exists(rule.threshold_path) for rule in self._rules)

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """At most four passes over the columns that the fractions depend on; counts the passes."""
        todo = {rule.name: rule for rule in self._rules if not store.exists(rule.threshold_path)}
        names = [shard.name for shard in shards]
        groups = [names[at : at + SHARDS_PER_LOOK] for at in range(0, len(names), SHARDS_PER_LOOK)]
        passes: Counter[str] = Counter()
        removed = tombstones_of(store)

        def one_pass(open_: Mapping[str, Search]) -> Mapping[str, Part]:
            passes["passes"] += 1
            searches = [(todo[name], search) for name, search in open_.items()]
            merged: dict[str, Part] = {}
            for parts in map_items(partial(_look, store, searches, removed), groups):
                for name, part in parts.items():
                    merged[name] = merge([merged[name], part]) if name in merged else part
                ticker.advance(0, f"pass {passes['passes']}: {', '.join(open_)}")
            return merged

        fractions = {name: rule.fraction for name, rule in todo.items() if rule.fraction is not None}
        thresholds = resolve(fractions, one_pass) if groups else dict.fromkeys(fractions)
        for name, threshold in thresholds.items():
            rule = todo[name]
            assert rule.score is not None
            store.put_json(
                rule.threshold_path,
                {"subset": name, "by": rule.score.sql, "fraction": rule.fraction, "threshold": threshold},
            )
        self._count(store, shards, map_items, removed)
        ticker.advance(max(1, len(shards)))
        return passes

    def _count(self, store: Store, shards: Sequence[Shard], map_items: Map, removed: Tombstones) -> None:
        todo = [rule for rule in self._counted if not store.exists(clauses_path(rule.spec, shards))]
        names = [shard.name for shard in shards]
        groups = [names[at : at + SHARDS_PER_LOOK] for at in range(0, len(names), SHARDS_PER_LOOK)]
        found: Counter[tuple[str, int, str]] = Counter()
        for counts in map_items(partial(_clauses_in, store, todo, removed), groups if todo else []):
            found.update(counts)
        for rule in todo:
            note = [
                {"clause": clause.sql} | {word: found[rule.name, place, word] for word in ("true", "false", "unknown")}
                for place, clause in enumerate(rule.where)
            ]
            store.put_json(clauses_path(rule.spec, shards), note)

    def values(self, store: Store) -> dict[str, float] | None:
        """Subset to threshold; infinity where no row was eligible. None until all are resolved."""
        found: dict[str, float] = {}
        for rule in self._rules:
            note = store.get_json(rule.threshold_path)
            if note is None:
                return None
            found[rule.name] = math.inf if note["threshold"] is None else note["threshold"]
        return found


class SelectStage(Stage):
    """Writes one table `member_<subset>` for each subset, in the order of the recipe."""

    name = "select"
    batch_rows = 100_000  # no images are read: a whole shard is one query

    def __init__(self, rules: Sequence[SubsetRule], thresholds: Mapping[str, float]) -> None:
        super().__init__()
        self._rules, self._thresholds, self._removed = tuple(rules), dict(thresholds), Tombstones()
        self.tables = tuple(rule.spec for rule in rules)

    def check(self, store: Store) -> None:
        """Nothing can fail here that the rules did not find; the tombstones are read."""
        self._removed = tombstones_of(store)

    def reads(self, missing: frozenset[str]) -> Sequence[Read]:
        """The columns of the missing subsets, computed tables first."""
        reads: dict[str, list[Column]] = {}
        for column in self._columns(missing):
            reads.setdefault(column.table.name, []).append(column)
        found = [Read(columns[0].table, tuple(column.column for column in columns)) for columns in reads.values()]
        return found or [Read(self._rules[0].anchor, ())]

    def _columns(self, missing: frozenset[str]) -> list[Column]:
        rules = [rule for rule in self._rules if rule.spec.name in missing]
        columns = {column.name: column for rule in rules for column in (*rule.columns, *_watched(rule, self._removed))}
        tables = {column.table.name: None for column in columns.values()}
        order = sorted(tables, key=lambda name: name == SAMPLES)
        return [column for name in order for column in columns.values() if column.table.name == name]

    def process(self, task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[Mapping[str, pa.RecordBatch]]:
        """Judge every row for every missing subset; counts members and reasons by subset."""
        columns = self._columns(task.missing)
        for batch in batches:
            rows = pa.table({"key": batch.column("key")} | dict(_labelled(columns, batch)))
            rows = mark_removed(rows, self._removed)
            outputs: dict[str, pa.RecordBatch] = {}
            for rule in self._rules:
                if rule.spec.name in task.missing:
                    judged = rows.select(["key", *rule.labels])
                    member, reason = decide(rule, judged, self._thresholds.get(rule.name))
                    outputs[rule.spec.name] = pa.RecordBatch.from_arrays(
                        [member, reason], schema=pa.schema([MEMBER, REASON])
                    )
                    self.counters[f"{rule.name}: member"] += member.true_count
                    refused = Counter(reason.drop_null().to_pylist())
                    self.counters.update({f"{rule.name}: {why}": count for why, count in refused.items()})
            yield outputs


@dataclass(frozen=True)
class Verdict:
    """What a subset says of one sample. `clauses` maps each clause to true, false or None (unknown), in order."""

    subset: str
    member: bool
    reason: str | None
    clauses: Mapping[str, bool | None]
    score: float | None = None
    threshold: float | None = None

    def __str__(self) -> str:
        head = f"{self.subset}: {'member' if self.member else f'refused by {self.reason}'}"
        lines = [
            f"  {'unknown' if value is None else str(value).lower():8}{sql}" for sql, value in self.clauses.items()
        ]
        if self.threshold is not None:
            lines.append(f"  keep_top: {self.score} against the threshold {self.threshold}")
        return "\n".join([head, *lines])

    __rich__ = __str__


def threshold_step(
    subsets: Mapping[str, SubsetSettings], tables: Sequence[TableSpec], shards: Sequence[Shard]
) -> ThresholdStep:
    """The step that resolves fractions. Raises PlanError for an expression that cannot be evaluated."""
    return ThresholdStep(subset_rules(subsets, tables, shards))


def select_stage(
    subsets: Mapping[str, SubsetSettings],
    tables: Sequence[TableSpec],
    shards: Sequence[Shard],
    thresholds: Mapping[str, float] | None,
) -> SelectStage:
    """The stage that writes `member_<subset>`. `thresholds` may lack numbers while a run is only planned."""
    return SelectStage(subset_rules(subsets, tables, shards), thresholds or {})


def clause_counts(store: Store, spec: TableSpec, shards: Sequence[Shard]) -> dict[str, int]:
    """Rows of a committed `member_<subset>` by what became of them: `member`, or the reason that refused them."""
    counts: Counter[str] = Counter()
    for shard in shards:
        table = store.read(spec, shard.name, ["member", "reason"])
        counts["member"] += int(table.column("member").combine_chunks().true_count)
        counts.update(table.column("reason").drop_null().to_pylist())
    return dict(sorted(counts.items(), key=lambda item: (item[0] != "member", -item[1], item[0])))


def explain_row(
    store: Store, tables: Sequence[TableSpec], subsets: Mapping[str, SubsetSettings], shard: str, row: int
) -> list[Verdict]:
    """What each subset says of one row, evaluated anew from the committed columns. Raises MissingTable."""
    committed = {spec.name: spec for spec in tables}
    removed = tombstones_of(store)
    verdicts = []
    for rule in subset_rules(subsets, tables, ()):
        rows = _rows(store, rule, removed, shard).slice(row, 1)
        judged = judge(rule, rows)
        values = {clause.sql: found[0].as_py() for clause, found in zip(rule.where, judged.clauses, strict=True)}
        if judged.status is not None:
            values = {"status = 'ok'": judged.status[0].as_py() == "ok"} | values
        threshold: float | None = None
        if rule.score is not None:
            spec = committed.get(rule.spec.name)
            note = store.get_json(f"_thresholds/{spec.fingerprint}.json") if spec else None
            threshold = math.inf if note is None or note["threshold"] is None else note["threshold"]
        member, reason = decide(rule, rows, threshold)
        score = judged.score[0].as_py() if judged.score is not None else None
        verdicts.append(Verdict(rule.name, member[0].as_py(), reason[0].as_py(), values, score, threshold))
    return verdicts


def _clauses_in(
    store: Store, rules: Sequence[SubsetRule], removed: Tombstones, shards: Sequence[str]
) -> Counter[tuple[str, int, str]]:
    """How often each clause (subset, place) is true, false and unknown among the rows of these shards that are ok."""
    found: Counter[tuple[str, int, str]] = Counter()
    for shard in shards:
        for rule in rules:
            judged = judge(rule, _rows(store, rule, removed, shard))
            status = judged.status
            for place, values in enumerate(judged.clauses):
                kept = values if status is None else values.filter(pc.fill_null(pc.equal(status, OK), False))
                true = pc.sum(kept).as_py() or 0
                found[rule.name, place, "true"] += true
                found[rule.name, place, "false"] += len(kept) - kept.null_count - true
                found[rule.name, place, "unknown"] += kept.null_count
    return found


def _look(
    store: Store, searches: Sequence[tuple[SubsetRule, Search]], removed: Tombstones, shards: Sequence[str]
) -> dict[str, Part]:
    """One task of a pass: what each search finds in these shards."""
    parts: dict[str, Part] = {}
    for shard in shards:
        for rule, search in searches:
            part = look(search, eligible_scores(rule, _rows(store, rule, removed, shard)))
            parts[rule.name] = merge([parts[rule.name], part]) if rule.name in parts else part
    return parts


def _rows(store: Store, rule: SubsetRule, removed: Tombstones, shard: str) -> pa.Table:
    if not rule.columns:
        return store.read(rule.anchor, shard, ["key"])
    columns = {column.name: column for column in (*rule.columns, *_watched(rule, removed))}
    return mark_removed(read_rows(store, columns, list(columns), shard), removed)


def _watched(rule: SubsetRule, removed: Tombstones) -> list[Column]:
    return [column for column in rule.watched if column.name in removed.watched]


def _labelled(columns: Sequence[Column], batch: pa.RecordBatch) -> Iterator[tuple[str, pa.Array]]:
    """A batch's columns under their names in the wide table (the store calls a second `width` source_width)."""
    taken: set[str] = set()
    for column in columns:
        name = column.column if column.column not in taken else f"source_{column.column}"
        taken.add(name)
        yield column.name, batch.column(name)
