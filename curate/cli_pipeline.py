"""The pipeline that a recipe names: a file in `pipelines/`, or one of the user's own by its path."""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from curate.engine.job import Job
from curate.errors import ConfigError, CurateError

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
    name = f"own_pipeline_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"pipeline: no file {file}; a name without .py is one of curate's own")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up
    try:
        spec.loader.exec_module(module)
    except CurateError:
        raise
    except Exception as error:
        raise ConfigError(f"pipeline: {_told(file, error)}") from error
    finally:
        sys.modules.pop(name, None)  # so that Ray sends what stands in it to its workers: they could not import it
    chosen: Callable[[Job], None] | None = getattr(module, "run", None)
    if not callable(chosen):
        raise ConfigError(f"pipeline: {file} has no function run(job)")
    try:
        inspect.signature(chosen).bind(None)
    except TypeError as error:
        raise ConfigError(f"pipeline: {file}: run takes the job and nothing else: {error}") from None
    return _blaming(file, chosen)


def _blaming(file: Path, run: Callable[[Job], None]) -> Callable[[Job], None]:
    """`run`, where an error of the file's own lines names them. One of curate's keeps its traceback."""

    @wraps(run)
    def told(job: Job) -> None:
        try:
            run(job)
        except (CurateError, OSError):
            raise
        except Exception as error:
            *_, last = traceback.extract_tb(error.__traceback__)
            if Path(last.filename).resolve() != file.resolve():
                raise
            raise ConfigError(f"pipeline: {_told(file, error)}") from error

    return told


def _told(file: Path, error: Exception) -> str:
    """The file, the line of it that failed, and how."""
    if isinstance(error, SyntaxError):
        return f"{file}: {error}"
    lines = [
        f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == file.resolve()
    ]
    return f"{file}{f', line {lines[-1]}' if lines else ''}: {type(error).__name__}: {error}"
