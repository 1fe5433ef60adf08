"""What all tests share: the folder of real data, and one Ray cluster for the whole run."""

import os
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
