"""Copies across all shards: one of each group stays, and every other row says which, why and by what rule.

Rules (`rules`) are applied in the order of the recipe, each to the rows that the rules before it left. A rule brings
rows with one value together across shards (`curate.across`); a rule over near values first finds their groups (`near`),
whose name is then the value; a rule against a reference set first asks each row which of its images it reaches
(`references`). What is then decided stands in `verdicts`. Only rows with an image (status ok) take part.

The recall of every search among vectors is measured and told: in the counts of the run, and beside the table:

    <root>/duplicates/<fingerprint>/_recall.json    of each rule: rows sampled, true pairs, found, rate, its lower bound
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from curate.across import ROW, decide_across
from curate.config import DedupSettings
from curate.dedup.asked import ask_references
from curate.dedup.firsts import GONE, row_bytes, verdicts_of
from curate.dedup.known import (
    digest_of,
    forget_older,
    identity_of,
    keep_groups,
    keep_neighbours,
    known_to,
    publish,
    sweep_identities,
)
from curate.dedup.near import Pool, group_near, pool_of
from curate.dedup.near_hashes import search_hashes
from curate.dedup.participants import dtype_of, hashes_on, vectors_on
from curate.dedup.references import keep_reference, measured_reference, read_reference
from curate.dedup.released import member_folders, preferred_release
from curate.dedup.rules import Rule, image_references, reference_place, rules_of, sums_of
from curate.dedup.verdicts import (
    DIRECT,
    GROUP,
    KEPT,
    SIMILARITY,
    check_ordering,
    copies_on,
    earlier_of_each,
    first_of_each,
    reaching_on,
    reason,
    redundant_on,
    touching,
)
from curate.errors import PlanError
from curate.metrics import Ticker
from curate.rows import SAMPLES, Column, columns_of, recall_path
from curate.schema import KEY, Shard, TableSpec, fingerprint, inputs_of, pool_digest
from curate.stage import CrossStep, Map
from curate.store import Store
from curate.vectors import founders, get_arrays

if TYPE_CHECKING:
    from curate.dedup.cells import Recall

VERSION = 5

_FIELDS = (
    pa.field("is_duplicate", pa.bool_(), nullable=False),
    pa.field("duplicate_of", pa.string()),  # key of the row that was kept instead, or id of a reference
    pa.field("duplicate_kind", pa.string()),  # the rule: sha256, image_phash, embedding_<name>, reference:<name>
    # To the row (or reference) that `duplicate_of` names: cosine, or for hashes 1 less a 64th for each bit. Below the
    # rule's threshold where other rows connect the two; null where a reference is reached through other rows only.
    pa.field("duplicate_similarity", pa.float32()),
    pa.field("duplicate_reason", pa.string()),
    # Of every row in a group, the one that stays included: the key of the row that stays, or, where all of it touches a
    # reference, of its first row. Null: no rule found it near another.
    pa.field("duplicate_group", pa.string()),
)


class DedupStep(CrossStep):
    """See the module's docstring. Writes the table `duplicates`."""

    name = "dedup"

    def __init__(
        self, rules: Sequence[DedupSettings], tables: Sequence[TableSpec], shards: Sequence[Shard],
        store: Store | None = None, measured: Mapping[str, str] | None = None,
        centroids: tuple[str, str] | None = None,
    ) -> None:  # fmt: skip
        columns = columns_of(tables)
        self._rules = rules_of(rules, columns, measured, centroids)
        if any(rule.settings.cells == "pool" and not rule.centroids for rule in self._rules):
            raise PlanError("dedup.cells: pool: this pipeline trains no cells before; see frame.py")
        for rule in self._rules:
            check_ordering(rule)
        inputs = inputs_of(_tables(self._rules, columns))
        settings: dict[str, Any] = {
            "rules": [_without_paths(rule) for rule in rules], "references": sums_of(self._rules),
            "pool": pool_digest(shards),
        }  # fmt: skip
        if any(rule.centroids for rule in self._rules):
            settings["centroids"] = centroids
        settings["base"] = fingerprint("duplicates", VERSION, settings, inputs)
        self._released = None
        if store is not None and any(rule.prefer_released for rule in rules):
            self._released = preferred_release(store, settings["base"])
        if self._released is not None:
            settings["released"] = self._released
        self._spec = TableSpec("duplicates", VERSION, pa.schema([KEY, *_FIELDS]), settings=settings, inputs=inputs)
        self._any = tables[0]
        self._samples = next(spec.fingerprint for spec in tables if spec.name == SAMPLES)
        self.tables = (self._spec,)

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether every shard has its verdicts."""
        return {shard.name for shard in shards} <= store.done(self._spec)

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Apply the rules in order; counts duplicates by rule, and the recall of each search among vectors."""
        work = f"_work/duplicates/{self._spec.fingerprint}"
        folders = member_folders(store, self._released, self._samples) if self._released else ()
        rules = [
            replace(
                rule, work=f"{work}/{rule.number}", released=folders if rule.settings.prefer_released else ()
            )
            for rule in self._rules
        ]  # fmt: skip
        counts: Counter[str] = Counter()
        recalls: dict[str, Any] = {}
        for number, rule in enumerate(rules):
            ticker.advance(0, f"{rule.kind}, rule {number + 1} of {len(rules)}")
            recall = _decide(store, rule, rules[:number], shards, map_items, counts)
            if recall is not None:
                recalls[f"{number}:{rule.kind}"] = {**vars(recall), "rate": recall.rate, "at_least": recall.lower}
                counts[f"{rule.kind}: near pairs of {recall.rows} sampled rows"] += recall.true
                counts[f"{rule.kind}: of these found"] += recall.found
        refreshed = [(rule, _identity(store, rule)) for rule in rules if rule.refreshed]
        for rule, identity in refreshed:
            if rule.form == "dinov2":
                keep_neighbours(store, identity, self._spec.fingerprint, rule.work, map_items)
            else:
                keep_groups(store, identity, self._spec.fingerprint, rule.work, shards, map_items)
            publish(store, identity, self._spec.fingerprint, shards)
        told = recall_path(self._spec)
        if recalls and not store.exists(told):  # another run at this root may have swept away what was just counted
            store.put_json(told, recalls)
        for count in map_items(partial(_commit, store, self._spec, self._any, rules), list(shards)):
            counts.update(count)
            ticker.advance(1)
        for _, identity in refreshed:
            forget_older(store, identity, self._spec.fingerprint)
        sweep_identities(store)
        store.remove_tree(work)
        return counts


