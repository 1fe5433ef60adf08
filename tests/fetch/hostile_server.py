"""A web server on loopback that misbehaves on demand, and a decoy that must never be connected to.

Raw sockets on an asyncio loop in a thread: every byte that goes out is written by a handler, so lies in headers,
half answers and drips are possible. `asked` counts requests by path, `most_at_once` by host what ran concurrently.
"""

import asyncio
import ssl
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

Handler = Callable[["Request", asyncio.StreamWriter], Awaitable[None]]


class Request:
    """One request: path with query, and headers in lower case."""

    def __init__(self, head: bytes) -> None:
        lines = head.decode("latin-1").split("\r\n")
        self.path = lines[0].split(" ")[1]  # of a request to a proxy: the whole URL
        self.headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()


def answer(body: bytes = b"", status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    """A complete HTTP answer."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


class HostileServer:
    """Serve `routes` (path without query, or a prefix ending in `*`) on 127.0.0.1."""

    def __init__(self, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self.host, self.port, self._tls = host, 0, tls
        self.routes: dict[str, Handler] = {}
        self.asked: Counter[str] = Counter()
        self.seen: list[Request] = []
        self.connections = self.running = self.most_at_once = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    @property
    def base(self) -> str:
        """`http://host:port`, or https."""
        return f"http{'s' if self._tls else ''}://{self.host}:{self.port}"

    def static(self, path: str, data: bytes) -> str:
        """Answer `path` with these exact bytes; gives the URL."""

        async def handle(request: Request, writer: asyncio.StreamWriter) -> None:
            writer.write(data)

        return self.route(path, handle)

    def route(self, path: str, handler: Handler) -> str:
        """Answer `path` with a handler; gives the URL."""
        self.routes[path] = handler
        return self.base + path.rstrip("*")

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)

        async def start() -> Any:
            server = await asyncio.start_server(self._serve, self.host, 0, limit=1 << 20, ssl=self._tls)
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                request = Request(await reader.readuntil(b"\r\n\r\n"))
                path = request.path.partition("?")[0]
                self.asked[path] += 1
                self.seen.append(request)
                handler = self.routes.get(path)
                if handler is None:
                    prefixes = [name for name in self.routes if name.endswith("*") and path.startswith(name[:-1])]
                    handler = self.routes[max(prefixes, key=len)] if prefixes else None
                self.running += path != "/robots.txt"
                self.most_at_once = max(self.most_at_once, self.running)
                try:
                    if handler is None:
                        writer.write(answer(b"nothing here", "404 Not Found"))
                    else:
                        await handler(request, writer)
                    await writer.drain()
                finally:
                    self.running -= path != "/robots.txt"
                if request.headers.get("connection") == "close":
                    break
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    def close(self) -> None:
        """Stop serving."""

        async def end() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)
            self._loop.call_soon(self._loop.stop)

        asyncio.run_coroutine_threadsafe(end(), self._loop)
        self._thread.join(5)
