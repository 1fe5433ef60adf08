"""New shards are compared with all, old pairs are not compared again, and the table is that of a run from scratch."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curate.config import DedupSettings, ReferenceSettings
from curate.dedup import known, near_hashes, near_vectors
from curate.dedup.known import FOLDER
from curate.errors import StoreError
from tests.dedup.pool import VectorPool, Vectors, in_small_cells, planted, shuffled

VECTORS = DedupSettings(by="embedding_toy", threshold=0.9, keep="key")
HASHES = DedupSettings(by="image_phash", radius=3, keep="key")
NEAREST = DedupSettings(by="embedding_toy", form="dinov2", neighbours=3, keep="key")
EQUAL = DedupSettings(by="image_phash", keep="width DESC, key")


def _hashes(vectors: Vectors, seed: int = 3) -> list[str]:
    """Random ones, of which a third are a few bits off or equal to others."""
    draw = np.random.default_rng(seed)
    values = [int(value) for value in draw.integers(0, 1 << 63, len(vectors), dtype=np.uint64)]
    for row in draw.permutation(len(values))[: len(values) // 3]:
        values[row] = values[draw.integers(len(values))]
        for bit in draw.integers(0, 64, draw.integers(0, 4)):
            values[row] ^= 1 << int(bit)
    return [f"{value:016x}" for value in values]


def _files(pool: VectorPool, folder: str) -> dict[str, bytes]:
    """Every Parquet file of a table."""
    root = Path(pool.store.full(folder))
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.parquet"))}


@pytest.mark.parametrize("rule", [VECTORS, NEAREST, HASHES], ids=["vectors", "nearest", "hashes"])
def test_only_pairs_with_a_new_row_are_compared(tmp_path: Path, rule: DedupSettings) -> None:
    """Guards against a refresh that costs as much as the first run."""
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((150, 16)).astype(np.float32)
    hashes = [f"{value:016x}" for value in draw.integers(0, 1 << 63, 150, dtype=np.uint64)]
    told = []
    for rows in (90, 90, 120, 150):
        pool = VectorPool(tmp_path, vectors[:rows], 30, hashes=hashes[:rows])
        other = rule if rows < 150 else rule.model_copy(update={"keep": "width, key"})
        _, counts = pool.run(other, map_items=shuffled)
        told.append(counts[f"{rule.by}: pairs compared"])
    # from scratch; with nothing new, and a table made again; 30 new rows; 30 more, and another order of keeping
    assert told == [90 * 89 // 2, 0, 30 * 29 // 2 + 30 * 90, 30 * 29 // 2 + 30 * 120]


@pytest.mark.parametrize("cells", [False, True], ids=["one task", "cells and tables"])
@pytest.mark.parametrize("rule", [VECTORS, NEAREST, HASHES], ids=["vectors", "nearest", "hashes"])
def test_the_table_is_the_same_whatever_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: DedupSettings, cells: bool
) -> None:
    """Guards against groups that depend on when a shard came; the cells last while the pool does not double."""
    if cells:
        in_small_cells(monkeypatch)
        monkeypatch.setattr(near_hashes, "ROWS_PER_TASK", 100)
        monkeypatch.setattr(near_hashes, "SHARDS_PER_CHUNK", 2)
    vectors = planted(480)
    hashes = _hashes(vectors)
    compared = []
    for rows in (360, 480):
        grown = VectorPool(tmp_path / "grown", vectors[:rows], 120, hashes=hashes[:rows])
        step, counts = grown.run(rule)
        compared.append(counts[f"{rule.by}: pairs compared"])
    scratch = VectorPool(tmp_path / "scratch", vectors, 120, hashes=hashes)
    again, counts = scratch.run(rule)
    folder = scratch.store.folder(again.tables[0])
    assert grown.store.folder(step.tables[0]) == folder
    assert _files(grown, folder) == _files(scratch, folder)
    assert sum(row["is_duplicate"] for row in scratch.rows(again)) > 100
    if cells or rule is not HASHES:  # few hashes are compared all with all where that is quicker than tables
        assert compared[1] < 0.6 * counts[f"{rule.by}: pairs compared"]
    assert _names(grown) == _names(scratch)  # nothing of older runs is kept


@pytest.mark.parametrize("by", ["embedding_toy", "image_phash"])
def test_only_new_rows_ask_the_references(tmp_path: Path, by: str) -> None:
    """Guards against all rows compared with a reference again, and answers that were given to another question."""
    vectors = planted(180).astype(np.float32)
    hashes = _hashes(vectors)
    np.save(tmp_path / "eval.npy", vectors[10::40])
    (tmp_path / "eval.txt").write_text("\n".join(hashes[10::40]))
    if by == "image_phash":
        set_ = ReferenceSettings(name="val", hashes=str(tmp_path / "eval.txt"), radius=2)
        near, closer = DedupSettings(by=by, against=[set_]), set_.model_copy(update={"radius": 1})
    else:
        set_ = ReferenceSettings(name="val", embeddings=str(tmp_path / "eval.npy"), threshold=0.8)
        near = DedupSettings(by=by, threshold=0.95, against=[set_])
        closer = set_.model_copy(update={"threshold": 0.9})
    alone = near.model_copy(update={"within": False})  # rows that were copies before now take part

    def told(root: str, rows: int, rule: DedupSettings) -> tuple[int, list[dict[str, Any]]]:
        pool = VectorPool(tmp_path / root, vectors[:rows], 60, hashes=hashes[:rows])
        step, counts = pool.run(rule, map_items=shuffled)
        return counts["reference:val: rows asked"], pool.rows(step)

    first = told("grown", 120, near)[0]
    last, table = told("grown", 180, near)
    every, scratch = told("scratch", 180, near)
    assert table == scratch and sum(row["duplicate_kind"] == "reference:val" for row in table) >= 4
    assert 0 < last < first < every <= first + last  # another row of a group may stay, and is asked
    assert every == told("grown", 180, near.model_copy(update={"against": [closer]}))[0]
    assert told("grown", 180, alone)[1] == told("alone", 180, alone)[1]


def _names(pool: VectorPool) -> list[str]:
    root = Path(pool.store.full(FOLDER))
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", [b"", b"not an archive", b"PK\x03\x04 cut"])
def test_what_is_known_is_damaged(tmp_path: Path, damage: bytes) -> None:
    """A traceback out of numpy for a file that a full disk cut, and no way on but another root."""
    rule = DedupSettings(by="embedding_toy", keep="key", threshold=0.9)
    pool = VectorPool(tmp_path / "pool", planted(60), 20)
    every = pool.shards
    pool.shards = every[:2]
    pool.run(rule)
    pool.shards = every
    folder = tmp_path / "pool" / FOLDER
    for file in folder.rglob("*.npz"):
        file.write_bytes(damage)
    with pytest.raises(StoreError, match=f"is damaged .*; remove the folder .*{FOLDER}"):
        pool.run(rule)
    shutil.rmtree(folder)
    scratch = VectorPool(tmp_path / "scratch", planted(60), 20)
    assert pool.rows(pool.run(rule)[0]) == scratch.rows(scratch.run(rule)[0])


def test_what_no_run_names_is_swept(tmp_path: Path) -> None:
    """Guards against knowledge of old settings that stays for ever, and against the loss of another recipe's."""
    vectors = planted(60)
    np.save(tmp_path / "eval.npy", vectors[10::40])
    set_ = ReferenceSettings(name="val", embeddings=str(tmp_path / "eval.npy"), threshold=0.8)
    old, other, mine = (
        VECTORS.model_copy(update={"threshold": threshold, "against": [set_]}) for threshold in (0.7, 0.8, 0.9)
    )
    pool = VectorPool(tmp_path / "pool", vectors, 30)
    folders = []
    for rule in (old, other):
        pool.run(rule)
        folders.append(set(pool.store.names(FOLDER)))
    root = Path(pool.store.full(FOLDER))
    for name in folders[0]:
        when = (root / name / "named.json").stat().st_mtime - known.KEPT_S - 60
        os.utime(root / name / "named.json", (when, when))
    pool.run(mine)  # names what all three ask of the references, again
    gone = folders[1] - set(pool.store.names(FOLDER))
    assert len(gone) == 1 and gone < folders[0] and len(folders[0]) == 3