def dedup_step(
    rules: Sequence[DedupSettings], tables: Sequence[TableSpec], shards: Sequence[Shard], store: Store | None = None,
    measured: Mapping[str, str] | None = None, centroids: tuple[str, str] | None = None,
) -> DedupStep:  # fmt: skip
    """The step for these rules over these tables. With the store, released rows are preferred. `measured`: folder of
    each reference set that comes as images, by its place in the recipe (`score.reference_images`). `centroids`: column
    and file of the pool's cells, for rules with `cells: pool`.

    Raises PlanError for an unknown rule or column, or an unreadable reference.
    """
    return DedupStep(rules, tables, shards, store, measured, centroids)


def images_to_measure(rules: Sequence[DedupSettings], tables: Sequence[TableSpec]) -> dict[str, tuple[str, str]]:
    """(images, column of the pool that measures them) of each reference set that comes as images, by its place."""
    return image_references(rules, columns_of(tables))


def _without_paths(rule: DedupSettings) -> dict[str, Any]:
    """Settings that say what is computed: a reference is known by its sum, wherever its file lies."""
    tree = rule.model_dump(mode="json")
    for one in tree["against"]:
        del one["hashes"], one["embeddings"], one["images"]
    return tree


def _tables(rules: Sequence[Rule], columns: Mapping[str, Column]) -> list[TableSpec]:
    names = {"status"}.union(*({*rule.values, *rule.keep_columns} for rule in rules))
    return list({columns[name].table.name: columns[name].table for name in sorted(names & set(columns))}.values())


def _decide(
    store: Store, rule: Rule, before: Sequence[Rule], shards: Sequence[Shard], map_items: Map, counts: Counter[str]
) -> "Recall | None":
    """Leave a rule's verdicts in its folder; the recall of its search where it is not exact by construction."""
    recall = None
    values = vectors_on if rule.search == "vectors" else hashes_on
    of_rule = partial(values, store, rule)
    pool = pool_of(store, rule.work, partial(of_rule, before), partial(of_rule, ()), shards)
    if rule.grouped:
        recall, compared = _group(pool, rule, shards, map_items)
        counts[f"{rule.kind}: pairs compared"] += compared
    candidates: Callable[..., pa.Table] = copies_on
    decide: Callable[[pa.Table], pa.Table] = partial(first_of_each, rule.settings.keep)
    if rule.reference is not None:
        path = f"{rule.work}/reference.npz"
        if not store.exists(path):
            found = (
                measured_reference(store, rule.measured)
                if rule.measured
                else read_reference(rule.reference, reference_place(rule))
            )
            keep_reference(store, path, found)
        counts[f"{rule.kind}: rows asked"] += ask_references(pool, rule, path, _read(rule), map_items)
        candidates, decide = reaching_on, partial(touching, store, path)
    elif rule.semdedup:
        candidates, decide = redundant_on, earlier_of_each
    of_shard = partial(candidates, store, rule, before)
    decide_across(store, rule.work, shards, map_items, of_shard, decide, row_bytes(rule))
    return recall


