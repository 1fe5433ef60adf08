"""More than two hundred URLs that hurt, each with the status that it must get."""

import asyncio
import gzip
import os
import random
import socket
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from curate.fetch.downloader import Row
from curate.fetch.resolver import Found
from curate.schema import STATUSES
from tests.fetch.conftest import Fetch
from tests.fetch.hostile_server import HostileServer, Request, answer

Table = list[tuple[str | None, tuple[str, ...]]]


def spellings(port: int) -> Table:
    """The forbidden 127.0.0.2 and other inside addresses in every spelling; all with a port where the decoy listens."""
    hosts = [
        "127.0.0.2", "2130706434", "0x7f000002", "0x7f.0.0.2", "0177.0.0.2", "017700000002", "127.2", "127.0.2",
        "0127.0.0.2", "127.0.0.2.", "[::ffff:127.0.0.2]", "[::ffff:7f00:2]", "[0:0:0:0:0:ffff:127.0.0.2]", "[::1]",
        "[::]", "[64:ff9b::7f00:2]", "0.0.0.0", "0", "169.254.169.254", "[fd00:ec2::254]", "100.100.100.200",
        "192.0.0.192", "168.63.129.16", "10.0.0.1", "172.16.0.1", "192.168.0.1", "2852039166", "0xa9fea9fe",
        "[fe80::1]", "224.0.0.1", "255.255.255.255", "①②⑦.⓪.⓪.②", "127。0。0。2",
    ]  # fmt: skip
    octal = "0127.0.0.2"  # 87.0.0.2 read as octal: public, but without a contact address nothing public is asked
    table: Table = [(f"http://{host}:{port}/x{number}.jpg", ("blocked_address",)) for number, host in enumerate(hosts)]
    assert octal in hosts
    return table + [(f"https://{host}:{port}/", ("blocked_address",)) for host in hosts[:16]]


def nonsense() -> Table:
    """What is no URL of the web."""
    texts: list[str | None] = [
        None, "", " ", "\n", "x", "/etc/passwd", "//127.0.0.1/x", "file:///etc/passwd", "file://localhost/etc/passwd",
        "FiLe:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1:70/_x", "dict://127.0.0.1:11211/stat", "s3://b/k",
        "data:image/png;base64,iVBORw0KGgo=", "javascript:alert(1)", "jar:http://h/x!/", "ldap://127.0.0.1/", "ws://h/",
        "http:", "http:/", "http://", "http:///x.jpg", "http://:80/", "http://[", "http://[::1", "http://]/",
        "http://127.0.0.1:0/", "http://127.0.0.1:65536/", "http://127.0.0.1:-1/", "http://127.0.0.1:http/",
        "http://u:p@127.0.0.1/", "http://u@127.0.0.1/", "http://@127.0.0.1:99999/", "http://127.0.0.1/\x00",
        "http://127.0.0.1/\r\nHost: x", "http://127.0.0.1/a\tb", "http://exa\nmple/", "http://256.1.1.1/", "http://1.2.3.4.5/",
        "http://0x/", "http://99999999999/", "http://" + "a." * 5000, "http://127.0.0.1/" + "a" * 9000,
        "\ud800", "http://\ud800/", "http:\\\\127.0.0.1\\x", "htp://127.0.0.1/x", "http//127.0.0.1/x", "about:blank",
    ]  # fmt: skip
    return [(text, ("bad_url", "dns", "blocked_address")) for text in texts]


