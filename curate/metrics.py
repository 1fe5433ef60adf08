"""Counters of what happened, cost meters, and progress that a person can follow.

A terminal gets bars (rich); anything else gets a plain line at most every few seconds, so that logs stay readable.
"""

import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY_S = 5.0  # a line of log per long step is enough to see that it lives


@dataclass(frozen=True)
class Cost:
    """What a piece of work took."""

    wall_s: float = 0.0
    cpu_s: float = 0.0  # of this process and its children, those that live on (decoders) too
    peak_rss_mb: float = 0.0  # of this process so far

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s, max(self.peak_rss_mb, other.peak_rss_mb))


@dataclass
class Stopwatch:
    """Measures a `with` block; `cost` is valid after it."""

    cost: Cost = field(default_factory=Cost)
    _wall: float = 0.0
    _cpu: float = 0.0

    def __enter__(self) -> "Stopwatch":
        self._wall, self._cpu = time.perf_counter(), _cpu_s()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak_mb = peak / 1024 if sys.platform != "darwin" else peak / 1024**2
        self.cost = Cost(time.perf_counter() - self._wall, _cpu_s() - self._cpu, peak_mb)


def _cpu_s() -> float:
    times = [os.times()]
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it has ended meanwhile
            times.append(child.cpu_times())
    return sum(each.user + each.system + each.children_user + each.children_system for each in times)


class Ticker:
    """Advances one line of progress."""

    def __init__(self, label: str, total: int, bar: Progress | None, console: Console) -> None:
        self._label, self._total, self._bar, self._console = label, total, bar, console
        self._task = bar.add_task(label, total=total, note="") if bar else None
        self._done = 0
        self._start = self._last = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more as done; `note` is shown beside the bar."""
        self._done += count
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=count, note=note)
            return
        now = time.monotonic()
        if now - self._last >= PLAIN_EVERY_S or self._done >= self._total:
            self._last = now
            self._console.print(
                f"{self._label}: {self._done:,}/{self._total:,} in {now - self._start:.0f} s {note}".rstrip(),
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


@contextmanager
def progress(label: str, total: int, console: Console | None = None) -> Iterator[Ticker]:
    """A bar on a terminal, plain lines elsewhere; written to stderr so that results can be piped."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield Ticker(label, total, None, console)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        yield Ticker(label, total, bar, console)


def total(counts: list[Mapping[str, int]]) -> dict[str, int]:
    """Sum counters key by key, keys in sorted order."""
    summed: Counter[str] = Counter()
    for count in counts:
        summed.update(count)
    return dict(sorted(summed.items()))
