"""A user's own pipeline file: what is wrong in it is told with its line."""

from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from curate.cli_pipeline import find_pipeline
from curate.errors import ConfigError, PlanError

JOB: Any = None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def run(job:\n", "never closed"),
        ("import nowhere_to_be_found\n", "line 1: ModuleNotFoundError"),
        ("\nlimit = int('many')\n", "line 2: ValueError"),
        ("x = 1\n", "no function run"),
        ("def run():\n    pass\n", "run takes the job"),
        ("def run(job):\n    limit = {}\n    limit['many']\n", "line 3: KeyError"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    """A traceback through curate for a slip in the user's own twenty lines."""
    file = tmp_path / "own.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"own.py.*{says}"):
        find_pipeline(str(file))(JOB)


def test_errors_of_curate_pass_through(tmp_path: Path) -> None:
    """A bug of curate's own called the user's, or a plan's error told as another."""
    file = tmp_path / "own.py"
    file.write_text("from curate.errors import PlanError\ndef run(job):\n    raise PlanError('no column x')\n")
    with pytest.raises(PlanError, match="no column x"):
        find_pipeline(str(file))(JOB)
    file.write_text("from curate.tar import nothing_here_is\n")
    with pytest.raises(ConfigError, match="nothing_here_is"):
        find_pipeline(str(file))
    file.write_text("from pathlib import PurePath\ndef run(job):\n    PurePath(3)\n")
    with pytest.raises(TypeError):
        find_pipeline(str(file))(JOB)


def test_its_dataclasses_work_and_its_functions_travel(tmp_path: Path) -> None:
    """A stage in the user's file that asks for its module, or that no worker of Ray could import."""
    file = tmp_path / "own.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass(frozen=True)\nclass Half:\n    of: int\n\n"
        "def run(job):\n    return Half\n"
    )
    made: Any = find_pipeline(str(file))
    sent = cloudpickle.dumps(made.__wrapped__)
    assert b"Half" in sent and cloudpickle.loads(sent)(None)(3).of == 3
