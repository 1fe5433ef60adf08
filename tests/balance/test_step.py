"""Balance and experts over a committed pool, row by row against plain restatements."""

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import curate.vectors
from curate.balance import entries as entries_file
from curate.balance.metaclip import kept
from curate.balance.stage import match_stage
from curate.balance.step import BalanceStep, balance_step, experts_step
from curate.config import BalanceSettings, ExpertsSettings
from curate.errors import PlanError
from curate.schema import KEY, SAMPLE_FIELDS, Shard, TableSpec, inputs_of, keys_of
from curate.stage import run_shard
from curate.store import Store
from curate.vectors import get_arrays, key_numbers
from tests.retrieve.pool import TABLES as VECTOR_TABLES
from tests.retrieve.pool import Killed, build, dying_map, go, rows_of, shuffled_map

SAMPLES = TableSpec("samples", 1, pa.schema([*SAMPLE_FIELDS, pa.field("language", pa.string())]), open_schema=True)
IMAGES = TableSpec("images", 1, pa.schema([KEY, pa.field("status", pa.string())]), inputs=inputs_of([SAMPLES]))
TABLES = [SAMPLES, IMAGES]
WORDS = ["dog", "cat", "a dog", "red car", "sky", "unseen", "tree", "blue sky"]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks, as a large pool has them."""
    monkeypatch.setattr(curate.vectors, "SHARDS_PER_CHUNK", 2)
    monkeypatch.setattr(entries_file, "SHARDS_PER_COUNT", 2)


def _pool(store: Store) -> tuple[list[Shard], list[dict[str, Any]]]:
    rng = np.random.default_rng(2)
    shards, facts = [], []
    for number in range(5):
        words = [[WORDS[i] for i in rng.choice(8, rng.integers(0, 4), p=[0.4, 0.2, 0.1, 0.1, 0.1, 0, 0.05, 0.05])]
                 for _ in range(60)]  # fmt: skip
        texts = [None if row % 29 == 28 else ", ".join(["photo", *found]) for row, found in enumerate(words)]
        urls = [f"{number}-{row}" for row in range(60)]
        part = [
            {"key": key, "text": text, "language": "en" if rng.random() < 0.8 else "de",
             "status": "ok" if rng.random() < 0.9 else "timeout"}
            for key, text in zip(keys_of(urls, texts), texts, strict=True)
        ]  # fmt: skip
        shard = Shard(f"{number:04d}", 60)
        keys = [fact["key"] for fact in part]
        languages = [fact["language"] for fact in part]
        store.write(SAMPLES, shard, pa.table([keys, urls, texts, languages], schema=SAMPLES.schema))
        store.write(IMAGES, shard, pa.table([keys, [f["status"] for f in part]], schema=IMAGES.schema), SAMPLES)
        shards.append(shard)
        facts += part
    return shards, facts


def balance_of(settings: BalanceSettings, store: Store, tables: list[TableSpec], shards: list[Shard]) -> BalanceStep:
    """The step, over a pool whose captions the stage before it has matched."""
    stage = match_stage(settings, tables)
    stage.setup()
    for shard in shards:
        run_shard(store, stage, shard)
    return balance_step(settings, store, [*tables, *stage.tables], shards)


def _expected(facts: list[dict[str, Any]], t: float, seed: int) -> dict[str, tuple[int, float, bool]]:
    """key: (matches, probability, drawn) by the published loop, of English captions with an image."""
    some = [fact for fact in facts if fact["status"] == "ok" and fact["language"] == "en"]
    found = [
        [at for at, word in enumerate(WORDS) if f" {word} " in f" {fact['text'].replace(',', ' , ')} "]
        if fact["text"] else []
        for fact in some
    ]  # fmt: skip
    counts = Counter(at for row in found for at in row)
    p = np.array([t / max(counts[at], t) for at in range(len(WORDS))])
    pairs = np.array([(row, at) for row, ats in enumerate(found) for at in ats])
    drawn = kept(pairs, p, key_numbers([fact["key"] for fact in some]), seed)
    return {
        fact["key"]: (len(ats), 1 - math.prod(1 - p[at] for at in ats), bool(one))
        for fact, ats, one in zip(some, found, drawn, strict=True)
    }


def _files(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*")) if path.is_file()}  # fmt: skip


@pytest.mark.parametrize("mapper", [map, shuffled_map])
def test_balance_equals_the_published_loop(tmp_path: Path, mapper: Any) -> None:
    """Guards against counts of a shard where those of the pool belong, and rows that were left out but drawn."""
    store = Store(str(tmp_path / "run"))
    shards, facts = _pool(store)
    file = tmp_path / "entries.txt"
    file.write_text("\n".join(WORDS) + "\n")
    settings = BalanceSettings(entries=str(file), t=12, where="language = 'en'", seed=9)
    step = balance_of(settings, store, TABLES, shards)
    counts = go(step, store, shards, mapper)
    expected = _expected(facts, 12, 9)
    texts = {fact["key"]: fact["text"] for fact in facts}
    for row in rows_of(store, match_stage(settings, TABLES).tables[0], shards):  # of all rows, in order
        text = texts[row["key"]]
        held = [at for at, word in enumerate(WORDS) if f" {word} " in f" {text} ".replace(",", " , ")]
        assert row["matched_entries"] == (None if text is None else held)
    found = rows_of(store, step.tables[0], shards)
    for row in found:
        if row["key"] not in expected:
            assert (row["matches"], row["keep_probability"], row["is_balanced"]) == (None, None, None)
            continue
        matches, probability, drawn = expected[row["key"]]
        assert (row["matches"], row["is_balanced"]) == (matches, drawn)
        assert row["keep_probability"] == pytest.approx(probability, abs=1e-6)
    kept_rows = sum(drawn for _, _, drawn in expected.values())
    assert counts == {
        "captions seen": len(expected), "captions matched": sum(m > 0 for m, _, _ in expected.values()),
        "captions kept": kept_rows,
    }  # fmt: skip
    assert 0 < kept_rows < counts["captions matched"]
    told = step.facts(store)
    assert told is not None
    assert told["captions_expected"] == pytest.approx(sum(p for _, p, _ in expected.values()), abs=1e-3)
    assert store.names("_work/balance") == []
    assert step.done(store, shards)


def test_tail_share_gives_t(tmp_path: Path) -> None:
    """Guards against a t that was carried from one pool to another (RECIPES 6: keep the tail's share)."""
    store = Store(str(tmp_path / "run"))
    shards, _ = _pool(store)
    file = tmp_path / "entries.json"
    file.write_text(json.dumps(WORDS))
    by_share = balance_of(BalanceSettings(entries=str(file), p=0.3), store, TABLES, shards)
    go(by_share, store, shards)
    facts = by_share.facts(store)
    assert facts is not None
    by_count = balance_of(BalanceSettings(entries=str(file), t=facts["t"]), store, TABLES, shards)
    go(by_count, store, shards)
    assert rows_of(store, by_share.tables[0], shards) == rows_of(store, by_count.tables[0], shards)
    assert by_share.tables[0].fingerprint != by_count.tables[0].fingerprint


def test_killed_anywhere_goes_on_to_the_same_rows(tmp_path: Path) -> None:
    """Guards against counts that miss or double what a killed run had counted."""
    file = tmp_path / "entries.txt"
    file.write_text("\n".join(WORDS))
    balance = BalanceSettings(entries=str(file), t=12)
    experts = ExpertsSettings(by="toy", fine=8, coarse=2, sample=100)
    trees = []
    for name in ("whole", "killed"):
        root = tmp_path / name
        captions, vectors = Store(str(root / "captions")), Store(str(root / "vectors"))
        shards, others = _pool(captions)[0], build(vectors)[0]
        for survives in range(40) if name == "killed" else ():
            for step, store, some in (
                (balance_of(balance, captions, TABLES, shards), captions, shards),
                (experts_step(experts, vectors, VECTOR_TABLES, others), vectors, others),
            ):
                try:
                    go(step, store, some, dying_map(survives))
                except Killed:
                    continue
        go(balance_of(balance, captions, TABLES, shards), captions, shards)
        go(experts_step(experts, vectors, VECTOR_TABLES, others), vectors, others)
        trees.append(_files(root))
    assert trees[0] == trees[1]


@pytest.mark.parametrize("mapper", [map, shuffled_map])
def test_experts_are_those_of_the_nearest_fine_centre(tmp_path: Path, mapper: Any) -> None:
    """Guards against captions of one expert that train another."""
    store = Store(str(tmp_path))
    shards, rows = build(store)
    settings = ExpertsSettings(by="toy", where="folder <> 'a'", fine=8, coarse=3, sample=120, seed=2)
    step = experts_step(settings, store, VECTOR_TABLES, shards)
    counts = go(step, store, shards, mapper)
    held = get_arrays(store, f"_experts/{step.tables[0].fingerprint}/experts.npz")
    found = rows_of(store, step.tables[0], shards)
    seen: Counter[int] = Counter()
    for row, told in zip(rows, found, strict=True):
        if row.vector is None or not row.vector.any() or row.folder == "a":
            assert (told["expert"], told["expert_cell"]) == (None, None)
            continue
        vector = row.vector.astype(np.float64)
        cell = int(np.linalg.norm(held["fine"] - vector / np.linalg.norm(vector), axis=1).argmin())
        assert (told["expert_cell"], told["expert"]) == (cell, held["expert_of_fine"][cell])
        seen[told["expert"]] += 1
    assert counts == {f"captions of expert {number}": seen[number] for number in range(3)}
    assert len(seen) == 3


def test_experts_outlive_a_refresh(tmp_path: Path) -> None:
    """Guards experts that were trained on yesterday's subsets: their centres and their old captions stay, and all is as
    in a pool that came at once."""
    settings = ExpertsSettings(by="toy", where="folder <> 'a'", fine=8, coarse=3, sample=120)
    grown, whole = Store(str(tmp_path / "grown")), Store(str(tmp_path / "whole"))
    shards = build(grown, shards=7)[0]
    build(whole, shards=7)
    first = experts_step(settings, grown, VECTOR_TABLES, shards[:4])
    go(first, grown, shards[:4], shuffled_map)
    before = _files(tmp_path / "grown" / "experts")
    second = experts_step(settings, grown, VECTOR_TABLES, shards[:6])
    go(second, grown, shards[:6])
    after = _files(tmp_path / "grown" / "experts")
    assert {name: after[name] for name in before} == before and len(after) == 6
    go(experts_step(settings, whole, VECTOR_TABLES, shards[:6]), whole, shards[:6])
    assert _files(tmp_path / "whole") == _files(tmp_path / "grown")
    doubled = experts_step(settings, grown, VECTOR_TABLES, shards)
    assert first.tables[0].fingerprint == second.tables[0].fingerprint != doubled.tables[0].fingerprint


def test_entries_are_lines_however_an_editor_leaves_them(tmp_path: Path) -> None:
    """Guards against a first entry that nothing matches, an empty one that all do, and lines cut where only Unicode
    sees an end of line."""
    file = tmp_path / "entries.txt"
    file.write_bytes("\ufeffdog\r\n\r\na\u2028b\x0cc\nd.g (\n猫\n\n".encode())
    assert entries_file.read_entries(str(file)) == ["dog", "a\u2028b\x0cc", "d.g (", "猫"]


@pytest.mark.parametrize(
    ("texts", "limits", "told"),
    [
        ([None, None], {"t": 3}, (3, None, 0, 0)), (["dog"], {"t": 1e30}, (1e30, 1.0, 1, 1)),
        (["cat"], {"p": 0.3}, (1, None, 0, 0)), (["a dog", "a dog"], {"p": 0.0}, (1, 0.0, 2, 2)),
        (["a dog", "a dog", "sky"], {"p": 1.0}, (2, 1 / 3, 3, 3)), ([""], {"p": 1.0}, (1, None, 0, 0)),
    ],
)  # fmt: skip
def test_small_pools_and_extreme_limits(
    tmp_path: Path, texts: list[str | None], limits: dict[str, Any], told: tuple[Any, ...]
) -> None:
    """Guards against pools of nulls or of one caption, and limits at their ends, that fail or keep at random."""
    store, shard, keys = Store(str(tmp_path)), Shard("0000", len(texts)), keys_of(["u"] * len(texts), texts)
    rows = pa.table([keys, ["u"] * len(texts), pa.array(texts, pa.string()), ["en"] * len(texts)], SAMPLES.schema)
    store.write(SAMPLES, shard, rows)
    store.write(IMAGES, shard, pa.table([keys, ["ok"] * len(texts)], schema=IMAGES.schema), SAMPLES)
    (tmp_path / "entries.txt").write_text("dog\nsky\ndog dog\n")
    settings = BalanceSettings(entries=str(tmp_path / "entries.txt"), **limits)
    step = balance_of(settings, store, TABLES, [shard])
    go(step, store, [shard])
    facts = step.facts(store)
    assert facts is not None
    assert (facts["t"], facts["p"], facts["matches"], facts["captions_kept"]) == pytest.approx(told)
    assert go(step, store, [shard]) == {}


def test_wrong_settings_are_refused_in_the_plan(tmp_path: Path) -> None:
    """Guards against a balance that fails after a pool was fetched and scored."""
    store = Store(str(tmp_path))
    good = tmp_path / "entries.txt"
    good.write_text("dog\n")
    for update, words in (
        ({"entries": "/nowhere"}, "cannot be read"), ({"column": "nope"}, "no column of text"),
        ({"where": "nope = 1"}, "balance.where"),
    ):  # fmt: skip
        with pytest.raises(PlanError, match=words):
            balance_of(BalanceSettings(entries=str(good), t=2).model_copy(update=update), store, TABLES, [])
    for number, (text, words) in enumerate((
        ('{"a": 1}', "no list of texts"), ("[]", "no list of texts"), ("[1]", "no list of texts"),
        ('["\\ud800"]', "not UTF-8"), ("[" * 100_000, "not UTF-8"), ('["dog", ""]', "version 2 cannot place"),
    )):  # fmt: skip
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        with pytest.raises(PlanError, match=words):
            balance_of(BalanceSettings(entries=str(path), t=2, version=2), store, TABLES, [])
    with pytest.raises(PlanError, match="nothing is matched"):
        balance_step(BalanceSettings(entries=str(good), t=2), store, TABLES, [])
    with pytest.raises(PlanError, match="coarse <= fine"):
        experts_step(ExpertsSettings(by="toy", fine=2, coarse=3), store, VECTOR_TABLES, [])
