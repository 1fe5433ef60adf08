"""One HTTP exchange, with every limit that a hostile or broken server can run into.

Connections are kept and shared, sockets open only where the guard allows, each phase has its deadline, bodies are
counted while they arrive. Redirects are handed back, not followed: the queue schedules them like any other request, so
that every hop is checked and every host's cap holds. No cookies, no proxies, no netrc, no environment.

The library is aiohttp, by `benchmarks/bench_fetch.py --part transport` (its table: benchmarks/RESULTS.md). It speaks
HTTP/1.1 only, and that is wanted here: a table of URLs asks each host for few and large bodies, which gain nothing from
sharing one connection's flow control, and both HTTP/2 clients tried cost more for the same bytes than their own
HTTP/1.1: httpx 5.4 instead of 3.7 CPU-ms an image over TLS, libcurl 0.8 instead of 0.4. libcurl's HTTP/1.1 is cheaper
than aiohttp (0.4 and 0.9); its callbacks have not been put under the guard.
"""

import asyncio
import email.utils
import ssl
import time
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import aiohttp
from yarl import URL

from curate import __version__
from curate.config import FetchSettings
from curate.fetch.consent import AGENTS, ROBOTS_BYTES, Robots, opted_out, parse_robots
from curate.fetch.guard import BlockedAddress, Guard
from curate.fetch.outcome import Body, Refusal, Status, brief
from curate.fetch.resolver import CachingResolver, Lookup, server_lookup, system_lookup

MAX_REDIRECTS = 5
GRACE_S = 3.0  # before the minimum rate counts: a transfer's first window is slow on any long line
LARGE_BYTES = 1_000_000  # a body beyond this needs a permit, so that memory is bounded whatever max_bytes is
LARGE_AT_ONCE = 8
READ_BUFFER = 512 * 1024  # bytes; with aiohttp's 64 kB a 250 kB body woke the loop twice as often
KEEP_ALIVE_S = 3.0  # a host with work left is asked again in milliseconds; an idle TLS connection holds 0.4 MB
ROBOTS_KEPT_S = 24 * 3600.0  # RFC 9309 2.4: not longer than a day
ROBOTS_FAILED_S = 300.0
ROBOTS_HOSTS = 50_000
ALLOW_ALL = Robots()


class Temporary(Refusal):
    """A refusal that may not stand: the queue may ask again, not before `after_s` seconds."""

    def __init__(self, status: Status, error: str, after_s: float | None = None) -> None:
        super().__init__(status, error)
        self.after_s = after_s


@dataclass(frozen=True)
class Redirect:
    """The server named another URL; unchecked."""

    location: str


@dataclass(frozen=True)
class _Verdict:
    """What is known of a host's robots.txt until `until` (monotonic seconds)."""

    robots: Robots
    refusal: Refusal | None
    until: float


def user_agent(contact: str | None) -> str:
    """Who we are and whom to write to."""
    return f"{AGENTS[0]}/{__version__} (image dataset builder; +{contact or 'local run'})"


