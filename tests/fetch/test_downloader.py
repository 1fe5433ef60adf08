"""Lists, hashes, retries, hosts, and going on after a kill."""

import asyncio
import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import imagehash
import psutil
import pytest
from yarl import URL

from curate.config import FetchSettings
from curate.errors import ConfigError, PlanError
from curate.fetch.blocklist import BlockList
from curate.fetch.downloader import Downloader, Row, check_settings
from curate.fetch.outcome import Outcome, Status
from curate.fetch.resolver import Found
from curate.fetch.spool import Fetched, Spool, digest_of
from curate.schema import STATUSES
from tests.fetch.conftest import ALLOWED, Fetch, encoded, scene
from tests.fetch.hostile_server import HostileServer, Request, answer


def statuses(outcomes: list[Outcome]) -> list[str]:
    """Just the statuses."""
    return [outcome.status for outcome in outcomes]


def test_the_vocabulary_is_the_schemas() -> None:
    """A status that no report knows."""
    assert Status.__args__ == STATUSES  # type: ignore[attr-defined]


def test_nobody_is_asked_without_a_contact() -> None:
    """A run over the web without anybody to complain to."""
    with pytest.raises(PlanError, match="contact"):
        check_settings(FetchSettings())
    check_settings(FetchSettings(contact="who@example.org"))
    check_settings(FetchSettings(allow_networks=["127.0.0.0/8"]))


def test_without_a_contact_only_own_networks_are_asked(fetch: Fetch) -> None:
    """`allow_networks` for a local server silently permits an anonymous run over the web."""
    assert statuses(fetch(["http://1.1.1.1/x.jpg", "http://[2606:4700::1111]/x.jpg"])) == ["blocked_address"] * 2


