"""The demo's web, drawn once for all tests of this folder, because drawing takes about 12 CPU-seconds."""

from pathlib import Path

import pytest

from curate.demo.server import free_port
from curate.demo.web import build


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The web with the demo's own seed, on a free port; in a path with a blank, as people have."""
    path = tmp_path_factory.mktemp("a demo") / "web"
    build(path, port=free_port())
    return path
