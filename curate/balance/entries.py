"""MetaCLIP over a pool: the entries of its captions counted as one, then drawn shard by shard.

    <work>/counts/<chunk>.npz        captions that contain each entry, in a chunk of shards
    <work>/probabilities.npz         p of each entry

The entries file is text (an entry a line) or a JSON list. What each caption contains stands in `matches`, from `stage`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curate.balance.metaclip import caption_probabilities, entry_counts, keep_probabilities, kept, p_to_t, t_to_p
from curate.config import BalanceSettings
from curate.errors import PlanError
from curate.metrics import Ticker
from curate.rows import Column, evaluate, read_rows
from curate.schema import KEY, OK, Shard, TableSpec
from curate.stage import Map
from curate.store import Store
from curate.vectors import Int64, chunks_of, get_arrays, key_numbers, put_arrays

SHARDS_PER_COUNT = 20  # 500,000 counts are 4 MB: fewer files of them than shards, and work for many cores


MATCHED = pa.field("matched_entries", pa.list_(pa.int32()))  # indices into the entries; null without a caption

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Captions:
    """What is balanced: the matched captions of a pool, who takes part, and where the passes keep their files."""

    store: Store
    columns: Mapping[str, Column]
    used: tuple[str, ...]
    settings: BalanceSettings
    spec: TableSpec
    work: str

    def read(self, shard: str) -> tuple[list[str], Mask, Int64]:
        """(keys, who takes part, (caption, entry) pairs of those, the caption by its place among them)."""
        table = read_rows(self.store, self.columns, self.used, shard)
        mask = np.ones(table.num_rows, bool)
        if "status" in table.column_names:
            mask &= np.asarray(pc.equal(table["status"], OK).fill_null(False))
        if self.settings.where:
            held = evaluate(table, {"held": f"CAST(({self.settings.where}) AS BOOLEAN)"})["held"]
            mask &= np.asarray(held.fill_null(False))
        found = table.filter(pa.array(mask))[MATCHED.name].combine_chunks()
        pairs = np.stack([pc.list_parent_indices(found), pc.list_flatten(found)], axis=1).astype(np.int64)
        return table[KEY.name].to_pylist(), mask, pairs


def digest_of(path: str) -> str:
    """sha256 of the entries file. Raises PlanError when it cannot be read."""
    return hashlib.sha256(_bytes(path)).hexdigest()


def read_entries(path: str) -> list[str]:
    """The entries of a file, in its order; empty lines are none. Raises PlanError."""
    data = _bytes(path)
    try:
        text = data.decode("utf-8-sig")
        entries = json.loads(text) if path.endswith(".json") else _lines(text)
        json.dumps(entries, ensure_ascii=False).encode()  # JSON may spell half a surrogate, which is no text
    except (ValueError, RecursionError) as error:
        raise PlanError(f"balance.entries: {path} is not UTF-8 text or JSON: {error}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, str) for entry in entries):
        raise PlanError(f"balance.entries: {path} is no list of texts; expected an entry a line, or a JSON list")
    return entries


def _lines(text: str) -> list[str]:
    return [line for line in text.replace("\r\n", "\n").split("\n") if line]


def _bytes(path: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as handle:
            data: bytes = handle.read()
    except (OSError, ValueError, ImportError) as error:
        raise PlanError(f"balance.entries: {path} cannot be read: {error}") from None
    return data


def balance(captions: Captions, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> dict[str, Any]:
    """Write the table; the facts of the whole pool."""
    store, settings, work = captions.store, captions.settings, captions.work
    count = len(read_entries(settings.entries))
    names = [shard.name for shard in shards]
    counts = np.zeros(count, np.int64)
    for path in map_items(partial(_count, captions, names, count), chunks_of(len(names), SHARDS_PER_COUNT)):
        counts += get_arrays(store, path)["counts"]
    t = settings.t
    if t is None:
        # A pool without matches has no tail; nothing is drawn whatever t is.
        t = max(1, p_to_t(counts, settings.p or 0.0)) if counts.any() else 1
    put_arrays(store, f"{work}/probabilities.npz", probabilities=keep_probabilities(counts, t))
    totals: Counter[str] = Counter()
    for found in map_items(partial(_draw, captions), list(shards)):
        totals.update(found)
        ticker.advance(1)
    total = int(counts.sum())
    return {
        "t": t, "p": t_to_p(counts, t) if total else None, "entries": count, "matches": total,
        "entries_matched": int((counts > 0).sum()), "entries_above_t": int((counts > t).sum()),
        **{f"captions_{name}": totals[name] for name in ("seen", "matched", "kept")},
        "captions_expected": round(totals["expected_millionths"] / 1e6, 3),
    }  # fmt: skip


def _count(captions: Captions, names: Sequence[str], entries: int, chunk: range) -> str:
    """Count the entries in a chunk of shards; where the counts are."""
    store, path = captions.store, f"{captions.work}/counts/{chunk.start:08d}.npz"
    if not store.exists(path):
        counts = sum((entry_counts(captions.read(names[number])[2], entries) for number in chunk), np.zeros(entries))
        put_arrays(store, path, counts=counts.astype(np.int64))
    return path


def _draw(captions: Captions, shard: Shard) -> Mapping[str, int]:
    """Write a shard unless it is there; its captions seen, matched and kept."""
    store, spec = captions.store, captions.spec
    if not store.has(spec, shard.name):
        keys, mask, pairs = captions.read(shard.name)
        probabilities = get_arrays(store, f"{captions.work}/probabilities.npz")["probabilities"]
        count = int(mask.sum())
        values = (
            np.bincount(pairs[:, 0], minlength=count),
            caption_probabilities(pairs, probabilities, count),
            kept(pairs, probabilities, key_numbers(keys)[mask], captions.settings.seed),
        )
        columns = [pa.array(keys)]
        for field, value in zip(list(spec.schema)[1:], values, strict=True):
            whole = np.zeros(shard.rows, value.dtype)
            whole[mask] = value
            columns.append(pa.array(whole.astype(field.type.to_pandas_dtype()), field.type, mask=~mask))
        aligned = captions.columns[MATCHED.name].table
        store.write(spec, shard, pa.table(columns, schema=spec.schema), aligned_with=aligned)
    table = store.read(spec, shard.name, spec.columns)
    there = table.filter(pc.is_valid(table["matches"]))
    expected = np.asarray(there["keep_probability"], dtype=np.float64).sum()
    return {
        "seen": there.num_rows, "matched": int(np.count_nonzero(np.asarray(there["matches"]))),
        "kept": int(np.count_nonzero(np.asarray(there["is_balanced"]))),
        "expected_millionths": round(1e6 * float(expected)),
    }  # fmt: skip
