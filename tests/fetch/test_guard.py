"""The guard: what may be asked for and what may be connected to."""

import asyncio
import socket
from collections.abc import Sequence

import pytest
from yarl import URL

from curate.errors import ConfigError
from curate.fetch.guard import BlockedAddress, Guard
from curate.fetch.outcome import Refusal
from curate.fetch.resolver import CachingResolver, Found, server_lookup

PRIVATE = [
    "0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "169.254.169.254",
    "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.168.1.1", "198.18.0.1", "198.51.100.7",
    "203.0.113.9", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "168.63.129.16",
    "::", "::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "fc00::1",
    "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "::7f00:1", "3fff::1", "5f00::1",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "93.184.215.14", "172.32.0.1", "11.0.0.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]


@pytest.mark.parametrize("address", PRIVATE)
def test_special_addresses_are_refused(address: str) -> None:
    """A row of the table reads the cloud's metadata service or a database beside us."""
    assert not Guard().allows(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    """The guard refuses the web."""
    assert Guard().allows(address)
    assert not Guard(public=False).allows(address), "without a contact address nothing public may be asked"


def test_allow_networks_opens_only_what_it_names() -> None:
    """Opening a server of one's own opens the rest of loopback too."""
    guard = Guard(["127.0.0.1/32", "fd12::/16"])
    assert guard.allows("127.0.0.1") and guard.allows("::ffff:127.0.0.1") and guard.allows("fd12::5")
    assert not guard.allows("127.0.0.2") and not guard.allows("::1") and not guard.allows("fd13::5")
    with pytest.raises(ConfigError, match="allow_networks"):
        Guard(["127.0.0.1/8"])


@pytest.mark.parametrize("text", [
    "http://2130706434/", "http://0x7f000002/", "http://0x7f.0.0.2/", "http://0177.0.0.2/", "http://017700000002/",
    "http://127.2/", "http://127.0.2/", "http://127.0.0.2./", "http://[::ffff:127.0.0.2]/", "http://[::ffff:7f00:2]/",
    "http://[64:ff9b::7f00:2]/", "http://[::1]/", "http://①②⑦.⓪.⓪.②/", "http://169.254.169.254/latest/meta-data/",
    "http://0/", "http://[::]/", "http://2852039166/", "HTTP://0X7F.2/",
])  # fmt: skip
def test_every_spelling_of_a_forbidden_address_is_seen(text: str) -> None:
    """An octal, decimal, short, full-width or mapped spelling passes where the dotted one does not."""
    with pytest.raises(Refusal) as refused:
        Guard(["127.0.0.1/32"]).parse(text)
    assert refused.value.status == "blocked_address"


@pytest.mark.parametrize("text", [
    None, "", "   ", "x", "/relative.jpg", "//host/x.jpg", "file:///etc/passwd", "FILE:///etc/passwd", "ftp://h/x",
    "gopher://h/x", "data:image/png;base64,AAAA", "javascript:alert(1)", "s3://b/k", "http://", "http:///x", "http://:80/",
    "http://u:p@h.example/x", "http://u@h.example/", "http://h.example:0/", "http://h.example:65536/",
    "http://h.example:x/", "http://[::1/", "http://h.example/a\r\nX: y", "http://h.example/\x00", "http://h\t.example/",
    "http://" + "a" * 9000, "http://999.999.999.999/", "http://1.2.3.4.5/", "http://127.0.0%2e2/", "http://%65vil.example/",
    "http://*/", "http://a,b/", "http://a b/", "http://a..b/", "http://./", "http://{a,b}/", "http://h%00.example/",
])  # fmt: skip
def test_what_is_no_http_url_is_a_bad_url(text: str | None) -> None:
    """A scheme that reads files, credentials that leak, or a header smuggled in by a line break."""
    with pytest.raises(Refusal) as refused:
        Guard().parse(text)
    assert refused.value.status == "bad_url"


def test_ordinary_urls_pass_and_redirects_are_relative_to_their_page() -> None:
    """The guard refuses unicode hosts, spaces in paths or relative redirects, which the web is full of."""
    guard = Guard()
    assert str(guard.parse(" https://bücher.example/ä b.jpg?x=%2F#frag ")) == (
        "https://xn--bcher-kva.example/%C3%A4%20b.jpg?x=/"
    )
    assert str(guard.parse("../y.jpg", URL("http://h.example/a/b/x.jpg"))) == "http://h.example/a/y.jpg"
    assert str(guard.parse("//cdn.example/y.jpg", URL("https://h.example/x"))) == "https://cdn.example/y.jpg"


def test_the_socket_itself_is_guarded() -> None:
    """A path around the resolver (literal address, library change) opens a socket unseen."""
    with pytest.raises(BlockedAddress):
        Guard().open_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80)))
    with pytest.raises(BlockedAddress):
        Guard().open_socket((socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 80, 0, 2)))
    Guard().open_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("1.1.1.1", 80))).close()


