"""Real processes at one root: killed at random moments of emission, publishing and removal, and two at once."""

import hashlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from curate.emit.step import files_of, latest_release
from curate.emit.takeback import Lists, take_back
from curate.emit.verify import verify_release
from curate.errors import PlanError
from curate.presence import present
from curate.store import Store
from tests.emit.nursery import Nursery, nursery
from tests.emit.pool import SAMPLES, make_pool, recipe_with, selected
from tests.emit.test_takeback import _traces, _victims

SUBSETS = {"any": {}, "good": {"where": "score > 0.2"}}
EMIT = {"samples_per_shard": 9, "group_samples": 50}
KILLS = 20


@pytest.fixture(scope="module")
def forks() -> Iterator[Nursery]:
    """Where processes come from."""
    with nursery() as found:
        yield found


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool with its selection, before anything is emitted."""
    root = tmp_path_factory.mktemp("ready") / "root"
    store = Store(str(root))
    selected(store, make_pool(store, shards=4, rows=25), recipe_with(SUBSETS, **EMIT))
    return root


@pytest.fixture(scope="module")
def whole(ready: Path, forks: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A root with its release, made undisturbed, and how long that took."""
    root = tmp_path_factory.mktemp("whole") / "root"
    shutil.copytree(ready, root)
    ((code, lasted_s),) = forks.do(["emit", str(root), SUBSETS, EMIT])
    assert code == 0
    return root, lasted_s


def _sums(root: Path, name: str | None = None) -> dict[str, str]:
    folder = root / "releases" / (name or str(latest_release(Store(str(root)))))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _check_releases(root: Path) -> list[str]:
    """Every release that is to be seen is whole; returns their names."""
    store = Store(str(root))
    names = [name for name in store.names("releases") if name != "latest"]
    for name in names:
        assert verify_release(str(root), name).samples > 0
        assert set(_sums(root, name)) == set(files_of(store.get_json(f"releases/{name}/release.json")))
    return names


def test_same_release_after_sigkills(
    ready: Path, whole: tuple[Path, float], forks: Nursery, tmp_path: Path
) -> None:  # fmt: skip
    """Guards against a release that is half visible after a power cut, or differs when work is taken up again."""
    done, lasts_s = whole
    draw = random.Random(0)
    killed = seen = rounds = 0
    root = tmp_path / "0"
    while killed < KILLS:
        if not root.exists():
            shutil.copytree(ready, root)
            rounds += 1
        ((code, _),) = forks.do(["emit", str(root), SUBSETS, EMIT], kill_s=draw.uniform(0, lasts_s))
        assert code in (0, -9)
        killed += code == -9
        if (root / "releases").exists():
            seen += len(_check_releases(root))
        if code == 0:
            assert _sums(root) == _sums(done)
            assert not list((root / "_work/emit").glob("*"))
            root = tmp_path / str(rounds)
    ((code, _),) = forks.do(["emit", str(root), SUBSETS, EMIT]) if root.exists() else ((0, 0.0),)
    assert code == 0 and seen > 0


@pytest.mark.parametrize("other", [EMIT, {**EMIT, "seed": 1}], ids=["same", "other"])
def test_two_runs_at_once_never_mix(
    ready: Path, whole: tuple[Path, float], forks: Nursery, tmp_path: Path, other: dict[str, Any]
) -> None:
    """Guards against two drivers whose files come into one folder, half-written ones among them."""
    done, _ = whole
    for attempt in range(2):
        root = tmp_path / str(attempt)
        shutil.copytree(ready, root)
        ended = forks.do(["emit", str(root), SUBSETS, EMIT], ["emit", str(root), SUBSETS, other])
        assert [code for code, _ in ended] == [0, 0]
        names = _check_releases(root)
        assert latest_release(Store(str(root))) in names
        assert not list(root.rglob(".tmp-*")) and not list((root / "_work/emit").glob("*"))
        assert [_sums(root, name) for name in names].count(_sums(done)) == (len(names) if other is EMIT else 1)
        assert len(names) == 2 or other is EMIT


def test_removal_after_sigkills(whole: tuple[Path, float], forks: Nursery, tmp_path: Path) -> None:
    """Guards against bytes that a killed removal leaves for ever, and against other tars that it spoils."""
    done, _ = whole
    store = Store(str(done))
    victims = _victims(store, store.shards(SAMPLES), 3)
    before = set(_sums(done).items())
    order = [[one.url for one in victims]]
    shutil.copytree(done, tmp_path / "undisturbed")
    ((code, lasts_s),) = forks.do(["remove", str(tmp_path / "undisturbed"), *order])
    assert code == 0
    expected = _sums(tmp_path / "undisturbed")
    draw = random.Random(1)
    killed = rounds = 0
    while killed < KILLS // 2:
        root, rounds = tmp_path / str(rounds), rounds + 1
        shutil.copytree(done, root)
        code = -9
        for _ in range(3):
            if code != 0:
                ((code, _),) = forks.do(["remove", str(root), *order], kill_s=draw.uniform(0, lasts_s))
                killed += code == -9
        ((code, _),) = forks.do(["remove", str(root), *order])
        assert code == 0
        gone = Store(str(root))
        assert _traces(gone, victims) == [] and not list(root.rglob(".tmp-*"))
        assert verify_release(str(root), str(latest_release(gone))).samples > 0
        assert _sums(root) == expected
    kept = {path for path, digest in expected.items() if (path, digest) in before and path.endswith(".tar")}
    assert len([path for path in expected if path.endswith(".tar")]) - len(kept) <= 2 * len(victims)


def test_a_removal_and_a_run_keep_each_other_out(tmp_path: Path, whole: tuple[Path, float]) -> None:
    """Guards against a run that publishes what is being removed, and a removal that misses what a run then writes."""
    from curate.engine.job import Job

    store = Store(str(whole[0]))
    with present(store, "run"), present(store, "run"):
        with pytest.raises(PlanError, match=r"run-.* is at work here"):
            take_back(store, Lists(domains=["nobody.example"]))
        assert not store.exists("_removed")
    assert store.names("_present") == []
    recipe = recipe_with({"any": {}}).model_copy(update={"root": str(whole[0])})
    job = Job(recipe)
    with present(store, "removal"):
        with pytest.raises(PlanError, match=r"removal-.* is at work here"):
            job.ingest(None)  # type: ignore[arg-type]  # refused before it looks at the step
        with pytest.raises(PlanError, match=r"removal-.* is at work here"):
            take_back(store, Lists())
    job.close()
    assert store.names("_present") == []
