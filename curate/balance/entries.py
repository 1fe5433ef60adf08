"""MetaCLIP over a pool: captions matched with the entries shard by shard, counted as one, drawn shard by shard.

    <work>/entries.json              the entries, for workers on other machines
    <work>/matches/<shard>.npz       captions that take part, and their (caption, entry) pairs
    <work>/counts/<chunk>.npz        captions that contain each entry, in a chunk of shards
    <work>/probabilities.npz         p of each entry

The entries file is text (an entry a line) or a JSON list. Every worker process builds the matcher once.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate.balance.metaclip import (
    Matcher,
    caption_probabilities,
    entry_counts,
    keep_probabilities,
    kept,
    p_to_t,
    t_to_p,
)
from curate.config import BalanceSettings
from curate.errors import PlanError
from curate.metrics import Ticker
from curate.rows import Column, evaluate, read_rows
from curate.schema import KEY, OK, Shard, TableSpec
from curate.stage import Map
from curate.store import Store
from curate.vectors import Int64, chunks_of, get_arrays, key_numbers, put_arrays

SHARDS_PER_COUNT = 20  # 500,000 counts are 4 MB: fewer files of them than shards, and work for many cores


@dataclass(frozen=True)
class Captions:
    """What is matched: the captions of a pool, who takes part, and where the passes keep their files."""

    store: Store
    columns: Mapping[str, Column]
    used: tuple[str, ...]  # the text first
    settings: BalanceSettings
    spec: TableSpec
    work: str

    def read(self, shard: str) -> tuple[Int64, list[str | None], list[str]]:
        """(rows that take part, their captions, their keys)."""
        table = read_rows(self.store, self.columns, self.used, shard)
        mask = np.ones(table.num_rows, bool)
        if "status" in table.column_names:
            mask &= np.asarray(pc.equal(table["status"], OK).fill_null(False))
        if self.settings.where:
            held = evaluate(table, {"held": f"CAST(({self.settings.where}) AS BOOLEAN)"})["held"]
            mask &= np.asarray(held.fill_null(False))
        some = table.filter(pa.array(mask))
        rows = np.flatnonzero(mask).astype(np.int64)
        return rows, some[self.settings.column].to_pylist(), some[KEY.name].to_pylist()


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


@lru_cache(maxsize=1)
def _matcher(root: str, path: str, version: Any) -> Matcher:
    return Matcher(Store(root).get_json(path), version)


def balance(captions: Captions, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> dict[str, Any]:
    """Write the table; the facts of the whole pool."""
    store, settings, work = captions.store, captions.settings, captions.work
    entries = read_entries(settings.entries)
    if not store.exists(f"{work}/entries.json"):
        store.put_json(f"{work}/entries.json", entries)
    names = [shard.name for shard in shards]
    counts = np.zeros(len(entries), np.int64)
    for path in map_items(partial(_match, captions, names), chunks_of(len(names), SHARDS_PER_COUNT)):
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
        "t": t, "p": t_to_p(counts, t) if total else None, "entries": len(entries), "matches": total,
        "entries_matched": int((counts > 0).sum()), "entries_above_t": int((counts > t).sum()),
        **{f"captions_{name}": totals[name] for name in ("seen", "matched", "kept")},
        "captions_expected": round(totals["expected_millionths"] / 1e6, 3),
    }  # fmt: skip


def _match(captions: Captions, names: Sequence[str], chunk: range) -> str:
    """Match a chunk of shards; where the counts of its entries are."""
    store, path = captions.store, f"{captions.work}/counts/{chunk.start:08d}.npz"
    if store.exists(path):
        return path
    matcher = _matcher(store.root, f"{captions.work}/entries.json", captions.settings.version)
    counts = np.zeros(matcher.count, np.int64)
    for number in chunk:
        rows, texts, _ = captions.read(names[number])
        pairs = matcher.matches(texts)
        counts += entry_counts(pairs, matcher.count)
        put_arrays(store, f"{captions.work}/matches/{names[number]}.npz", rows=rows, pairs=pairs.astype(np.int32))
    put_arrays(store, path, counts=counts)
    return path


def _draw(captions: Captions, shard: Shard) -> Mapping[str, int]:
    """Write a shard unless it is there; its captions seen, matched and kept."""
    store, spec = captions.store, captions.spec
    if not store.has(spec, shard.name):
        held = get_arrays(store, f"{captions.work}/matches/{shard.name}.npz")
        probabilities = get_arrays(store, f"{captions.work}/probabilities.npz")["probabilities"]
        rows, pairs = held["rows"], held["pairs"].astype(np.int64)
        aligned = captions.columns[captions.settings.column].table
        keys = store.read(aligned, shard.name, [KEY.name]).column(KEY.name)
        numbers = key_numbers(keys.to_pylist())[rows]
        values = (
            np.bincount(pairs[:, 0], minlength=len(rows)),
            caption_probabilities(pairs, probabilities, len(rows)),
            kept(pairs, probabilities, numbers, captions.settings.seed),
        )
        outside = np.ones(shard.rows, bool)
        outside[rows] = False
        columns = [keys]
        for field, value in zip(list(spec.schema)[1:], values, strict=True):
            whole = np.zeros(shard.rows, value.dtype)
            whole[rows] = value
            columns.append(pa.array(whole.astype(field.type.to_pandas_dtype()), field.type, mask=outside))
        store.write(spec, shard, pa.table(columns, schema=spec.schema), aligned_with=aligned)
    table = store.read(spec, shard.name, spec.columns)
    there = table.filter(pc.is_valid(table["matches"]))
    expected = np.asarray(there["keep_probability"], dtype=np.float64).sum()
    return {
        "seen": there.num_rows, "matched": int(np.count_nonzero(np.asarray(there["matches"]))),
        "kept": int(np.count_nonzero(np.asarray(there["is_balanced"]))),
        "expected_millionths": round(1e6 * float(expected)),
    }  # fmt: skip