@pytest.mark.parametrize("rule", [VECTORS, NEAREST, HASHES], ids=["vectors", "nearest", "hashes"])
def test_a_group_that_lost_a_row_may_fall_apart(tmp_path: Path, rule: DedupSettings) -> None:
    """Guards against old copies that hang together by a row which another rule has removed since, or a shard gone."""
    angles = np.radians([0, 20, 40, 60, 80, 180])  # each within 0.9 of the next only
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    chain = [0b0, 0b11, 0b1111, 0b111111, 0b11111111, 0xFFFF << 40]
    hashes = [f"{value:016x}" for value in chain]
    first = VectorPool(tmp_path / "grown", vectors, 2, hashes=hashes)
    step, _ = first.run(rule)
    assert len(first.gone(step)) == 4
    without = [shard for shard in first.shards if shard.name != "0001"]
    first.shards, first.keys = without, [*first.keys[:2], *first.keys[4:]]
    less, _ = first.run(rule)
    assert set(first.gone(less)) == {max(first.keys[:2])}  # rows 0 and 1 are near; 4 is alone now
    back = VectorPool(tmp_path / "grown", vectors, 2, hashes=hashes)
    assert back.rows(back.run(rule)[0]) == back.rows(step)


def test_rows_that_an_earlier_rule_removes_later_leave_their_group(tmp_path: Path) -> None:
    """Guards against a chain of copies over a row that a new shard's better copy has replaced."""
    angles = np.radians([0, 20, 40, 40, 180])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    hashes = [f"{value:016x}" for value in (1, 2, 3, 2, 4)]  # the fourth, new, has the second's hash
    rules = [EQUAL, VECTORS]
    keys = VectorPool(tmp_path / "keys", vectors, 3, hashes=hashes).keys
    order = "CASE key " + " ".join(
        f"WHEN '{key}' THEN {place}" for key, place in zip(keys, (2, 1, 3, 0, 4), strict=True)
    )
    rules[0] = EQUAL.model_copy(update={"keep": f"{order} END"})
    small = VectorPool(tmp_path / "grown", vectors[:3], 3, hashes=hashes[:3])
    assert len(small.gone(small.run(*rules)[0])) == 2
    grown = VectorPool(tmp_path / "grown", vectors, 3, hashes=hashes)
    scratch = VectorPool(tmp_path / "scratch", vectors, 3, hashes=hashes)
    found = grown.rows(grown.run(*rules)[0])
    assert found == scratch.rows(scratch.run(*rules)[0])
    assert [row["duplicate_kind"] for row in found][:2] == [None, "image_phash"]  # the first is alone now


