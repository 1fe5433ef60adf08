"""Through a proxy, over HTTP/2, and what large bodies may hold of the memory."""

import asyncio
import gzip
import resource
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypercorn.asyncio import serve
from hypercorn.config import Config
from pydantic import ValidationError

from curate.config import FetchSettings
from curate.errors import PlanError
from curate.fetch.answer import LARGE_AT_ONCE, LARGE_BYTES
from curate.fetch.blocklist import BlockList
from curate.fetch.client import Client
from curate.fetch.crawl import Crawl
from curate.fetch.downloader import check_settings
from curate.fetch.guard import Guard
from curate.fetch.outcome import Body
from curate.fetch.resolver import Found
from tests.fetch.conftest import Fetch
from tests.fetch.hostile_server import HostileServer, Request, answer


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """(certificate, key) of 127.0.0.1 and far.example, which this process trusts and nothing else."""
    files = (str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1,DNS:far.example"]
    made = subprocess.run([*command, *names, "-out", files[0], "-keyout", files[1]], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no openssl command here to make a certificate with")
    monkeypatch.setenv("SSL_CERT_FILE", files[0])
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    return files


def _tls(certificate: tuple[str, str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


def test_a_proxy_is_used_where_the_recipe_names_one(
    server: HostileServer, decoy: HostileServer, jpeg: bytes, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are looked up here although only the proxy can; or its password goes to the servers behind it."""
    monkeypatch.setenv("CURATE_PROXY_CREDENTIALS", "me:secret")
    monkeypatch.setenv("http_proxy", decoy.base)
    for name in ("far", "moved"):
        target = answer(b"", "302 Found", "Location: http://169.254.169.254/x")
        server.static(f"http://{name}.example/a.jpg", answer(jpeg) if name == "far" else target)
    urls = ["http://far.example/a.jpg", "http://moved.example/a.jpg", "http://10.0.0.1/a.jpg", "http://dead.example/"]
    outcomes = fetch(urls, proxy=server.base, contact="who@example.org")
    assert [outcome.status for outcome in outcomes] == ["ok", "blocked_address", "blocked_address", "http_4xx"]
    assert server.asked["http://far.example/robots.txt"] == 1
    assert all(request.headers["proxy-authorization"].startswith("Basic ") for request in server.seen)
    direct = fetch([server.static("/direct.jpg", answer(jpeg))])
    assert direct[0].status == "ok" and "proxy-authorization" not in server.seen[-1].headers


def test_a_proxy_tunnels_tls(
    server: HostileServer, jpeg: bytes, fetch: Fetch, certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy's own `200 Connection established` is taken for the picture's headers; its password goes further."""
    monkeypatch.setenv("CURATE_PROXY_CREDENTIALS", "me:secret")
    far = HostileServer(tls=_tls(certificate))
    far.static("/a.jpg", answer(jpeg))
    far.static("/opted.jpg", answer(jpeg, "200 OK", "X-Robots-Tag: noai"))
    tunnels = []

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tunnels.append((await reader.readuntil(b"\r\n\r\n")).decode())
        inner, outer = await asyncio.open_connection("127.0.0.1", far.port)
        writer.write(b"HTTP/1.1 200 Connection established\r\nX-Robots-Tag: noai\r\n\r\n")

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while part := await source.read(65536):
                target.write(part)
            target.close()

        await asyncio.gather(pump(reader, outer), pump(inner, writer), return_exceptions=True)

    listening = asyncio.run_coroutine_threadsafe(asyncio.start_server(serve_one, "127.0.0.1", 0), server._loop).result(
        5
    )
    port = listening.sockets[0].getsockname()[1]
    urls = ["https://far.example/a.jpg", "https://far.example/opted.jpg"]
    outcomes = fetch(urls, proxy=f"http://127.0.0.1:{port}", contact="who@example.org", robots=False)
    assert [outcome.status for outcome in outcomes] == ["ok", "opted_out"], outcomes
    assert tunnels and all(text.startswith("CONNECT far.example:443 ") for text in tunnels)
    assert all("Proxy-Authorization: Basic" in text for text in tunnels)
    assert not any("proxy-authorization" in request.headers for request in far.seen)
    far.close()


def test_a_proxy_in_the_plan() -> None:
    """A password lands in the recipe, and so in every release; or the other engine asks without the proxy."""
    with pytest.raises(ValidationError, match="pattern"):
        FetchSettings(proxy="http://me:secret@127.0.0.1:3128")
    with pytest.raises(PlanError, match=r"fetch\.proxy"):
        check_settings(FetchSettings(proxy="http://127.0.0.1:3128", engine="img2dataset", contact="who@example.org"))


@pytest.fixture
def two(certificate: tuple[str, str], jpeg: bytes) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that speaks HTTP/2 over TLS: its base URL, and the requests that it has seen."""
    seen: list[dict[str, Any]] = []

    async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        seen.append(scope)
        headers = [(b"content-length", b"%d" % len(jpeg))]
        if scope["path"] == "/opted.jpg":
            headers += [(b"x-robots-tag", b"all"), (b"x-robots-tag", b"noimageai")]
        status = 404 if scope["path"] in ("/gone.jpg", "/robots.txt") else 200
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": jpeg})

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = Config.from_mapping(bind=f"127.0.0.1:{port}", certfile=certificate[0], keyfile=certificate[1],
                                 alpn_protocols=["h2"], accesslog=None, errorlog=None)  # fmt: skip
    loop, ended = asyncio.new_event_loop(), asyncio.Event()
    running = loop.create_task(serve(application, config, shutdown_trigger=ended.wait))  # type: ignore[arg-type]
    thread = threading.Thread(target=loop.run_until_complete, args=(running,))
    thread.start()
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        threading.Event().wait(0.02)
    yield f"https://127.0.0.1:{port}", seen
    loop.call_soon_threadsafe(ended.set)
    thread.join(10)
    loop.close()


def test_http_2_over_tls(two: tuple[str, list[dict[str, Any]]], fetch: Fetch) -> None:
    """A server that offers HTTP/2 is asked over a connection for each picture, or its headers are not read."""
    base, seen = two
    urls = [f"{base}/{number}.jpg" for number in range(30)] + [f"{base}/gone.jpg", f"{base}/opted.jpg"]
    outcomes = fetch(urls, per_host=8)
    assert [outcome.status for outcome in outcomes] == [*["ok"] * 30, "http_4xx", "opted_out"]
    assert {scope["http_version"] for scope in seen} == {"2"} and len(seen) == 33
    assert len({scope["client"] for scope in seen}) <= 2


async def _loopback(host: str) -> Sequence[Found]:
    return [(socket.AF_INET, "127.0.0.1")]


def test_large_bodies_wait_for_their_turn(server: HostileServer, jpeg: bytes, fetch: Fetch) -> None:
    """A host of large files fills the memory; or a body that waited for its turn is cut, doubled or called slow."""
    started = finished = most = 0
    body = jpeg + bytes(3 * LARGE_BYTES)

    async def large(request: Request, writer: asyncio.StreamWriter) -> None:
        nonlocal started, finished, most
        started += 1
        most = max(most, started - finished)
        writer.write(answer(b"", length=len(body)) + body[: 2 * LARGE_BYTES])
        await asyncio.sleep(0.2)
        writer.write(body[2 * LARGE_BYTES :])
        await writer.drain()
        finished += 1

    server.route("/large/*", large)
    urls = [f"http://h{number}.example:{server.port}/large/{number}.jpg" for number in range(3 * LARGE_AT_ONCE)]
    outcomes = fetch(urls, lookup=_loopback, robots=False, timeout_s=3.0, first_byte_timeout_s=3.0)
    assert [outcome.status for outcome in outcomes] == ["ok"] * len(urls), [outcome.error for outcome in outcomes]
    assert {outcome.original_bytes for outcome in outcomes} == {len(body)}
    assert most > LARGE_AT_ONCE, "none had to wait: this test has shown nothing"


def test_a_large_body_that_is_refused_ends_alone(server: HostileServer, jpeg: bytes, fetch: Fetch) -> None:
    """Bytes that waited for their turn are refused, and whoever gave the turn loses its own picture by it."""

    async def large(request: Request, writer: asyncio.StreamWriter) -> None:
        first = int(request.path.rsplit("/", 1)[1]) < LARGE_AT_ONCE
        if not first:  # without a length, one chunk beyond the cap
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + bytes(LARGE_BYTES + 300_000))
            return
        writer.write(answer(b"", length=LARGE_BYTES + 1500) + jpeg + bytes(LARGE_BYTES + 500 - len(jpeg)))
        await writer.drain()
        await asyncio.sleep(1)
        writer.write(bytes(1000))

    server.route("/l/*", large)
    urls = [f"http://h{n}.example:{server.port}/l/{n}" for n in range(2 * LARGE_AT_ONCE)]
    outcomes = fetch(urls, lookup=_loopback, robots=False, max_bytes=LARGE_BYTES + 2000)
    expected = ["ok"] * LARGE_AT_ONCE + ["too_large"] * LARGE_AT_ONCE
    assert [outcome.status for outcome in outcomes] == expected, [outcome.error for outcome in outcomes]


def test_compressed_bodies_are_bounded_together(server: HostileServer, fetch: Fetch) -> None:
    """A packet of each of many hosts becomes 16 MB of memory, of all of them at once."""
    packet = gzip.compress(bytes(60_000_000), 9)[:16_000]
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 900000\r\n\r\n"

    async def stall(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head + packet)
        await asyncio.sleep(30)

    server.route("/b/*", stall)
    urls = [f"http://h{n}.example:{server.port}/b/{n}" for n in range(5 * LARGE_AT_ONCE)]
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.02):
            most = max(most, psutil.Process().memory_info().rss)

    watcher = threading.Thread(target=watch)
    before = psutil.Process().memory_info().rss
    watcher.start()
    outcomes = fetch(urls, lookup=_loopback, robots=False, timeout_s=1.5, first_byte_timeout_s=1.5)
    over.set()
    watcher.join()
    found = [outcome.status for outcome in outcomes]
    assert set(found) <= {"too_slow", "timeout"} and found.count("too_slow") > LARGE_AT_ONCE
    assert most - before < 300e6, f"{(most - before) / 1e6:.0f} MB"


def test_what_follows_a_compressed_body_is_not_kept(server: HostileServer, jpeg: bytes, fetch: Fetch) -> None:
    """zlib keeps it and copies all of it with each chunk: 25 MB of it held every other transfer for a minute."""
    body = gzip.compress(jpeg) + bytes(25_000_000)
    start = time.process_time()
    (outcome,) = fetch([server.static("/a.jpg", answer(body, "200 OK", "Content-Encoding: gzip"))], robots=False)
    assert outcome.status == "ok" and outcome.original_bytes == len(jpeg)
    assert time.process_time() - start < 3


def test_large_bodies_that_wait_for_a_decoder_are_bounded(server: HostileServer, jpeg: bytes) -> None:
    """Pictures that are slow to decode let finished bodies pile up: 64 of 50 MB each."""
    body = jpeg + bytes(2 * LARGE_BYTES)
    base = server.static("/p/*", answer(body)) and server.base + "/p/"
    settings = FetchSettings(allow_networks=["127.0.0.1/32"], robots=False, per_host=64)
    waiting = most = done = 0

    async def finish(number: int, body: Body) -> None:
        nonlocal waiting, most, done
        waiting += 1
        most = max(most, waiting)
        await asyncio.sleep(0.2)
        waiting -= 1
        done += body.status == "ok"

    async def run() -> None:
        guard = Guard(settings.allow_networks)
        client = Client(settings, guard)
        urls = [(n, f"{base}{n}") for n in range(6 * LARGE_AT_ONCE)]
        await Crawl(client, guard, BlockList(), settings, finish).run(urls)
        await client.close()

    asyncio.run(run())
    assert done == 6 * LARGE_AT_ONCE and LARGE_AT_ONCE // 2 < most <= LARGE_AT_ONCE


def test_descriptors_do_not_run_out(server: HostileServer, jpeg: bytes, fetch: Fetch) -> None:
    """A soft limit of 256, as on macOS, or a high concurrency: sound URLs end as `connect`."""

    async def slow(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        writer.write(answer(jpeg))

    server.route("/s/*", slow)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 100, limits[1]))
    try:
        urls = [f"http://h{number}.example:{server.port}/s/{number}" for number in range(200)]
        outcomes = fetch(urls, lookup=_loopback, robots=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert {outcome.status for outcome in outcomes} == {"ok"}
