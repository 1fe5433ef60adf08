"""Emission over committed tables: the right samples, the same bytes whatever happens, visible only when whole."""

import hashlib
import json
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

from curate.emit.step import emit_step, latest_release
from curate.emit.verify import verify_release
from curate.errors import PlanError, ReleaseError
from curate.schema import Shard
from curate.store import Store
from curate.tar import BLOCK, header
from tests.emit.pool import TABLES, emitter, make_pool, recipe_with, run, selected, shuffled_map

SUBSETS = {"good": {"where": "score > 0.2"}, "best": {"keep_top": {"by": "score", "fraction": 0.3}}}


def _pool(tmp_path: Path) -> tuple[Store, list[Shard]]:
    store = Store(str(tmp_path))
    return store, make_pool(store)


def _sums(store: Store) -> dict[str, str]:
    folder = f"releases/{latest_release(store)}"
    paths = list(store.fs.find(store.full(folder)))
    return {path.split("/releases/")[1].split("/", 1)[1]: hashlib.sha256(store.fs.cat_file(path)).hexdigest()
            for path in paths}  # fmt: skip


def _rows(store: Store, shards: Sequence[Shard]) -> list[dict[str, Any]]:
    reads = [(spec, None) for spec in [*TABLES[1:], TABLES[0]]]  # samples last: its width is source_width
    return [row for shard in shards for row in store.read_joined(reads, shard.name).to_pylist()]


def _expected(store: Store, shards: Sequence[Shard], where: Callable[[dict[str, Any]], bool]) -> list[str]:
    return sorted(row["key"] for row in _rows(store, shards) if row["status"] == "ok" and where(row))


def test_captions_may_be_left_out(tmp_path: Path) -> None:
    """Guards against text that a trainer on pictures must read past, and against a card that promises it."""
    store, shards = _pool(tmp_path)
    run(emitter(store, shards, recipe_with(SUBSETS, captions=False, columns=[])), store, shards)
    folder = tmp_path / "releases" / str(latest_release(store))
    with tarfile.open(folder / "good" / "00000.tar") as archive:
        assert {name.partition(".")[2] for name in archive.getnames()} == {"jpg"}
    card = (folder / "README.md").read_text()
    assert "no `<key>.txt`" in card and "open_clip_train" not in card


