"""Selection over committed tables: who is a member, who is not and why, and what is computed again when."""

from pathlib import Path

import pyarrow as pa
import pytest

from curate.catalog import open_catalog
from curate.config import KeepTop, SubsetSettings
from curate.engine.inline import InlineDriver
from curate.errors import PlanError
from curate.metrics import progress
from curate.schema import KEY, SAMPLE_FIELDS, Shard, TableSpec, inputs_of, keys_of
from curate.select.step import clause_counts, explain_row, select_stage, threshold_step
from curate.store import Store

SAMPLES = TableSpec("samples", 1, pa.schema([*SAMPLE_FIELDS, pa.field("width", pa.int64())]), open_schema=True)
_FACTS = [pa.field("status", pa.string()), pa.field("width", pa.int32())]
IMAGES = TableSpec("images", 1, pa.schema([KEY, *_FACTS]), inputs=inputs_of([SAMPLES]))
SCORES = TableSpec("scores_x", 1, pa.schema([KEY, pa.field("score", pa.float32())]), inputs=inputs_of([IMAGES]))
OTHER = TableSpec("scores_y", 1, pa.schema([KEY, pa.field("other", pa.float32())]), inputs=inputs_of([IMAGES]))
TABLES = [SAMPLES, IMAGES, SCORES, OTHER]
ROWS = [
    # status, width as stored, width in the source, score
    ("ok", 300, 640, 0.9),
    ("ok", 300, 640, 0.4),
    ("ok", 100, 640, 0.9),
    ("ok", 300, 640, None),
    ("ok", 300, 100, 0.7),
    ("timeout", None, 640, None),
    ("ok", None, 640, float("nan")),
    ("removed", None, 100, 0.99),  # a score without an image must not make a member
]


@pytest.fixture
def pool(tmp_path: Path) -> tuple[Store, list[Shard]]:
    """Two shards with the same rows."""
    store = Store(str(tmp_path))
    shards = []
    for number in range(2):
        shard = Shard(f"{number:04d}", len(ROWS))
        keys = keys_of([f"{number}-{row}" for row in range(len(ROWS))], ["t"] * len(ROWS))
        status, width, source, score = (list(column) for column in zip(*ROWS, strict=True))
        store.write(SAMPLES, shard, pa.table([keys, keys, ["t"] * len(ROWS), source], schema=SAMPLES.schema))
        for spec, columns in ((IMAGES, [status, width]), (SCORES, [score]), (OTHER, [score])):
            store.write(spec, shard, pa.table([keys, *columns], schema=spec.schema), SAMPLES)
        shards.append(shard)
    return store, shards


def _select(store: Store, shards: list[Shard], subsets: dict[str, SubsetSettings]) -> list[TableSpec]:
    step = threshold_step(subsets, TABLES, shards)
    if not step.done(store, shards):
        with progress("thresholds", len(shards)) as ticker:
            step.run(store, shards, map, ticker)
    stage = select_stage(subsets, TABLES, shards, step.values(store))
    for reports in InlineDriver().run(store, [stage], shards):
        assert reports[0].set_aside is None
    return list(stage.tables)


def test_every_row_knows_its_first_refusal(pool: tuple[Store, list[Shard]]) -> None:
    """Guards against null counted as false, against members whose image failed, and against mixed-up widths."""
    store, shards = pool
    subsets = {"a": SubsetSettings(where="width >= 200 AND score > 0.5 AND source_width > width")}
    (spec,) = _select(store, shards, subsets)
    table = store.read(spec, shards[0].name)
    assert table.column("member").to_pylist() == [True] + [False] * 7
    assert table.column("reason").to_pylist() == [
        None, "where: score > 0.5", "where: width >= 200", "unknown: score > 0.5", "where: source_width > width",
        "status: timeout", "unknown: width >= 200", "status: removed",
    ]  # fmt: skip
    counts = clause_counts(store, spec, shards)
    assert counts["member"] == 2
    assert counts["unknown: score > 0.5"] == 2
    assert sum(counts.values()) == 2 * len(ROWS)


def test_fraction_is_of_the_rows_that_the_condition_leaves(pool: tuple[Store, list[Shard]]) -> None:
    """Guards against a fraction of all rows, of failed ones or of unknown scores; ties are kept whole."""
    store, shards = pool
    subsets = {"top": SubsetSettings(where="width > 200", keep_top=KeepTop(by="score", fraction=0.5))}
    (spec,) = _select(store, shards, subsets)
    # Eligible are 0.9, 0.4, 0.7 in both shards; sorted[int(6 * 0.5)] = 0.7.
    assert threshold_step(subsets, TABLES, shards).values(store) == {"top": pytest.approx(0.7)}
    reasons = store.read(spec, shards[1].name).column("reason").to_pylist()
    assert reasons == [
        None, "keep_top", "where: width > 200", "unknown: score", None, "status: timeout", "unknown: width > 200",
        "status: removed",
    ]  # fmt: skip


