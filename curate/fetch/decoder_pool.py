"""A few decoding processes behind one asyncio call.

A process that dies or runs too long costs the sample it held (after a second try in a fresh process, since the damage
may have been done by the sample before) and is replaced.
"""

import asyncio
import contextlib
import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
from typing import BinaryIO, cast

from curate.errors import StageError
from curate.fetch import decoder
from curate.fetch.images import ImageSettings
from curate.fetch.outcome import Picture

DECODE_S = 30.0  # of one picture; 100 megapixels of progressive JPEG take 4 s
START_S = 120.0  # imports of NumPy and OpenCV from a cold network disk
STARTS_IN_VAIN = 3
_REPLY_BYTES = 4096  # at once; a reply has 100
# glibc hands every buffer beyond 128 kB back to the system and has it zeroed anew, page by page: 0.4 of 3.8 ms for a
# picture to 256 pixels, 1.0 of 6.2 ms to 512. A decoder keeps up to 64 MB instead.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "67108864",
}  # fmt: skip
# The parent's sys.path, not the environment's: a Ray worker finds this package where its runtime environment put it.
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[5])
from curate.fetch.decoder import main
main(sys.argv[1:5])
"""


class _Process:
    """One child, a socket to it, and the memory through which it is given bodies and gives images.

    A 240 kB body over the socket cost 0.7 ms on both sides together; copied into shared memory it costs 0.05.
    """

    def __init__(self, settings: ImageSettings, body_bytes: int, lock: BinaryIO) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        text = decoder.settings_text(settings)
        environment = {**os.environ, **_ENVIRONMENT}
        self.link, self.answered = ours, False
        self._loop = asyncio.get_running_loop()
        self._reply: asyncio.Future[Picture] = self._loop.create_future()
        self._received = bytearray()
        with theirs, _shared_file() as shared:
            size = decoder.shared_bytes(body_bytes, settings)
            shared.truncate(size)  # sparse: only what was touched is there
            self.memory = mmap.mmap(shared.fileno(), size)
            descriptors = (theirs.fileno(), shared.fileno(), lock.fileno())
            self.child = subprocess.Popen(  # noqa: S603  # our own interpreter and module
                [sys.executable, "-c", _PROGRAM, *map(str, descriptors), text, json.dumps(sys.path)],
                pass_fds=descriptors, stdin=subprocess.DEVNULL, env=environment,
            )  # fmt: skip
        self._loop.add_reader(ours, self._receive)

    async def ask(self, body: bytes | bytearray) -> Picture:
        """Hand over one body, wait for its picture. Raises ConnectionError when the process is gone."""
        self.memory[: len(body)] = body
        self._reply = self._loop.create_future()
        self._received.clear()
        self.link.send(decoder.REQUEST.pack(len(body)))  # eight bytes into an empty buffer: this never waits
        picture = await self._reply
        self.answered = True
        return picture

    def _receive(self) -> None:
        """Whatever the child has sent; called by the loop. One watch for the child's life, not one for each picture."""
        try:
            part = self.link.recv(_REPLY_BYTES)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        self._received += part
        if not part:
            self._loop.remove_reader(self.link)
        if self._reply.done():
            return
        if not part:
            self._reply.set_exception(ConnectionResetError("the decoder is gone"))
        elif (picture := decoder.unpack(self._received, self.memory)) is not None:
            self._reply.set_result(picture)

    def end(self) -> str:
        """Kill and reap; says how it had ended."""
        code = self.child.poll()
        self._loop.remove_reader(self.link)
        self.link.close()
        self.memory.close()
        self.child.kill()
        last = self.child.wait()
        return f"signal {-last}" if code is not None and last < 0 else f"exit {code}"


def _shared_file() -> BinaryIO:
    """A file without a name that lives in memory where the system can do that."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("curate-body"), "w+b")
    return cast(BinaryIO, tempfile.TemporaryFile())


class DecoderPool:
    """At most `count` processes, started when needed; used from one event loop."""

    def __init__(self, settings: ImageSettings, count: int, body_bytes: int, decode_s: float = DECODE_S) -> None:
        """`body_bytes`: of the largest body that will be handed in. `decode_s`: for one picture."""
        self._settings, self._count, self._body_bytes, self._decode_s = settings, count, body_bytes, decode_s
        self._idle: asyncio.LifoQueue[_Process | None] = asyncio.LifoQueue()
        self._all: set[_Process] = set()
        self._in_vain = 0
        self._lock = _shared_file()  # of whoever decodes something large
        for _ in range(count):
            self._idle.put_nowait(None)  # started when first needed

    async def close(self) -> None:
        """End all processes."""
        for process in list(self._all):
            self._end(process)
        self._lock.close()

    async def process(self, body: bytes | bytearray) -> Picture:
        """The picture of a body, computed in one of the processes. Raises StageError when none can be started."""
        picture = await self._try(body)
        if picture.status == "decode_crash" and "longer than" not in (picture.error or ""):
            picture = await self._try(body)
        return picture

    async def _try(self, body: bytes | bytearray) -> Picture:
        process = await self._idle.get()
        keep: _Process | None = None
        try:
            if process is None:
                process = _Process(self._settings, self._body_bytes, self._lock)
                self._all.add(process)
            limit = self._decode_s if process.answered else self._decode_s + START_S
            async with asyncio.timeout(limit):
                picture = await process.ask(body)
            keep, self._in_vain = process, 0
            return picture
        except TimeoutError:
            return Picture("decode_crash", f"longer than {self._decode_s:g} s in the decoder")
        except OSError:
            assert process is not None
            await asyncio.sleep(0.05)  # let it become a zombie, so that its signal is known
            how = self._end(process)
            if not process.answered:
                self._in_vain += 1
                if self._in_vain > STARTS_IN_VAIN * (self._count + 1):
                    raise StageError(
                        f"decoder processes end before their first picture ({how}); is opencv installed on the worker?"
                    ) from None
            return Picture("decode_crash", f"the decoder ended with {how}")
        finally:
            if keep is None and process in self._all:
                self._end(process)
            self._idle.put_nowait(keep)

    def _end(self, process: _Process) -> str:
        self._all.discard(process)
        with contextlib.suppress(ProcessLookupError):
            return process.end()
        return "exit"
