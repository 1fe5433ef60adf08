"""What was shipped stays shipped, and a second run finds nothing to do."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curate.config import DedupSettings
from curate.dedup.step import DedupStep, dedup_step
from curate.errors import StoreError
from curate.schema import KEY, TableSpec, inputs_of
from curate.store import Store
from tests.dedup.pool import SAMPLES, VectorPool

RULE = DedupSettings(by="embedding_toy", threshold=0.9, keep="key")
MEMBER = [KEY, pa.field("member", pa.bool_()), pa.field("reason", pa.string())]


def _release(pool: VectorPool, step: DedupStep, number: int) -> None:
    """As select and emit leave it: members are what is no duplicate."""
    spec = TableSpec("member_all", 1, pa.schema(MEMBER), inputs=inputs_of(step.tables))
    for shard in pool.shards:
        rows = pool.store.read(step.tables[0], shard.name).to_pylist()
        table = [{"key": row["key"], "member": not row["is_duplicate"], "reason": None} for row in rows]
        pool.store.write(spec, shard, pa.Table.from_pylist(table, schema=spec.schema), SAMPLES)
    name = f"{number:04d}-{spec.fingerprint[:8]}"
    tables = {
        one.name: {"fingerprint": one.fingerprint, "settings": dict(one.settings)}
        for one in (SAMPLES, *step.tables, spec)
    }
    pool.store.put_json(f"releases/{name}/release.json", {"tables": tables})
    pool.store.put_bytes("releases/latest", f"{name}\n".encode())


def _pools(root: Path) -> tuple[VectorPool, VectorPool]:
    """The same store with one shard, then with three that hold copies of the first's rows."""
    vectors = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    grown = np.concatenate([vectors, vectors[::-1], vectors])
    return VectorPool(root, vectors, 40), VectorPool(root, grown, 40)


def test_a_refresh_does_not_flip_what_was_shipped(tmp_path: Path) -> None:
    """Guards against a newer copy with a lower key that replaces an image which trainers already have."""
    small, grown = _pools(tmp_path)
    first, counts = small.run(RULE, store=small.store)
    assert not counts.get("duplicate by embedding_toy")
    _release(small, first, 1)
    plain = dedup_step([RULE], grown.tables, grown.shards)
    preferring, _ = grown.run(RULE, store=grown.store)
    assert preferring.tables[0].fingerprint != plain.tables[0].fingerprint
    kept = [key for key, row in zip(grown.keys, grown.rows(preferring), strict=True) if not row["is_duplicate"]]
    assert kept == grown.keys[:40]  # without, the lowest key of three stays, wherever it stands
    flipped, _ = grown.run(RULE.model_copy(update={"prefer_released": False}), store=grown.store)
    assert set(grown.gone(flipped)) & set(grown.keys[:40])


def test_a_second_run_finds_its_table(tmp_path: Path) -> None:
    """Guards against a release that changes the identity of the very table that it was made from."""
    small, grown = _pools(tmp_path)
    store = Store(str(tmp_path))

    def table(pool: VectorPool, rule: DedupSettings = RULE) -> str:
        return dedup_step([rule], pool.tables, pool.shards, store).tables[0].fingerprint

    first, _ = small.run(RULE, store=store)
    _release(small, first, 1)
    assert table(small) == first.tables[0].fingerprint
    second, _ = grown.run(RULE, store=store)
    assert second.tables[0].settings["released"].startswith("0001-")
    _release(grown, second, 2)
    assert table(grown) == second.tables[0].fingerprint
    _release(grown, second, 3)  # another selection from the same table
    assert table(grown) == second.tables[0].fingerprint
    other = RULE.model_copy(update={"threshold": 0.95})
    third, _ = grown.run(other, store=store)
    assert third.tables[0].settings["released"].startswith("0003-")
    _release(grown, third, 4)
    assert table(grown) == second.tables[0].fingerprint  # two recipes on one root do not chase each other
    assert table(grown, other) == third.tables[0].fingerprint


def test_member_tables_that_are_gone_are_named(tmp_path: Path) -> None:
    """Guards against a refresh that silently forgets what was shipped."""
    small, grown = _pools(tmp_path)
    first, _ = small.run(RULE, store=small.store)
    _release(small, first, 1)
    small.store.remove_tree("member_all")
    with pytest.raises(StoreError, match="prefer_released"):
        grown.run(RULE, store=grown.store)


def test_a_release_of_other_shards_prefers_nothing(tmp_path: Path) -> None:
    """Guards against a pool cut anew, whose rows 40 and more of a shard no member table of the old cut has: a crash,
    or rows preferred for what stood at their place.
    """
    small, grown = _pools(tmp_path)
    first, _ = small.run(RULE, store=small.store)
    _release(small, first, 1)
    (name,) = (name for name in small.store.names("releases") if name != "latest")
    note = small.store.get_json(f"releases/{name}/release.json")
    note["tables"]["samples"]["fingerprint"] = "of another cut"
    small.store.put_json(f"releases/{name}/release.json", note)
    preferring, _ = grown.run(RULE, store=grown.store)
    flipped, _ = grown.run(RULE.model_copy(update={"prefer_released": False}), store=grown.store)
    assert grown.gone(preferring) == grown.gone(flipped)
