"""Steps across shards: the pool's cells, retrieval near seed sets, and balanced sampling under a tree of cells.

    centroids              nothing: trains the cells before dedup, where a rule of it says `cells: pool`
    cells                  cell, distance                                 which cell a row's vector is nearest to
    retrieved              is_retrieved, retrieved_by, …                  which seed sets retrieve it
    hierarchical_sample    hierarchical_sample_<target>                   how often a balanced sample takes it

Cells are trained on the pool's founders (`curate.vectors.founders`) and know no condition, so that a refresh assigns
new shards alone: `cells.where`, which each refresh may answer otherwise (NOT is_duplicate), says which rows are then
counted, searched and sampled. Once a pool has doubled, all is trained and assigned anew.

Declared here so that a plan loads neither torch nor FAISS; the passes are in `partition`, `seeds`, `sample_based`,
`by_cells` and `gather`. All of them leave whole files in the store: killed anywhere, a second run goes on to the same
rows, and so does any number of workers.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from curate.config import CellsSettings, HierarchySettings, LevelSettings, RetrieveSettings
from curate.errors import PlanError
from curate.metrics import Ticker
from curate.retrieve.vector_files import check_width, digest_of, width_of
from curate.schema import KEY, Shard, TableSpec, fingerprint, inputs_of, pool_digest
from curate.stage import CrossStep, Map
from curate.store import Store
from curate.vectors import founders, points_within, pool_of

if TYPE_CHECKING:
    from curate.retrieve.partition import Place

MOST_COPIES = 10_000  # of one image: `random` draws a number for each
CELLS = (pa.field("cell", pa.int32()), pa.field("distance", pa.float32()))
RETRIEVED = (
    pa.field("is_retrieved", pa.bool_(), nullable=False),
    pa.field("retrieved_by", pa.list_(pa.string())),  # the sets, in the recipe's order; the lists go together
    pa.field("retrieved_similarity", pa.list_(pa.float32())),  # cosine to the nearest seed of the set
    pa.field("retrieved_rank", pa.list_(pa.int32())),  # best place among a seed's neighbours, from 1
    pa.field("retrieved_times", pa.list_(pa.int32())),  # seeds of the set that retrieve the row
    pa.field("retrieved_count", pa.int32(), nullable=False),  # sum over the sets; `count_once`: sets
)


class CellsStep(CrossStep):
    """Writes `cells`: null for rows without an image or a usable vector. `read`: what decides who is in which cell."""

    name = "cells"

    def __init__(
        self, settings: CellsSettings, store: Store, tables: Sequence[TableSpec], shards: Sequence[Shard]
    ) -> None:
        self.settings, self.points_per_cell = settings, settings.points_per_cell
        self.given, self.shards = tuple(tables), tuple(shards)
        self.pool = pool_of(store, tables, shards, settings.by, settings.where, self.name)
        self._founding = pool_of(store, tables, founders(shards), settings.by, None, self.name)
        identity = settings.model_dump(mode="json", exclude={"where", "memory_gb"})
        if settings.centroids is None:
            self.points_per_cell, self.note = points_of(settings, settings, self.pool.width, self.name)
            identity |= {"founders": pool_digest(founders(shards)), "points_per_cell": self.points_per_cell}
        else:
            identity["centroids"] = digest_of(settings.centroids, "cells.centroids")
            check_width(width_of(settings.centroids, None), self.pool.width, settings.centroids, "cells.centroids")
        self._spec = TableSpec("cells", 2, pa.schema([KEY, *CELLS]), identity, inputs_of(self._founding.tables))
        self.tables = (self._spec,)
        self.read = tuple({spec.name: spec for spec in (*self.pool.tables, self._spec)}.values())
        self.identity = {"pool": pool_digest(shards), "where": settings.where}  # of what is done with the cells
        self.folder = f"_cells/{self._spec.fingerprint}"  # as `Place` has it
        self._count = f"{self.folder}/{fingerprint(self.identity, inputs_of(self.read))}"

    @property
    def facts(self) -> str:
        """Where the facts of the partition are kept."""
        return f"{self._count}/facts.json"

    @property
    def place(self) -> "Place":
        """The partition, as the passes over it see it."""
        from curate.retrieve.partition import Place  # noqa: PLC0415  # torch and FAISS: not for a plan

        return Place(self._spec, self.settings.metric, self._count)

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether every shard has its cells, and the pool its sizes."""
        return store.exists(self.facts) and {shard.name for shard in shards} <= store.done(self._spec)

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Train and assign; counts are those of the partition."""
        from curate.retrieve import partition  # noqa: PLC0415  # torch and FAISS: not for a plan

        self.prepare(map_items)
        return partition.assign_all(self.pool, self.place, shards, map_items, ticker)

    def prepare(self, map_items: Map) -> None:
        """Write the centroids, unless they are there."""
        from curate.retrieve import partition  # noqa: PLC0415  # torch and FAISS: not for a plan

        work = f"_work/cells/{self._spec.fingerprint}"
        partition.prepare(self._founding, self.place, self.settings, self.points_per_cell, work, map_items)
        self.pool.store.remove_tree(work)


def points_of(level: LevelSettings, how: CellsSettings | HierarchySettings, width: int, place: str) -> tuple[int, str]:
    """(points of each cluster that k-means sees, what a plan says where memory makes them fewer than asked for).

    Raises PlanError where memory does not hold what resampling gathers, or not even a point a cluster.
    """
    gathered = level.sample_size if level.resampling else 1
    most = points_within(level.count, max(how.points_per_cell, gathered), width, how.memory_gb, place)
    if gathered > most:
        told = f"{place}: sample_size {gathered} of {level.count:,} clusters is more than memory_gb ({how.memory_gb:g})"
        raise PlanError(f"{told} holds in one task; {most} would fit")
    if most >= how.points_per_cell:
        return how.points_per_cell, ""
    told = f"{place}: k-means of {level.count:,} clusters sees {most} points for each, not {how.points_per_cell}"
    return most, f"{told}: memory_gb ({how.memory_gb:g}) holds no more"


def cells_step(
    settings: CellsSettings, store: Store, tables: Sequence[TableSpec], shards: Sequence[Shard]
) -> CellsStep:
    """The step for these settings over these tables. Raises PlanError for an unknown column, bad SQL, or a file."""
    return CellsStep(settings, store, tables, shards)


class CentroidsStep(CrossStep):
    """Trains the cells of `cells_step`, which then only assigns. `path`: their file, of unit vectors."""

    name = "centroids"

    def __init__(
        self, settings: CellsSettings, store: Store, tables: Sequence[TableSpec], shards: Sequence[Shard]
    ) -> None:
        if settings.metric != "cosine":
            raise PlanError("dedup.cells: pool: vectors are compared by cosine; set cells.metric: cosine")
        self._cells = CellsStep(settings.model_copy(update={"where": None}), store, tables, shards)
        self.by, self.path, self.note = settings.by, f"{self._cells.folder}/centroids.npz", self._cells.note

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether the centroids are there."""
        return store.exists(self.path)

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Train."""
        self._cells.prepare(map_items)
        return {"cells": self._cells.settings.count}


def centroids_step(
    settings: CellsSettings, store: Store, tables: Sequence[TableSpec], shards: Sequence[Shard]
) -> CentroidsStep:
    """The step for these settings. Raises PlanError for cells that are not spherical, an unknown column, or a file."""
    return CentroidsStep(settings, store, tables, shards)


class RetrieveStep(CrossStep):
    """Writes `retrieved`, and a table of the sets with their own counts."""

    name = "retrieve"

    def __init__(self, settings: RetrieveSettings, cells: CellsStep, embedded: Mapping[str, str]) -> None:
        self.settings, self._cells, self._embedded = settings, cells, embedded
        _bytes_a_row(settings.codes, cells.pool.width)
        identity = settings.model_dump(mode="json") | cells.identity
        read = {spec.name: spec for spec in cells.read}
        for one, plain in zip(settings.sets, identity["sets"], strict=True):
            place = f"retrieve.sets.{one.name}"
            if one.embeddings is not None:
                plain["embeddings"] = digest_of(one.embeddings, f"{place}.embeddings")
                check_width(width_of(one.embeddings, one.array), cells.pool.width, one.embeddings, place)
            elif one.images is not None:
                if one.name not in embedded:
                    raise PlanError(f"{place}.images: this pipeline embeds no seed sets")
                plain["images"] = embedded[one.name]
            else:
                rows = pool_of(cells.pool.store, cells.given, cells.shards, cells.settings.by, one.where, place)
                read |= {spec.name: spec for spec in rows.tables}
        self._spec = TableSpec("retrieved", 1, pa.schema([KEY, *RETRIEVED]), identity, inputs_of(read.values()))
        self.tables = (self._spec,)

    @property
    def _table(self) -> str:
        return f"_retrieved/{self._spec.fingerprint}/table.json"

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether every shard has its rows and the sets their counts."""
        return store.exists(self._table) and {shard.name for shard in shards} <= store.done(self._spec)

    def report(self, store: Store) -> dict[str, Any] | None:
        """The sets with their own counts; None before the step has run. See `gather.table_of`."""
        return cast("dict[str, Any] | None", store.get_json(self._table))

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Retrieve; counts are the images that each set gives."""
        from curate.retrieve import by_cells, gather, partition, sample_based, seeds  # noqa: PLC0415  # torch, FAISS

        pool, place = self._cells.pool, self._cells.place
        sizes = place.sizes(store)
        if not sizes.any() and any(one.how != "as_is" for one in self.settings.sets):
            raise PlanError("retrieve: no row of the pool is in a cell; check `cells.where`")
        parts = partition.parts_of(sizes, _bytes_a_row(self.settings.codes, pool.width))
        folder = f"_work/retrieved/{self._spec.fingerprint}"
        work = seeds.Retrieval(pool, place, self.settings, parts, folder, self._embedded)
        met = seeds.hand_out(work, map_items)
        sampled = sample_based.retrieve(work, map_items)
        clustered = by_cells.retrieve(work, met, shards, map_items)
        counts, spread = gather.write_all(work, self._spec, shards, map_items, ticker)
        table = gather.table_of(work, met, sampled, clustered, counts, spread)
        if not store.exists(self._table):  # another run at this root may have ended, and swept away what we counted
            store.put_json(self._table, table)
        store.remove_tree(work.work)
        return {f"retrieved by {line['set']}": line["final"] for line in table["sets"] if line["final"]}


def _bytes_a_row(codes: str | None, width: int) -> int:
    """Of a vector in float16, or of its code. Raises PlanError for a product quantiser that does not fit the width."""
    if codes is None:
        return 2 * width
    kind, number = codes[:2], int(codes[2:])
    if kind == "PQ" and width % number:
        raise PlanError(f"retrieve.codes: {codes} cuts {width} numbers into {number}; expected a divisor")
    return number if kind == "PQ" else width * number // 8


def retrieve_step(
    settings: RetrieveSettings, cells: CellsStep, embedded: Mapping[str, str] | None = None
) -> RetrieveStep:
    """The step for these sets over the pool of `cells`. `embedded`: folder of the vectors of each set of images.

    Raises PlanError for bad SQL, or a file that is not there.
    """
    return RetrieveStep(settings, cells, embedded or {})


class HierarchyStep(CrossStep):
    """Writes `hierarchical_sample`: a column for each target, how often the sample takes the row (0: not at all)."""

    name = "hierarchy"

    def __init__(self, settings: HierarchySettings, cells: CellsStep) -> None:
        if cells.settings.metric != "l2":
            raise PlanError("hierarchy: its lowest level is the cells, and it is Euclidean; set cells.metric: l2")
        if settings.splits > 1 and cells.settings.resampling:  # as in Vo et al. 2024
            raise PlanError("hierarchy.splits: a level has either splits or resampling; set cells.resampling: 0")
        upwards = [cells.settings.count * settings.splits, *(level.count for level in settings.levels)]
        if any(upper > lower for lower, upper in pairwise(upwards)):
            raise PlanError(f"hierarchy.levels: {upwards} clusters from the lowest upwards; each level needs fewer")
        if settings.multiplier > MOST_COPIES or max(settings.targets) >= 2**62:
            raise PlanError(f"hierarchy: multiplier may be up to {MOST_COPIES:,}, and a target below 2^62")
        self.settings, self._cells = settings, cells
        fields = [pa.field(f"hierarchical_sample_{target}", pa.int32()) for target in settings.targets]
        identity = settings.model_dump(mode="json", exclude={"memory_gb"}) | cells.identity
        points = [points_of(level, settings, cells.pool.width, self.name) for level in settings.levels]
        self.note = "; ".join(note for _, note in points if note)
        if self.note:
            identity["points_of_levels"] = [number for number, _ in points]
        self._points = tuple(number for number, _ in points)
        self._spec = TableSpec("hierarchical_sample", 1, pa.schema([KEY, *fields]), identity, inputs_of(cells.read))
        self.tables = (self._spec,)

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether every shard has its sample."""
        return {shard.name for shard in shards} <= store.done(self._spec)

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Build the tree over the centroids, share out the targets, draw; counts are the images of each target."""
        from curate.retrieve import tree  # noqa: PLC0415  # torch and FAISS: not for a plan

        if not self._cells.place.sizes(store).any():
            raise PlanError("hierarchy: no row of the pool is in a cell; check `cells.where`")
        work = f"_work/hierarchical_sample/{self._spec.fingerprint}"
        pool, place = self._cells.pool, self._cells.place
        counts = tree.sample(pool, place, self.settings, self._points, self._spec, work, shards, map_items, ticker)
        store.remove_tree(work)
        return counts


def hierarchy_step(settings: HierarchySettings, cells: CellsStep) -> HierarchyStep:
    """The step for this tree over the pool of `cells`. Raises PlanError for cells that are not Euclidean."""
    return HierarchyStep(settings, cells)
