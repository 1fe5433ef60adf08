"""urllib's opener under our guard, for img2dataset's own Downloader.

img2dataset calls `urllib.request.urlopen`, which follows any scheme to any address and reads without end. While this
opener is installed those calls check schemes, addresses, redirects, lists, consent, body size and the whole transfer's
time instead. Every refusal is raised as `<status>: <reason>`, which is what img2dataset writes down as its message.
"""

import hashlib
import heapq
import http.client
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

from yarl import URL

from curate.config import FetchSettings
from curate.fetch.blocklist import BlockList
from curate.fetch.client import MAX_REDIRECTS, user_agent
from curate.fetch.consent import ROBOTS_BYTES, Robots, opted_out, parse_robots
from curate.fetch.decode import read_header
from curate.fetch.guard import BlockedAddress, Guard
from curate.fetch.outcome import Refusal, Status, brief

_CHUNK = 64 * 1024


class _Reaper(threading.Thread):
    """Shuts sockets down at their deadline: urllib's timeout starts anew with every byte that arrives."""

    def __init__(self) -> None:
        super().__init__(name="curate-deadlines", daemon=True)
        self._lock, self._end = threading.Lock(), threading.Event()
        self._due: list[tuple[float, int, weakref.ref[socket.socket]]] = []

    def watch(self, connection: socket.socket, limit_s: float) -> None:
        """End this connection in `limit_s` seconds, if it still lives then."""
        with self._lock:
            heapq.heappush(self._due, (time.monotonic() + limit_s, id(connection), weakref.ref(connection)))

    def run(self) -> None:
        """Look twice a second."""
        while not self._end.wait(0.5):
            with self._lock:
                while self._due and self._due[0][0] < time.monotonic():
                    connection = heapq.heappop(self._due)[2]()
                    if connection is not None:
                        try:
                            socket.socket.shutdown(connection, socket.SHUT_RDWR)
                        except OSError:
                            continue

    def close(self) -> None:
        """Stop looking."""
        self._end.set()


class _Body:
    """What img2dataset sees of a response: headers, and `read()` once, in a `with` block."""

    def __init__(self, headers: http.client.HTTPMessage, data: bytes) -> None:
        self.headers, self._data = headers, data

    def __enter__(self) -> "_Body":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def read(self) -> bytes:
        """The whole body."""
        return self._data


class _PlainConnection(http.client.HTTPConnection):
    def __init__(self, owner: "GuardedOpener", host: str, **options: Any) -> None:
        super().__init__(host, **options)
        self._owner = owner

    def connect(self) -> None:
        self.sock = self._owner.connect(self.host, self.port)


class _SecureConnection(http.client.HTTPSConnection):
    def __init__(self, owner: "GuardedOpener", host: str, **options: Any) -> None:
        super().__init__(host, context=owner.context, **options)
        self._owner = owner

    def connect(self) -> None:
        bare = self._owner.connect(self.host, self.port)
        self.sock = self._owner.context.wrap_socket(bare, server_hostname=self.host)
        self._owner.watch(self.sock)


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, owner: "GuardedOpener") -> None:
        super().__init__()
        self._owner = owner

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(partial(_PlainConnection, self._owner), req)


