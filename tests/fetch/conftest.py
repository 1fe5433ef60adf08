"""A server to fetch from, one that must not be reached, and pictures."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curate.config import FetchSettings
from curate.fetch.blocklist import BlockList
from curate.fetch.downloader import Downloader, Row
from curate.fetch.outcome import Outcome
from curate.fetch.resolver import Lookup
from tests.fetch.hostile_server import HostileServer

ALLOWED = "127.0.0.1/32"
FORBIDDEN = "127.0.0.2"  # loopback as well, so that a guard that fails is seen by a socket that was opened

Fetch = Callable[..., list[Outcome]]


@pytest.fixture
def server() -> Iterator[HostileServer]:
    """The hostile server."""
    server = HostileServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def decoy() -> Iterator[HostileServer]:
    """Listens where nobody may connect."""
    server = HostileServer(FORBIDDEN)
    yield server
    assert server.connections == 0, "a forbidden address was connected to"
    server.close()


@pytest.fixture
def fetch(tmp_path: Path) -> Iterator[Fetch]:
    """Fetch URLs (or Rows) with settings; the downloader's default deadlines are cut short."""
    opened: list[Downloader] = []

    def run(
        urls: Sequence[str | Row | None],
        lists: BlockList | None = None,
        lookup: Lookup | None = None,
        **settings: object,
    ) -> list[Outcome]:
        chosen = {
            "allow_networks": [ALLOWED], "timeout_s": 20.0, "connect_timeout_s": 10.0, "first_byte_timeout_s": 15.0,
            "retries": 0, "decoders": 1, "image_size": 64, **settings,
        }  # fmt: skip
        downloader = Downloader(FetchSettings.model_validate(chosen), lists, lookup)
        opened.append(downloader)
        rows = [row if isinstance(row, Row) else Row(row) for row in urls]
        return list(downloader.fetch(rows, tmp_path / f"scratch{len(opened)}"))

    yield run
    for downloader in opened:
        downloader.close()


def scene(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """A small picture with smooth areas, edges and soft colours, as photographs have them."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]

    def wave(low: float, high: float) -> np.ndarray:
        return np.sin(rows / rng.uniform(low, high) + columns / rng.uniform(low, high) + rng.uniform(0, 6))

    luma = 127 + 60 * wave(5, 30)
    for _ in range(4):
        x, y, size = rng.integers(width), rng.integers(height), rng.integers(4, max(5, min(width, height) // 2))
        luma[(rows - y) ** 2 + (columns - x) ** 2 < size**2] += rng.integers(-60, 60)
    pixels = np.stack([luma + 40 * wave(15, 40) for _ in range(3)], -1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """A picture as a file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture(scope="session")
def jpeg() -> bytes:
    """A small valid JPEG."""
    return encoded(scene(), quality=90)


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Real pictures, where there are any."""
    shared = os.environ.get("CURATE_SHARED")
    folder = Path(shared or "") / "realdata" / "images"
    if not shared or not folder.is_dir():
        pytest.skip("CURATE_SHARED does not name a folder with realdata")
    return folder
