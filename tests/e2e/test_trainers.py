"""open_clip's own training entry point reads an emitted subset as it is: several workers, resampled and not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from curate.demo.paths import weights_dir
from curate.emit.step import latest_release
from curate.store import Store
from tests.emit.pool import emitter, make_pool, recipe_with, run

WORKERS = 2


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release with samples without captions among the others: the trainer must skip exactly those."""
    root = tmp_path_factory.mktemp("release")
    store = Store(str(root))
    shards = make_pool(store, shards=3, rows=40)
    run(emitter(store, shards, recipe_with({"any": {}}, samples_per_shard=60, min_tars=WORKERS)), store, shards)
    return root / "releases" / str(latest_release(store))


@pytest.mark.parametrize("resampled", [False, True])
def test_open_clip_trains_on_it(release: Path, tmp_path: Path, resampled: bool) -> None:
    """Guards against a layout that only our own readers take: sizes.json, tar numbers, members, captions."""
    tars = len(list((release / "any").glob("*.tar")))
    command = [
        sys.executable, "-m", "open_clip_train.main", "--dataset-type", "webdataset",
        "--train-data", f"{release}/any/{{00000..{tars - 1:05d}}}.tar", "--model", f"local-dir:{weights_dir()}",
        "--batch-size", "16", "--epochs", "1", "--workers", str(WORKERS), "--warmup", "1", "--precision", "fp32",
        "--log-every-n-steps", "1", "--logs", str(tmp_path), "--name", "tiny", "--device", "cpu",
        *(["--dataset-resampled", "--train-num-samples", "64"] if resampled else []),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=170, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    log = (tmp_path / "tiny" / "out.log").read_text()
    steps = re.findall(r"Train Epoch: 0 \[\s*(\d+)/(\d+)", log)
    assert len(steps) >= 4
    assert "Handling webdataset error" not in log
    checkpoints = tmp_path / "tiny" / "checkpoints"
    assert any(checkpoints.glob("epoch_1.pt"))
