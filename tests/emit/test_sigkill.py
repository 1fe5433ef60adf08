"""A real SIGKILL at random moments of emission and publishing."""

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from curate.emit.step import latest_release
from curate.emit.verify import verify_release
from curate.store import Store
from tests.emit.pool import SAMPLES, emitter, make_pool, recipe_with, run

ROOT = Path(__file__).resolve().parents[2]
EMIT = {"samples_per_shard": 6, "group_samples": 150}
KILLS = 4  # 20 of them passed when this was written; each costs the start of a process
CHILD = """
import sys
from curate.store import Store
from tests.emit.pool import emitter, recipe_with, run
from curate.schema import Shard
store = Store(sys.argv[1])
shards = [Shard(f"pool-{number:04d}", 60) for number in range(6)]
step = emitter(store, shards, recipe_with({"any": {}, "good": {"where": "score > 0.2"}}, **eval(sys.argv[2])))
print("ready", flush=True)
run(step, store, shards)
"""


def _sums(root: Path) -> dict[str, str]:
    folder = root / "releases" / str(latest_release(Store(str(root))))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_release_after_sigkills(tmp_path: Path) -> None:
    """Guards against a release that is half visible after a power cut, or differs when work is taken up again."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for root in (whole, killed):
        make_pool(Store(str(root)))
    store = Store(str(whole))
    shards = store.shards(SAMPLES)
    step = emitter(store, shards, recipe_with({"any": {}, "good": {"where": "score > 0.2"}}, **EMIT))
    started = time.monotonic()
    run(step, store, shards)
    lasts_s = time.monotonic() - started
    draw = random.Random(0)
    for attempt in range(KILLS + 1):
        command = [sys.executable, "-c", CHILD, str(killed), repr(EMIT)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
            if attempt < KILLS:
                time.sleep(draw.uniform(0, lasts_s / 2))
                child.send_signal(signal.SIGKILL)
            ended = child.wait()
        releases = killed / "releases"
        for release in releases.iterdir() if releases.exists() else ():
            if release.is_dir():
                assert verify_release(str(killed), release.name).samples > 0
    assert ended == 0
    assert _sums(killed) == _sums(whole)
    assert not list((killed / "releases").rglob(".tmp-*"))
