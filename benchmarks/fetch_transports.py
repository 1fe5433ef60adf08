"""The same downloads by several client libraries, bytes only: what `bench_fetch.py --part transport` compares.

Each function fetches all URLs with up to 64 requests at once, as the library's own documentation suggests for speed,
and returns how many bodies were images. None checks addresses or sizes: this chooses a library, it is not a fetcher.
"""

import asyncio
import ssl
from collections.abc import Callable, Sequence

AT_ONCE = 64


async def _spread(table: Sequence[str], one: Callable) -> int:
    waiting = iter(table)

    async def work() -> int:
        found = 0
        for url in waiting:
            found += (await one(url))[:2] == b"\xff\xd8"
        return found

    return sum(await asyncio.gather(*(work() for _ in range(AT_ONCE))))


async def _aiohttp(table: Sequence[str]) -> int:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0, ssl=ssl.create_default_context())
    async with aiohttp.ClientSession(connector=connector, read_bufsize=512 * 1024, auto_decompress=False) as session:

        async def one(url: str) -> bytes:
            async with session.get(url) as response:
                return await response.read()

        return await _spread(table, one)


def aiohttp_asyncio(table: Sequence[str]) -> int:
    """aiohttp on asyncio's own loop."""
    return asyncio.run(_aiohttp(table))


def aiohttp_uvloop(table: Sequence[str]) -> int:
    """aiohttp on uvloop."""
    import uvloop

    return uvloop.run(_aiohttp(table))


async def _httpx(table: Sequence[str], http2: bool) -> int:
    import httpx

    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
    async with httpx.AsyncClient(http2=http2, limits=limits, verify=ssl.create_default_context(), timeout=30) as client:

        async def one(url: str) -> bytes:
            return (await client.get(url)).content

        return await _spread(table, one)


def httpx_http1(table: Sequence[str]) -> int:
    """httpx, HTTP/1.1."""
    return asyncio.run(_httpx(table, http2=False))


def httpx_http2(table: Sequence[str]) -> int:
    """httpx with HTTP/2 on offer (the bench server answers HTTP/1.1; this is the cost of having it)."""
    import h2  # noqa: F401

    return asyncio.run(_httpx(table, http2=True))


def pycurl_multi(table: Sequence[str]) -> int:
    """libcurl's multi interface."""
    from io import BytesIO

    import pycurl

    multi, found, waiting, busy = pycurl.CurlMulti(), 0, list(reversed(table)), 0
    idle = [pycurl.Curl() for _ in range(AT_ONCE)]
    while waiting or busy:
        while waiting and idle:
            handle = idle.pop()
            handle.body = BytesIO()
            handle.setopt(pycurl.URL, waiting.pop())
            handle.setopt(pycurl.CAINFO, ssl.get_default_verify_paths().cafile)
            handle.setopt(pycurl.WRITEDATA, handle.body)
            multi.add_handle(handle)
            busy += 1
        while multi.perform()[0] == pycurl.E_CALL_MULTI_PERFORM:
            pass
        _, done, failed = multi.info_read()
        for handle in [*done, *(entry[0] for entry in failed)]:
            found += handle.body.getvalue()[:2] == b"\xff\xd8"
            multi.remove_handle(handle)
            idle.append(handle)
            busy -= 1
        multi.select(1.0)
    return found


def urllib_threads(table: Sequence[str]) -> int:
    """urllib in threads, a connection per image: img2dataset's way."""
    import urllib.request
    from concurrent.futures import ThreadPoolExecutor

    def one(url: str) -> bool:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.read()[:2] == b"\xff\xd8"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(one, table))


LIBRARIES: dict[str, Callable[[Sequence[str]], int]] = {
    "aiohttp": aiohttp_asyncio,
    "aiohttp-uvloop": aiohttp_uvloop,
    "httpx": httpx_http1,
    "httpx-h2": httpx_http2,
    "pycurl": pycurl_multi,
    "urllib-threads": urllib_threads,
}
