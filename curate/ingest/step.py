"""Ingest: which rows exist. New sources join the pool as a batch; what is in the pool is never touched.

The list of sources is not part of the table's identity: new files are new rows, old rows keep their shards, and a
source that is no longer listed, or whose content was replaced, keeps the rows that it gave. Below the table's folder:

    _pool/<batch>.json     sources and shards of a batch; with it the batch exists
    _keys/<batch>/…        the keys of its samples, in order, for later batches to compare with
    _ingest/plan.json      the batch that is being made: its sources with size and sha256
    _ingest/work-…/        what its passes leave for one another; gone when the batch exists
    _ingest/seen.json      content hashes by size and mtime or ETag, so that a run need not read what it knows

A batch that was begun is finished as planned before another one is planned. If its sources changed meanwhile it is
planned anew; nothing of it was in the pool.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from curate.config import IngestSettings
from curate.ingest import passes, pools
from curate.ingest.reading import look, rows_about
from curate.ingest.schemas import unite
from curate.ingest.sources import File, find_tables, sha256_of, stat
from curate.metrics import Ticker, total
from curate.schema import SAMPLE_FIELDS, Shard, TableSpec, fingerprint
from curate.stage import CrossStep, Map
from curate.store import Store

VERSION = 1
ROWS_PER_PARTITION = 4_000_000  # compared at once: 0.4 GB
MERGED_EVERY = 8  # batches whose key files are compared one by one, before one batch takes them all in
LOOKERS = 16  # footers read at once: waiting for storage, not for a core


def ingest_step(settings: IngestSettings, store: Store) -> "IngestStep":
    """List the sources, read the columns of those that are new, and check `columns` and `where` against them.

    Raises SourceError and PlanError.
    """
    identity: dict[str, Any] = {"columns": settings.columns, "where": settings.where}
    identity |= {"rows_per_shard": settings.rows_per_shard} if settings.sources else {"adopt": True}
    named = TableSpec("samples", VERSION, pa.schema(SAMPLE_FIELDS), identity, open_schema=True)
    files = [*find_tables(settings.sources), *pools.find_pools(settings.adopt)]
    pool = _Pool(store, named)
    plan = pool.plan()
    fixed = pool.schema() if plan is None else _unpack(plan["schema"])
    with ThreadPoolExecutor(LOOKERS) as threads:
        sources = list(threads.map(lambda file: look(file, settings.columns), pool.fresh(files)))
    for source in sources:
        if settings.where is not None:
            passes.check_where(source, settings.where)
    schema = unite(fixed, [(source.file.path, passes.own_fields(source)) for source in sources])
    samples = TableSpec(named.name, VERSION, schema, identity, open_schema=True)
    return IngestStep(settings, samples, files)


class IngestStep(CrossStep):
    """Brings new sources into the pool. Its table is `samples`: key, url, text and the sources' own columns."""

    name = "ingest"

    def __init__(self, settings: IngestSettings, samples: TableSpec, files: Sequence[File]) -> None:
        self.tables = (samples,)
        self._settings, self._samples, self._files = settings, samples, files
        self.tars = tuple(file.path for file in files if file.kind == "pool")

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether every source is in the pool as it is now, and nothing is left to clear."""
        pool = _Pool(store, self._samples)
        return not pool.leftovers() and not pool.fresh(self._files)

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Finish the batch that was begun, then make one of the sources that are new.

        Counts: rows_in, pruned (by `where`), duplicates, samples; bad_lines, bad_values (read as null), bad_encoding
        and no_url where there are any; sources, and sources_gone that are in the pool and not listed any more.
        """
        pool = _Pool(store, self._samples)
        counts: list[Mapping[str, int]] = []
        plan = pool.plan()
        if plan is not None and _as_planned(plan):
            counts.append(self._make(pool, plan, map_items, ticker))
        pool.clear()
        fresh = pool.fresh(self._files)
        if fresh:
            plan = self._plan(pool, fresh, map_items)
            counts.append(self._make(pool, plan, map_items, ticker))
            pool.clear()
        listed = {file.path for file in self._files}
        gone = len({path for path, _ in pool.known()} - listed)
        ticker.advance(1, f"{len(store.shards(self._samples)):,} shards")
        return total([*counts, {"sources_gone": gone}]) if gone else total(counts)

    def _plan(self, pool: "_Pool", fresh: Sequence[File], map_items: Map) -> dict[str, Any]:
        hashes = dict(map_items(content_hash, fresh))
        sources = [{**asdict(file), "sha256": hashes[file.path]} for file in fresh]
        rows = sum(rows_about(look(file, self._settings.columns)) for file in fresh)
        held = sum(shard.rows for shard in pool.store.shards(self._samples))
        earlier = pool.generations()
        partitions = max([1, *(partitions for _, partitions in earlier)])
        while partitions * ROWS_PER_PARTITION < rows + held and partitions < 2**16:
            partitions *= 2
        number = len(pool.batches)
        plan = {
            "number": number, "partitions": partitions, "earlier": earlier, "schema": _pack(self._samples.schema),
            "merging": number % MERGED_EVERY == MERGED_EVERY - 1, "sources": sources,
        }  # fmt: skip
        pool.begin(plan)
        return plan

    def _make(self, pool: "_Pool", plan: Mapping[str, Any], map_items: Map, ticker: Ticker) -> dict[str, int]:
        files = [_file(plain) for plain in plan["sources"]]
        with ThreadPoolExecutor(LOOKERS) as threads:
            sources = list(threads.map(lambda file: look(file, self._settings.columns), files))
        earlier = tuple((number, partitions) for number, partitions in plan["earlier"])
        batch = passes.Batch(
            pool.store, self._samples, plan["number"], pool.work(plan), plan["partitions"], earlier, plan["merging"],
            len(sources), self._settings.where, self._settings.rows_per_shard,
        )  # fmt: skip
        each = [(batch, place, source) for place, source in enumerate(sources)]
        _go(map_items, passes.spill, each, ticker, "sources hashed")
        _go(map_items, passes.compare, [(batch, part) for part in range(batch.partitions)], ticker, "parts compared")
        _go(map_items, passes.write, each, ticker, "sources written")
        return pool.finish(plan, [pool.store.get_json(batch.done_path(place)) for place in range(len(sources))])


