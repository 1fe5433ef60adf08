"""Take-back: what was removed is in no file, does not return, and everything else keeps its bytes."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

from curate.emit.step import latest_release
from curate.emit.takeback import Lists, TakenBack, lines_of, take_back
from curate.emit.verify import verify_release
from curate.errors import PlanError, ReleaseError
from curate.removed import tombstones_of
from curate.retry import Opened, reopen
from curate.schema import Shard
from curate.stage import run_shard
from curate.store import Store
from tests.emit.pool import IMAGES, SAMPLES, SCORES, emitter, make_pool, recipe_with, run, selected
from tests.engine.toy import ToyFetch, fill_pool

SUBSETS = {"good": {"where": "score > 0.2"}, "all": {}}


@dataclass
class Victim:
    """A sample that is to go."""

    key: str
    url: str
    text: str
    image: bytes


def _released(root: str, **emit: Any) -> tuple[Store, list[Shard]]:
    store = Store(root)
    shards = make_pool(store, shards=3)
    run(emitter(store, shards, recipe_with(SUBSETS, samples_per_shard=20, **emit)), store, shards)
    return store, shards


def _victims(store: Store, shards: Sequence[Shard], count: int) -> list[Victim]:
    found = []
    for shard in shards:
        rows = store.read_joined([(IMAGES, None), (SAMPLES, ["url", "text"]), (SCORES, ["score"])], shard.name)
        kept = [row for row in rows.to_pylist() if row["status"] == "ok" and row["text"] and (row["score"] or 0) > 0.2]
        for row in kept[:count]:
            (image,) = store.read_ranges(row["tar"], [row["offset"]], [row["length"]])
            found.append(Victim(row["key"], row["url"], row["text"], image))
    return found[:count]


def _files(store: Store) -> dict[str, bytes]:
    found = store.fs.find(store.full(""))
    return {path[len(store.full("")) :]: store.fs.cat_file(path) for path in found}


def _traces(store: Store, victims: Sequence[Victim]) -> list[str]:
    """Files that still hold a picture, a caption or a URL; Parquet is read, since it is compressed."""
    found = []
    for path, data in _files(store).items():
        held = data
        words = [word for one in victims for word in (one.url.encode(), one.text.encode())]
        if path.endswith(".parquet"):
            with store.open(path.lstrip("/")) as handle:
                held = repr(pq.read_table(handle).to_pylist()).encode()
        pixels = [one.image[-100:-20] for one in victims]  # its start is every picture's
        if any(word in held for word in [*words, *pixels]):
            found.append(path)
    return found


def _tars(store: Store, name: str) -> dict[str, str]:
    folder = f"releases/{name}"
    return {
        path.split(f"{folder}/")[1]: hashlib.sha256(data).hexdigest()
        for path, data in _files(store).items()
        if folder in path and path.endswith(".tar")
    }


@pytest.mark.parametrize("kind", ["keys", "urls"])
@pytest.mark.parametrize("place", ["local", "memory"])
def test_removed_samples_are_in_no_file_and_other_tars_keep_their_bytes(tmp_path: Path, kind: str, place: str) -> None:
    """Guards against a picture, caption or URL that stays in a tar, a table or an older release."""
    fsspec.filesystem("memory").store.clear()
    store, shards = _released(str(tmp_path / "run") if place == "local" else f"memory://take-{kind}")
    first = str(latest_release(store))
    run(emitter(store, shards, recipe_with({"other": {"where": "word_count > 2"}})), store, shards)
    run(emitter(store, shards, recipe_with(SUBSETS, samples_per_shard=20)), store, shards)  # latest is the first again
    victims = _victims(store, shards, 2)
    assert len(_traces(store, victims)) >= 3
    before = _tars(store, first)
    names = [one.key if kind == "keys" else one.url for one in victims]
    report = take_back(store, Lists(keys=names) if kind == "keys" else Lists(urls=names))
    assert report.samples == 2
    assert _traces(store, victims) == []
    new = str(latest_release(store))
    assert new not in (first, None) and first in report.withdrawn
    note = store.get_json(f"releases/{new}/release.json")
    assert note["predecessor"] == first
    assert verify_release(store.root, new).samples == note["manifest"]["rows"]
    after = _tars(store, new)
    same = [name for name in before if after.get(name) == before[name]]
    assert len(before) == len(after) and len(before) - 4 <= len(same) < len(before)
    with pytest.raises(ReleaseError, match=f"withdrawn: samples were taken back; use releases/{new}"):
        verify_release(store.root, first)
    files = _files(store)
    assert take_back(store, Lists()).samples == 0
    assert _files(store) == files


def test_a_run_after_it_finds_its_release_and_a_new_one_is_without_them(tmp_path: Path) -> None:
    """Guards against `latest` that moves back to the withdrawn release, and a new selection that brings them back."""
    store, shards = _released(str(tmp_path))
    (victim,) = _victims(store, shards, 1)
    take_back(store, Lists(keys=[victim.key]))
    new = latest_release(store)
    step = emitter(store, shards, recipe_with(SUBSETS, samples_per_shard=20))
    assert step.done(store, shards)
    run(step, store, shards)
    assert latest_release(store) == new
    other = recipe_with({"fresh": {"where": "word_count >= 0 OR score IS NULL"}})
    run(emitter(store, shards, other), store, shards)
    manifest = pq.read_table(tmp_path / "releases" / str(latest_release(store)) / "manifest.parquet")
    assert victim.key not in manifest.column("key").to_pylist()


def test_a_lost_pointer_to_the_latest_release_still_gives_a_successor(tmp_path: Path) -> None:
    """Guards against a removal that withdraws the only release and leaves nothing to train on."""
    store, shards = _released(str(tmp_path))
    (victim,) = _victims(store, shards, 1)
    store.put_bytes("releases/latest", b"nonsense\n")
    report = take_back(store, Lists(keys=[victim.key]))
    assert report.latest == latest_release(store) and report.latest not in report.withdrawn
    assert verify_release(str(tmp_path), str(report.latest)).samples


def test_selection_refuses_what_tombstones_name_even_where_tables_still_hold_it(tmp_path: Path) -> None:
    """Guards against a refresh that brings a removed URL, hash or domain back before anyone sweeps again."""
    store, shards = _released(str(tmp_path / "a"))
    (victim,) = _victims(store, shards, 1)
    take_back(store, Lists(urls=[victim.url], hashes=[f"{7:064x}"], domains=["HOST-2.example."]))
    refreshed = Store(str(tmp_path / "b"))
    make_pool(refreshed, shards=3)
    for batch in store.names("_removed"):
        path = f"_removed/{batch}/tombstones.json"
        refreshed.put_bytes(path, store.get_bytes(path))
    assert tombstones_of(refreshed).domains == {"host-2.example"}
    members, _ = selected(
        refreshed, shards, recipe_with({"all": {}, "top": {"keep_top": {"by": "score", "fraction": 1}}})
    )
    for name, spec in members.items():
        for number, shard in enumerate(shards):
            rows = refreshed.read_joined([(spec, ["member", "reason"]), (SAMPLES, ["url"])], shard.name).to_pylist()
            for row, fact in enumerate(rows):
                if number == 2 or row == 7 or fact["url"] == victim.url:
                    assert not fact["member"], (name, number, row)
                    assert fact["reason"] in ("status: removed", "status: timeout") or fact["reason"].startswith(
                        "status"
                    )
    assert take_back(refreshed, Lists()).samples > 50


class _Killed(BaseException):
    """What SIGKILL looks like from inside."""


@pytest.mark.parametrize("place", ["local", "memory"])
def test_killed_at_any_write_then_run_again_completes(tmp_path: Path, place: str) -> None:
    """Guards against a removal that a kill leaves half done, or that finds nothing the second time."""
    fsspec.filesystem("memory").store.clear()
    whole, shards = _released(str(tmp_path / "whole"))
    victims = _victims(whole, shards, 3)
    lists = Lists(urls=[one.url for one in victims])
    take_back(whole, lists)
    expected = _tars(whole, str(latest_release(whole)))
    for kill in random.Random(2).sample(range(40), 5):
        store, _ = _released(str(tmp_path / f"k{kill}") if place == "local" else f"memory://k{kill}")
        left = [kill]
        staged, put_bytes, remove = Store.staged, Store.put_bytes, Store.remove

        def counted(call: Any, left: list[int] = left) -> Any:
            def wrapped(*args: Any) -> Any:
                left[0] -= not args[1].startswith("_present")  # of a process that is dead it would say nothing
                if left[0] < 0 and not args[1].startswith("_present"):
                    raise _Killed
                return call(*args)

            return wrapped

        with pytest.MonkeyPatch.context() as patch:
            for name, call in (("staged", staged), ("put_bytes", put_bytes), ("remove", remove)):
                patch.setattr(Store, name, counted(call))
            try:
                take_back(store, lists)
            except _Killed:
                assert left[0] < 0
        take_back(store, lists)
        assert _traces(store, victims) == []
        assert _tars(store, str(latest_release(store))) == expected
        verify_release(store.root, str(latest_release(store)))
        assert all(store.exists(f"_removed/{name}/done.json") for name in store.names("_removed"))


def test_a_tar_that_would_be_empty_gives_its_number_to_the_last(tmp_path: Path) -> None:
    """Guards against a gap in the numbers that trainers expand, and against empty tars."""
    store, _ = _released(str(tmp_path))
    name = str(latest_release(store))
    manifest = pq.read_table(tmp_path / "releases" / name / "manifest.parquet").to_pylist()
    gone = [row["key"] for row in manifest if row["subset"] == "good" and row["tar"] == "00001.tar"]
    before = _tars(store, name)
    take_back(store, Lists(keys=gone))
    new = str(latest_release(store))
    after = _tars(store, new)
    last = max(path for path in before if path.startswith("good/"))
    assert verify_release(store.root, new).samples == len(manifest) - 2 * len(gone)
    assert last not in after and after["good/00001.tar"] == before[last]
    left = pq.read_table(tmp_path / "releases" / new / "manifest.parquet").to_pylist()
    scores = [row["score"] for row in left if row["subset"] == "all"]
    known = [score for score in scores if score is not None]
    mean = pytest.approx(sum(known) / len(known))
    noted = store.get_json(f"releases/{new}/release.json")["subsets"]["all"]["scores"]["score"]
    counted = {"least": min(known), "mean": mean, "most": max(known), "unknown": len(scores) - len(known)}
    assert noted == counted and counted["unknown"] > 0


def test_a_hash_as_emitted_takes_the_bytes_as_served_along(tmp_path: Path) -> None:
    """Guards against a picture that returns from another address, or as its copy when the first is gone."""
    store, _ = _released(str(tmp_path))
    manifest = store.full(f"releases/{latest_release(store)}/manifest.parquet")
    named = next(row for row in pq.read_table(manifest).to_pylist() if row["subset"] == "good")
    take_back(store, Lists(hashes=[named["member_sha256"]]))
    assert named["sha256"] in tombstones_of(store).hashes
    left = pq.read_table(store.full(f"releases/{latest_release(store)}/manifest.parquet"))
    assert named["sha256"] not in left.column("sha256").to_pylist()  # three shards have a row with these bytes
    files = _files(store)
    assert take_back(store, Lists(hashes=[named["member_sha256"]])).samples == 0 and _files(store) == files


def test_entries_that_are_none_are_refused(tmp_path: Path) -> None:
    """Guards against a list that removes nothing because its entries are of another kind."""
    store, _ = _released(str(tmp_path))
    with pytest.raises(PlanError, match="--hashes: 'abc' is not 64 hex digits"):
        take_back(store, Lists(hashes=["abc"]))
    for entry in ("http://host-1.example/", "host-1.example/a", "host-1.example:80", r".*\.example", "*", "a,b"):
        with pytest.raises(PlanError, match="is not a domain"):  # host-1.example/a would take the whole host
            take_back(store, Lists(domains=[entry]))
    assert Lists(domains=["*.Bücher.example.", "[::1]"]).note() == {"domains": ["::1", "xn--bcher-kva.example"]}
    with pytest.raises(PlanError, match="is not a URL"):
        take_back(store, Lists(urls=["key,url"]))
    with pytest.raises(PlanError, match="no run was ever made here"):
        take_back(Store(str(tmp_path / "mistyped")), Lists(domains=["host-1.example"]))
    (tmp_path / "list.txt").write_text("http://a.example/1\n", encoding="utf-8-sig")
    assert lines_of(str(tmp_path / "list.txt")) == ["http://a.example/1"]
    assert isinstance(take_back(store, Lists()), TakenBack) and not store.exists("_removed")


def test_tars_that_no_row_names_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against pictures that survive in what a killed `--retry` or a killed writer left beside the tables."""
    store = Store(str(tmp_path))
    shards = fill_pool(store, shards=2, rows=40)
    stage = ToyFetch()
    images = stage.tables[0]
    for shard in shards:
        run_shard(store, stage, shard)
    folder = store.folder(images)
    (first, last) = (shard.name for shard in shards)
    assert reopen(store, images, shards[0], ["timeout"]) > 0
    with monkeypatch.context() as patch:
        patch.setattr(Opened, "close", lambda self: None)  # the kill comes after the commit and before this
        run_shard(store, stage, shards[0])
    assert reopen(store, images, shards[1], ["timeout"]) > 0  # waits to be fetched again: its old tar is needed
    left = [f"{folder}/{first}.tar", f"{folder}/_previous/{first}.parquet"]
    store.put_bytes(f"{folder}/9999.tar", store.get_bytes(left[0]))  # of a shard that was never committed
    (tmp_path / folder / ".tmp-here-1-abc").write_bytes(store.get_bytes(left[0]))
    assert all(store.exists(path) for path in left)
    rows = store.read_joined([(images, None), (ToyFetch().reads(frozenset())[0].table, ["url"])], first).to_pylist()
    victim = next(row for row in rows if row["status"] == "ok")
    (picture,) = store.read_ranges(victim["tar"], [victim["offset"]], [victim["length"]])
    report = take_back(store, Lists(urls=[victim["url"]]))
    assert (report.samples, report.swept) == (1, 4)
    assert not any(picture in data or victim["url"].encode() in data for data in _files(store).values())
    assert [name for name in store.names(folder) if name.endswith(".tar")] == [f"{first}.r1.tar", f"{last}.tar"]
    assert run_shard(store, stage, shards[1]).computed  # goes on from the rows as they were
    assert all(store.read_images(store.read(images, shard.name)) for shard in shards)