def bad_answers(server: HostileServer, jpeg: bytes) -> Table:
    """Status lines, headers and bodies that lie."""
    table: Table = []

    def add(name: str, data: bytes, *statuses: str) -> None:
        table.append((server.static(f"/answer/{name}", data), statuses))

    for code in (400, 401, 402, 403, 404, 405, 406, 408, 410, 416, 418, 421, 429, 451, 499, 600, 999):
        add(f"status{code}", answer(jpeg, f"{code} No"), "http_4xx")
    for code in (500, 501, 502, 503, 504, 505, 507, 520, 521, 522, 525, 599):
        add(f"status{code}", answer(jpeg, f"{code} No"), "http_5xx")
    for code in (300, 304, 305, 306):
        add(f"status{code}", answer(b"", f"{code} Odd"), "bad_url")
    tags = ("noai", "noimageai", "noindex", "noimageindex", "noml", "none", "curate: noai", "all, noai", "NOAI")
    for number, tag in enumerate(tags):
        add(f"robots-tag{number}", answer(jpeg, "200 OK", f"X-Robots-Tag: {tag}"), "opted_out")
    add("two-tags", answer(jpeg, "200 OK", "X-Robots-Tag: all", "x-robots-tag: noai"), "opted_out")
    add("tdm", answer(jpeg, "200 OK", "tdm-reservation: 1"), "opted_out")
    add("other-agent", answer(jpeg, "200 OK", "X-Robots-Tag: googlebot: noindex"), "ok")
    add("no-content", answer(b"", "204 No Content"), "empty")
    add("empty", answer(b""), "empty")
    add("html", answer(b"<html>not here</html>", "200 OK", "Content-Type: image/jpeg"), "not_image")
    add(
        "svg",
        answer(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "200 OK", "Content-Type: image/svg+xml"),
        "not_image",
    )
    add("text-type", answer(jpeg, "200 OK", "Content-Type: text/html"), "ok")
    add("announced", answer(b"x", length=10**12), "too_large")
    add("negative-length", answer(jpeg, length=-5), "connect")
    add("short", answer(jpeg, length=len(jpeg) + 1000), "too_slow", "connect")
    add("long", answer(jpeg, length=len(jpeg) // 2), "decode_error", "connect")
    add("two-lengths", answer(jpeg, "200 OK", "Content-Length: 3"), "connect")
    add("length-text", b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n" + jpeg, "connect")
    add("chunk-lies", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n" + jpeg, "connect")
    add("chunk-huge", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\n", "connect")
    add(
        "chunked",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(jpeg), jpeg),
        "ok",
    )
    add("not-http", b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "connect")
    add("garbage", os.urandom(64) + b"\r\n\r\n", "connect")
    add("version", b"HTTP/9.9 200 OK\r\nContent-Length: 0\r\n\r\n", "connect", "empty")
    add("huge-header", b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000 + b"\r\n\r\n", "connect")
    add("many-headers", b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 20_000 + b"\r\n", "connect")
    add("nul-header", b"HTTP/1.1 200 OK\r\nX\x00: a\r\n\r\n", "connect")
    add("binary-reason", b"HTTP/1.1 404 \xff\xfe\x80\r\nContent-Length: 0\r\n\r\n", "http_4xx", "connect")
    add("gzip", answer(gzip.compress(jpeg), "200 OK", "Content-Encoding: gzip"), "ok")
    add("deflate", answer(zlib.compress(jpeg), "200 OK", "Content-Encoding: deflate"), "ok")
    bomb = gzip.compress(bytes(200_000_000), 6)
    add("gzip-bomb", answer(bomb, "200 OK", "Content-Encoding: gzip"), "too_large")
    add("gzip-broken", answer(b"\x1f\x8b\x08garbage", "200 OK", "Content-Encoding: gzip"), "decode_error")
    add("gzip-cut", answer(gzip.compress(jpeg)[:-40], "200 OK", "Content-Encoding: gzip"), "decode_error")
    add("brotli", answer(b"\x0b\x02\x80hello\x03", "200 OK", "Content-Encoding: br"), "decode_error")
    add("two-encodings", answer(jpeg, "200 OK", "Content-Encoding: gzip, gzip"), "decode_error")
    for name in ("aws-chunked", "utf-8", "none", "identity"):
        add(f"encoding-{name}", answer(jpeg, "200 OK", f"Content-Encoding: {name}"), "ok")
    add("encoding-list", answer(gzip.compress(jpeg), "200 OK", "Content-Encoding: identity, gzip"), "ok")
    add("length-digits", answer(jpeg, "200 OK").replace(b"Length: ", b"Length: " + b"9" * 5000), "too_large")
    add("retry-digit", b"HTTP/1.1 503 X\r\nRetry-After: \xc2\xb2\r\nContent-Length: 0\r\n\r\n", "http_5xx")
    add("status-name", answer(jpeg, "200 OK", "X-Robots-Tag: noai", "HTTP/1.1: 200"), "opted_out")
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n" % (len(jpeg), jpeg)
    add("trailer", chunks + b"HTTP/1.1: 302\r\nLocation: http://127.0.0.2/\r\n\r\n", "ok")
    add("cookie", answer(jpeg, "200 OK", "Set-Cookie: id=1; Domain=127.0.0.1"), "ok")
    return table


def redirects(server: HostileServer, decoy: HostileServer, jpeg: bytes) -> Table:
    """Where a Location must not lead."""
    server.static("/good.jpg", answer(jpeg))
    table: Table = []

    def add(name: str, target: str, *statuses: str, code: int = 302, headers: Sequence[str] = ()) -> None:
        data = answer(b"", f"{code} Moved", f"Location: {target}", *headers)
        table.append((server.static(f"/redirect/{name}", data), statuses))

    for number, (url, statuses) in enumerate(spellings(decoy.port)):
        assert url is not None
        if url.isascii():
            add(f"inside{number}", url, *statuses)
    for number, target in enumerate([
        "file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/", "data:image/png;base64,AAAA", "javascript:x",
        "http://u:p@127.0.0.1/", "http://127.0.0.1:99999/", "http://[::1/", "//127.0.0.1:0/x",
    ]):  # fmt: skip
        add(f"odd{number}", target, "bad_url")
    for code in (301, 302, 303, 307, 308):
        add(f"code{code}", "/good.jpg", "ok", code=code)
    add("opted", "/good.jpg", "opted_out", headers=["X-Robots-Tag: noai"])
    add("opted-tdm", "/good.jpg", "opted_out", headers=["tdm-reservation: 1"])
    add("self", "/redirect/self", "bad_url")
    add("empty", "", "bad_url")
    for hop in range(8):
        target = f"/redirect/chain{hop + 1}" if hop < 7 else "/good.jpg"
        add(f"chain{hop}", target, "ok" if hop > 2 else "bad_url")  # from chain3 on there are five hops or fewer
    return table


def slow(server: HostileServer, jpeg: bytes) -> Table:
    """What never ends."""

    async def hang(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async def drip_head(request: Request, writer: asyncio.StreamWriter) -> None:
        for byte in answer(jpeg)[:30]:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.2)

    async def drip_body(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"", length=len(jpeg)))
        for byte in jpeg[:30]:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.2)

    async def endless(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while True:
            writer.write(bytes(65536))
            await writer.drain()

    async def reset(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(jpeg[:50], length=len(jpeg)))
        writer.transport.abort()

    return [
        (server.route("/slow/hang", hang), ("timeout",)),
        (server.route("/slow/head", drip_head), ("timeout",)),
        (server.route("/slow/body", drip_body), ("too_slow",)),
        (server.route("/slow/endless", endless), ("too_large",)),
        (server.route("/slow/reset", reset), ("connect",)),
    ]


def test_every_hostile_url_gets_its_status(
    server: HostileServer, decoy: HostileServer, jpeg: bytes, fetch: Fetch
) -> None:
    """A trick of a URL, a server or a redirect crashes, hangs, fills memory, reaches inside, or gets the wrong name."""
    table = [
        *spellings(decoy.port), *nonsense(), *bad_answers(server, jpeg), *redirects(server, decoy, jpeg),
        *slow(server, jpeg), ("http://127.0.0.1:1/x.jpg", ("connect",)), ("http://dead.invalid/x.jpg", ("dns",)),
        (server.base.replace("http:", "https:") + "/good.jpg", ("tls", "timeout")),
    ]  # fmt: skip
    random.Random(0).shuffle(table)
    assert len(table) >= 200
    before, start = psutil.Process().memory_info().rss, time.monotonic()
    outcomes = fetch(
        [url for url, _ in table], max_bytes=5_000_000, min_rate_bytes_s=0, timeout_s=4, first_byte_timeout_s=3
    )
    assert time.monotonic() - start < 60
    assert psutil.Process().memory_info().rss - before < 300e6, "memory is not bounded"
    wrong = [
        (url and url[:100], outcome.status, outcome.error, statuses)
        for (url, statuses), outcome in zip(table, outcomes, strict=True)
        if outcome.status not in statuses
    ]
    assert not wrong
    assert {outcome.status for outcome in outcomes} <= set(STATUSES)
    assert all((outcome.status == "ok") == bool(outcome.image) for outcome in outcomes)
    assert decoy.connections == 0
    assert not any("cookie" in request.headers or "authorization" in request.headers for request in server.seen)


def test_rebinding_from_public_to_private_is_refused(server: HostileServer, decoy: HostileServer, fetch: Fetch) -> None:
    """A name that is public when it is checked and private when it is connected to reaches inside."""
    asked: Counter[str] = Counter()

    async def lookup(host: str) -> Sequence[Found]:
        asked[host] += 1
        if host.startswith("mixed"):
            return [(socket.AF_INET, "127.0.0.2"), (socket.AF_INET, "127.0.0.1")]
        first = host.startswith("turns") and asked[host] == 1
        return [(socket.AF_INET, "127.0.0.1" if first else "127.0.0.2")]

    server.static("/a.jpg", answer(b"", "302 Found", f"Location: http://turns.example:{decoy.port}/x"))
    urls = [
        f"http://inside.example:{decoy.port}/x.jpg",
        f"http://turns.example:{server.port}/a.jpg",  # its redirect leads to itself, on the decoy's port
        f"http://mixed.example:{decoy.port}/x.jpg",  # only its allowed address may be tried: nobody listens there
    ]
    outcomes = fetch(urls, lookup=lookup, robots=False)
    assert [outcome.status for outcome in outcomes] == ["blocked_address", "connect", "connect"]
    assert asked["turns.example"] == 1, "one answer is used for both hops: the second, private one is never asked for"
    assert decoy.connections == 0


def test_nothing_leaks_from_the_environment(
    server: HostileServer,
    decoy: HostileServer,
    jpeg: bytes,
    fetch: Fetch,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A proxy, a netrc password or a cookie of whoever runs this reaches strangers."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, decoy.base)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    server.static("/a.jpg", answer(jpeg, "200 OK", "Set-Cookie: a=b"))
    server.static("/b.jpg", answer(jpeg))
    outcomes = fetch([server.base + "/a.jpg", server.base + "/b.jpg"], contact="who@example.org", per_host=1)
    assert [outcome.status for outcome in outcomes] == ["ok", "ok"]
    for request in server.seen:
        assert not {"cookie", "authorization", "proxy-authorization"} & request.headers.keys()
        assert "who@example.org" in request.headers["user-agent"] and "curate/" in request.headers["user-agent"]
        assert request.headers["accept-encoding"] == "identity"


def test_rows_of_one_url_are_fetched_once_and_come_back_in_order(
    server: HostileServer, jpeg: bytes, fetch: Fetch
) -> None:
    """A URL in several rows is asked for several times, or rows come back in order of completion."""

    async def varied(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(random.random() / 50)
        writer.write(answer(jpeg))

    base = server.route("/v/*", varied)
    rows = [Row(f"{base}{number % 40}.jpg") for number in range(120)] + [Row(server.base + "/404")] * 3
    outcomes = fetch(rows)
    assert [outcome.status for outcome in outcomes] == ["ok"] * 120 + ["http_4xx"] * 3
    assert all(server.asked[f"/v/{number}.jpg"] == 1 for number in range(40)) and server.asked["/404"] == 1
