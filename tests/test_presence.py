"""Runs beside runs, a removal alone: kept by what each leaves at the root, without a lock of the store."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from curate import presence
from curate.errors import PlanError
from curate.presence import FOLDER, GIVEN_UP_S, present
from curate.store import Store

HOLD = """
import sys, time
from curate.presence import present
from curate.store import Store
with present(Store(sys.argv[1]), "run"):
    print("here", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_run_left_keeps_nobody_out(tmp_path: Path) -> None:
    """Guards against a root that no removal may touch after a power cut, and one that it may touch beside a run."""
    store = Store(str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"here\n"
        with pytest.raises(PlanError, match=f"run-.*-{child.pid}-"), present(store, "removal"):
            pass
        child.send_signal(signal.SIGKILL)
    with present(store, "removal"):
        assert len(store.names(FOLDER)) == 1
    assert store.names(FOLDER) == []


@pytest.mark.parametrize("place", ["local", "s3"])
def test_another_machine_is_given_up_by_the_clock_of_the_store(
    place: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a run elsewhere that is taken for dead while it signs, or for living when it is long gone."""
    store = Store(str(tmp_path) if place == "local" else f"{request.getfixturevalue('s3_bucket')}/root")
    elsewhere = f"{FOLDER}/run-other-{os.getpid()}-0.json"
    store.put_json(elsewhere, {"machine": "other", "started": 0.0})
    with pytest.raises(PlanError, match="run-other"), present(store, "removal"):
        pass
    assert store.exists(elsewhere)
    if place == "local":
        past = time.time() - GIVEN_UP_S - 1
        os.utime(tmp_path / elsewhere, (past, past))
    else:
        monkeypatch.setattr(presence, "GIVEN_UP_S", 0.5)
        time.sleep(2.1)  # S3 tells whole seconds
    with present(store, "removal"):
        assert not store.exists(elsewhere)


def test_a_run_and_a_removal_are_never_there_at_once(tmp_path: Path) -> None:
    """Guards against two that come in the same moment and do not see each other."""
    store = Store(str(tmp_path))
    inside: list[str] = []
    seen: set[tuple[str, ...]] = set()
    entered = {"run": 0, "removal": 0}
    until = time.monotonic() + 1.5

    def come_and_go(kind: presence.Kind, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < until:
            try:
                with present(store, kind):
                    inside.append(kind)
                    entered[kind] += 1
                    seen.add(tuple(sorted(inside)))
                    time.sleep(draw.uniform(0, 0.005))
                    seen.add(tuple(sorted(inside)))
                    inside.remove(kind)
            except PlanError:
                time.sleep(draw.uniform(0, 0.02))

    kinds: list[presence.Kind] = ["run", "removal", "run", "removal"]
    threads = [threading.Thread(target=come_and_go, args=(kind, seed)) for seed, kind in enumerate(kinds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(entered.values()) > 0
    assert all("removal" not in some or some == ("removal",) for some in seen), seen


GIVEN_UP = """
import signal, sys, time
from curate import presence
from curate.store import Store

signal.signal(signal.SIGINT, getattr(signal, sys.argv[2]))
presence.SIGN_EVERY_S = 0.05
store = Store(sys.argv[1])
with presence.present(store, "run"):
    time.sleep(0.2)  # some signs
    (name,) = store.names(presence.FOLDER)
    for _ in range(500):
        store.remove(f"{presence.FOLDER}/{name}")  # as a removal does that takes it for given up
        time.sleep(0.02)
"""


@pytest.mark.parametrize(("interrupt", "code"), [("default_int_handler", -signal.SIGINT), ("SIG_IGN", -signal.SIGTERM)])
def test_one_that_was_given_up_ends(tmp_path: Path, interrupt: str, code: int) -> None:
    """Guards against a run that slept for an hour, goes on, and writes what was removed meanwhile; also one in the
    background, where shells ignore interrupts."""
    words = [sys.executable, "-c", GIVEN_UP, str(tmp_path), interrupt]
    assert subprocess.run(words, capture_output=True, timeout=60, check=False).returncode == code
