"""Runs the steps across shards in processes of its own and kills them at random moments; `test_sigkill` starts it.

    python -m tests.retrieve.killed FOLDER

Forked here, so that a kill costs no start of Python. Prints JSON: for each step how many processes were killed, and
which files of an undisturbed run the last one did not leave, or left with other bytes.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import torch

import curate.vectors
from curate import across
from curate.balance.step import experts_step
from curate.config import (
    BalanceSettings,
    CellsSettings,
    ExpertsSettings,
    HierarchySettings,
    LevelSettings,
    RetrieveSettings,
    SeedSet,
)
from curate.retrieve import gather, partition, seeds, splits
from curate.retrieve.step import cells_step, hierarchy_step, retrieve_step
from curate.schema import Shard
from curate.store import UNFINISHED, Store
from tests.balance.test_step import balance_of
from tests.retrieve.pool import TABLES, WIDTH, build, go
from tests.retrieve.test_step import _tree

CELLS = CellsSettings(by="toy", count=12, metric="l2", points_per_cell=20, resampling=1, sample_size=6)
SPLIT = CELLS.model_copy(update={"resampling": 0, "batch": 40})
SETS = [
    SeedSet(name="near", how="sample", where="folder = 'b'", k=3, nprobe=3),
    SeedSet(name="cells", how="cluster", where="folder = 'c'", more_than=3, per_cell=9, cap=20),
    SeedSet(name="kept", how="as_is", where="folder = 'a'"),
]
UPPER = LevelSettings(count=3, resampling=1, sample_size=2)
SHARDS = [Shard(f"{number:04d}", 50) for number in range(4)]
KILLS = 2


def retrieve(store: Store) -> None:
    """k-means with resampling; then all three ways, with the exact comparison after a search over codes."""
    where = cells_step(CELLS, store, TABLES, SHARDS)
    go(where, store, SHARDS)
    go(retrieve_step(RetrieveSettings(sets=SETS, recall_seeds=9, codes="SQ8"), where), store, SHARDS)


def hierarchy(store: Store) -> None:
    """k-means by mini-batches; cells cut into clusters, a level above, quotas and draws."""
    where = cells_step(SPLIT, store, TABLES, SHARDS)
    go(where, store, SHARDS)
    go(hierarchy_step(HierarchySettings(splits=2, levels=[UPPER], targets=[50, 90]), where), store, SHARDS)


def balance(store: Store) -> None:
    """MetaCLIP's matches and draws, and MoDE's experts."""
    entries = Path(store.root).with_name("entries.txt")
    go(balance_of(BalanceSettings(entries=str(entries), t=3), store, TABLES, SHARDS), store, SHARDS)
    settings = ExpertsSettings(by="toy", fine=6, coarse=2, sample=90, fine_iterations=5, coarse_iterations=5)
    go(experts_step(settings, store, TABLES, SHARDS), store, SHARDS)


def _run(step: Callable[[Store], None], root: Path, kill_s: float | None = None) -> tuple[int, float]:
    """(exit code, seconds); -9 is SIGKILL."""
    started = time.monotonic()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            step(Store(str(root)))
            code = 0
        finally:
            os._exit(code)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.monotonic() - started
        if kill_s is not None and time.monotonic() - started >= kill_s:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def _files(root: Path) -> dict[str, str]:
    """What a reader can see: neither files without their name yet, nor work folders, which the next job sweeps."""
    return {name: sha for name, sha in _tree(root).items() if UNFINISHED not in name and not name.startswith("_work/")}


def killed_and_resumed(step: Callable[[Store], None], folder: Path) -> dict[str, Any]:
    """Kill a step until it was killed often enough, finish it, and compare."""
    whole, draw, kills, rounds = folder / step.__name__, random.Random(0), 0, 0
    shutil.copytree(folder / "pool", whole)
    code, lasts_s = _run(step, whole)
    expected, wrong = _files(whole), set[str]() if code == 0 else {"undisturbed"}
    while kills < KILLS and not wrong:
        rounds += 1
        root, code = folder / f"{step.__name__}{rounds}", -9
        shutil.copytree(folder / "pool", root)
        while code == -9:
            code, _ = _run(step, root, draw.uniform(0, lasts_s) if kills < KILLS else None)
            kills += code == -9
        found = _files(root)
        wrong = {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)}
    return {"kills": kills, "wrong": sorted(wrong)}


def main(folder: Path) -> dict[str, dict[str, Any]]:
    """See the module's docstring."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    curate.vectors.SHARDS_PER_CHUNK = gather.SHARDS_PER_RETURN = splits.SHARDS_PER_RETURN = 2
    seeds.SEEDS_PER_CHUNK, partition.PART_BYTES = 16, 2 * WIDTH * 60
    across.ROWS_PER_PARTITION, across.CHUNKS = 100, 2
    build(Store(str(folder / "pool")), shards=len(SHARDS), rows=SHARDS[0].rows)
    (folder / "entries.txt").write_text("t1\nt2\nt3\nunseen\n")
    return {step.__name__: killed_and_resumed(step, folder) for step in (retrieve, hierarchy, balance)}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
