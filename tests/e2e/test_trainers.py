"""Programs of others take what was emitted as it is: open_clip's training, img2dataset on a list of URLs."""

import os
import re
import runpy
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.demo.paths import weights_dir
from curate.emit.exports import EXPORTS
from curate.emit.step import latest_release
from curate.store import Store
from tests.emit.pool import emitter, make_pool, recipe_with, run, stored

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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork with threads: the loaders' workers
@pytest.mark.parametrize("words", [[], ["--stream"]], ids=["map-style", "streamed"])
def test_multi_crop_example_runs(
    release: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against an example that a reader copies and that does not run: multi-crop, several workers."""
    example = str(Path(__file__).resolve().parents[2] / "examples" / "multi_crop.py")
    sized = ["--batch", "8", "--batches", "4", "--workers", "2"]
    monkeypatch.setattr(sys, "argv", [example, str(release), "any", *sized, *words])
    runpy.run_path(example, run_name="__main__")
    assert capsys.readouterr().out.startswith("32 pictures, 10 crops each ((8, 3, 224, 224), (8, 3, 98, 98))")


class _Site(BaseHTTPRequestHandler):
    """Serves the pictures of a pool of 30 rows a shard; one of them has changed since."""

    def do_GET(self) -> None:
        shard, row = (int(part) for part in self.path.strip("/").split("/"))
        data = stored(shard, row, 30) if row != 4 else stored(9, row, 30)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_img2dataset_downloads_our_list(tmp_path: Path) -> None:
    """Guards against a list of links that its readers cannot use: names of columns, hashes that do not match."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = Store(str(tmp_path / "root"))
        shards = make_pool(store, shards=2, rows=30, site=f"http://127.0.0.1:{server.server_port}")
        run(emitter(store, shards, recipe_with({"any": {}})), store, shards)
        release = tmp_path / "root" / "releases" / str(latest_release(store))
        listed = EXPORTS["urls"](str(release), "any", tmp_path)
        command = [
            str(Path(sys.executable).with_name("img2dataset")), "--url_list", str(listed), "--input_format", "parquet",
            "--url_col", "url", "--verify_hash", '["sha256","sha256"]', "--save_additional_columns", '["uid"]',
            "--output_folder", str(tmp_path / "out"), "--output_format", "webdataset", "--resize_mode", "no",
            "--disable_all_reencoding", "True", "--processes_count", "1", "--thread_count", "8",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=170, cwd=tmp_path, check=False)
        server.shutdown()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    manifest = pq.read_table(release / "manifest.parquet", columns=["key", "url", "sha256"]).to_pylist()
    changed = [row["key"] for row in manifest if row["url"].endswith("/4")]
    found = pa.concat_tables([pq.read_table(file) for file in (tmp_path / "out").glob("*.parquet")]).to_pylist()
    assert sorted(row["uid"] for row in found) == sorted(row["key"] for row in manifest)
    failed = {row["uid"]: row["error_message"] for row in found if row["status"] != "success"}
    assert failed == dict.fromkeys(changed, "hash mismatch") and len(changed) == 2
    digests = {row["key"]: row["sha256"] for row in manifest}
    assert all(row["sha256"] == digests[row["uid"]] for row in found if row["uid"] not in failed)
