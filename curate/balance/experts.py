"""MoDE over a pool: both clusterings trained on a sample of its founders' vectors, then every shard assigned.

    _experts/<fingerprint>/experts.npz     fine and coarse centres, and the expert of each fine cell

Training is one item of work for any worker, assignment one a shard; both ask for a GPU where the engine has some.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from curate.balance.mode import Experts, assign, train
from curate.config import ExpertsSettings
from curate.engine.driver import OnDevice
from curate.metrics import Ticker
from curate.schema import KEY, Shard, TableSpec
from curate.stage import Map
from curate.store import Store
from curate.vectors import Pool, draw, drawn, finish, get_arrays, put_arrays

GPU_OF_A_PASS = 0.25  # of a GPU: four tasks hide one another's reading


def prepare(founding: Pool, settings: ExpertsSettings, spec: TableSpec, work: str, map_items: Map) -> None:
    """Write both clusterings, unless they are there. Raises PlanError for too few captions."""
    path = _path(spec)
    if not founding.store.exists(path):
        draw(founding, work, settings.sample, settings.seed, map_items)
        finish(map_items(OnDevice(partial(_train, founding, settings, work)), [path]))


def _path(spec: TableSpec) -> str:
    return f"_experts/{spec.fingerprint}/experts.npz"


def assign_all(
    pool: Pool, settings: ExpertsSettings, spec: TableSpec, shards: Sequence[Shard], map_items: Map, ticker: Ticker
) -> Mapping[str, int]:
    """Write the table where it is missing; captions by expert."""
    counts: Counter[int] = Counter()
    assign_shard = OnDevice(partial(_assign, pool, spec, _path(spec)), GPU_OF_A_PASS)
    for found in map_items(assign_shard, list(enumerate(shards))):
        counts.update(found)
        ticker.advance(1)
    return {f"captions of expert {number}": counts[number] for number in range(settings.coarse)}


def _train(pool: Pool, settings: ExpertsSettings, work: str, path: str) -> None:
    points = drawn(pool, work, settings.sample)[1]
    trained = train(
        points, settings.fine, settings.coarse, settings.fine_iterations, settings.coarse_iterations, settings.seed,
        _device(),
    )  # fmt: skip
    found = {"fine": trained.fine, "coarse": trained.coarse, "expert_of_fine": trained.expert_of_fine}
    if not pool.store.exists(path):  # by another run, that has swept away what this one read
        put_arrays(pool.store, path, **found)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@lru_cache(maxsize=1)
def _experts(root: str, path: str) -> Experts:
    held = get_arrays(Store(root), path)
    return Experts(held["fine"], held["coarse"], held["expert_of_fine"])


def _assign(pool: Pool, spec: TableSpec, path: str, item: tuple[int, Shard]) -> Mapping[int, int]:
    """Assign a shard unless it is; its captions by expert."""
    number, shard = item
    if not pool.store.has(spec, shard.name):
        part = pool.read(number)
        cells, experts = _none(shard.rows), _none(shard.rows)
        for fine, coarse in assign(_experts(pool.store.root, path), [part.vectors], _device()):
            cells[part.rows - pool.starts[number]] = fine
            experts[part.rows - pool.starts[number]] = coarse
        aligned = pool.columns[pool.by].table
        keys = pool.store.read(aligned, shard.name, [KEY.name]).column(KEY.name)
        columns = [pa.array(column, pa.int32(), mask=column < 0) for column in (experts, cells)]
        pool.store.write(spec, shard, pa.table([keys, *columns], schema=spec.schema), aligned_with=aligned)
    found = pool.store.read(spec, shard.name, ["expert"])["expert"].drop_null()
    return Counter(found.to_pylist())


def _none(rows: int) -> npt.NDArray[np.int32]:
    return np.full(rows, -1, np.int32)