def test_resolver_caches_answers_and_failures_and_bounds_lookups() -> None:
    """A dead name is looked up once per image, and a shard floods the resolver (RECIPES 14 B)."""
    asked: list[str] = []
    running = most = 0

    async def lookup(host: str) -> Sequence[Found]:
        nonlocal running, most
        asked.append(host)
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        if host.startswith("dead"):
            raise OSError(-2, "Name or service not known")
        return [(socket.AF_INET, "10.0.0.1"), (socket.AF_INET, "1.1.1.1")]

    async def go() -> None:
        resolver = CachingResolver(Guard(), lookup, concurrency=3, timeout_s=1.0)
        names = [f"live{number}.example" for number in range(12)] * 3 + ["dead.example"] * 20
        results = await asyncio.gather(*(resolver.resolve(name) for name in names), return_exceptions=True)
        assert all(isinstance(result, OSError) for result in results[-20:])
        live = [result for result in results[:-20] if not isinstance(result, BaseException)]
        assert len(live) == 36 and {address for result in live for address in result} == {"1.1.1.1"}
        with pytest.raises(OSError, match="Name or service"):
            await resolver.resolve("dead.example")

    asyncio.run(go())
    assert sorted(asked) == sorted({*asked}), "a name was looked up twice"
    assert most <= 3


def test_names_that_resolve_to_private_addresses_are_blocked_not_dead() -> None:
    """A public name that points inside (DNS rebinding's first half) is reported as a dead site."""

    async def lookup(host: str) -> Sequence[Found]:
        return [(socket.AF_INET, "169.254.169.254"), (socket.AF_INET6, "::ffff:10.0.0.1")]

    async def go() -> None:
        with pytest.raises(BlockedAddress):
            await CachingResolver(Guard(), lookup, 1, 1.0).resolve("metadata.example")

    asyncio.run(go())


def test_a_lookup_that_hangs_ends() -> None:
    """A resolver that never answers holds the shard."""

    async def lookup(host: str) -> Sequence[Found]:
        await asyncio.sleep(60)
        return []

    async def go() -> None:
        with pytest.raises(OSError, match="no answer"):
            await CachingResolver(Guard(), lookup, 1, 0.05).resolve("slow.example")

    asyncio.run(go())


class _NameServer(asyncio.DatagramProtocol):
    """Answers A questions with one public address, and that `dead` names do not exist."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: object) -> None:
        question = data[12 : data.index(b"\0", 12) + 5]
        exists, wanted = b"dead" not in question, question[-4:-2] == b"\0\1"
        record = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + bytes([93, 184, 215, 14]) if exists and wanted else b""
        head = data[:2] + (b"\x81\x80" if exists else b"\x81\x83") + b"\0\1" + (b"\0\1" if record else b"\0\0")
        self._transport.sendto(head + bytes(4) + question + record, address)  # type: ignore[attr-defined]


def test_named_dns_servers_are_asked() -> None:
    """`dns_servers` is read and the machine's overloaded resolver is used all the same."""

    async def go() -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(_NameServer, local_addr=("127.0.0.1", 0))
        port = transport.get_extra_info("sockname")[1]
        resolver = CachingResolver(Guard(), server_lookup([f"127.0.0.1:{port}"], 5.0), 2, 10.0)
        assert await resolver.resolve("live.example") == ["93.184.215.14"]
        with pytest.raises(OSError, match="not found"):
            await resolver.resolve("dead.example")
        transport.close()

    asyncio.run(go())


def test_few_addresses_of_a_name_are_kept() -> None:
    """A hostile DNS answer of thousands of addresses, for each of many names, fills the memory."""

    async def lookup(host: str) -> Sequence[Found]:
        return [(socket.AF_INET, f"127.0.{number // 250}.{number % 250}") for number in range(4000)]

    async def run() -> list[str]:
        return await CachingResolver(Guard(["127.0.0.0/8"]), lookup, 1, 1.0).resolve("h.example")

    assert len(asyncio.run(run())) == 16
