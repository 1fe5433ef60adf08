"""The main job as a user runs it: URL table in, subsets out, whatever happens on the way."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.config import load_recipe
from curate.engine.driver import Driver
from curate.engine.job import Job
from curate.fetch.stage import FetchStage
from curate.stage import Task
from pipelines import frame, image_text
from tests.e2e.conftest import Web, command, curate, environment, release_of, tree_of


@pytest.fixture(scope="module")
def whole(web: Web, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed inline run."""
    root = tmp_path_factory.mktemp("whole") / "run"
    curate("run", web.recipe(root))
    return root


def test_release_holds_what_the_web_planted(web: Web, whole: Path) -> None:
    """Guards against a line that ends well and kept the wrong pictures."""
    truth = pq.read_table(web.truth)
    manifest = pq.read_table(next((whole / "releases").glob("0*/manifest.parquet")))
    found = duckdb.sql(
        """
        SELECT kind, count(*) FILTER (WHERE subset = 'pairs') AS pairs FROM truth
        LEFT JOIN manifest USING (key) GROUP BY kind
        """
    ).fetchall()
    pairs = dict(found)
    assert pairs["wrong_caption"] == pairs["http_404"] == pairs["opted_out"] == pairs["bomb_pixels"] == 0
    assert pairs["shapes"] > 90
    assert pairs["scene"] > 90
    for identity in ("key", "image_phash"):  # of each group of copies one stayed
        chosen = list(zip(manifest["subset"].to_pylist(), manifest[identity].to_pylist(), strict=True))
        assert len(chosen) == len(set(chosen))
    assert truth.num_rows == 639


def test_second_run_starts_nothing_and_changes_no_byte(web: Web, whole: Path) -> None:
    """Guards against a nightly run that rewrites what is there."""
    before = tree_of(whole)
    began = time.time_ns()
    curate("run", web.recipe(whole))
    after = tree_of(whole)
    assert after == before
    assert all(changed < began for changed, _ in after.values())


def test_ray_with_one_and_two_workers_gives_the_same_release(web: Web, whole: Path, tmp_path: Path) -> None:
    """Guards against results that depend on where and how wide a run was."""
    for workers in (1, 2):
        root = tmp_path / f"ray{workers}"
        limits = dict.fromkeys(("fetch", "score", "score_text", "select"), workers)
        curate("run", web.recipe(root, engine={"driver": "ray", "cpus": 2, "workers": limits}))
        assert release_of(root) == release_of(whole)


def test_root_on_s3_gives_the_same_release(web: Web, whole: Path, s3_bucket: str, tmp_path: Path) -> None:
    """Guards against a line that works on a disk only: renames, listings, half-written objects."""
    import s3fs

    recipe = web.recipe(tmp_path / "run")
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "run"), f"{s3_bucket}/run"))
    curate("run", recipe)
    curate("verify", f"{s3_bucket}/run")
    fs = s3fs.S3FileSystem()
    folder = f"{s3_bucket}/run/releases/{fs.cat_file(f'{s3_bucket}/run/releases/latest').decode().strip()}"
    prefix = folder.removeprefix("s3://")
    found = {path.removeprefix(f"{prefix}/"): hashlib.sha256(fs.cat_file(path)).hexdigest() for path in fs.find(folder)}
    assert found == release_of(whole)
    curate("run", recipe)
    assert set(fs.find(folder)) == {f"{prefix}/{name}" for name in found}


