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


async def _httpx(table: Sequence[str], version: str) -> int:
    import httpx

    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
    verify, two = ssl.create_default_context(), version == "HTTP/2"
    async with httpx.AsyncClient(http2=two, limits=limits, verify=verify, timeout=30) as client:

        async def one(url: str) -> bytes:
            answer = await client.get(url)
            return answer.content if answer.http_version == version else b""

        return await _spread(table, one)


def httpx_http1(table: Sequence[str]) -> int:
    """httpx, HTTP/1.1."""
    return asyncio.run(_httpx(table, "HTTP/1.1"))


def httpx_http2(table: Sequence[str]) -> int:
    """httpx, HTTP/2 (of the h2 package)."""
    import h2  # noqa: F401

    return asyncio.run(_httpx(table, "HTTP/2"))


def pycurl_http1(table: Sequence[str]) -> int:
    """libcurl's multi interface, HTTP/1.1."""
    return _pycurl(table, two=False)


def pycurl_http2(table: Sequence[str]) -> int:
    """libcurl's multi interface, HTTP/2: requests to one host share a connection."""
    return _pycurl(table, two=True)


def _pycurl(table: Sequence[str], *, two: bool) -> int:
    from io import BytesIO

    import pycurl

    if two and not pycurl.version_info()[4] & pycurl.VERSION_HTTP2:
        raise ImportError("this libcurl has no HTTP/2")
    version = pycurl.CURL_HTTP_VERSION_2_0 if two else pycurl.CURL_HTTP_VERSION_1_1
    expected = 3 if two else 2  # CURLINFO_HTTP_VERSION
    multi, found, waiting, busy = pycurl.CurlMulti(), 0, list(reversed(table)), 0
    multi.setopt(pycurl.M_PIPELINING, pycurl.PIPE_MULTIPLEX)
    idle = [pycurl.Curl() for _ in range(AT_ONCE)]
    while waiting or busy:
        while waiting and idle:
            handle = idle.pop()
            handle.body = BytesIO()
            handle.setopt(pycurl.URL, waiting.pop())
            handle.setopt(pycurl.CAINFO, ssl.get_default_verify_paths().cafile)
            handle.setopt(pycurl.HTTP_VERSION, version)
            handle.setopt(pycurl.PIPEWAIT, two)
            handle.setopt(pycurl.WRITEDATA, handle.body)
            multi.add_handle(handle)
            busy += 1
        while multi.perform()[0] == pycurl.E_CALL_MULTI_PERFORM:
            pass
        _, done, failed = multi.info_read()
        for handle in [*done, *(entry[0] for entry in failed)]:
            found += handle.body.getvalue()[:2] == b"\xff\xd8" and handle.getinfo(pycurl.INFO_HTTP_VERSION) == expected
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
    "pycurl": pycurl_http1,
    "pycurl-h2": pycurl_http2,
    "urllib-threads": urllib_threads,
}