def _go(map_items: Map, function: Callable[[Any], None], items: Sequence[Any], ticker: Ticker, what: str) -> None:
    for done, _ in enumerate(map_items(function, items), start=1):
        ticker.advance(0, f"{done:,}/{len(items):,} {what}")


def content_hash(file: File) -> tuple[str, str]:
    """(path, what stands for the content): sha256 of a table; of an adopted pool, of its index."""
    return file.path, pools.identity(file.path) if file.kind == "pool" else sha256_of(file.path)


def _as_planned(plan: Mapping[str, Any]) -> bool:
    """Whether the sources of a begun batch are what they were."""
    for plain in plan["sources"]:
        now = stat(plain["path"])
        if now is None or now[0] != plain["bytes"] or now[1] != plain["token"]:
            return False
    return True


def _file(plain: Mapping[str, Any]) -> File:
    return File(plain["path"], plain["bytes"], plain["token"], plain["kind"])


def _pack(schema: pa.Schema) -> str:
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def _unpack(text: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


class _Pool:
    """What the store knows of ingestion."""

    def __init__(self, store: Store, samples: TableSpec) -> None:
        self.store, self.samples = store, samples
        self.folder = f"{store.folder(samples)}/_ingest"
        self.batches = store.batches(samples)

    def plan(self) -> dict[str, Any] | None:
        """The batch that was begun and is not in the pool."""
        plan: dict[str, Any] | None = self.store.get_json(f"{self.folder}/plan.json")
        return plan if plan is not None and plan["number"] == len(self.batches) else None

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Commit a plan."""
        number = f"{plan['number']:04d}-"
        for name in self.store.names(self.store.folder(self.samples)):
            if name.startswith(number):  # of a batch that was begun, and planned anew
                self.store.remove(f"{self.store.folder(self.samples)}/{name}")
        self.store.put_json(f"{self.folder}/plan.json", plan)

    def work(self, plan: Mapping[str, Any]) -> str:
        """The folder of a plan's passes; another plan has another one."""
        return f"{self.folder}/work-{fingerprint(plan)}"

    def finish(self, plan: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Make the batch part of the pool; returns its counts."""
        seen = self.store.get_json(f"{self.folder}/seen.json") or {}
        for plain in plan["sources"]:
            seen[plain["path"]] = [plain["bytes"], plain["token"], plain["sha256"]]
        self.store.put_json(f"{self.folder}/seen.json", seen)
        counts = total([entry["counts"] for entry in done])
        counts["sources"] = len(done)
        sources = [
            {**{name: plain[name] for name in ("path", "bytes", "sha256")}, "rows": entry["counts"]["samples"]}
            for plain, entry in zip(plan["sources"], done, strict=True)
        ]
        batch = {
            "shards": [shard for entry in done for shard in entry["shards"]], "sources": sources, "counts": counts,
            "partitions": plan["partitions"], "merged": plan["merging"], "schema": plan["schema"],
        }  # fmt: skip
        self.store.add_batch(self.samples, plan["number"], batch)
        self.batches = self.store.batches(self.samples)
        return counts

    def leftovers(self) -> list[str]:
        """Plans and work folders."""
        return [name for name in self.store.names(self.folder) if name != "seen.json"]

    def clear(self) -> None:
        """Remove what no batch needs any more; the plan last, so that a kill here leaves nothing unclear."""
        needed = {f"{number:06d}" for number, _ in self.generations()}
        keys = f"{self.store.folder(self.samples)}/_keys"
        stale = [f"{keys}/{name}" for name in self.store.names(keys) if name not in needed]
        for path in [*stale, *(f"{self.folder}/{name}" for name in sorted(self.leftovers(), key="plan.json".__eq__))]:
            self.store.remove_tree(path)

    def generations(self) -> list[tuple[int, int]]:
        """(batch, partitions) of the key files that together hold all keys of the pool."""
        merged = [number for number, batch in enumerate(self.batches) if batch["merged"]]
        first = merged[-1] if merged else 0
        return [(number, self.batches[number]["partitions"]) for number in range(first, len(self.batches))]

    def schema(self) -> pa.Schema | None:
        """The pool's columns."""
        return _unpack(self.batches[-1]["schema"]) if self.batches else None

    def known(self) -> dict[tuple[str, str], int]:
        """(path, sha256) of every source in the pool -> bytes."""
        return {
            (source["path"], source["sha256"]): source["bytes"] for batch in self.batches for source in batch["sources"]
        }

    def fresh(self, files: Sequence[File]) -> list[File]:
        """The files that are not in the pool, or not with the content that they have now."""
        known = self.known()
        paths = {path for path, _ in known}
        seen = self.store.get_json(f"{self.folder}/seen.json") or {}
        fresh = []
        for file in files:
            if file.path not in paths:
                fresh.append(file)
                continue
            size, token, sha256 = seen.get(file.path, (None, None, None))
            if (size, token) != (file.bytes, file.token):
                _, sha256 = content_hash(file)
            if (file.path, sha256) not in known:
                fresh.append(file)
        return fresh
