"""Which reference each row reaches itself, and what earlier runs were told of it, so that a refresh asks new rows only.

    <rule>/direct/<shard>.npz       `row`, `reference`, `similarity` of rows that reach one; `start`: the shard's first
                                    row in the pool
    _near/<identity>/<shard>.npz    `asked`: rows that were compared with the references; `row`, `reference`,
                                    `similarity` of those that reach one

A row's answer depends on nothing but its value and the references: `identity` names both, and no row is asked twice.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.dedup.known import digest_of, identity_of, name_identity
from curate.dedup.near import FloatArray, IntArray, Pool
from curate.dedup.references import kept_reference, nearest_hashes
from curate.dedup.rules import Rule
from curate.stage import Map
from curate.vectors import chunks_of, get_arrays, put_arrays

SHARDS_PER_ASK = 50  # an index of the references is built once per this many shards

_NOTHING: Mapping[str, npt.NDArray[Any]] = {
    "asked": np.empty(0, np.int64), "row": np.empty(0, np.int64), "reference": np.empty(0, np.int64),
    "similarity": np.empty(0, np.float32),
}  # fmt: skip


def ask_references(pool: Pool, rule: Rule, reference_path: str, read: Sequence[str], map_items: Map) -> int:
    """Write `direct/<shard>.npz` for every shard; returns how many rows were asked.

    `read` names the tables that values come from. What is there already is not made again.
    """
    there = set(pool.store.names(pool.place("direct")))
    chunks = chunks_of(len(pool.names), max(1, min(SHARDS_PER_ASK, len(pool.names) // 32)))
    todo = [chunk for chunk in chunks if any(f"{pool.names[number]}.npz" not in there for number in chunk)]
    if not todo:
        return 0
    references = digest_of(kept_reference(pool.store, reference_path).values)
    told = identity_of(
        "asked", rule.search, rule.threshold if rule.search == "vectors" else rule.radius, references, read
    )
    name_identity(pool.store, told)
    return sum(map_items(partial(_ask, pool, rule, reference_path, told), todo))


def _ask(pool: Pool, rule: Rule, reference_path: str, told: str, chunk: range) -> int:
    """Ask the rows of these shards that no earlier run asked."""
    store, count = pool.store, 0
    nearest = None
    for number in chunk:
        values, rows = pool.values(pool.names[number])
        path = f"{told}/{pool.names[number]}.npz"
        answers = get_arrays(store, path) if store.exists(path) else _NOTHING
        new = ~np.isin(rows, answers["asked"])
        if new.any():
            nearest = nearest or _nearest(kept_reference(store, reference_path).values, rule)
            place, similarity = nearest(values[new])
            reached = place >= 0
            answers = _merged(answers, rows[new], rows[new][reached], place[reached], similarity[reached])
            put_arrays(store, path, **answers)
            count += int(new.sum())
        mine = np.isin(answers["row"], rows)
        put_arrays(
            store, pool.place(f"direct/{pool.names[number]}.npz"), row=answers["row"][mine],
            reference=answers["reference"][mine], similarity=answers["similarity"][mine],
            start=np.array([pool.starts[number]], np.int64),
        )  # fmt: skip
    return count


def _merged(
    answers: Mapping[str, npt.NDArray[Any]], asked: IntArray, row: IntArray, reference: IntArray, similarity: FloatArray
) -> dict[str, npt.NDArray[Any]]:
    new = {"asked": asked, "row": row, "reference": reference, "similarity": similarity}
    both = {name: np.concatenate([answers[name], values]) for name, values in new.items()}
    order = np.argsort(both["row"])
    return {name: np.sort(values) if name == "asked" else values[order] for name, values in both.items()}


def _nearest(references: npt.NDArray[Any], rule: Rule) -> Callable[[npt.NDArray[Any]], tuple[IntArray, FloatArray]]:
    if rule.search == "hashes":
        return partial(nearest_hashes, references=references, radius=rule.radius)
    from curate.dedup.reference_vectors import NearestVectors  # noqa: PLC0415  # torch: where vectors are compared

    return NearestVectors(references, rule.threshold).of
