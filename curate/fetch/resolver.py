"""Names to addresses: cached, failures too, with few lookups at once.

Most failures of a web-scale download are the resolver giving up under load (RECIPES 14 B), so a name is looked up once
for all its images, a dead name is remembered, and at most `concurrency` lookups run at a time. Only addresses that the
guard allows are handed out.
"""

import asyncio
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from curate.fetch.guard import BlockedAddress, Guard

FOUND_S = 600.0  # seconds; longer than most records live, shorter than a shard's worth of moving sites
FAILED_S = 60.0
CACHED_NAMES = 200_000  # 100 MB at worst
ADDRESSES = 16  # of a name: a hostile answer holds thousands

Found = tuple[socket.AddressFamily, str]
Lookup = Callable[[str], Awaitable[Sequence[Found]]]


class CachingResolver:
    """`lookup` with a cache for answers and for failures.

    `lookup` takes a host name and gives (family, address) pairs or raises OSError.
    """

    def __init__(self, guard: Guard, lookup: Lookup, concurrency: int, timeout_s: float) -> None:
        self._guard, self._lookup, self._timeout_s = guard, lookup, timeout_s
        self._slots = asyncio.Semaphore(concurrency)
        self._known: OrderedDict[str, tuple[float, Sequence[Found] | OSError]] = OrderedDict()
        self._running: dict[str, asyncio.Task[Sequence[Found]]] = {}

    async def resolve(self, host: str) -> list[str]:
        """Allowed addresses of a host. Raises OSError when there is none, BlockedAddress when all are forbidden."""
        found = await self._addresses(host.lower().rstrip("."))
        usable = [address for _, address in found if self._guard.allows(address)]
        if found and not usable:
            raise BlockedAddress(f"{found[0][1]} is not a public address")
        return usable

    async def _addresses(self, host: str) -> Sequence[Found]:
        known = self._known.get(host)
        if known is not None and known[0] > time.monotonic():
            if isinstance(known[1], OSError):
                raise OSError(*known[1].args)
            return known[1]
        task = self._running.get(host)
        if task is None:
            task = asyncio.create_task(self._ask(host))
            self._running[host] = task
            task.add_done_callback(lambda done: self._forget(host, done))
        # Shielded: one image's deadline must not end the lookup for the others.
        return await asyncio.shield(task)

    def _forget(self, host: str, task: "asyncio.Task[Sequence[Found]]") -> None:
        self._running.pop(host, None)
        if not task.cancelled():
            task.exception()  # seen: nobody may have waited to the end

    async def _ask(self, host: str) -> Sequence[Found]:
        answer: Sequence[Found] | OSError
        async with self._slots:
            try:
                answer = (await asyncio.wait_for(self._lookup(host), self._timeout_s))[:ADDRESSES]
                if not answer:
                    answer = OSError("no address")
            except TimeoutError:
                answer = OSError(f"no answer in {self._timeout_s:g} s")
            except (OSError, UnicodeError) as error:
                answer = OSError(*error.args)
        failed = isinstance(answer, OSError)
        self._known[host] = (time.monotonic() + (FAILED_S if failed else FOUND_S), answer)
        while len(self._known) > CACHED_NAMES:
            self._known.popitem(last=False)
        if isinstance(answer, OSError):
            raise answer
        return answer

    def close(self) -> None:
        """Give up running lookups."""
        for task in list(self._running.values()):
            task.cancel()


def system_lookup(threads: int) -> Lookup:
    """The machine's own resolver (getaddrinfo) in at most `threads` threads of its own."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="curate-dns")

    def ask(host: str) -> Sequence[Found]:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
        return [(socket.AddressFamily(family), str(target[0])) for family, _, _, _, target in infos]

    async def lookup(host: str) -> Sequence[Found]:
        return await asyncio.get_running_loop().run_in_executor(pool, ask, host)

    return lookup


def server_lookup(servers: Sequence[str], timeout_s: float) -> Lookup:
    """Named DNS servers (`fetch.dns_servers`), asked directly by c-ares."""
    import aiodns  # noqa: PLC0415  # only when servers are named; it brings its own event channel

    resolver = aiodns.DNSResolver(nameservers=list(servers), timeout=timeout_s, tries=2)

    async def lookup(host: str) -> Sequence[Found]:
        try:
            answer = await resolver.getaddrinfo(host, family=socket.AF_UNSPEC, type=socket.SOCK_STREAM)
        except aiodns.error.DNSError as error:
            raise OSError(*error.args) from None
        found: list[Found] = []
        for node in answer.nodes:
            address = node.addr[0]
            found.append(
                (socket.AddressFamily(node.family), address.decode() if isinstance(address, bytes) else address)
            )
        return found

    return lookup