def test_a_fraction_may_be_of_other_rows(pool: tuple[Store, list[Shard]]) -> None:
    """Guards against DataComp-1B's best 30 % of the pool read as the best 30 % of what its other filter leaves."""
    store, shards = pool
    top = KeepTop(by="score", fraction=0.4, of="width IS NOT NULL")
    (spec,) = _select(store, shards, {"top": SubsetSettings(where="width > 200", keep_top=top)})
    # Of 0.9, 0.4, 0.9, 0.7 in both shards: sorted[int(8 * 0.4)] = 0.9; of what is wider than 200 it would be 0.7.
    reasons = store.read(spec, shards[1].name).column("reason").to_pylist()
    assert reasons[:5] == [None, "keep_top", "where: width > 200", "unknown: score", "keep_top"]
    with pytest.raises(PlanError, match=r"subsets\.top\.keep_top\.of"):
        _select(store, shards, {"top": SubsetSettings(keep_top=KeepTop(by="score", fraction=0.4, of="widht > 1"))})


def test_a_fraction_of_nothing_selects_nothing(pool: tuple[Store, list[Shard]]) -> None:
    """Guards against a crash, or everything selected, when no row is eligible."""
    store, shards = pool
    (spec,) = _select(store, shards, {"z": SubsetSettings(where="score > 9", keep_top=KeepTop(by="score", fraction=1))})
    assert clause_counts(store, spec, shards)["member"] == 0


def test_identity_changes_with_what_decides_and_nothing_else(pool: tuple[Store, list[Shard]]) -> None:
    """Guards against stale members after an edit, and against work done again for an unrelated scorer or shard."""
    _, shards = pool
    where, top = SubsetSettings(where="score > 0.5"), SubsetSettings(keep_top=KeepTop(by="score", fraction=0.5))

    def prints(tables: list[TableSpec], shards: list[Shard], **subsets: SubsetSettings) -> list[str]:
        return [spec.fingerprint for spec in select_stage(subsets, tables, shards, {}).tables]

    base = prints(TABLES, shards, a=where, b=top)
    renewed = TableSpec("scores_y", 2, OTHER.schema, inputs=OTHER.inputs)
    assert prints([*TABLES[:3], renewed], shards, a=where, b=top) == base
    assert prints(TABLES, shards[:1], a=where, b=top)[0] == base[0]
    assert prints(TABLES, shards[:1], a=where, b=top)[1] != base[1]
    rescored = TableSpec("scores_x", 2, SCORES.schema, inputs=SCORES.inputs)
    assert not set(prints([SAMPLES, IMAGES, rescored, OTHER], shards, a=where, b=top)) & set(base)
    assert prints(TABLES, shards, a=SubsetSettings(where="score > 0.6"), b=top)[1] == base[1]


def test_plan_names_subset_and_clause(pool: tuple[Store, list[Shard]]) -> None:
    """Guards against an error that leaves the reader to search a long recipe."""
    _, shards = pool
    with pytest.raises(PlanError, match=r"subsets\.b\.where: scroe > 1: scroe is no column, did you mean score"):
        select_stage({"a": SubsetSettings(), "b": SubsetSettings(where="width > 1 AND scroe > 1")}, TABLES, shards, {})


def test_explains_one_sample(pool: tuple[Store, list[Shard]]) -> None:
    """Guards against an explanation that disagrees with what was selected."""
    store, shards = pool
    subsets = {
        "a": SubsetSettings(where="width >= 200 AND score > 0.5"),
        "top": SubsetSettings(keep_top=KeepTop(by="score", fraction=0.2)),
        "all": SubsetSettings(),
    }
    specs = _select(store, shards, subsets)
    for row in range(len(ROWS)):
        verdicts = explain_row(store, [*TABLES, *specs], subsets, shards[0].name, row)
        for verdict, spec in zip(verdicts, specs, strict=True):
            held = store.read(spec, shards[0].name).slice(row, 1).to_pylist()[0]
            assert (verdict.member, verdict.reason) == (held["member"], held["reason"])
    unknown = explain_row(store, [*TABLES, *specs], subsets, shards[0].name, 3)[0]
    assert dict(unknown.clauses) == {"status = 'ok'": True, "width >= 200": True, "score > 0.5": None}
    assert "unknown score > 0.5" in str(unknown)


def test_members_of_two_subsets_are_asked_side_by_side(pool: tuple[Store, list[Shard]]) -> None:
    """Guards against `member` of one subset hiding that of another in `curate sql`."""
    store, shards = pool
    specs = _select(store, shards, {"a": SubsetSettings(where="score > 0.5"), "b": SubsetSettings()})
    with open_catalog(store, [*TABLES, *specs], [shard.name for shard in shards]) as catalog:
        found = catalog.sql("SELECT count(*) FROM rows WHERE member_b AND NOT member_a AND reason_a LIKE 'unknown%'")
        assert found.fetchall() == [(4,)]
