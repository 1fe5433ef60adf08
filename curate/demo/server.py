"""Serve the demo's small web on 127.0.0.1, with all that was planted: `python -m curate.demo.server DIR`.

It listens on loopback only and answers only what `web.build` wrote. Where the machine has 127.0.0.2 it listens there
too, so that a client that follows a redirect to a forbidden address is caught in the act (`private_hits`) and not only
by a refused connection. It refuses to wait for ever: a hanging page is let go after `hang_s`.
"""

import argparse
import asyncio
import contextlib
import json
import socket
import threading
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from aiohttp import web as http

from curate.demo.web import DEFAULT_PORT, PRIVATE_HOST, Route, build
from curate.errors import PlanError

HOST: Final = "127.0.0.1"


class WebServer:
    """A context manager that serves `folder`, which `web.build` wrote, from a thread of its own.

    `hits` counts requests by path, `private_hits` those that reached the forbidden address (None: this machine has no
    such address to listen on).

    Raises:
        PlanError: on entry, when the port is taken.
    """

    def __init__(self, folder: Path, hang_s: float = 60.0) -> None:
        written = json.loads((folder / "web.json").read_text("utf-8"))
        self.port: int = written["settings"]["port"]
        self.hits: Counter[str] = Counter()
        self.private_hits: Counter[str] | None = None
        self._routes = {path: Route(**route) for path, route in written["routes"].items()}
        self._files = folder / "files"
        self._hang_s = hang_s
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="demo-web", daemon=True)
        self._runner: http.ServerRunner | None = None  # made on the loop that it belongs to

    @property
    def url(self) -> str:
        """http://127.0.0.1:port, without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        except OSError as error:
            self.__exit__(None, None, None)
            raise PlanError(
                f"the demo's web cannot listen on {HOST}:{self.port} ({error.strerror}); stop what uses this port, "
                f"perhaps another demo, or choose another port with --port"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._close()

    async def _start(self) -> None:
        self._runner = http.ServerRunner(http.Server(self._answer), shutdown_timeout=1.0)
        await self._runner.setup()
        await http.TCPSite(self._runner, HOST, self.port).start()
        with contextlib.suppress(OSError):  # macOS gives loopback the one address 127.0.0.1
            await http.TCPSite(self._runner, PRIVATE_HOST, self.port).start()
            self.private_hits = Counter()

    async def _stop(self) -> None:
        self._stopping.set()
        if self._runner is not None:
            await self._runner.cleanup()

    def _close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _answer(self, request: http.BaseRequest) -> http.StreamResponse:
        """Do what the plan says for this path; what is not planned is 404."""
        self.hits[request.path] += 1
        local = request.transport and request.transport.get_extra_info("sockname")
        if local and local[0] == PRIVATE_HOST and self.private_hits is not None:
            self.private_hits[request.path] += 1
        route = self._routes.get(request.path)
        if route is None:
            return http.Response(status=404, text="not in the plan")
        if route.behaviour == "hang":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self._hang_s)
            return http.Response(status=504, text="let go")
        body = await asyncio.to_thread((self._files / route.file).read_bytes) if route.file else b""
        if route.behaviour == "truncate":
            return await self._truncate(request, route, body)
        return http.Response(status=route.status, headers=route.headers, body=body)

    async def _truncate(self, request: http.BaseRequest, route: Route, body: bytes) -> http.StreamResponse:
        """Promise the whole body, send half of it, and hang up."""
        response = http.StreamResponse(headers={**route.headers, "Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        if request.transport is not None:
            request.transport.close()
        return response


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment, for tests."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """Build the web where it is not built yet, and serve it until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the web lies or shall be built")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    parser.add_argument("--seed", type=int, default=0, help="another seed, another web (0 to 99)")
    parser.add_argument("--hang-s", type=float, default=60.0, help="when hanging pages let go, seconds")
    settings = parser.parse_args()
    table = build(settings.folder, settings.port, settings.seed)
    try:
        with WebServer(settings.folder, settings.hang_s) as server:
            print(f"serving {server.url}; its URL table is {table}; Ctrl-C ends", flush=True)
            threading.Event().wait()
    except PlanError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
