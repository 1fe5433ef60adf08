"""libcurl on asyncio: one GET with its bytes handed on as they arrive, over connections that are kept and shared.

Sockets open only through the guard, names are resolved before and given along, redirects are an answer like any other.
No cookies, no netrc, no environment; a proxy only where the recipe names one. HTTP/2 where a TLS server offers it.
What an answer means is not decided here.
"""

import asyncio
import os
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import pycurl
from yarl import URL

from curate.fetch.guard import Guard, SocketInfo

PROXY_CREDENTIALS = "CURATE_PROXY_CREDENTIALS"
READ_BUFFER = 512 * 1024  # bytes, of a socket at once; the reader is given 16 kB at a time
IDLE_CONNECTIONS = 512
KEEP_ALIVE_S = 3  # a host with work left is asked again in milliseconds; an idle TLS connection holds 0.4 MB
RESOLVED_S = 600  # longer than any request waits; the resolver's own cache decides how old an address may be
SUPPRESS_CONNECT_HEADERS = 265  # CURLOPT_…; pycurl has no name for it: a proxy's own answer is not the server's
_HELD = int(pycurl.WRITEFUNC_PAUSE)
_ABORT = -1


class TransferError(Exception):
    """What libcurl says of a transfer that failed; `code` is its CURLE number."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Reader(Protocol):
    """Who takes an answer. What these raise ends the transfer and is raised by `Transport.get`."""

    def head(self, code: int, headers: "Headers") -> None:
        """The status and all headers are there."""

    def take(self, chunk: memoryview) -> bool:
        """Bytes of the body; False to be given these again after `resume`."""

    def paused(self, resume: Callable[[], None]) -> None:
        """How to go on after `take` was False."""


@dataclass(frozen=True)
class Headers:
    """Header lines in their order, names in lower case."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        """The values of every header of this name."""
        return [value for found, value in self.lines if found == name]

    def first(self, name: str) -> str | None:
        """The value of the first header of this name."""
        return next((value for found, value in self.lines if found == name), None)


class _Line:
    """One libcurl handle, used for one transfer after another."""

    def __init__(self, open_socket: Callable[[SocketInfo], socket.socket], options: dict[int, Any]) -> None:
        self._open_socket = open_socket
        self.curl = pycurl.Curl()
        for option, value in options.items():
            self.curl.setopt(option, value)
        self.curl.setopt(pycurl.OPENSOCKETFUNCTION, self._open)
        self.curl.setopt(pycurl.HEADERFUNCTION, self._header)
        self.curl.setopt(pycurl.WRITEFUNCTION, self._write, use_memoryview=True)
        self.failure: BaseException | None = None  # what the reader raised
        self.unopened: OSError | None = None  # why there is no socket
        self._reader: Reader | None = None
        self._code, self._headers = 0, Headers()
        self._in_head = self._judged = False  # trailers, and a header that is named HTTP/, begin no answer

    def begin(self, url: URL, addresses: Sequence[str], reader: Reader, *, close: bool) -> None:
        """Set out for `url`. `addresses` of its host; none where the URL names one itself or a proxy resolves."""
        self._reader, self.failure, self.unopened = reader, None, None
        self._in_head = self._judged = False
        self.curl.setopt(pycurl.URL, str(url))
        if addresses:
            self.curl.setopt(pycurl.RESOLVE, [f"+{url.raw_host}:{url.port}:{','.join(addresses)}"])
        else:
            self.curl.unsetopt(pycurl.RESOLVE)
        self.curl.setopt(pycurl.FORBID_REUSE, close)

    def end(self) -> None:
        """Let go of the reader and of the body in it."""
        self._reader = None

    def _open(self, purpose: int, address: Any) -> socket.socket | int:
        try:
            return self._open_socket((address.family, address.socktype, address.protocol, "", address.addr))
        except OSError as error:
            self.unopened = error  # of several addresses another one may do: this counts only if none did
            return int(pycurl.SOCKET_BAD)

    def _header(self, line: bytes) -> int | None:
        try:
            if not self._in_head and line.startswith(b"HTTP/"):
                self._code, self._headers, self._in_head = int(line.split(None, 2)[1]), Headers(), True
            elif line not in (b"\r\n", b"\n"):
                name, _, value = line.partition(b":")
                text = value.strip().decode("utf-8", "surrogateescape")
                self._headers.lines.append((name.strip().lower().decode("latin-1"), text))
            elif self._code < 200:  # an interim answer: another head follows
                self._in_head = False
            elif self._reader is not None and not self._judged:  # else the end of trailers
                self._judged = True
                self._reader.head(self._code, self._headers)
        except Exception as error:
            self.failure = error
            return _ABORT
        return None

    def _write(self, chunk: memoryview) -> int | None:
        try:
            assert self._reader is not None
            if not self._reader.take(chunk):
                self._reader.paused(self._go_on)
                return _HELD
        except Exception as error:
            self.failure = error
            return _ABORT
        return None

    def _go_on(self) -> None:
        with suppress(pycurl.error):  # the reader would not have the bytes: this transfer's end, not the caller's
            self.curl.pause(pycurl.PAUSE_CONT)


class Transport:
    """All transfers of one event loop; open inside it."""

    def __init__(
        self, guard: Guard, headers: Sequence[str], connect_timeout_s: float, proxy: str | None = None
    ) -> None:
        """`headers`: lines sent with every request. With `proxy` (a URL) nothing else is connected to.

        The proxy's `user:password` is CURATE_PROXY_CREDENTIALS in the environment: not in a recipe, which is copied
        into releases.
        """
        self._open_socket = guard.open_socket if proxy is None else _open_any
        trusted = ssl.get_default_verify_paths()  # the machine's own, or what SSL_CERT_FILE names
        self._options: dict[int, Any] = {
            pycurl.NOSIGNAL: 1,
            pycurl.PROTOCOLS: pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS,
            pycurl.FOLLOWLOCATION: 0,
            pycurl.PATH_AS_IS: 1,
            pycurl.NETRC: pycurl.NETRC_IGNORED,
            pycurl.PROXY: proxy or "",  # "": none, whatever the environment says
            pycurl.PROXYUSERPWD: os.environ.get(PROXY_CREDENTIALS, "") if proxy else "",
            pycurl.NOPROXY: "",
            SUPPRESS_CONNECT_HEADERS: 1,
            pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_2TLS,
            pycurl.PIPEWAIT: 1,  # a second request waits to learn whether the first one's connection has room for it
            pycurl.HTTPHEADER: [line.encode() for line in headers],
            pycurl.CONNECTTIMEOUT_MS: int(1000 * connect_timeout_s),
            pycurl.DNS_CACHE_TIMEOUT: RESOLVED_S,
            pycurl.BUFFERSIZE: READ_BUFFER,
            pycurl.MAXAGE_CONN: KEEP_ALIVE_S,
        }
        for option, path in ((pycurl.CAINFO, trusted.cafile), (pycurl.CAPATH, trusted.capath)):
            if path is not None:
                self._options[option] = path
        self._multi = pycurl.AsyncCurlMulti()
        self._multi.setopt(pycurl.M_MAXCONNECTS, IDLE_CONNECTIONS)
        self._idle: list[_Line] = []

    async def get(self, url: URL, addresses: Sequence[str], reader: Reader, *, close: bool = False) -> None:
        """Ask for `url` and give its answer to `reader`. `close`: this connection is not wanted again.

        Raises what the reader raised, BlockedAddress, or TransferError. Cancelling it ends the transfer.
        """
        line = self._idle.pop() if self._idle else _Line(self._open_socket, self._options)
        try:
            line.begin(url, addresses, reader, close=close)
            await self._multi.perform(line.curl)
        except pycurl.error as error:
            if line.failure is not None:
                raise line.failure from None
            if line.unopened is not None and error.args[0] == pycurl.E_COULDNT_CONNECT:
                raise line.unopened from None
            raise TransferError(*error.args) from None
        except asyncio.CancelledError:
            with suppress(RuntimeError):  # gone already
                self._multi.remove_handle(line.curl)
            raise
        finally:
            line.end()
            self._idle.append(line)

    async def close(self) -> None:
        """Close all connections."""
        await self._multi.aclose()
        for line in self._idle:
            line.curl.close()


def _open_any(info: SocketInfo) -> socket.socket:
    """A socket to the proxy that the recipe names: it is the recipe's to choose."""
    return socket.socket(*info[:3])