@pytest.mark.parametrize("rule", [VECTORS, NEAREST], ids=["vectors", "nearest"])
def test_a_killed_refresh_outlives_what_it_knew(tmp_path: Path, rule: DedupSettings) -> None:
    """Guards against a run that goes on with a shard set back in, after a run without it has forgotten the first."""
    vectors = planted(120)
    VectorPool(tmp_path / "grown", vectors[:60], 30).run(rule)
    killed, scratch = VectorPool(tmp_path / "grown", vectors, 30), VectorPool(tmp_path / "scratch", vectors, 30)

    def mortal(function, items):  # type: ignore[no-untyped-def]
        for item in items:
            if "_merge" in function.func.__name__ or "_spread" in function.func.__name__:
                raise KeyboardInterrupt
            yield function(item)

    with pytest.raises(KeyboardInterrupt):
        killed.run(rule, map_items=mortal)
    less = VectorPool(tmp_path / "grown", vectors[:90], 30)
    less.run(rule)
    assert killed.rows(killed.run(rule)[0]) == scratch.rows(scratch.run(rule)[0])


def test_a_killed_refresh_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a run that, killed and begun again, starts from another earlier run or from half of one."""
    monkeypatch.setattr(near_vectors, "CHUNK_BYTES", 20_000)
    vectors = planted(400)
    scratch = VectorPool(tmp_path / "scratch", vectors, 100)
    expected = scratch.rows(scratch.run(VECTORS)[0])
    for limit in (2, 9):
        VectorPool(tmp_path / f"{limit}", vectors[:300], 100).run(VECTORS)
        pool = VectorPool(tmp_path / f"{limit}", vectors, 100)
        left = [limit]

        def mortal(function, items, left=left):  # type: ignore[no-untyped-def]
            for item in items:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                yield function(item)

        with pytest.raises(KeyboardInterrupt):
            pool.run(VECTORS, map_items=mortal)
        assert pool.rows(pool.run(VECTORS)[0]) == expected
