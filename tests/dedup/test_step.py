"""Exact dedup across shards: one of each group, the right one, whatever the order of work."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curate import across
from curate.config import DedupSettings
from curate.dedup import near_hashes
from curate.dedup.step import dedup_step
from curate.errors import PlanError
from curate.metrics import progress
from curate.schema import KEY, SAMPLE_FIELDS, Shard, TableSpec, inputs_of, keys_of
from curate.store import Store
from tests.dedup.pool import VectorPool

SAMPLES = TableSpec("samples", 1, pa.schema(SAMPLE_FIELDS), open_schema=True)
_FACTS = [("status", pa.string()), ("sha256", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
IMAGES = TableSpec("images", 1, pa.schema([KEY, *(pa.field(*f) for f in _FACTS)]), inputs=inputs_of([SAMPLES]))
HASHES = TableSpec(
    "scores_phash", 1, pa.schema([KEY, pa.field("image_phash", pa.string())]), inputs=inputs_of([IMAGES])
)
TABLES = [SAMPLES, IMAGES, HASHES]
RULES = [
    DedupSettings(by="sha256"),
    DedupSettings(by="image_phash", keep="width * height DESC, key"),
]


def _pool(store: Store, shards: int = 5, rows: int = 80) -> tuple[list[Shard], list[dict[str, Any]]]:
    """Rows with planted equal bytes and equal hashes within and across shards; failures among them."""
    draw = random.Random(3)
    pool, facts = [], []
    for number in range(shards):
        urls, texts = [f"{number}-{row}" for row in range(rows)], [f"t{draw.randrange(3)}" for _ in range(rows)]
        keys = keys_of(urls, texts)
        shard = Shard(f"{number:04d}", rows)
        part = []
        for key, text in zip(keys, texts, strict=True):
            ok = draw.random() > 0.1
            content = draw.randrange(150)
            part.append({
                "key": key, "text": text, "status": "ok" if ok else "timeout", "sha256": f"s{content}" if ok else None,
                "width": draw.randrange(1, 9) if ok else None, "height": 1 if ok else None,
                "image_phash": f"p{content // 2}" if ok and draw.random() > 0.05 else None,
            })  # fmt: skip
        store.write(SAMPLES, shard, pa.table([keys, urls, texts], schema=pa.schema(SAMPLE_FIELDS)))
        for spec in (IMAGES, HASHES):
            picked = [{name: fact[name] for name in spec.schema.names} for fact in part]
            store.write(spec, shard, pa.Table.from_pylist(picked, schema=spec.schema), SAMPLES)
        pool.append(shard)
        facts += part
    return pool, facts


def _brute_force(facts: list[dict[str, Any]], rules: list[tuple[str, ...]]) -> dict[str, str]:
    """key -> key kept instead, rule by rule over the survivors."""
    gone: dict[str, str] = {}
    for names in rules:
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for fact in facts:
            if fact["status"] == "ok" and fact["key"] not in gone and fact[names[0]] is not None:
                groups.setdefault(tuple(fact[name] for name in names), []).append(fact)
        for group in groups.values():
            first, *others = sorted(group, key=lambda fact: (-fact["width"] * fact["height"], fact["key"]))
            gone |= {fact["key"]: first["key"] for fact in others}
    return gone


def _shuffled_map(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    order = list(items)
    random.Random(len(order)).shuffle(order)
    return map(function, order)


def _found(store: Store, shards: list[Shard], spec: TableSpec) -> dict[str, str]:
    rows = [row for shard in shards for row in store.read(spec, shard.name).to_pylist()]
    assert all(row["is_duplicate"] == (row["duplicate_of"] is not None) for row in rows)
    return {row["key"]: row["duplicate_of"] for row in rows if row["is_duplicate"]}


@pytest.mark.parametrize("partitions", [1, 7])
@pytest.mark.parametrize("shuffled", [False, True])
def test_equals_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partitions: int, shuffled: bool) -> None:
    """Guards against groups that are split by shard, by partition or by the order in which workers finish."""
    store = Store(str(tmp_path))
    shards, facts = _pool(store)
    monkeypatch.setattr(across, "ROWS_PER_PARTITION", -(-len(facts) // partitions))
    monkeypatch.setattr(across, "CHUNKS", 3)
    step = dedup_step(RULES, TABLES, shards)
    with progress("dedup", len(shards)) as ticker:
        counts = step.run(store, shards, _shuffled_map if shuffled else map, ticker)
    expected = _brute_force(facts, [("sha256",), ("image_phash",)])
    assert _found(store, shards, step.tables[0]) == expected
    assert sum(counts.values()) == len(expected) > 100  # pairs are counted by searches, and there is none
    assert step.done(store, shards)
    assert store.names("_work/duplicates") == []


def test_pair_rule_compares_text_too(tmp_path: Path) -> None:
    """Guards against COYO's pair rule that drops one image under two captions."""
    store = Store(str(tmp_path))
    shards, facts = _pool(store)
    step = dedup_step([DedupSettings(by="image_phash_text")], TABLES, shards)
    with progress("dedup", len(shards)) as ticker:
        step.run(store, shards, map, ticker)
    assert _found(store, shards, step.tables[0]) == _brute_force(facts, [("image_phash", "text")])


