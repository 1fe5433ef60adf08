"""The pipeline that a recipe names: a file in `pipelines/`, or one of the user's own by its path."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from pathlib import Path

from curate.engine.job import Job
from curate.errors import ConfigError

SHARED = "frame"  # in pipelines/ as well, and no pipeline


def find_pipeline(name: str) -> Callable[[Job], None]:
    """Its `run(job)`. Raises ConfigError for a name or a file that has none."""
    return _own(Path(name)) if name.endswith(".py") else _ours(name)


def _ours(name: str) -> Callable[[Job], None]:
    package = importlib.import_module("pipelines")
    known = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != SHARED)
    if name not in known:
        raise ConfigError(f"pipeline: {name!r} is not one of {', '.join(known)}, nor a .py file of your own")
    chosen: Callable[[Job], None] = importlib.import_module(f"pipelines.{name}").run
    return chosen


def _own(file: Path) -> Callable[[Job], None]:
    spec = importlib.util.spec_from_file_location(f"own_pipeline_{file.stem}", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"pipeline: no file {file}; a name without .py is one of curate's own")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise ConfigError(f"pipeline: {file}: {error}") from error
    chosen: Callable[[Job], None] | None = getattr(module, "run", None)
    if not callable(chosen):
        raise ConfigError(f"pipeline: {file} has no function run(job)")
    return chosen