def _group(pool: Pool, rule: Rule, shards: Sequence[Shard], map_items: Map) -> "tuple[Recall | None, int]":
    """Find the groups, with what an earlier run knows; the recall of the search, and how many pairs it compared."""
    note = pool.place("known.json")
    if rule.search == "hashes":
        pool = replace(pool, known=known_to(pool.store, _identity(pool.store, rule), note, shards))
        return None, group_near(pool, search_hashes(pool, rule.radius), map_items)
    from curate.dedup.near_vectors import founding_shards, search_vectors  # noqa: PLC0415  # torch: for vectors only
    from curate.dedup.recall import measure_pool  # noqa: PLC0415  # as above

    founding = pool  # SemDeDup's number of cells follows the pool
    if rule.form != "semdedup":
        some = founders(shards) if rule.centroids else founding_shards(shards)
        founding = pool_of(pool.store, pool.folder, pool.everyone, pool.everyone, some)
    search = search_vectors(
        pool, founding, rule.form, rule.threshold, rule.settings.neighbours, rule.centroids or rule.settings.cells,
        rule.columns[rule.values[0]].type.list_size, dtype_of(rule),
    )  # fmt: skip
    if rule.refreshed:
        identity = _identity(pool.store, rule)
        known = known_to(pool.store, identity, note, shards)
        if rule.form == "dinov2":
            search = replace(search, known=known, found=pool.place("nearest"))
        else:
            pool = replace(pool, known=known)
    compared = group_near(pool, search, map_items)
    return measure_pool(pool, search, map_items), compared


def _identity(store: Store, rule: Rule) -> str:
    """What the rule compares and how; for vectors, in which cells."""
    if rule.search == "hashes":
        return identity_of(rule.number, rule.kind, rule.radius, _read(rule))
    cells = digest_of(*get_arrays(store, f"{rule.work}/cells.npz").values())
    return identity_of(
        rule.number, rule.kind, [rule.form, rule.threshold, rule.settings.neighbours, cells], _read(rule)
    )


def _read(rule: Rule) -> list[str]:
    """The tables that say who takes part, and with what value."""
    return [rule.columns[name].table.fingerprint for name in ("status", rule.values[0])]


def _apply(store: Store, rule: Rule, shard: str, rows: list[dict[str, Any]]) -> None:
    verdicts = verdicts_of(store, rule, shard)
    names = (ROW.name, KEPT.name, SIMILARITY.name, DIRECT.name, GROUP.name, GONE.name)
    for row, kept, similarity, direct, group, gone in zip(*(verdicts[name].to_pylist() for name in names), strict=True):
        rows[row] = {**rows[row], "duplicate_group": group}
        if gone:
            rows[row] |= {
                "is_duplicate": True, "duplicate_of": kept, "duplicate_kind": rule.kind,
                "duplicate_similarity": similarity, "duplicate_reason": reason(rule, kept, direct),
            }  # fmt: skip


def _commit(store: Store, spec: TableSpec, aligned: TableSpec, rules: Sequence[Rule], shard: Shard) -> dict[str, int]:
    """Write a shard's `duplicates` from the verdicts of all rules; counts them by rule.

    What is there stays: another run at this root may have written it and swept away the verdicts read here.
    """
    if store.has(spec, shard.name):
        return _counts(store.read(spec, shard.name, ["duplicate_kind"]))
    nothing: dict[str, Any] = {**dict.fromkeys((field.name for field in _FIELDS), None), "is_duplicate": False}
    rows = [nothing] * shard.rows
    for rule in rules:
        _apply(store, rule, shard.name, rows)
    keys = store.read(aligned, shard.name, [KEY.name]).column(KEY.name)
    told = pa.Table.from_pylist(rows, schema=pa.schema(_FIELDS))
    store.write(spec, shard, pa.table([keys, *told.columns], schema=spec.schema), aligned_with=aligned)
    return _counts(told)


def _counts(told: pa.Table) -> dict[str, int]:
    counts = Counter(told.column("duplicate_kind").drop_null().to_pylist())
    return {f"duplicate by {kind}": count for kind, count in counts.items()}