class _Secure(urllib.request.HTTPSHandler):
    def __init__(self, owner: "GuardedOpener") -> None:
        super().__init__()
        self._owner = owner

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(partial(_SecureConnection, self._owner), req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = MAX_REDIRECTS

    def __init__(self, opener: "GuardedOpener") -> None:
        self._owner = opener

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Each hop is checked like a first URL."""
        if self._owner.consents:
            self._owner.check_headers(headers)
            self._owner.check(newurl)
        else:
            self._owner.guard.parse(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class GuardedOpener:
    """Stands where urllib's opener stands. Thread-safe: img2dataset asks from many threads."""

    def __init__(self, settings: FetchSettings, guard: Guard, lists: BlockList) -> None:
        self.guard, self._settings, self._lists = guard, settings, lists
        self.sizes: dict[str, int] = {}  # of bodies handed over, by their sha256
        self.context = ssl.create_default_context()
        self._robots: dict[str, Robots | Refusal] = {}
        self._reaper = _Reaper()
        self._reaper.start()
        self._thread = threading.local()
        self._opener = urllib.request.OpenerDirector()  # no proxies, no files, no ftp
        for handler in (_Plain(self), _Secure(self), _Redirects(self)):
            self._opener.add_handler(handler)
        self._opener.add_handler(urllib.request.HTTPErrorProcessor())
        self._opener.add_handler(urllib.request.HTTPDefaultErrorHandler())

    @property
    def consents(self) -> bool:
        """Whether this thread asks for an image (and not for robots.txt)."""
        return bool(getattr(self._thread, "image", False))

    def connect(self, host: str, port: int) -> socket.socket:
        """A socket to an allowed address of this host, with its deadline. Raises Refusal or OSError."""
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise Refusal("dns", brief(str(error))) from None
        problem: OSError = OSError("no address")
        for info in infos:
            try:
                connection = self.guard.open_socket(info)
            except BlockedAddress as error:
                problem = error
                continue
            try:
                connection.settimeout(self._settings.connect_timeout_s)
                connection.connect(info[4])
            except OSError as error:
                connection.close()
                problem = error
                continue
            connection.settimeout(self._settings.timeout_s)
            self.watch(connection)
            return connection
        raise problem

    def watch(self, connection: socket.socket) -> None:
        """Start a connection's deadline."""
        self._reaper.watch(connection, self._settings.timeout_s)

    def check(self, text: str | None) -> URL:
        """A URL that may be asked for. Raises Refusal: scheme, literal address, lists, robots.txt."""
        url = self.guard.parse(text)
        listed = self._lists.refuses_url(url, (text or "").strip())
        if listed:
            raise Refusal("blocked_list", listed)
        if self._settings.robots:
            verdict = self._robots_of(url)
            if isinstance(verdict, Refusal):
                raise Refusal(verdict.status, verdict.error)
            line = verdict.refuses(url.raw_path_qs)
            if line:
                raise Refusal("robots", brief(line))
        return url

    def check_headers(self, headers: http.client.HTTPMessage) -> None:
        """Raise Refusal for an opt-out, of which img2dataset itself knows only half."""
        tags, reservations = headers.get_all("X-Robots-Tag", []), headers.get_all("tdm-reservation", [])
        reason = opted_out(tags, reservations) if self._settings.opt_out else None
        if reason:
            raise Refusal("opted_out", reason)

    def _robots_of(self, url: URL) -> Robots | Refusal:
        origin = str(url.origin())
        verdict = self._robots.get(origin)
        if verdict is None:
            self._thread.image = False
            try:
                verdict = parse_robots(self._get(str(url.origin().with_path("/robots.txt")), ROBOTS_BYTES)[1])
            except Refusal as refusal:
                gone = refusal.status in ("http_4xx", "bad_url", "empty") and "429" not in refusal.error
                kind: Status = "robots" if refusal.status in ("http_4xx", "http_5xx") else refusal.status
                verdict = Robots() if gone else Refusal(kind, f"robots.txt: {refusal.error}")
            self._robots[origin] = verdict
        return verdict

    def open(self, request: urllib.request.Request, data: Any = None, timeout: Any = None) -> _Body:
        """What `urlopen` calls. Raises Refusal, whose text img2dataset keeps."""
        url = self.check(request.full_url if isinstance(request, urllib.request.Request) else str(request))
        self._thread.image = True
        headers, body = self._get(str(url), self._settings.max_bytes)
        if not body:
            raise Refusal("empty", "no bytes in the body")
        listed = self._lists.refuses_bytes(body)
        if listed:
            raise Refusal("blocked_list", listed)
        read_header(body, self._settings.max_pixels)  # img2dataset counts pixels only after it has decoded them
        self.sizes[hashlib.sha256(body).hexdigest()] = len(body)
        return _Body(headers, body)

    def _get(self, url: str, cap: int) -> tuple[http.client.HTTPMessage, bytes]:
        request = urllib.request.Request(url, headers={"User-Agent": user_agent(self._settings.contact)})  # noqa: S310
        start = time.monotonic()
        try:
            with self._opener.open(request, timeout=self._settings.timeout_s) as response:
                if self.consents:
                    self.check_headers(response.headers)
                parts: list[bytes] = []
                total = 0
                while part := response.read(_CHUNK):
                    parts.append(part)
                    total += len(part)
                    if total > cap:
                        raise Refusal("too_large", f"more than {cap} bytes")
                    if time.monotonic() - start > self._settings.timeout_s:
                        raise Refusal("too_slow", f"body not complete in {self._settings.timeout_s:g} s")
                return response.headers, b"".join(parts)
        except Refusal:
            raise
        except Exception as error:
            raise _refusal(error, time.monotonic() - start >= self._settings.timeout_s) from None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Be the process's opener for a while."""
        module: Any = urllib.request
        before = module._opener
        urllib.request.install_opener(self)  # type: ignore[arg-type]  # urlopen needs `open` only
        try:
            yield
        finally:
            module._opener = before

    def close(self) -> None:
        """End the deadline thread."""
        self._reaper.close()


def _refusal(error: BaseException, late: bool) -> Refusal:
    """Whatever urllib raises as one of our statuses."""
    cause = getattr(error, "reason", error)
    if isinstance(cause, Refusal):
        return cause
    if isinstance(error, urllib.error.HTTPError):
        status: Status = "bad_url" if error.code < 400 else "http_5xx" if 500 <= error.code < 600 else "http_4xx"
        return Refusal(status, f"HTTP {error.code}" if error.code >= 400 else f"more than {MAX_REDIRECTS} redirects")
    status = "bad_url"
    if isinstance(cause, BlockedAddress):
        status = "blocked_address"
    elif isinstance(cause, TimeoutError) or late:
        status = "timeout"
    elif isinstance(cause, ssl.SSLError):
        status = "tls"
    elif isinstance(cause, OSError | http.client.HTTPException):
        status = "connect"
    return Refusal(status, brief(cause if isinstance(cause, BaseException) else error))
