"""One HTTP exchange, with every limit that a hostile or broken server can run into, and who said no beforehand.

Each phase has its deadline: connect (also of a DNS lookup), first byte, the whole. Redirects are handed back, not
followed: the queue schedules them like any other request, so that every hop is checked and every host's cap holds.

The library is libcurl, by `benchmarks/bench_fetch.py --part transport` (its table: benchmarks/RESULTS.md).
"""

import asyncio
import resource
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import pycurl
from yarl import URL

from curate import __version__
from curate.config import FetchSettings
from curate.fetch.answer import Answer, Permits, Redirect, Temporary
from curate.fetch.consent import AGENTS, ROBOTS_BYTES, Robots, parse_robots
from curate.fetch.guard import BlockedAddress, Guard, is_address
from curate.fetch.outcome import Body, Refusal, Status, brief
from curate.fetch.resolver import CachingResolver, Lookup, server_lookup, system_lookup
from curate.fetch.transport import IDLE_CONNECTIONS, TransferError, Transport

MAX_REDIRECTS = 5
OTHER_DESCRIPTORS = 256  # files, decoders, Ray's own
_TLS = frozenset({
    pycurl.E_SSL_CONNECT_ERROR, pycurl.E_PEER_FAILED_VERIFICATION, pycurl.E_SSL_CERTPROBLEM, pycurl.E_SSL_CIPHER,
    pycurl.E_SSL_CACERT_BADFILE, pycurl.E_SSL_ISSUER_ERROR, pycurl.E_SSL_ENGINE_INITFAILED,
})  # fmt: skip
_LASTING: dict[int, Status] = {pycurl.E_COULDNT_RESOLVE_HOST: "dns", pycurl.E_URL_MALFORMAT: "bad_url"}
ROBOTS_KEPT_S = 24 * 3600.0  # RFC 9309 2.4: not longer than a day
ROBOTS_FAILED_S = 300.0
ROBOTS_HOSTS = 50_000
ROBOTS_MEMORY = 50_000_000  # bytes; one file of 500 kB can take 6 MB, and a hostile domain has names without end
ALLOW_ALL = Robots()


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
        _allow_descriptors(settings.concurrency + IDLE_CONNECTIONS + OTHER_DESCRIPTORS)
        if lookup is None:
            servers = settings.dns_servers
            lookup = (
                server_lookup(servers, settings.connect_timeout_s)
                if servers
                else system_lookup(settings.dns_concurrency)
            )
        self._resolver = CachingResolver(guard, lookup, settings.dns_concurrency, settings.connect_timeout_s)
        headers = [
            f"User-Agent: {user_agent(settings.contact)}",
            "Accept: image/*,*/*;q=0.5",
            "Accept-Encoding: identity",
        ]
        self._transport = Transport(guard, headers, settings.connect_timeout_s, settings.proxy)
        self._permits = Permits()
        self._robots: OrderedDict[URL, _Verdict] = OrderedDict()
        self._robots_memory = 0
        self._robots_running: dict[URL, asyncio.Task[_Verdict]] = {}

    async def close(self) -> None:
        """Close all connections."""
        for task in list(self._robots_running.values()):
            task.cancel()
        self._resolver.close()
        await self._transport.close()

    async def exchange(self, url: URL, budget_s: float, *, last: bool = False) -> Body | Redirect:
        """Ask for an image once; `budget_s` is for connect, headers and body together.

        `last` closes the connection afterwards (nothing more is wanted of this host). Raises Refusal, or Temporary
        where another try may help.
        """
        return await self._get(url, budget_s, self._settings.max_bytes, consent=True, close=last)

    async def _get(self, url: URL, budget_s: float, cap: int, *, consent: bool, close: bool = False) -> Body | Redirect:
        first_byte_s = min(budget_s, self._settings.first_byte_timeout_s)
        clock = asyncio.timeout(first_byte_s)
        answer = Answer(self._settings, cap, budget_s, clock, self._permits, consent=consent)
        kept = False
        try:
            await self._transfer(url, answer, clock, first_byte_s, budget_s, close=close)
            found = answer.result()
            kept = isinstance(found, Body)
            return found
        finally:
            if not kept:
                answer.release()

    async def _transfer(
        self, url: URL, answer: Answer, clock: asyncio.Timeout, first_byte_s: float, budget_s: float, *, close: bool
    ) -> None:
        """Let the answer come, as far as it does. Raises Refusal where it gave no verdict itself."""
        try:
            async with clock:
                try:
                    await self._transport.get(url, await self._addresses(url), answer, close=close)
                finally:
                    answer.end()
        except Refusal:
            raise
        except TimeoutError:
            if answer.begun and answer.verdict is None:
                raise Refusal("too_slow", f"body not complete in {budget_s:g} s") from None
            if answer.verdict is None:
                raise Temporary("timeout", f"no answer in {first_byte_s:g} s") from None
        except Exception as error:  # whatever the library says of hostile bytes costs this URL, not the shard
            if answer.verdict is None:
                raise _refusal(error) from None

    async def _addresses(self, url: URL) -> Sequence[str]:
        """Of a URL's host; empty where the URL names one itself, or a proxy does the looking up."""
        host = url.raw_host or ""
        if self._settings.proxy is not None or is_address(host):
            return ()
        try:
            return await self._resolver.resolve(host)
        except BlockedAddress as error:
            raise Refusal("blocked_address", brief(str(error))) from None
        except OSError as error:
            raise Refusal("dns", brief(str(error))) from None

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
        old = self._robots.pop(origin, None)
        self._robots[origin] = verdict
        self._robots_memory += verdict.robots.memory_bytes - (old.robots.memory_bytes if old is not None else 0)
        while len(self._robots) > ROBOTS_HOSTS or self._robots_memory > ROBOTS_MEMORY:
            _, oldest = self._robots.popitem(last=False)
            self._robots_memory -= oldest.robots.memory_bytes
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
            if refusal.status in ("too_large", "too_slow", "decode_error"):
                return ALLOW_ALL, Refusal("robots", f"robots.txt: {refusal.error}")
        return ALLOW_ALL, None  # 4xx, empty, endless redirects: there is no robots.txt


def _allow_descriptors(count: int) -> None:
    """Raise this process's soft limit: where sockets run out, sound URLs end as `connect`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        with suppress(ValueError, OSError):
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (count if hard == resource.RLIM_INFINITY else min(count, hard), hard)
            )


def _refusal(error: Exception) -> Refusal:
    """A failure on the way, as one of ours."""
    if isinstance(error, BlockedAddress):
        return Refusal("blocked_address", brief(str(error)))
    if not isinstance(error, TransferError):
        return Temporary("connect", brief(error))
    text = brief(str(error))
    if error.code in _TLS:
        return Refusal("tls", text)
    if error.code in _LASTING:
        return Refusal(_LASTING[error.code], text)
    return Temporary("timeout" if error.code == pycurl.E_OPERATION_TIMEDOUT else "connect", text)
