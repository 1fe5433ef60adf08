"""One answer of a server while it arrives: judged by its head, counted and inflated byte by byte, ended where it lies.

Consent is read from the head, before a byte of the body is kept. Sizes and rates hold for what really comes, whatever
the headers promise.
"""

import asyncio
import email.utils
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from curate.config import FetchSettings
from curate.fetch.consent import opted_out
from curate.fetch.outcome import Body, Refusal, Status, brief
from curate.fetch.transport import Headers

GRACE_S = 3.0  # before the minimum rate counts: a transfer's first window is slow on any long line
LARGE_BYTES = 1_000_000  # a body beyond this needs a permit, so that memory is bounded whatever max_bytes is
LARGE_AT_ONCE = 8
DRAINED_BYTES = 64_000  # of a body that is not wanted: cheaper to read than a new connection
DRAIN_S = 1.0
_DEFLATED = frozenset({"gzip", "x-gzip", "deflate"})
_UNREADABLE = frozenset({"br", "zstd", "compress", "x-compress", "dcb", "dcz"})


class Temporary(Refusal):
    """A refusal that may not stand: the queue may ask again, not before `after_s` seconds."""

    def __init__(self, status: Status, error: str, after_s: float | None = None) -> None:
        super().__init__(status, error)
        self.after_s = after_s


@dataclass(frozen=True)
class Redirect:
    """The server named another URL; unchecked."""

    location: str


class Enough(Exception):
    """Ends a transfer whose verdict stands."""


class Permits:
    """How many large bodies may be in memory at once; the others wait their turn with nothing read."""

    def __init__(self, count: int = LARGE_AT_ONCE) -> None:
        self._free = count
        self._waiting: deque[Answer] = deque()

    def take(self, answer: "Answer") -> bool:
        """Whether there is one; if not, `answer.admitted()` is called once there is."""
        if self._free:
            self._free -= 1
            return True
        self._waiting.append(answer)
        return False

    def give(self) -> None:
        """Hand one on, or back."""
        if self._waiting:
            self._waiting.popleft().admitted()
        else:
            self._free += 1

    def forget(self, answer: "Answer") -> None:
        """This one does not wait any longer."""
        if answer in self._waiting:
            self._waiting.remove(answer)