def test_every_subset_equals_its_sql_and_every_member_its_source(tmp_path: Path) -> None:
    """Guards against a sample missing, doubled, in the wrong subset, or with another sample's picture or caption."""
    store, shards = _pool(tmp_path)
    step = emitter(store, shards, recipe_with(SUBSETS, samples_per_shard=50, features=["toy_image"]))
    assert not step.done(store, shards)
    counts = run(step, store, shards)
    assert step.done(store, shards)
    folder = tmp_path / "releases" / str(latest_release(store))
    manifest = pq.read_table(folder / "manifest.parquet").to_pylist()
    expected = _expected(store, shards, lambda row: row["score"] is not None and row["score"] > 0.2)
    assert sorted(row["key"] for row in manifest if row["subset"] == "good") == expected
    assert counts["good: samples"] == len(expected)
    images = {row["key"]: row for row in _rows(store, shards)}
    for row in manifest:
        source = images[row["key"]]
        with tarfile.open(folder / row["subset"] / row["tar"]) as archive:
            mine = [name for name in archive.getnames() if name.startswith(row["key"])]
            members = {name.partition(".")[2]: archive.extractfile(name) for name in mine}
            found = {suffix: handle.read() for suffix, handle in members.items() if handle}
        (stored,) = store.read_ranges(source["tar"], [source["offset"]], [source["length"]])
        assert found["jpg"] == stored
        assert row["member_sha256"] == hashlib.sha256(stored).hexdigest()
        assert found.get("txt", b"").decode() == (source["text"] or "")
        assert ("txt" in found) == (source["text"] is not None)
        record = json.loads(found["json"])
        assert record["score"] == pytest.approx(source["score"])
        assert record["source_width"] == source["source_width"] and record["width"] == 24
        assert record["boxes"] in ([], [[pytest.approx(0.1), pytest.approx(0.2), pytest.approx(0.3), None]])
        assert found["toy_image.npy"][:6] == b"\x93NUMPY"
    assert verify_release(str(tmp_path), folder.name).samples == len(manifest)
    assert sorted(path.name for path in (folder / "good").iterdir()) == [
        *(f"{tar:05d}.tar" for tar in range(-(-len(expected) // 50))), "__len__", "sizes.json",
    ]  # fmt: skip
    assert (folder / "good" / "__len__").read_text() == str(len(expected))
    assert sum(json.loads((folder / "good" / "sizes.json").read_text()).values()) == len(expected)


@pytest.mark.parametrize("group_samples", [1_000_000, 60])
def test_same_bytes_in_any_order_of_work_and_on_an_object_store(tmp_path: Path, group_samples: int) -> None:
    """Guards against bytes that depend on workers, on the driver, or on where the pool lies."""
    recipe = recipe_with(SUBSETS, samples_per_shard=20, group_samples=group_samples)
    fsspec.filesystem("memory").store.clear()
    sums = []
    for number, root in enumerate([str(tmp_path / "a"), str(tmp_path / "b"), "memory://emit"]):
        store = Store(root)
        shards = make_pool(store)
        counts = run(emitter(store, shards, recipe), store, shards, shuffled_map(number) if number else map)
        sums.append(_sums(store))
        if number == 2:
            assert counts["requests"] < counts["samples"] / 4  # neighbours are read together
        else:
            assert counts["requests"] == counts["samples"]
        assert verify_release(root, str(latest_release(store))).samples == counts["samples"]
        shuffles = [
            facts["shuffle"]
            for facts in store.get_json(f"releases/{latest_release(store)}/release.json")["subsets"].values()
        ]
        assert all(shuffle["exact"] == (group_samples > 1000) for shuffle in shuffles)
    assert sums[0] == sums[1] == sums[2]


class _Killed(BaseException):
    """What SIGKILL looks like from inside: nothing may catch it."""


@pytest.mark.parametrize("root", ["local", "memory"])
def test_killed_anywhere_then_run_again_gives_the_same_release(tmp_path: Path, root: str) -> None:
    """Guards against half releases and against bytes that depend on where a run was killed."""
    recipe = recipe_with(SUBSETS, samples_per_shard=20, group_samples=100)
    whole = Store(str(tmp_path / "whole"))
    shards = make_pool(whole)
    run(emitter(whole, shards, recipe), whole, shards)
    fsspec.filesystem("memory").store.clear()
    store = Store(str(tmp_path / "killed") if root == "local" else "memory://killed")
    make_pool(store)
    step = emitter(store, shards, recipe)
    draw = random.Random(5)
    kills = 0
    while not step.done(store, shards):
        left = [draw.randrange(1, 40)]
        written = Store.staged, Store.put_bytes

        def staged(self: Store, path: str, left: list[int] = left, written: Any = written) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise _Killed
            return written[0](self, path)

        def put_bytes(self: Store, path: str, data: bytes, left: list[int] = left, written: Any = written) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise _Killed
            written[1](self, path, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "staged", staged)
            patch.setattr(Store, "put_bytes", put_bytes)
            try:
                run(step, store, shards, shuffled_map(kills))
            except _Killed:
                kills += 1
        name = latest_release(store)
        if name is not None:
            verify_release(store.root, name)
        if store.is_local:
            assert all(verify_release(store.root, other) for other in store.names("releases") if other != "latest")
    assert kills >= 3
    assert _sums(store) == _sums(whole)
    assert not store.exists("_work/emit") or store.names("_work/emit") == []


def test_releases_are_kept_and_latest_moves(tmp_path: Path) -> None:
    """Guards against a release overwritten by the next, and work done twice for one that is there."""
    store, shards = _pool(tmp_path)
    first = emitter(store, shards, recipe_with(SUBSETS))
    run(first, store, shards)
    before = _sums(store)
    second = emitter(store, shards, recipe_with(SUBSETS, seed=1))
    run(second, store, shards)
    assert [name[:4] for name in store.names("releases")] == ["0001", "0002", "late"]
    assert not first.done(store, shards) and second.done(store, shards)

    def no_map(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        raise AssertionError("nothing is to be computed again")

    assert run(first, store, shards, no_map) == {}
    assert latest_release(store) is not None and str(latest_release(store)).startswith("0001")
    assert _sums(store) == before


def test_two_runs_at_once_publish_one_release(tmp_path: Path) -> None:
    """Guards against two drivers that mix their files or fall over each other's clearing up."""
    store, shards = _pool(tmp_path)
    recipe = recipe_with(SUBSETS, samples_per_shard=20)
    step = emitter(store, shards, recipe)
    other = emitter(store, shards, recipe)
    overtaken = []

    def map_items(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == 2 and not overtaken:
                overtaken.append(run(other, store, shards))
            yield function(item)

    run(step, store, shards, map_items)
    assert overtaken
    assert len(store.names("releases")) == 2
    assert verify_release(str(tmp_path), str(latest_release(store))).samples == overtaken[0]["samples"]


def test_reads_only_what_was_chosen(tmp_path: Path) -> None:
    """Guards against a scan of the pool for a subset of a few percent."""
    store, shards = _pool(tmp_path)
    counts = run(
        emitter(store, shards, recipe_with({"few": {"keep_top": {"by": "score", "fraction": 0.02}}})), store, shards
    )
    pool = sum(
        size
        for shard in shards
        for size in [store.fs.size(store.full(store.shard_path(TABLES[1], shard.name, ".tar")))]
    )
    assert counts["bytes_read"] < 0.02 * pool


def test_plan_refuses_unknown_columns(tmp_path: Path) -> None:
    """Guards against a misspelt column that is found when the tars are written."""
    store, shards = _pool(tmp_path)
    with pytest.raises(PlanError, match=r"emit\.columns: no column scor; did you mean score"):
        emitter(store, shards, recipe_with(SUBSETS, columns=["key", "scor"]))
    with pytest.raises(PlanError, match=r"emit\.features: no column score; there are toy_image"):
        emitter(store, shards, recipe_with(SUBSETS, features=["score"]))


def test_a_damaged_latest_is_written_anew(tmp_path: Path) -> None:
    """Guards against a traceback where running again mends it."""
    store, shards = _pool(tmp_path)
    step = emitter(store, shards, recipe_with({"all": {}}))
    run(step, store, shards)
    name = latest_release(store)
    store.put_bytes("releases/latest", b"\xff\xfe")
    assert not step.done(store, shards)
    run(step, store, shards)
    assert latest_release(store) == name


def test_what_is_named_twice_is_written_once(tmp_path: Path) -> None:
    """Guards against two members of one name in a sample, which trainers refuse."""
    store, shards = _pool(tmp_path)
    twice = {"columns": ["score", "score"], "features": ["toy_image", "toy_image"]}
    run(emitter(store, shards, recipe_with({"all": {}}, **twice)), store, shards)
    with tarfile.open(tmp_path / "releases" / str(latest_release(store)) / "all" / "00000.tar") as archive:
        names = archive.getnames()
    assert len(set(names)) == len(names)


def test_release_holds_no_secret_and_no_place(tmp_path: Path) -> None:
    """Guards against credentials that are published with a dataset."""
    store, shards = _pool(tmp_path)
    recipe = recipe_with(SUBSETS)
    ingest = recipe.ingest.model_copy(update={"sources": ["https://me:pw1@host/x.parquet?X-Sig=pw2"]})
    scores = {"vlm": {"scorer": "vlm", "api_token": "pw3"}}
    recipe = recipe.model_copy(update={"ingest": ingest, "score": scores, "root": "/secret/place"})
    run(emitter(store, shards, recipe), store, shards)
    text = store.get_bytes(f"releases/{latest_release(store)}/release.json").decode()
    assert "https://host/x.parquet?***" in text
    assert not any(word in text for word in ("pw1", "pw2", "pw3", "/secret/place", str(tmp_path)))


@pytest.mark.parametrize("damage", [
    "byte", "cut", "extra", "missing", "sizes", "manifest", "note", "name", "length", "folder", "recipe", "list",
])  # fmt: skip
def test_verify_finds_damage(tmp_path: Path, damage: str) -> None:
    """Guards against a verification that would pass anything, and one that damage ends with a traceback."""
    store, shards = _pool(tmp_path)
    run(emitter(store, shards, recipe_with(SUBSETS, samples_per_shard=100)), store, shards)
    name = str(latest_release(store))
    folder = tmp_path / "releases" / name
    tar = folder / "good" / "00001.tar"
    words = "00001.tar"
    if damage == "byte":
        data = bytearray(tar.read_bytes())
        data[600] ^= 1
        tar.write_bytes(bytes(data))
        words = "is not the"
    elif damage == "cut":
        tar.write_bytes(tar.read_bytes()[:5000])
    elif damage == "extra":
        (folder / "good" / "00009.tar").write_bytes(b"")
        words = "00009.tar: not part"
    elif damage == "missing":
        tar.unlink()
        words = "00001.tar: missing"
    elif damage == "sizes":
        (folder / "best" / "sizes.json").write_text("{}")
        words = "sizes.json"
    elif damage == "manifest":
        table = pq.read_table(folder / "manifest.parquet")
        pq.write_table(table.slice(1), folder / "manifest.parquet")
        words = "manifest.parquet: sha256"
    elif damage == "name":
        with tarfile.open(tar) as archive:
            size = archive.getmembers()[0].size
        tar.write_bytes(header("../no key.jpg", size) + tar.read_bytes()[BLOCK:])
        words = "no key.jpg is not the"
    elif damage == "length":
        (folder / "best" / "__len__").write_bytes(b"\xff")
        words = "__len__"
    elif damage == "folder":
        tar.unlink()
        tar.mkdir()
    elif damage == "recipe":
        note = (folder / "release.json").read_text()
        (folder / "release.json").write_text(note.replace("score > 0.2", "score > 0.9"))
        words = "its seal does not fit"
    elif damage == "list":
        (folder / "release.json").write_text("[]")
        words = "its seal does not fit"
    else:
        (folder / "release.json").unlink()
        words = "never finished"
    with pytest.raises(ReleaseError, match=words):
        verify_release(str(tmp_path), name)


def test_a_release_counts_every_clause_on_its_own_and_names_its_models(tmp_path: Path) -> None:
    """Guards against counts by first refusal alone, which hide what a later clause refuses, and unnamed licences."""
    store, shards = _pool(tmp_path)
    recipe = recipe_with({"good": {"where": "score > 0.2 AND word_count >= 3"}})
    weights = [{"table": "scores_toy", "name": "toy", "sha256": "ab" * 32, "licence": "MIT", "source": "x"}]
    members, thresholds = selected(store, shards, recipe)
    step = emit_step(recipe.emit, recipe, TABLES, members, shards, thresholds, {}, weights)
    run(step, store, shards)
    folder = f"releases/{latest_release(store)}"
    release = store.get_json(f"{folder}/release.json")
    rows = [row for row in _rows(store, shards) if row["status"] == "ok"]
    scores = [row["score"] for row in rows]
    assert release["subsets"]["good"]["clauses"] == [
        {"clause": "score > 0.2", "true": sum(s is not None and s > 0.2 for s in scores),
         "false": sum(s is not None and s <= 0.2 for s in scores), "unknown": scores.count(None)},
        {"clause": "word_count >= 3", "true": sum(row["word_count"] >= 3 for row in rows),
         "false": sum(row["word_count"] < 3 for row in rows), "unknown": 0},
    ]  # fmt: skip
    assert release["weights"] == weights
    text = store.get_bytes(f"{folder}/README.md").decode()
    assert "| scores_toy | toy | MIT |" in text and "unknown 0" in text
    known = [row["score"] for row in pq.read_table(tmp_path / folder / "manifest.parquet").to_pylist()]
    noted = release["subsets"]["good"]["scores"]
    mean = pytest.approx(sum(known) / len(known))
    assert noted["score"] == {"least": min(known), "mean": mean, "most": max(known), "unknown": 0}
    assert set(noted) == {"score", "word_count"}
    assert f"| score | {min(known):.6g} | {sum(known) / len(known):.6g} | {max(known):.6g} | 0 |" in text
