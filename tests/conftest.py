"""What all tests share: the folder of real data, and one Ray cluster for the whole run."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real weights and images that are not in the repository; CURATE_SHARED names their folder."""
    folder = os.environ.get("CURATE_SHARED")
    if not folder:
        pytest.skip("CURATE_SHARED is not set: real weights and images are not at hand")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def ray_driver() -> Iterator["RayDriver"]:  # noqa: F821  # imported below: only tests that use it load Ray
    """One cluster of two cores for every test that needs Ray: starting one takes seconds."""
    from curate.engine.ray import RayDriver

    driver = RayDriver(cpus=2)
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A real HTTP server that speaks S3 (moto)."""
    from moto.server import ThreadedMotoServer

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket as a URL; keys that are nobody's stand in the environment, where every S3 client looks."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"b{time.time_ns()}"
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}"
