"""Processes over a ready store that are killed at chosen moments: forked here, so that each costs no start of Python.

Reads a line of JSON for each order, {"do": [[name, arguments…], …], "kill_s": seconds or null}: all are begun at once,
each in a process of its own. Answers with a line: [[exit code, seconds], …], where -9 is SIGKILL.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from curate.emit.takeback import Lists, take_back
from curate.store import Store
from tests.emit.pool import SAMPLES, emitter, recipe_with, run

ROOT = Path(__file__).resolve().parents[2]


class Nursery:
    """The other side: gives orders to a process that runs this file."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def do(self, *orders: Sequence[Any], kill_s: float | None = None) -> list[tuple[int, float]]:
        """Begin all at once, kill what still lives after `kill_s`; (exit code, seconds) of each."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": orders, "kill_s": kill_s}) + "\n")
        self._process.stdin.flush()
        return [(code, lasted_s) for code, lasted_s in json.loads(self._process.stdout.readline())]


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    """A process that forks."""
    command = [sys.executable, "-m", "tests.emit.nursery"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Nursery(process)
        assert process.stdin is not None
        process.stdin.close()


def emit(root: str, subsets: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Select, emit and publish."""
    store = Store(root)
    shards = store.shards(SAMPLES)
    run(emitter(store, shards, recipe_with(dict(subsets), **settings)), store, shards)


def remove(root: str, urls: Sequence[str]) -> None:
    """Take samples back."""
    take_back(Store(root), Lists(urls=urls))


def _child(order: Sequence[Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not os.environ.get("NURSERY_LOUD"):
            os.dup2(1, 2)
        name, *arguments = order
        {"emit": emit, "remove": remove}[name](*arguments)
        code = 0
    finally:
        os._exit(code)


def _watch(pids: Sequence[int], kill_s: float | None) -> list[tuple[int, float]]:
    started = time.monotonic()
    ended: dict[int, tuple[int, float]] = {}
    while len(ended) < len(pids):
        lasted_s = time.monotonic() - started
        for pid in pids:
            if pid in ended:
                continue
            if kill_s is not None and lasted_s >= kill_s:
                os.kill(pid, signal.SIGKILL)
            found, status = os.waitpid(pid, 0 if kill_s is not None and lasted_s >= kill_s else os.WNOHANG)
            if found:
                ended[pid] = os.waitstatus_to_exitcode(status), lasted_s
        time.sleep(0.001)
    return [ended[pid] for pid in pids]


if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(_watch([_child(order) for order in asked["do"]], asked["kill_s"])), flush=True)
