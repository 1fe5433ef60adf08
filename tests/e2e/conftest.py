"""The demo's small web, drawn and served once, and the command as a user starts it."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from curate.demo.paths import weights_dir
from curate.demo.server import WebServer, free_port
from curate.demo.web import build


@dataclass(frozen=True)
class Web:
    """A served small web."""

    server: WebServer
    table: Path
    truth: Path

    def recipe(self, root: Path, **sections: object) -> Path:
        """Write a recipe for this web; `sections` replace or add."""
        tree = {
            "root": str(root),
            "ingest": {"sources": [str(self.table)], "rows_per_shard": 100},
            "fetch": {
                "allow_networks": ["127.0.0.1/32"], "timeout_s": 60, "first_byte_timeout_s": 60, "retries": 0,
                "min_image_size": 32, "max_aspect_ratio": 3.0, "max_pixels": 20_000_000,
            },
            "score": {
                "clip_demo": {"scorer": "clip", "model": f"local-dir:{weights_dir()}"},
                "phash": {"scorer": "phash"}, "text": {"scorer": "text_stats"},
            },
            "dedup": [{"by": "sha256"}, {"by": "image_phash"}],
            "subsets": {
                "pairs": {"where": "NOT is_duplicate AND clip_similarity_demo > 0.55"},
                "half": {"where": "NOT is_duplicate", "keep_top": {"by": "clip_similarity_demo", "fraction": 0.5}},
            },
            "emit": {"samples_per_shard": 60, "seed": 5},
            "engine": {"driver": "inline", "cpus": 2},
            **sections,
        }  # fmt: skip
        root.parent.mkdir(parents=True, exist_ok=True)
        file = root.parent / f"{root.name}.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """Drawn once, served for the whole session."""
    folder = tmp_path_factory.mktemp("web")
    table = build(folder, free_port())
    # Hanging pages end with 504 here and the deadline is long, so that a busy machine cannot change a row's status:
    # the tests compare bytes. Real timeouts are tested with the demo and in tests/fetch.
    with WebServer(folder, hang_s=0.2) as server:
        yield Web(server, table, folder / "truth.parquet")


@pytest.fixture(scope="session")
def pool(web: Web, tmp_path_factory: pytest.TempPathFactory, ray_driver: "RayDriver") -> "Pool":  # noqa: F821
    """What the recipes of vectors and captions start from."""
    from tests.e2e.recipe_pool import make_pool  # torch and transformers: not for tests that need no pool

    return make_pool(web, tmp_path_factory.mktemp("pool"), ray_driver)


def curate(*words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it."""
    result = subprocess.run(
        command(*words), check=False, capture_output=True, text=True, timeout=300, env=environment()
    )
    if check and result.returncode:
        raise AssertionError(f"{words}: exit {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


def command(*words: object) -> list[str]:
    """Its argument list."""
    return [sys.executable, "-m", "curate.cli", *map(str, words)]


def environment() -> dict[str, str]:
    """The caller's, less what belongs to another cluster."""
    return {**{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}, "COLUMNS": "200"}


def release_of(root: Path) -> dict[str, str]:
    """sha256 of every file of the latest release, by name below it."""
    folder = root / "releases" / (root / "releases" / "latest").read_text().strip()
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tree_of(root: Path) -> dict[str, tuple[int, str]]:
    """Time of change and sha256 of every file below a root."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
    }
