"""In which order and how many at once: one queue per host under one global cap.

A slow host holds at most its own few slots, a host that never answers holds one and is given up after a few failures,
and nobody is asked more than `per_host` things at a time. Redirects and retries go through the same queues, so each hop
is checked and counted where it leads.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from yarl import URL

from curate.config import FetchSettings
from curate.fetch.answer import Redirect, Temporary
from curate.fetch.blocklist import BlockList
from curate.fetch.client import MAX_REDIRECTS, Client
from curate.fetch.guard import Guard
from curate.fetch.outcome import Body, Refusal

BACKOFF_S = 0.5  # doubled with every try
LONGEST_WAIT_S = 30.0  # a server that asks for more (Retry-After) is left for `--retry`
WAITED_S = 90.0  # asked for with nothing given in between: such a host could hold the shard for hours
FAILURES_AT_FIRST = 2  # in a row, of a host that has never answered
FAILURES_LATER = 8  # in a row, of one that has
BODIES_IN_STORE = 8  # with these at the decoders the network is fast enough: no host is asked more at once
BODIES_WAITING = 64  # for a decoder; beyond, nothing new is asked for: memory, and what a kill loses, stay small
_UNREACHED = frozenset({"timeout", "dns", "connect", "tls"})

Finish = Callable[[int, Body], Awaitable[None]]


@dataclass
class _Job:
    """One URL under way. `text` is its spelling in the table or redirect; `spent_s` counts over all its hops."""

    number: int
    url: URL
    text: str
    hops: int = 0
    tries: int = 0
    spent_s: float = 0.0


@dataclass
class _Host:
    """What is known of one origin. `tokens`: entries in the ready queue; `limit`: requests allowed at once now."""

    limit: int
    jobs: deque[_Job] = field(default_factory=deque)
    tokens: int = 0
    running: int = 0
    failures: int = 0
    answered: bool = False
    gone: Refusal | None = None
    resume_at: float = 0.0
    waited_s: float = 0.0  # that it asked for since it last gave something


class Crawl:
    """Fetches one list of URLs; `finish(number, body)` is awaited once for each, in order of completion."""

    def __init__(self, client: Client, guard: Guard, lists: BlockList, settings: FetchSettings, finish: Finish) -> None:
        self._client, self._guard, self._lists, self._settings, self._finish = client, guard, lists, settings, finish
        self._hosts: dict[URL, _Host] = {}
        self._ready: asyncio.Queue[_Host | None] = asyncio.Queue()
        self._open = 0
        self._workers = 0
        self._finishing = 0
        self._eased = asyncio.Condition()

    async def run(self, urls: Sequence[tuple[int, str | None]]) -> None:
        """Fetch all (number, URL). Raises what `finish` raises; nothing else."""
        self._open = len(urls)
        if not urls:
            return
        try:
            async with asyncio.TaskGroup() as group:
                self._workers = min(self._settings.concurrency, len(urls))
                for _ in range(self._workers):
                    group.create_task(self._work())
                for number, text in urls:
                    await self._enter(_Job(number, URL(), text or ""), text, None)
        except* Exception as failed:
            raise failed.exceptions[0] from None

    async def _enter(self, job: _Job, text: str | None, base: URL | None) -> None:
        """Check a URL or a redirect's target and queue it at its host."""
        try:
            job.url = self._guard.parse(text, base)
            job.text = (text or "").strip() if base is None else str(job.url)
            reason = self._lists.refuses_url(job.url, job.text)
            if reason:
                raise Refusal("blocked_list", reason)
        except Refusal as refusal:
            await self._end(job, Body(refusal.status, refusal.error))
            return
        self._queue(job)

    def _queue(self, job: _Job) -> None:
        origin = job.url.origin()
        host = self._hosts.get(origin)
        if host is None:
            host = self._hosts[origin] = _Host(limit=1)  # the first request says whether anybody is there
        host.jobs.append(job)
        self._feed(host)

    def _feed(self, host: _Host) -> None:
        loop = asyncio.get_running_loop()
        if host.resume_at > loop.time():
            loop.call_at(host.resume_at + 0.001, self._feed, host)
            return
        while host.tokens < len(host.jobs) and host.tokens + host.running < host.limit:
            host.tokens += 1
            self._ready.put_nowait(host)

    async def _work(self) -> None:
        while True:
            if self._finishing >= BODIES_WAITING:
                async with self._eased:
                    await self._eased.wait_for(lambda: self._finishing < BODIES_WAITING)
            host = await self._ready.get()
            if host is None:
                return
            host.tokens -= 1
            if host.resume_at > asyncio.get_running_loop().time():
                self._feed(host)
            elif host.jobs:
                await self._serve(host, host.jobs.popleft())

    async def _serve(self, host: _Host, job: _Job) -> None:
        host.running += 1
        body: Body | None = None
        location: str | None = None
        try:
            if host.gone is not None:
                raise Refusal(host.gone.status, host.gone.error)
            answer = await self._ask(host, job)
            if isinstance(answer, Redirect):
                location = answer.location
            else:
                body = answer
            self._reached(host)
            host.waited_s = 0.0
        except Refusal as refusal:
            if not self._again(host, job, refusal):
                body = Body(refusal.status, refusal.error)
        finally:
            host.running -= 1
            self._feed(host)
        if location is not None:
            job.hops += 1
            if job.hops > MAX_REDIRECTS:
                body = Body("bad_url", f"more than {MAX_REDIRECTS} redirects")
            else:
                await self._enter(job, location, job.url)
        if body is not None:
            await self._end(job, body)

    async def _ask(self, host: _Host, job: _Job) -> Body | Redirect:
        await self._client.permit(job.url)
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            last = not host.jobs and host.running == 1
            return await self._client.exchange(job.url, max(0.1, self._settings.timeout_s - job.spent_s), last=last)
        finally:
            job.spent_s += loop.time() - start

    def _reached(self, host: _Host) -> None:
        """An answer: one request more at once, so that a host is met gently and only as fast as it and we can work.

        Each one more may be a connection more: 0.5 a picture were opened in bench_fetch when hosts always gained.
        """
        host.failures, host.answered = 0, True
        if self._finishing < BODIES_IN_STORE:
            host.limit = min(self._settings.per_host, host.limit + 1)

    def _again(self, host: _Host, job: _Job, refusal: Refusal) -> bool:
        """Keep the host's books; queue the job anew and say True where that may help."""
        if refusal.status in _UNREACHED:
            host.failures += 1
            if host.failures >= (FAILURES_LATER if host.answered else FAILURES_AT_FIRST) and host.gone is None:
                host.gone = Refusal(refusal.status, f"host given up: {refusal.error}")
        elif refusal.status != "blocked_address":
            self._reached(host)
        if not isinstance(refusal, Temporary) or job.tries >= self._settings.retries or host.gone is not None:
            return False
        wait = BACKOFF_S * 2**job.tries if refusal.after_s is None else refusal.after_s
        if wait > LONGEST_WAIT_S:
            return False
        loop = asyncio.get_running_loop()
        if refusal.after_s is not None:
            until = max(host.resume_at, loop.time() + wait)
            host.waited_s += until - max(host.resume_at, loop.time())
            host.resume_at = until
            if host.waited_s > WAITED_S:
                host.gone = Refusal(refusal.status, f"host given up: {refusal.error}")
                host.resume_at = 0.0
                return False
        job.tries += 1
        job.spent_s = 0.0
        loop.call_later(wait, self._queue, job)
        return True

    async def _end(self, job: _Job, body: Body) -> None:
        self._finishing += 1
        try:
            await self._finish(job.number, body)
        finally:
            body.release()
        self._finishing -= 1
        self._open -= 1
        async with self._eased:
            self._eased.notify(1 if self._open else self._workers)
        if self._open == 0:
            for _ in range(self._workers):
                self._ready.put_nowait(None)
