"""What the tests of ingest share: tables made on the spot, a run of the step, and a store that dies on command."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curate.config import IngestSettings
from curate.ingest.step import ingest_step
from curate.metrics import progress
from curate.schema import TableSpec
from curate.store import Store


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]], **options: Any) -> Path:
    """A small Parquet file."""
    pq.write_table(pa.table(dict(columns)), path, **options)
    return path


def ingest(
    store: Store, sources: Sequence[object], map_items: Callable[..., Iterator[Any]] = map, **settings: Any
) -> tuple[TableSpec, dict[str, int]]:
    """Plan and run as the job does."""
    entries = [str(source) for source in sources]
    given = {"adopt": entries} if settings.pop("adopt", False) else {"sources": entries}
    step = ingest_step(IngestSettings(**given, **settings), store)
    if step.done(store, []):
        return step.tables[0], {}
    with progress("ingest", 1) as ticker:
        counts = dict(step.run(store, [], map_items, ticker))
    assert step.done(store, [])
    return step.tables[0], counts


def rows_of(store: Store, samples: TableSpec) -> list[dict[str, Any]]:
    """Every row of the pool, in order."""
    return [row for shard in store.shards(samples) for row in store.read(samples, shard.name).to_pylist()]


def tree(root: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*")) if path.is_file()
    }  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours may catch it."""


class MortalStore(Store):
    """A store whose process dies before its n-th change at rest."""

    def __init__(self, root: str, lives: int) -> None:
        super().__init__(root)
        self.lives = lives

    def _change(self) -> None:
        if self.lives == 0:
            raise Killed
        self.lives -= 1

    @contextmanager
    def staged(self, path: str) -> Iterator[Path]:
        with super().staged(path) as local:
            yield local
            self._change()

    def remove(self, path: str) -> None:
        self._change()
        super().remove(path)

    def remove_tree(self, folder: str) -> None:
        self._change()
        super().remove_tree(folder)