class Answer:
    """A `transport.Reader`. `clock` ends at the first byte's deadline; the head moves it to the whole's.

    `begun`: whether the head was there. `verdict`: what was decided, which no later failure changes.
    """

    def __init__(
        self, settings: FetchSettings, cap: int, budget_s: float, clock: asyncio.Timeout, permits: Permits,
        *, consent: bool,
    ) -> None:  # fmt: skip
        self._settings, self._cap, self._clock, self._permits, self._consent = settings, cap, clock, permits, consent
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + budget_s
        self.begun = False
        self.verdict: Redirect | Refusal | None = None
        self._inflate: zlib._Decompress | None = None
        self._start, self._received = 0.0, 0
        self._data = bytearray()
        self._left = b""  # of a chunk, compressed
        self._permit = False
        self._held_at = 0.0
        self._resume: Callable[[], None] | None = None

    def head(self, code: int, headers: Headers) -> None:
        """Judge status line and headers. Raises Enough when the body is not worth reading."""
        self.begun, self._start = True, self._loop.time()
        announced = _length(headers)
        try:
            self.verdict = self._judge(code, headers)
            if self.verdict is None:
                if announced is not None and announced > self._cap:
                    raise Refusal("too_large", f"{announced} bytes announced; {self._cap} allowed")
                self._inflate = _inflater(headers.first("content-encoding"))
        except Refusal as refusal:
            self.verdict = refusal
        if self.verdict is not None:
            if announced is None or announced > DRAINED_BYTES:
                raise Enough
            self._deadline = min(self._deadline, self._start + DRAIN_S)
        self._clock.reschedule(self._deadline)

    def _judge(self, code: int, headers: Headers) -> Redirect | None:
        if self._consent and self._settings.opt_out and code < 400:
            reason = opted_out(headers.all("x-robots-tag"), headers.all("tdm-reservation"))
            if reason:
                raise Refusal("opted_out", reason)
        if 200 <= code < 300:
            return None
        if code in (301, 302, 303, 307, 308):
            location = headers.first("location")
            if not location:
                raise Refusal("bad_url", f"HTTP {code} without a Location")
            return Redirect(location)
        if code == 429 or 500 <= code < 600:
            status: Status = "http_4xx" if code == 429 else "http_5xx"
            raise Temporary(status, f"HTTP {code}", _retry_after(headers.first("retry-after")))
        raise Refusal("bad_url" if code < 400 else "http_4xx", f"HTTP {code}")

    def take(self, chunk: memoryview) -> bool:
        """Bytes of the body; False while a large one waits for its permit. Raises Enough, or Refusal at a limit."""
        if self.verdict is not None:
            self._received += len(chunk)
            if self._received > DRAINED_BYTES:
                raise Enough
            return True
        try:
            if self._inflate is not None:
                if not self._inflated(chunk):
                    return False
            elif self._admit(len(self._data) + len(chunk)):
                self._data += chunk
            else:
                return False
            self._received += len(chunk)
            self._check()
        except Refusal as refusal:
            self.verdict = refusal
            raise Enough from None
        return True

    def _admit(self, size: int) -> bool:
        """Whether so many bytes may be held now. If not, the permit is waited for, and the clock stands still."""
        if self._permit or size <= LARGE_BYTES:
            return True
        self._permit = self._permits.take(self)
        if not self._permit:
            self._held_at = self._loop.time()
            self._clock.reschedule(None)
        return self._permit

    def _inflated(self, chunk: memoryview) -> bool:
        """Whether all of a chunk, or of what is left of it, was inflated: a thousandfold, so no more than is admitted.

        What follows the stream's end is not looked at: zlib would keep it, and copy it anew with each chunk.
        """
        assert self._inflate is not None
        source: bytes | memoryview = self._left or chunk
        while source and not self._inflate.eof and len(self._data) <= self._cap:
            limit = (self._cap if self._permit else min(self._cap, LARGE_BYTES)) + 1 - len(self._data)
            try:
                self._data += self._inflate.decompress(source, max(1, limit))
            except zlib.error as error:
                raise Refusal("decode_error", brief(error)) from None
            source = self._left = self._inflate.unconsumed_tail
            if source and not self._admit(len(self._data)):
                return False
        return True

    def _check(self) -> None:
        if max(self._received, len(self._data)) > self._cap:
            raise Refusal("too_large", f"more than {self._cap} bytes")
        elapsed = self._loop.time() - self._start
        if elapsed > GRACE_S and self._received < self._settings.min_rate_bytes_s * elapsed:
            raise Refusal("too_slow", f"{self._received / elapsed:.0f} bytes/s")

    def paused(self, resume: Callable[[], None]) -> None:
        """Kept for `admitted`."""
        self._resume = resume

    def admitted(self) -> None:
        """The permit is there; the time spent waiting for it was not the server's."""
        waited = self._loop.time() - self._held_at
        self._permit = True
        self._deadline += waited
        self._start += waited
        self._clock.reschedule(self._deadline)
        assert self._resume is not None
        self._resume()

    def end(self) -> None:
        """The transfer is over, one way or another."""
        self._permits.forget(self)

    def release(self) -> None:
        """The body is done with: the next large one may come."""
        if self._permit:
            self._permits.give()
            self._permit = False

    def result(self) -> Body | Redirect:
        """What came of it. Raises Refusal."""
        if isinstance(self.verdict, Refusal):
            raise self.verdict
        if self.verdict is not None:
            return self.verdict
        if self._inflate is not None and not self._inflate.eof:
            raise Refusal("decode_error", "compressed body ends early")
        if not self._data:
            raise Refusal("empty", "no bytes in the body")
        return Body("ok", None, self._data, self.release)


def _length(headers: Headers) -> int | None:
    value = headers.first("content-length")
    if value is None or not (value.isascii() and value.isdigit()):
        return None
    return int((value.lstrip("0") or "0")[:20])  # int() raises beyond some thousand digits


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date."""
    if value is None:
        return None
    if value.isascii() and value.strip().isdigit():
        return float(value.strip()[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _inflater(encoding: str | None) -> "zlib._Decompress | None":
    """A decompressor for a body that came compressed although identity was asked for.

    Names that are no compression (`aws-chunked`, `utf-8`, `none`) are passed over, as browsers do.
    """
    names = [name.partition(";")[0].strip().lower() for name in (encoding or "").split(",")]
    deflated = sum(name in _DEFLATED for name in names)
    if deflated > 1 or not _UNREADABLE.isdisjoint(names):
        raise Refusal("decode_error", brief(f"Content-Encoding {encoding} was not asked for"))
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32) if deflated else None  # gzip or zlib, by its header
