"""A small committed pool of clustered vectors, some rows without one, for the steps across shards."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curate.metrics import progress
from curate.schema import KEY, SAMPLE_FIELDS, Shard, TableSpec, inputs_of, keys_of
from curate.stage import CrossStep
from curate.store import Store

WIDTH = 16
SAMPLES = TableSpec("samples", 1, pa.schema([*SAMPLE_FIELDS, pa.field("folder", pa.string())]), open_schema=True)
IMAGES = TableSpec("images", 1, pa.schema([KEY, pa.field("status", pa.string())]), inputs=inputs_of([SAMPLES]))
VECTORS = TableSpec(
    "embeddings_toy", 1, pa.schema([KEY, pa.field("toy", pa.list_(pa.float16(), WIDTH))]), inputs=inputs_of([IMAGES])
)
TABLES = [SAMPLES, IMAGES, VECTORS]


@dataclass(frozen=True)
class Row:
    """A row of the pool as the tests see it; `vector` float16[WIDTH] or None."""

    key: str
    status: str
    folder: str
    vector: np.ndarray | None


def build(store: Store, shards: int = 5, rows: int = 80, text: str = "t") -> tuple[list[Shard], list[Row]]:
    """Write the pool; vectors around 12 centres, every tenth row failed, a few rows zero or without a vector."""
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(12, WIDTH))
    made: list[Shard] = []
    facts: list[Row] = []
    for number in range(shards):
        urls, texts = [f"{number}-{row}" for row in range(rows)], [f"{text}{row}" for row in range(rows)]
        part = []
        for row, key in enumerate(keys_of(urls, texts)):
            vector = (centres[rng.integers(12)] + rng.normal(size=WIDTH) * 0.5).astype(np.float16)
            vector[:] = 0 if row % 37 == 36 else vector
            status = "timeout" if row % 10 == 9 else "ok"
            folder = "abc"[int(rng.integers(3))]
            part.append(Row(key, status, folder, None if status != "ok" or row % 23 == 22 else vector))
        shard = Shard(f"{number:04d}", rows)
        keys = [one.key for one in part]
        store.write(SAMPLES, shard, pa.table([keys, urls, texts, [one.folder for one in part]], schema=SAMPLES.schema))
        store.write(IMAGES, shard, pa.table([keys, [one.status for one in part]], schema=IMAGES.schema), SAMPLES)
        vectors = pa.array([one.vector for one in part], VECTORS.schema.field("toy").type)
        store.write(VECTORS, shard, pa.table([pa.array(keys), vectors], schema=VECTORS.schema), SAMPLES)
        made.append(shard)
        facts += part
    return made, facts


def shuffled_map(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """An engine whose workers finish in another order."""
    order = list(items)
    random.Random(len(order)).shuffle(order)
    return map(function, order)


class Killed(Exception):
    """The engine died."""


def dying_map(after: int) -> Callable[..., Iterator[Any]]:
    """An engine that dies after so many items of all its maps."""
    left = [after]

    def run(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        for item in items:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            yield function(item)

    return run


def go(step: CrossStep, store: Store, shards: list[Shard], mapper: Any = map) -> dict[str, int]:
    """Run a step as a job does, unless it is done."""
    if step.done(store, shards):
        return {}
    with progress(step.name, len(shards)) as ticker:
        return dict(step.run(store, shards, mapper, ticker))


def rows_of(store: Store, spec: TableSpec, shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """All rows of a table, in the order of the pool."""
    return [row for shard in shards for row in store.read(spec, shard.name).to_pylist()]