class Client:
    """Open inside a running event loop; not shared between loops."""

    def __init__(self, settings: FetchSettings, guard: Guard, lookup: Lookup | None = None) -> None:
        self._settings, self._guard = settings, guard
        if lookup is None:
            servers = settings.dns_servers
            lookup = (
                server_lookup(servers, settings.connect_timeout_s)
                if servers
                else system_lookup(settings.dns_concurrency)
            )
        resolver = CachingResolver(guard, lookup, settings.dns_concurrency, settings.connect_timeout_s)
        context = ssl.create_default_context()
        connector = aiohttp.TCPConnector(
            resolver=resolver, use_dns_cache=False, socket_factory=guard.open_socket, ssl=context,
            limit=0,  # the queue holds the caps; a second pool limit would only hide waiting inside the deadline
            keepalive_timeout=KEEP_ALIVE_S,
        )  # fmt: skip
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            read_bufsize=READ_BUFFER,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout_s),
            headers={
                "User-Agent": user_agent(settings.contact),
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            },
        )
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._robots: OrderedDict[URL, _Verdict] = OrderedDict()
        self._robots_running: dict[URL, asyncio.Task[_Verdict]] = {}

    async def close(self) -> None:
        """Close all connections."""
        for task in list(self._robots_running.values()):
            task.cancel()
        await self._session.close()

    async def exchange(self, url: URL, budget_s: float, *, last: bool = False) -> Body | Redirect:
        """Ask for an image once; `budget_s` is for connect, headers and body together.

        `last` closes the connection afterwards (nothing more is wanted of this host). Raises Refusal, or Temporary
        where another try may help.
        """
        return await self._get(url, budget_s, self._settings.max_bytes, consent=True, close=last)

    async def _get(self, url: URL, budget_s: float, cap: int, *, consent: bool, close: bool = False) -> Body | Redirect:
        reading = False
        first_byte_s = min(budget_s, self._settings.first_byte_timeout_s)
        loop = asyncio.get_running_loop()
        start = loop.time()
        headers = {"Connection": "close"} if close else None
        try:
            async with asyncio.timeout(first_byte_s) as clock:
                async with self._session.get(url, allow_redirects=False, headers=headers) as response:
                    reading = True
                    clock.reschedule(start + budget_s)
                    found = self._judge(response, consent)
                    if found is not None:
                        return found
                    return await self._read(response, cap, clock)
        except Refusal:
            raise
        except TimeoutError as error:
            if reading:
                raise Refusal("too_slow", f"body not complete in {budget_s:g} s") from None
            raise Temporary("timeout", brief(error) if str(error) else f"no answer in {first_byte_s:g} s") from None
        except Exception as error:  # whatever the library raises on hostile bytes costs this URL, not the shard
            raise _refusal(error) from None

    def _judge(self, response: aiohttp.ClientResponse, consent: bool) -> Redirect | None:
        """Refuse by status line and headers; None when the body is wanted."""
        code, headers = response.status, response.headers
        if consent and self._settings.opt_out and code < 400:
            reason = opted_out(headers.getall("X-Robots-Tag", ()), headers.getall("tdm-reservation", ()))
            if reason:
                raise Refusal("opted_out", reason)
        if 200 <= code < 300:
            return None
        if code in (301, 302, 303, 307, 308):
            location = headers.get("Location")
            if not location:
                raise Refusal("bad_url", f"HTTP {code} without a Location")
            return Redirect(location)
        if code == 429 or 500 <= code < 600:
            status: Status = "http_4xx" if code == 429 else "http_5xx"
            raise Temporary(status, f"HTTP {code}", _retry_after(headers.get("Retry-After")))
        raise Refusal("bad_url" if code < 400 else "http_4xx", f"HTTP {code}")

    async def _read(self, response: aiohttp.ClientResponse, cap: int, clock: asyncio.Timeout) -> Body:
        announced = response.content_length
        if announced is not None and announced > cap:
            raise Refusal("too_large", f"{announced} bytes announced; {cap} allowed")
        inflate = _inflater(response.headers.get("Content-Encoding"))
        loop = asyncio.get_running_loop()
        start, received = loop.time(), 0
        data = bytearray()
        permit = False
        try:
            while chunk := await response.content.readany():
                received += len(chunk)
                data += chunk if inflate is None else _inflate(inflate, chunk, cap + 1 - len(data))
                if max(received, len(data)) > cap:
                    raise Refusal("too_large", f"more than {cap} bytes")
                elapsed = loop.time() - start
                if elapsed > GRACE_S and received < self._settings.min_rate_bytes_s * elapsed:
                    raise Refusal("too_slow", f"{received / elapsed:.0f} bytes/s")
                if len(data) > LARGE_BYTES and not permit:
                    waited = loop.time()
                    deadline = clock.when()
                    clock.reschedule(None)
                    await self._large.acquire()
                    permit = True
                    clock.reschedule(None if deadline is None else deadline + loop.time() - waited)
        finally:
            if permit:
                self._large.release()
        if inflate is not None and not inflate.eof:
            raise Refusal("decode_error", "compressed body ends early")
        if not data:
            raise Refusal("empty", "no bytes in the body")
        return Body("ok", None, data)

    # ---- robots.txt --------------------------------------------------------------------------------------------

    async def permit(self, url: URL) -> None:
        """Raise Refusal unless the host's robots.txt, fetched when first needed, allows this URL."""
        if not self._settings.robots:
            return
        origin = url.origin()
        verdict = self._robots.get(origin)
        if verdict is None or verdict.until < time.monotonic():
            task = self._robots_running.get(origin)
            if task is None:
                task = asyncio.create_task(self._learn_robots(origin))
                self._robots_running[origin] = task
                task.add_done_callback(lambda _: self._robots_running.pop(origin, None))
            verdict = await asyncio.shield(task)
        if verdict.refusal is not None:
            raise Refusal(verdict.refusal.status, verdict.refusal.error)
        line = verdict.robots.refuses(url.raw_path_qs)
        if line:
            raise Refusal("robots", brief(line))

    async def _learn_robots(self, origin: URL) -> _Verdict:
        """Fetch and keep a host's robots.txt: no file allows all, a failing server forbids all (RFC 9309 2.3.1)."""
        robots, refusal = ALLOW_ALL, None
        for attempt in range(2):
            robots, refusal = await self._fetch_robots(origin)
            # A hanging host is not asked twice: each try costs the whole deadline, and a slot as long.
            if not isinstance(refusal, Temporary) or refusal.status == "timeout" or attempt:
                break
            await asyncio.sleep(0.5)
        verdict = _Verdict(robots, refusal, time.monotonic() + (ROBOTS_KEPT_S if refusal is None else ROBOTS_FAILED_S))
        self._robots[origin] = verdict
        while len(self._robots) > ROBOTS_HOSTS:
            self._robots.popitem(last=False)
        return verdict

    async def _fetch_robots(self, origin: URL) -> tuple[Robots, Refusal | None]:
        url = origin.with_path("/robots.txt")
        try:
            for _ in range(MAX_REDIRECTS + 1):
                answer = await self._get(url, self._settings.timeout_s, ROBOTS_BYTES, consent=False)
                if isinstance(answer, Body):
                    return parse_robots(answer.data), None
                url = self._guard.parse(answer.location, base=url)
        except Refusal as refusal:
            if refusal.status == "http_5xx" or (isinstance(refusal, Temporary) and refusal.status == "http_4xx"):
                return ALLOW_ALL, Temporary("robots", f"robots.txt: {refusal.error}")
            if refusal.status in ("timeout", "dns", "connect", "tls", "blocked_address"):
                kind = Temporary if isinstance(refusal, Temporary) else Refusal
                return ALLOW_ALL, kind(refusal.status, f"robots.txt: {refusal.error}")
            if refusal.status in ("too_large", "too_slow"):
                return ALLOW_ALL, Refusal("robots", f"robots.txt: {refusal.error}")
        return ALLOW_ALL, None  # 4xx, empty, endless redirects: there is no robots.txt


def _refusal(error: BaseException) -> Refusal:
    """A failure of the network library as one of ours."""
    cause: Any = getattr(error, "os_error", error)
    if isinstance(cause, BlockedAddress):
        return Refusal("blocked_address", brief(str(cause)))
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Refusal("dns", brief(str(cause)))
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        return Refusal("tls", brief(str(getattr(error, "certificate_error", cause))))
    if isinstance(error, aiohttp.InvalidURL | UnicodeError):
        return Refusal("bad_url", brief(error))
    return Temporary("connect", brief(error))


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value.strip()[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _inflater(encoding: str | None) -> "zlib._Decompress | None":
    """A decompressor for a body that came compressed although identity was asked for."""
    name = (encoding or "identity").strip().lower()
    if name in ("identity", ""):
        return None
    if name in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # gzip or zlib, by its header
    raise Refusal("decode_error", brief(f"Content-Encoding {name} was not asked for"))


def _inflate(inflate: "zlib._Decompress", chunk: bytes, room: int) -> bytes:
    try:
        return inflate.decompress(chunk, max(1, room))
    except zlib.error as error:
        raise Refusal("decode_error", brief(error)) from None
