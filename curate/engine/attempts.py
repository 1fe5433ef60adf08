"""How often a shard may fail, remembered in the store so that a dead worker cannot forget it.

    _attempts/<stage>/<fingerprint>/<shard>.json    tries that have started; removed when the shard succeeds
    _set_aside/<stage>/<fingerprint>/<shard>.json   shards given up, with the cause; later runs skip them

A try that raised counts. A try that left no ending (its process died) counts when it belongs to this run and its node
still lives: then the shard killed its worker. A killed driver or a lost node is not the shard's fault.
"""

import errno
import os
import socket
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from curate.schema import Shard, fingerprint
from curate.stage import ShardReport, Stage, run_shard, scratch_path
from curate.store import Store

MAX_TRIES = 3
# A full or read-only disk is no shard's fault: it would set every shard aside within seconds. The run ends instead.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


def stage_id(stage: Stage) -> str:
    """`<stage>/<hash of its tables>`."""
    return f"{stage.name}/{fingerprint([spec.fingerprint for spec in stage.tables])}"


def set_aside(store: Store, stage: Stage) -> dict[str, str]:
    """Shards given up by this stage in this or earlier runs, with the cause."""
    folder = f"_set_aside/{stage_id(stage)}"
    names = (name for name in store.names(folder) if name.endswith(".json"))
    return {name[: -len(".json")]: str(store.get_json(f"{folder}/{name}")["cause"]) for name in names}


def forgive(store: Store, stage: Stage) -> int:
    """Forget this stage's set-aside shards, so that they are tried again; returns how many."""
    names = set_aside(store, stage)
    for name in names:
        store.remove(f"_set_aside/{stage_id(stage)}/{name}.json")
    return len(names)


def run_bounded(
    store: Store, stage: Stage, shard: Shard, run_id: str, node: str, alive: Callable[[], Iterable[str]]
) -> ShardReport:
    """`run_shard` with at most three tries; afterwards the shard is set aside and the report says why.

    Raises OSError when the disk is full or read-only: that ends the run, and no shard is blamed.

    `node` names this worker's machine and `alive` lists the machines that live, both as the engine knows them.
    """
    path = f"_attempts/{stage_id(stage)}/{shard.name}.json"
    tries = _counted(store.get_json(path) or [], run_id, alive)
    while len(tries) < MAX_TRIES:
        tries.append({"run": run_id, "node": node, "host": socket.gethostname(), "pid": os.getpid(), "cause": None})
        store.put_json(path, tries)
        try:
            report = run_shard(store, stage, shard)
        except Exception as error:  # any failure of a stage is a try, whatever it is; its cause is kept
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            tries[-1]["cause"] = _cause(error)
            store.put_json(path, tries)
            continue
        _clear(store, stage, shard, path)
        return report
    causes = [entry["cause"] for entry in tries if entry["cause"]]
    cause = causes[-1] if causes else "its worker process died each time (a decoder crash or out of memory)"
    message = f"{stage.name} failed on {shard.name} ({len(tries)} tries): {cause}"
    store.put_json(f"_set_aside/{stage_id(stage)}/{shard.name}.json", {"cause": message, "tries": tries})
    _clear(store, stage, shard, path)
    return ShardReport(stage.name, shard.name, shard.rows, set_aside=message)


def _counted(tries: list[dict[str, Any]], run_id: str, alive: Callable[[], Iterable[str]]) -> list[dict[str, Any]]:
    ours = [entry for entry in tries if entry["run"] == run_id]
    open_ended = {entry["node"] for entry in ours if entry["cause"] is None}
    living = set(alive()) if open_ended else set()
    return [entry for entry in ours if entry["cause"] is not None or entry["node"] in living]


def _clear(store: Store, stage: Stage, shard: Shard, path: str) -> None:
    store.remove(path)
    store.remove_tree(scratch_path(store, stage, shard.name))


def _cause(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({Path(last[0].filename).name}:{last[0].lineno})" if last else ""
    return f"{type(error).__name__}: {error}{place}"[:2000]
