"""SIGKILL at random moments of every step across shards, which a test inside one process cannot see."""

import json
import subprocess
import sys
from pathlib import Path


def test_steps_finish_to_the_same_bytes_after_sigkills(tmp_path: Path) -> None:
    """Guards against half a file that a later run takes for whole, counts that a killed process had added once already,
    and k-means that starts from another state."""
    command = [sys.executable, "-m", "tests.retrieve.killed", str(tmp_path)]
    told = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    found = json.loads(told.stdout)
    assert list(found) == ["retrieve", "hierarchy", "balance"]
    assert all(one["kills"] >= 2 and one["wrong"] == [] for one in found.values()), found