def test_block_lists(server: HostileServer, jpeg: bytes, fetch: Fetch, tmp_path: Path) -> None:
    """What was withdrawn is stored again: by domain, URL, hash of either, or look."""
    urls = [server.static(f"/{name}.jpg", answer(jpeg + name.encode())) for name in ("md5", "sha1", "sha256", "free")]
    urls.append(server.static("/listed.jpg", answer(jpeg)))
    urls.append(server.static("/hashed.jpg", answer(jpeg)))
    urls.append(server.static("/to-listed.jpg", answer(b"", "302 Found", "Location: /listed.jpg")))
    alike = encoded(scene(400, 260, 5), quality=80)
    urls.append(server.static("/alike.jpg", answer(alike)))
    digests = [hashlib.new(kind, jpeg + kind.encode()).hexdigest() for kind in ("md5", "sha1", "sha256")]
    files = {
        "hashes": "# withdrawn\n" + "\n".join(digests).upper() + "\n\n",
        "urls": server.base + "/listed.jpg\n",
        "url_hashes": hashlib.sha256((server.base + "/hashed.jpg").encode()).hexdigest() + "\n",
        "phashes": str(imagehash.phash(scene(400, 260, 5))) + " # a look\n",
        "domains": "evil.example\n*.worse.example\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    settings = {f"block_{name}": [str(tmp_path / name)] for name in files}
    outcomes = fetch(
        [*urls, "http://a.b.evil.example/x.jpg", "http://worse.example/x", "http://notevil.invalid/"], **settings
    )
    blocked = ["blocked_list"] * 4
    assert statuses(outcomes) == [*["blocked_list"] * 3, "ok", *blocked, "blocked_list", "blocked_list", "dns"]
    assert not any(outcome.image for outcome in outcomes if outcome.status != "ok")
    assert server.asked["/listed.jpg"] == server.asked["/hashed.jpg"] == 0
    for path in tmp_path.glob("scratch*/*"):
        assert jpeg[:100] not in path.read_bytes(), "refused bytes were written to disk"


def test_broken_block_lists_are_an_error_of_the_plan(tmp_path: Path) -> None:
    """A list with a header line, or one that is not there, blocks nothing."""
    (tmp_path / "list").write_text("sha256\nabc\n")
    with pytest.raises(ConfigError, match="no MD5"):
        BlockList.load(hashes=[str(tmp_path / "list")])
    with pytest.raises(ConfigError, match="cannot be read"):
        BlockList.load(domains=[str(tmp_path / "absent")])
    (tmp_path / "domains").write_text("https://evil.example/\n")
    with pytest.raises(ConfigError, match="no domain"):
        BlockList.load(domains=[str(tmp_path / "domains")])
    with pytest.raises(ConfigError, match="pHash"):
        BlockList.load(phashes=[str(tmp_path / "list")])


def test_domains_are_compared_as_dns_has_them(tmp_path: Path, fetch: Fetch) -> None:
    """A host that is no valid Punycode ends the shard; or an editor's BOM, or another script, lets a domain through."""
    (tmp_path / "list").write_bytes("\ufeffevil.example\r\nxn--bcher-kva.example\r\n*.kühe.example.\r\n\r\n".encode())
    lists = BlockList.load(domains=[str(tmp_path / "list")])
    urls = [f"http://{host}/" for host in ("evil.example", "bücher.example", "a.xn--khe-hoa.example", "xn--a", "xn--")]

    async def lookup(host: str) -> Sequence[Found]:
        raise OSError("no such name")

    assert statuses(fetch(urls, lists, lookup)) == [*["blocked_list"] * 3, "dns", "dns"]


def test_block_list_of_many_hashes_is_fast(tmp_path: Path) -> None:
    """Re-LAION's 16 million hashes: memory and time per image grow with the list."""
    lines = (hashlib.md5(str(number).encode()).hexdigest() for number in range(100_000))
    (tmp_path / "list").write_text("\n".join(lines))
    lists = BlockList.load(hashes=[str(tmp_path / "list")])
    assert lists.digests["md5"].nbytes == 800_000
    start = time.process_time()
    found = [lists.refuses_bytes(str(number).encode()) is not None for number in range(99_000, 101_000)]
    assert found == [True] * 1000 + [False] * 1000 and time.process_time() - start < 1
    assert lists.refuses_url(URL("http://h.example/"), "http://h.example/") is None


def test_verify_hash(server: HostileServer, jpeg: bytes, fetch: Fetch) -> None:
    """A bought domain serves other bytes than the table was made from (split-view poisoning)."""
    url = server.static("/a.jpg", answer(jpeg))
    other = server.static("/b.jpg", answer(jpeg))
    digests = [hashlib.new(kind, jpeg).hexdigest() for kind in ("md5", "sha1", "sha256", "sha512")]
    wrong = "0" * 64
    rows = [
        *(Row(url, digest) for digest in digests),
        Row(url, digests[2].upper()),
        Row(url, wrong),
        Row(url),
        Row(url, ""),
    ]
    rows += [Row(other, wrong), Row(other, "not a digest")]
    outcomes = fetch(rows)
    assert statuses(outcomes) == [*["ok"] * 5, "hash_mismatch", "ok", "ok", "hash_mismatch", "hash_mismatch"]
    assert all(outcome.sha256 == digests[2] and outcome.original_bytes == len(jpeg) for outcome in outcomes)
    assert server.asked["/a.jpg"] == server.asked["/b.jpg"] == 1


def test_retries_only_where_they_help(server: HostileServer, jpeg: bytes, fetch: Fetch) -> None:
    """A 404 or an opt-out is asked for again and again, or a short 503 loses the picture."""

    def failing(times: int, bad: bytes) -> str:
        path = f"/fails/{len(server.routes)}"

        async def handle(request: Request, writer: asyncio.StreamWriter) -> None:
            writer.write(bad if server.asked[path] <= times else answer(jpeg))
            if not bad:
                writer.transport.abort()

        return server.route(path, handle)

    urls = [
        failing(1, answer(b"", "503 Busy", "Retry-After: 1")),
        failing(2, answer(b"", "500 Oops")),
        failing(1, answer(b"", "429 Slow down", "Retry-After: 0")),
        failing(9, answer(b"", "502 Bad")),
        failing(9, answer(b"", "404 Not Found")),
        failing(9, answer(jpeg, "200 OK", "X-Robots-Tag: noai")),
        failing(9, answer(b"", "503 Busy", "Retry-After: 3600")),
        failing(9, answer(b"", "403 Forbidden")),
    ]
    start = time.monotonic()
    outcomes = fetch(urls, retries=2)
    assert statuses(outcomes) == ["ok", "ok", "ok", "http_5xx", "http_4xx", "opted_out", "http_5xx", "http_4xx"]
    assert 1.0 < time.monotonic() - start < 20
    assert [server.asked[URL(url).path] for url in urls] == [2, 3, 2, 3, 1, 1, 1, 1]


def test_a_host_that_only_puts_off_is_given_up(
    server: HostileServer, jpeg: bytes, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request is answered with 503 and Retry-After: sixteen of 10,000 URLs in half a minute, for hours."""
    monkeypatch.setattr("curate.fetch.crawl.WAITED_S", 2.5)
    base = server.static("/busy/*", answer(b"", "503 Busy", "Retry-After: 1")) and server.base + "/busy/"
    start = time.monotonic()
    assert set(statuses(fetch([f"{base}{n}" for n in range(300)], robots=False, retries=5))) == {"http_5xx"}
    assert time.monotonic() - start < 10 and sum(server.asked.values()) < 100


def test_robots_of_many_hosts_are_bounded(
    server: HostileServer, jpeg: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A domain with names without end has 500 kB of robots.txt at each: 9 MB of memory a name, for a day."""
    monkeypatch.setattr("curate.fetch.client.ROBOTS_MEMORY", 1_000_000)
    lines = "".join(f"Disallow: /{number}\n" for number in range(2000))  # 300 kB of memory
    server.static("/robots.txt", answer(b"User-agent: *\n" + lines.encode()))
    server.static("/a.jpg", answer(jpeg))

    async def lookup(host: str) -> Sequence[Found]:
        return [(socket.AF_INET, "127.0.0.1")]

    rows = [Row(f"http://h{number}.example:{server.port}/a.jpg") for number in range(10)]
    with Downloader(FetchSettings(allow_networks=[ALLOWED], decoders=1), lookup=lookup) as downloader:
        for attempt in range(2):
            assert statuses(list(downloader.fetch(rows, tmp_path / str(attempt)))) == ["ok"] * 10
    assert server.asked["/robots.txt"] >= 17, "all were kept"


def test_robots_are_asked_once_and_before_the_image(server: HostileServer, jpeg: bytes, fetch: Fetch) -> None:
    """The server sees the image request of a crawler that it had shut out."""
    server.static("/robots.txt", answer(b"User-agent: *\nDisallow: /private\n"))
    server.static("/private/a.jpg", answer(jpeg))
    public = server.static("/public/a.jpg", answer(jpeg))
    moved = server.static("/public/moved.jpg", answer(b"", "301 Moved", "Location: /private/a.jpg"))
    urls = [server.base + "/private/a.jpg", public, moved, *(f"{server.base}/private/{n}.jpg" for n in range(20))]
    assert statuses(fetch(urls)) == ["robots", "ok", "robots", *["robots"] * 20]
    assert server.asked["/robots.txt"] == 1 and server.asked["/private/a.jpg"] == 0
    assert server.seen[0].path == "/robots.txt"
    assert statuses(fetch(urls[:2], robots=False)) == ["ok", "ok"]


@pytest.mark.parametrize(("robots", "status"), [
    (answer(b"", "404 Not Found"), "ok"), (answer(b"", "403 Forbidden"), "ok"), (answer(b"", "500 Oops"), "robots"),
    (answer(b"", "503 Busy"), "robots"), (answer(b"", "429 Slow"), "robots"),
    (answer(b"", "302 Found", "Location: /r2"), "robots"), (answer(b"", "302 Found", "Location: /robots.txt"), "ok"),
    (answer(b"", "302 Found", "Location: file:///etc/passwd"), "ok"),
    (answer(b"x", "200 OK", "Content-Encoding: br"), "robots"),
    (answer(b""), "ok"), (answer(b"\xff\xfe\x00garbage" * 99), "ok"), (answer(b"x", length=10**9), "robots"),
])  # fmt: skip
def test_what_a_robots_answer_means(
    server: HostileServer, jpeg: bytes, fetch: Fetch, robots: bytes, status: str
) -> None:
    """RFC 9309 2.3.1: no file allows all, a failing server forbids all."""
    server.static("/robots.txt", robots)
    server.static("/r2", answer(b"User-agent: curate\nDisallow: /\n"))
    assert statuses(fetch([server.static("/a.jpg", answer(jpeg))])) == [status]


def test_per_host_cap_and_shared_connections(server: HostileServer, jpeg: bytes, fetch: Fetch) -> None:
    """A small server is hammered, or is made to open a connection per image."""

    async def short(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.01)
        writer.write(answer(jpeg))

    base = server.route("/s/*", short)
    outcomes = fetch([f"{base}{number}.jpg" for number in range(100)], per_host=3)
    assert statuses(outcomes) == ["ok"] * 100
    assert server.most_at_once <= 3 and server.connections <= 6


def test_a_slow_host_does_not_hold_the_others(server: HostileServer, jpeg: bytes, fetch: Fetch) -> None:
    """One host that never answers takes every slot, and each of its images its whole deadline."""
    slow = HostileServer()

    async def hang(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    slow.route("/*", hang)
    base = server.static("/q/*", answer(jpeg)) and server.base + "/q/"
    urls = [url for n in range(100) for url in (f"{slow.base}/{n}.jpg", f"{base}{n}.jpg")]
    start = time.monotonic()
    outcomes = fetch(urls, concurrency=8, robots=False, retries=1, first_byte_timeout_s=1, timeout_s=2)
    assert statuses(outcomes) == ["timeout", "ok"] * 100
    assert time.monotonic() - start < 20, "100 images of the slow host at 1 s each"
    slow.close()


def test_minimum_rate(server: HostileServer, jpeg: bytes, fetch: Fetch) -> None:
    """With a long deadline a drip of bytes holds its slot for all of it."""

    async def drip(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"", length=100_000))
        for _ in range(200):
            writer.write(bytes(20))
            await asyncio.sleep(0.1)

    start = time.monotonic()
    (outcome,) = fetch([server.route("/drip.jpg", drip)], timeout_s=60, min_rate_bytes_s=1000)
    assert outcome.status == "too_slow" and "bytes/s" in (outcome.error or "")
    assert 3 <= time.monotonic() - start < 15


def test_certificates_are_checked(jpeg: bytes, fetch: Fetch, tmp_path: Path) -> None:
    """Whoever sits on the line decides what is in the data set."""
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-subj",
    ]
    files = {name: str(tmp_path / name) for name in ("key", "cert")}
    made = subprocess.run(
        [*command, "/CN=x", "-keyout", files["key"], "-out", files["cert"]], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("no openssl command here to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["cert"], files["key"])
    server = HostileServer(tls=context)
    assert statuses(fetch([server.static("/a.jpg", answer(jpeg))])) == ["tls"]
    server.close()


def test_spool_survives_a_torn_write(tmp_path: Path) -> None:
    """A half-written record is taken for a picture, or spoils those before it."""
    outcomes = [Outcome("ok", None, os.urandom(500), "jpg", 1, 2, 3, 4, 5, "aa"), Outcome("timeout", "é\ud800")]
    with Spool(tmp_path, "p") as spool:
        for number in range(10):
            spool.add(digest_of(str(number)), Fetched(outcomes[number % 2], ("x",)))
    whole = spool.path.read_bytes()
    for cut in (1, 30, 200, 700):
        spool.path.write_bytes(whole[:-cut])
        with Spool(tmp_path, "p") as again:
            assert 7 <= again.resumed < 10
            assert again.get(digest_of("0")) == Fetched(outcomes[0], ("x",))
            again.add(digest_of("new"), Fetched(outcomes[0]))
            assert again.get(digest_of("new")).outcome == outcomes[0] and digest_of("9") not in again
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    spool.path.write_bytes(damaged)
    with Spool(tmp_path, "p") as again:
        assert 3 <= again.resumed <= 6
    with Spool(tmp_path, "other settings") as fresh:
        assert fresh.resumed == 0


_CHILD = """
import json, sys
from pathlib import Path
from curate.config import FetchSettings
from curate.fetch.downloader import Downloader, Row
urls, scratch = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
settings = FetchSettings(allow_networks=["127.0.0.1/32"], image_size=64, decoders=1, retries=0, robots=False,
                         concurrency=32)
with Downloader(settings) as downloader:
    outcomes = list(downloader.fetch([Row(url) for url in urls], scratch, "p"))
print(json.dumps([[outcome.status, outcome.sha256, len(outcome.image)] for outcome in outcomes]))
"""


def _of_session(leader: int) -> list[int]:
    """Living processes that were started by a process that is gone."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (OSError, psutil.Error):
            continue
    return found


def test_killed_twice_nothing_is_fetched_again(server: HostileServer, jpeg: bytes, tmp_path: Path) -> None:
    """A kill loses what was fetched, a row, or the order; or leaves decoders behind."""

    async def faulty(request: Request, writer: asyncio.StreamWriter) -> None:
        number = int(request.path.rsplit("/", 1)[1].partition(".")[0])
        await asyncio.sleep(0.002)
        writer.write(answer(jpeg + b"%d" % number) if number % 5 else answer(b"", "404 Gone"))

    base = server.route("/k/*", faulty)
    urls = [f"{base}{number}.jpg" for number in range(1200)]
    table = tmp_path / "urls.json"
    table.write_text(json.dumps(urls))
    command = [sys.executable, "-c", _CHILD, str(table), str(tmp_path / "scratch")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path])}
    for goal in (300, 800):
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        while sum(server.asked.values()) < goal and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        deadline = time.monotonic() + 20
        while _of_session(child.pid):
            assert time.monotonic() < deadline, "decoders outlive the worker that was killed"
            time.sleep(0.02)
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    rows = json.loads(done.stdout)
    assert [row[0] for row in rows] == ["ok" if number % 5 else "http_4xx" for number in range(1200)]
    assert all(row[1] == hashlib.sha256(jpeg + b"%d" % n).hexdigest() for n, row in enumerate(rows) if n % 5)
    again = Counter({path: count - 1 for path, count in server.asked.items() if count > 1})
    assert sum(again.values()) <= 2 * 32, "more than what was in flight at the two kills was asked for twice"


def test_memory_does_not_grow_with_the_shard(server: HostileServer, fetch: Fetch, tmp_path: Path) -> None:
    """A first row that hangs makes the whole shard wait in memory."""
    big = encoded(scene(600, 400), quality=90)
    big += bytes(400_000 - len(big) % 400_000)
    base = server.static("/m/*", answer(big)) and server.base + "/m/"
    fetch([f"{base}warm{n}" for n in range(20)], resize_mode="no", strip_metadata=False)
    before = psutil.Process().memory_info().rss
    settings = FetchSettings(
        allow_networks=[ALLOWED], resize_mode="no", strip_metadata=False, decoders=1, concurrency=32
    )
    with Downloader(settings) as downloader:
        outcomes = downloader.fetch([Row(f"{base}{number}") for number in range(400)], tmp_path / "memory")
        assert sum(len(outcome.image) for outcome in outcomes) == 400 * len(big) > 150e6
    assert psutil.Process().memory_info().rss - before < 100e6