@pytest.mark.parametrize("rows_per_task", [50, 1_000_000])
def test_near_hashes_join_components_across_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_task: int
) -> None:
    """Guards against near copies that are missed because they fell on different shards, tables or partitions."""
    store = Store(str(tmp_path))
    draw = random.Random(5)
    seeds = [draw.getrandbits(64) for _ in range(60)]
    hashes = []
    for seed in seeds:
        chain = seed
        for _ in range(draw.randrange(1, 9)):
            hashes.append(chain)
            for bit in draw.sample(range(64), draw.randrange(4)):
                chain ^= 1 << bit
    draw.shuffle(hashes)
    shards, facts, at = [], [], 0
    for number in range(4):
        part = hashes[at : at + 70]
        at += 70
        urls = [f"{number}-{row}" for row in range(len(part))]
        keys = keys_of(urls, urls)
        shard = Shard(f"{number:04d}", len(part))
        images = [
            {"key": key, "status": "ok", "sha256": key, "width": draw.randrange(1, 5), "height": 1} for key in keys
        ]
        store.write(SAMPLES, shard, pa.table([keys, urls, urls], schema=pa.schema(SAMPLE_FIELDS)))
        store.write(IMAGES, shard, pa.Table.from_pylist(images, schema=IMAGES.schema), SAMPLES)
        store.write(HASHES, shard, pa.table([keys, [f"{value:016x}" for value in part]], schema=HASHES.schema), SAMPLES)
        shards.append(shard)
        facts += [{**image, "hash": value} for image, value in zip(images, part, strict=True)]
    monkeypatch.setattr(near_hashes, "ROWS_PER_TASK", rows_per_task)
    monkeypatch.setattr(near_hashes, "SHARDS_PER_CHUNK", 2)
    step = dedup_step([DedupSettings(by="image_phash", radius=3)], TABLES, shards)
    with progress("dedup", len(shards)) as ticker:
        step.run(store, shards, _shuffled_map, ticker)
    found = _found(store, shards, step.tables[0])
    assert found == _components(facts, 3)
    rows = [row for shard in shards for row in store.read(step.tables[0], shard.name).to_pylist()]
    own = {fact["key"]: fact["hash"] for fact in facts}
    for row in rows:
        if row["is_duplicate"]:
            apart = (own[row["key"]] ^ own[row["duplicate_of"]]).bit_count()
            assert row["duplicate_similarity"] == 1 - apart / 64
        stays = row["duplicate_of"] or (row["key"] if row["key"] in found.values() else None)
        assert row["duplicate_group"] == stays


def _components(facts: list[dict[str, Any]], radius: int) -> dict[str, str]:
    """key -> key kept, by comparing all with all."""
    group = list(range(len(facts)))
    for i, one in enumerate(facts):
        for j in range(i):
            if (one["hash"] ^ facts[j]["hash"]).bit_count() <= radius and group[i] != group[j]:
                low, high = sorted((group[i], group[j]))
                group = [low if name == high else name for name in group]
    gone = {}
    for name in set(group):
        members = [fact for fact, own in zip(facts, group, strict=True) if own == name]
        first, *others = sorted(members, key=lambda fact: (-fact["width"] * fact["height"], fact["key"]))
        gone |= {fact["key"]: first["key"] for fact in others}
    return gone


def test_killed_anywhere_and_run_again_gives_the_same(tmp_path: Path) -> None:
    """Guards against intermediate files that a kill leaves half, or that a second run counts twice."""
    whole = Store(str(tmp_path / "whole"))
    shards, _ = _pool(whole)
    step = dedup_step(RULES, TABLES, shards)
    with progress("dedup", 5) as ticker:
        step.run(whole, shards, map, ticker)
    expected = _found(whole, shards, step.tables[0])
    for limit in range(1, 30, 3):
        store = Store(str(tmp_path / f"killed{limit}"))
        _pool(store)
        budget = [limit]

        def mortal(function: Callable[[Any], Any], items: Sequence[Any], left: list[int] = budget) -> Iterator[Any]:
            for item in items:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                yield function(item)

        with progress("dedup", 5) as ticker:
            try:
                step.run(store, shards, mortal, ticker)
            except KeyboardInterrupt:
                step.run(store, shards, map, ticker)
        assert _found(store, shards, step.tables[0]) == expected


def test_unknown_rules_and_columns_fail_in_the_plan() -> None:
    """Guards against a typo that is found after the fetch."""
    for rule in (
        DedupSettings(by="md5"),
        DedupSettings(by="sha256", radius=2),
        DedupSettings(by="sha256", keep="widht DESC"),
    ):
        with pytest.raises(PlanError):
            dedup_step([rule], TABLES, [])
    with pytest.raises(PlanError, match="phash"):
        dedup_step([DedupSettings(by="image_phash")], [SAMPLES, IMAGES], [])


def test_a_pool_without_rows_and_a_hash_that_is_none(tmp_path: Path) -> None:
    """Guards against a search planned for nothing, and an adopted column of another hash that fails without a name."""
    rule = DedupSettings(by="image_phash", radius=3, keep="key")
    empty = VectorPool(tmp_path / "empty", np.empty((0, 4), np.float32), 3)
    assert not any(empty.run(rule)[1].values())
    other = VectorPool(tmp_path / "other", np.ones((3, 4), np.float32), 3, hashes=["0" * 16, "p:12", "0" * 16])
    with pytest.raises(PlanError, match="'p:12' is no pHash"):
        other.run(rule)
    exact, _ = other.run(DedupSettings(by="image_phash", keep="key"))
    assert len(other.gone(exact)) == 1