@pytest.mark.parametrize(("engine", "kills"), [("inline", 10), ("ray", 3)])
def test_killed_driver_goes_on_to_the_same_release(
    web: Web, whole: Path, tmp_path: Path, engine: str, kills: int
) -> None:
    """Guards against anything half written that a second run takes for whole."""
    root = tmp_path / "run"
    recipe = web.recipe(root, engine={"driver": engine, "cpus": 2})
    draw = random.Random(kills)
    killed = 0
    for _ in range(kills):
        process = subprocess.Popen(
            command("run", recipe), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
        )
        try:
            process.wait(timeout=draw.uniform(1.0, 5.0) + (6.0 if engine == "ray" else 0.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    curate("run", recipe)
    assert killed > 0
    assert release_of(root) == release_of(whole)
    assert list(root.rglob(".tmp-*")) == []


def test_new_threshold_only_selects_and_emits(web: Web, whole: Path, tmp_path: Path) -> None:
    """Guards against a changed threshold that fetches or scores anything again."""
    root = tmp_path / "run"
    shutil.copytree(whole, root)
    before = tree_of(root)
    requests = web.server.hits.total()
    curate("run", web.recipe(root, subsets={"pairs": {"where": "NOT is_duplicate AND clip_similarity_demo > 0.7"}}))
    after = tree_of(root)
    new = {path.split("/", maxsplit=1)[0] for path in set(after) - set(before)}
    assert new == {"member_pairs", "_clauses", "releases"}  # the new subset, its counts, the new release
    assert web.server.hits.total() == requests
    assert len(list((root / "releases").glob("0*"))) == 2


def test_retry_asks_only_for_what_failed(web: Web, whole: Path, tmp_path: Path) -> None:
    """Guards against retries that download a pool again, or that lose what it had."""
    root = tmp_path / "run"
    shutil.copytree(whole, root)
    before = Counter(web.server.hits)
    curate("run", web.recipe(root), "--retry", "http_4xx")
    asked = set(web.server.hits - before)
    truth = pq.read_table(web.truth).to_pylist()
    gone = {urlsplit(row["url"]).path for row in truth if row["kind"] == "http_404"}
    assert gone <= asked <= {*gone, "/robots.txt"}
    names = ("subset", "key", "sha256")
    first, second = (pq.read_table(path).select(names) for path in sorted(root.glob("releases/0*/manifest.parquet")))
    assert first.equals(second)


def test_new_scorer_scores_only_itself(web: Web, whole: Path, tmp_path: Path) -> None:
    """Guards against a new score that costs as much as all of them."""
    root = tmp_path / "run"
    shutil.copytree(whole, root)
    before = tree_of(root)
    recipe = web.recipe(root)
    curate("run", recipe, "--set", "score.facts.scorer=image_facts")
    after = tree_of(root)
    new = {path.split("/", maxsplit=1)[0] for path in set(after) - set(before)}
    assert "scores_facts" in new
    assert not new & {"images", "scores_clip_demo", "scores_phash", "scores_text", "embeddings_clip_demo", "duplicates"}


class PoisonedFetch(FetchStage):
    """The real stage; one shard kills its process, as a decoder with a hole would."""

    def process(self, task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[Mapping[str, pa.RecordBatch]]:
        if task.shard.name.endswith("2"):
            os._exit(11)
        return super().process(task, batches)


def test_poisoned_shard_is_reported_and_the_rest_is_released(
    web: Web, tmp_path: Path, ray_driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against one shard that takes the whole run with it, and against a loss that nobody is told of."""
    root = tmp_path / "run"
    monkeypatch.setattr(frame, "fetch_stage", PoisonedFetch)
    job = Job(load_recipe(web.recipe(root)), driver=lambda: ray_driver)
    image_text.run(job)
    job.note()
    ((shard, cause),) = job.set_aside.items()
    assert "3 tries" in cause
    assert "set aside" in curate("status", root).stdout
    release = json.loads(next((root / "releases").glob("0*/release.json")).read_text())
    assert shard in json.dumps(release["set_aside"])
    manifest = pq.read_table(next((root / "releases").glob("0*/manifest.parquet")))
    assert manifest.num_rows > 100


def test_commands_answer(web: Web, whole: Path, tmp_path: Path) -> None:
    """Guards against commands that only work in their help."""
    recipe = web.recipe(whole)
    assert "member_pairs" in curate("plan", recipe).stdout
    assert "subset pairs" in curate("status", whole).stdout
    key = next(iter(pq.read_table(next((whole / "releases").glob("0*/manifest.parquet")))["key"].to_pylist()))
    assert "clip_similarity_demo" in curate("explain", key, "--root", whole).stdout
    answer = curate(
        "sql", "SELECT status, count(*) AS n FROM images GROUP BY 1 ORDER BY 2 DESC", "--root", whole
    ).stdout
    assert "http_4xx" in answer
    curate("verify", whole)
    curate("report", whole, "--out", tmp_path / "page.html")
    assert "<script" not in (tmp_path / "page.html").read_text()
    for wrong in (["explain", "nope", "--root", whole], ["verify", tmp_path], ["run", tmp_path / "no.yaml"],
                  ["sql", "SELEC 1", "--root", whole], ["plan", recipe, "--set", "dedup.0.by=md5"]):  # fmt: skip
        result = curate(*wrong, check=False)
        assert result.returncode == 2, (wrong, result.stdout, result.stderr)
        assert "Traceback" not in result.stderr


def test_verify_finds_a_changed_byte(whole: Path, tmp_path: Path) -> None:
    """Guards against a release that was damaged and trains anyway."""
    root = tmp_path / "run"
    shutil.copytree(whole, root)
    tar = next(root.glob("releases/0*/pairs/00000.tar"))
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    result = curate("verify", root, check=False)
    assert result.returncode == 2
    assert "00000.tar" in result.stderr
