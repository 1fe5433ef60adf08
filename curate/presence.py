"""Who works at a root: runs beside runs, a removal alone, so that neither undoes what the other did.

    <root>/_present/<run|removal>-<host>-<pid>-<id>.json    there while it works, written anew every minute

No store needs a lock for it. Each says first that it is there, and looks for others afterwards: of two that come at
once, at least one sees the other and goes. That holds wherever a listing shows what was written before it: local
disks, S3 and GCS do. One that was killed is known by its process on its own machine, elsewhere by ten minutes without a
sign, measured by the store's clock. One that slept through these minutes ends when it finds out.
"""

import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil

from curate.errors import PlanError
from curate.store import Store

FOLDER = "_present"
SIGN_EVERY_S = 60.0
GIVEN_UP_S = 600.0  # ten signs missed: an object store that fails for some minutes must not cost a run its place
Kind = Literal["run", "removal"]


@contextmanager
def present(store: Store, kind: Kind) -> Iterator[None]:
    """Be at work at a root for the length of the block.

    Raises PlanError when a removal is there already or, for a removal, a run.
    """
    name = f"{kind}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.json"
    path = f"{FOLDER}/{name}"
    _sign(store, path)
    stop = threading.Event()
    signing = threading.Thread(target=_keep_signing, args=(store, name, stop), name="curate-presence", daemon=True)
    try:
        others = in_the_way(store, name)
        if others:
            raise PlanError(
                f"{store.root}: {others[0]} is at work here; run again when it has ended. If it was killed, "
                f"it is taken for given up {GIVEN_UP_S / 60:.0f} minutes after its last sign"
            )
        signing.start()
        yield
    finally:
        stop.set()
        if signing.ident is not None:
            signing.join()  # a sign after the last would keep others out
        store.remove(path)


def in_the_way(store: Store, mine: str) -> list[str]:
    """Names of those who are at work and must not be beside `mine`; what the dead left is removed."""
    found = []
    for name in store.names(FOLDER):
        if name == mine:
            continue
        if _is_gone(store, name, mine):
            store.remove(f"{FOLDER}/{name}")
        elif "removal" in (name.partition("-")[0], mine.partition("-")[0]):
            found.append(name.removesuffix(".json"))
    return found


def written_at(info: Mapping[str, Any]) -> float:
    """When a file was written, seconds since 1970 by the store's clock; now, where the store does not tell."""
    found = info.get("mtime") or info.get("LastModified") or info.get("created") or time.time()
    return float(found) if isinstance(found, float | int) else float(found.timestamp())


def _sign(store: Store, path: str) -> None:
    store.put_json(path, {"machine": _machine(), "started": psutil.Process().create_time()})


def _machine() -> str:
    """Where process numbers mean the same: containers may share a host's name and not its processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return socket.gethostname()


def _is_gone(store: Store, name: str, mine: str) -> bool:
    note = store.get_json(f"{FOLDER}/{name}")
    if note is None:
        return True  # it ended while we looked
    if note["machine"] == _machine():
        try:
            return bool(psutil.Process(int(name.rsplit("-", 2)[1])).create_time() != note["started"])
        except psutil.NoSuchProcess:
            return True
    try:
        theirs, ours = (written_at(store.fs.info(store.full(f"{FOLDER}/{one}"))) for one in (name, mine))
    except FileNotFoundError:
        return False  # one of the two has just ended: looked at again by who comes next
    return ours - theirs > GIVEN_UP_S


def _keep_signing(store: Store, name: str, stop: threading.Event) -> None:
    """Sign every minute; when others took us for given up, end the process as Ctrl-C does, or where that is ignored (a
    shell's background job) as `kill` does."""
    path = f"{FOLDER}/{name}"
    while not stop.wait(SIGN_EVERY_S):
        began = time.time()
        try:
            known = store.exists(path)
            _sign(store, path)
            slept = time.time() - began > GIVEN_UP_S  # between these two lines: what was seen is long past
            if known and not slept and not in_the_way(store, name):
                continue
        except Exception:  # noqa: S112  # whatever the store's client raises: the next sign may come through
            continue
        if not stop.is_set():
            ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            how = signal.SIGTERM if ignored else signal.SIGINT
            signal.pthread_kill(threading.main_thread().ident or 0, how)
            return
