"""A release: chosen samples as tars that trainers read, with everything that says how they came to be.

    <root>/releases/<NNNN>-<fingerprint>/release.json       written last: without it there is no release
                                         manifest.parquet   a row per sample and subset, in the order of the tars
                                         README.md          the dataset card
                                         <subset>/00000.tar … sizes.json __len__
    <root>/releases/latest                                  the name of the newest release; moves after everything else
    <root>/_work/emit/<fingerprint>/                        while it grows

The fingerprint is the hash of all that determines the bytes. On a local disk a release grows below `_work`; when whole,
its files get second names in a folder of the process, which is renamed. On an object store, which cannot rename, it
grows in its place and `release.json` makes it one. Releases are never changed. Two runs at once write either different
folders or the same bytes.
"""

import hashlib
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from curate.config import EmitSettings, Recipe
from curate.emit.card import card
from curate.emit.facts import card_features, facts_of
from curate.emit.passes import Build, order, pick, write
from curate.emit.provenance import SEAL, release_note, seal_of, subset_note
from curate.emit.shuffle import Group, deal, group
from curate.emit.successor import carry
from curate.emit.summary import Summary
from curate.emit.verify import NOTE, RELEASES, WITHDRAWN
from curate.errors import PlanError
from curate.metrics import Ticker
from curate.presence import written_at
from curate.rows import SAMPLES, clauses_path, recall_path
from curate.schema import Shard, TableSpec, fingerprint, inputs_of, pool_digest
from curate.stage import CrossStep, Map
from curate.store import Store

VERSION = 3
LATEST = f"{RELEASES}/latest"
DAY_S = 24 * 3600  # after which an unfinished release is taken for given up


class EmitStep(CrossStep):
    """See the module's docstring."""

    name = "emit"

    def __init__(
        self,
        settings: EmitSettings,
        recipe: Recipe,
        tables: Sequence[TableSpec],
        members: Mapping[str, TableSpec],
        shards: Sequence[Shard],
        thresholds: Mapping[str, float],
        set_aside: Mapping[str, str],
        weights: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._weights = list(weights)
        self._settings, self._recipe, self._members = settings, recipe, dict(members)
        self._thresholds, self._set_aside = dict(thresholds), dict(set_aside)
        self._facts = facts_of(tables, settings.columns, settings.features)
        if settings.blur_faces:
            self._facts.check_faces()
        self._specs = [*tables, *members.values()]
        self._fingerprint = fingerprint(
            "release", VERSION, settings.model_dump(mode="json"), list(members), inputs_of(members.values()),
            inputs_of(self._facts.tables), pool_digest(shards),
        )  # fmt: skip

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether this very release is there, and the latest."""
        name = self._released(store)
        return name is not None and latest_release(store) == name

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Build what is missing and publish; counts samples and tars, bytes written, bytes and requests read."""
        work = f"_work/emit/{self._fingerprint}"
        counts: Mapping[str, int] = {}
        if self._released(store) is None:
            target = f"{work}/release" if store.is_local else f"{RELEASES}/{self._name(store)}"
            build = Build(store, self._settings, self._facts, self._members, work, target)
            try:
                counts = self._build(build, shards, map_items, ticker)
                self._publish(build)
            except Exception:
                if self._released(store) is None:  # else another run published it and cleared the work away
                    raise
        name = self._released(store)
        assert name is not None, "published above"
        if latest_release(store) != name:
            store.put_bytes(LATEST, f"{name}\n".encode())
        _clear(store, work)
        _sweep(store)
        return counts

    def _build(self, build: Build, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        settings = self._settings
        largest = max((shard.rows for shard in shards), default=1)
        chunks = deal([shard.name for shard in shards], largest, settings.seed, settings.group_samples)
        found: dict[int, Any] = {}
        for result in map_items(partial(pick, build), chunks):
            found[result["chunk"]] = result["subsets"]
            ticker.advance(0, f"choosing, {len(found)} of {len(chunks)} parts")
        picked = {name: _summed([found[chunk.number][name] for chunk in chunks]) for name in self._members}
        groups = {name: self._groups(name, [found[chunk.number][name] for chunk in chunks]) for name in self._members}
        every = [one for name in self._members for one in groups[name]]
        for _ in map_items(partial(order, build), every):
            ticker.advance(0, "shuffling")
        notes = self._write(build, every, map_items, ticker, max(1, len(shards)))
        traffic: Counter[str] = Counter()
        for note in (note for name in self._members for note in notes[name]):
            traffic.update({"requests": note.get("requests", 0), "bytes_read": note.get("bytes_read", 0)})
        read = f"{traffic['bytes_read'] / 1e6:,.1f} MB read in {traffic['requests']:,} requests"
        ticker.advance(0, read)
        self._finish(build, shards, picked, groups, notes)
        written = {name: sum(note["samples"] for note in notes[name]) for name in self._members}
        return {
            **{f"{name}: samples": samples for name, samples in written.items()},
            "samples": sum(written.values()), "tars": sum(len(notes[name]) for name in self._members),
            "bytes_written": sum(note["bytes"] for name in self._members for note in notes[name]), **traffic,
        }  # fmt: skip

    def _groups(self, name: str, parts: Sequence[Mapping[str, Any]]) -> list[Group]:
        settings = self._settings
        return group(
            name, [part["samples"] for part in parts], [part["bytes"] for part in parts], settings.group_samples,
            settings.samples_per_shard, settings.bytes_per_shard, settings.min_tars,
        )  # fmt: skip

    def _write(
        self, build: Build, groups: Sequence[Group], map_items: Map, ticker: Ticker, total: int
    ) -> dict[str, list[dict[str, Any]]]:
        """The notes of all tars, in order, by subset."""
        # Where images lie elsewhere, a group's neighbours are read together, so one worker writes all of its tars.
        together = not build.store.is_local
        items = [
            (one, tars)
            for one in groups
            for tars in ([tuple(range(one.tars))] if together else [(tar,) for tar in range(one.tars)])
        ]
        notes: dict[str, list[dict[str, Any]]] = {name: [] for name in self._members}
        tars = sum(one.tars for one in groups)
        written = shown = 0
        for made in map_items(partial(_write_item, build), items):
            for note in made:
                notes[note["subset"]].append(note)
            written += len(made)
            ticker.advance(total * written // tars - shown, f"tar {written} of {tars}")
            shown = total * written // tars
        return {name: sorted(found, key=lambda note: str(note["tar"])) for name, found in notes.items()}

    def _finish(
        self, build: Build, shards: Sequence[Shard], picked: Mapping[str, Any], groups: Mapping[str, Sequence[Group]],
        notes: Mapping[str, Sequence[Mapping[str, Any]]],
    ) -> None:  # fmt: skip
        """Everything beside the tars; `release.json` last."""
        store, target = build.store, build.target
        for name, files in notes.items():
            store.put_json(f"{target}/{name}/sizes.json", {file["tar"]: file["samples"] for file in files})
            store.put_bytes(f"{target}/{name}/__len__", str(picked[name]["samples"]).encode())
        sources = [
            {key: value for key, value in batch.items() if key != "shards"}
            for spec in self._specs
            if spec.name == SAMPLES
            for batch in store.batches(spec)
        ]
        release = release_note(
            self._fingerprint, self._recipe, self._settings, self._specs, shards, self._set_aside, sources,
            {
                name: subset_note(
                    self._recipe, spec, self._thresholds.get(name), picked[name], groups[name], notes[name]
                )
                | {"clauses": store.get_json(clauses_path(spec, shards)) or []}
                for name, spec in self._members.items()
            },
        )  # fmt: skip
        release["weights"] = self._weights
        copies = next((spec for spec in self._specs if spec.name == "duplicates"), None)
        release["recall"] = (store.get_json(recall_path(copies)) if copies is not None else None) or {}
        digest, rows, scores = _concatenate(build, notes)
        release["manifest"] = {"sha256": digest, "rows": rows}
        for name, noted in scores.items():
            release["subsets"][name]["scores"] = noted
        readme = card(release, card_features(self._facts, self._settings)).encode()
        store.put_bytes(f"{target}/README.md", readme)
        release["card"] = {"sha256": hashlib.sha256(readme).hexdigest()}
        release[SEAL] = seal_of(release)
        store.put_json(f"{target}/{NOTE}", release)

    def _publish(self, build: Build) -> None:
        """Make a local release visible under its name; elsewhere it is where it belongs already.

        Another run may still be writing below `target`: what it has not finished must not come along.
        """
        store = build.store
        place = f"{RELEASES}/{self._name(store)}"
        if not store.is_local or self._released(store) is not None:
            return
        mine = f"{build.work}/publish-{uuid.uuid4().hex[:12]}"
        for name in files_of(store.get_json(f"{build.target}/{NOTE}")):
            carry(store, f"{build.target}/{name}", f"{mine}/{name}")
        Path(store.full(place)).parent.mkdir(parents=True, exist_ok=True)
        # Fails when another run published the same bytes just now.
        Path(store.full(mine)).rename(store.full(place))

    def _released(self, store: Store) -> str | None:
        """The name of the complete release with this fingerprint: the newest that was not withdrawn."""
        for name in reversed(self._candidates(store)):
            note = store.get_json(f"{RELEASES}/{name}/{NOTE}")
            if note is None or note["fingerprint"] != self._fingerprint:
                continue
            if not store.exists(f"{RELEASES}/{name}/{WITHDRAWN}"):
                return name
        return None

    def _candidates(self, store: Store) -> list[str]:
        return [name for name in store.names(RELEASES) if name.endswith(f"-{self._fingerprint[:8]}")]

    def _name(self, store: Store) -> str:
        """The folder that this release grows in, or the next free number."""
        mine = [name for name in self._candidates(store) if not store.exists(f"{RELEASES}/{name}/{NOTE}")]
        if mine:
            return mine[-1]
        numbers = [int(name[:4]) for name in store.names(RELEASES) if name[:4].isdigit()]
        return f"{max(numbers, default=0) + 1:04d}-{self._fingerprint[:8]}"


def emit_step(
    settings: EmitSettings,
    recipe: Recipe,
    tables: Sequence[TableSpec],
    member_specs: Mapping[str, TableSpec],
    shards: Sequence[Shard],
    thresholds: Mapping[str, float],
    extra: Mapping[str, str],
    weights: Sequence[Mapping[str, Any]] = (),
) -> EmitStep:
    """The step that publishes a release. `extra` names the shards that were set aside, with the cause.

    `weights` are the model files behind the tables, {table, name, sha256, licence, source} each.

    Raises PlanError for a column that no table has, or where no table says where images lie.
    """
    if not member_specs:
        raise PlanError(
            "emit: the recipe has no subsets; write `subsets: {all: {}}` to emit every sample with an image"
        )
    return EmitStep(settings, recipe, tables, member_specs, shards, thresholds, extra, weights)


def latest_release(store: Store) -> str | None:
    """The name that `releases/latest` holds."""
    try:
        return store.get_bytes(LATEST).decode(errors="replace").strip()
    except FileNotFoundError:
        return None


def files_of(release: Mapping[str, Any]) -> list[str]:
    """Every file of a release, by its `release.json`."""
    subsets = release["subsets"].items()
    own = [f"{name}/{file}" for name, _ in subsets for file in ("sizes.json", "__len__")]
    tars = [f"{name}/{file['name']}" for name, facts in subsets for file in facts["files"]]
    return [*tars, *own, "README.md", "manifest.parquet", NOTE]


def _clear(store: Store, folder: str) -> None:
    """Remove a folder into which another run may be writing, or which it is removing as well."""
    for _ in range(10):
        with suppress(OSError):
            store.remove_tree(folder)
        if not store.exists(folder):
            return


def _sweep(store: Store) -> None:
    """Remove what killed runs of other releases left: once their release is there, or when a day went by."""
    notes = [store.get_json(f"{RELEASES}/{name}/{NOTE}") for name in store.names(RELEASES) if name != "latest"]
    published = {note["fingerprint"] for note in notes if note is not None}
    for name in store.names("_work/emit"):
        if name in published or _is_old(store, f"_work/emit/{name}"):
            _clear(store, f"_work/emit/{name}")
    for name in store.names(RELEASES):  # on an object store they grow in their place
        whole = name == "latest" or store.exists(f"{RELEASES}/{name}/{NOTE}")
        if not whole and _is_old(store, f"{RELEASES}/{name}"):
            store.remove_tree(f"{RELEASES}/{name}")


def _is_old(store: Store, folder: str) -> bool:
    """Whether nothing in a folder was written for a day; False where the store does not tell."""
    times = [written_at(info) for info in store.fs.find(store.full(folder), detail=True).values()]
    return bool(times) and time.time() - max(times) > DAY_S


def _write_item(build: Build, item: tuple[Group, tuple[int, ...]]) -> list[dict[str, Any]]:
    return write(build, *item)


def _summed(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    clauses: Counter[str] = Counter()
    for part in parts:
        clauses.update(part["clauses"])
    plain = {name: sum(part[name] for part in parts) for name in ("samples", "bytes", "without_text")}
    return {**plain, "clauses": dict(clauses)}


def _concatenate(
    build: Build, notes: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[str, int, dict[str, dict[str, Any]]]:
    """Write manifest.parquet, a row group for each tar; returns (sha256, rows, scores by subset)."""
    rows = 0
    scores: dict[str, dict[str, Any]] = {}
    with build.store.staged(f"{build.target}/manifest.parquet") as local:
        with pq.ParquetWriter(local, build.facts.manifest_schema(), compression="zstd") as writer:
            for name in sorted(notes):  # as release.json lists them
                summary = Summary(build.facts.scores)
                for number in range(len(notes[name])):
                    with build.store.open(build.part(name, number)) as handle:
                        part = pq.read_table(handle)
                    writer.write_table(part, row_group_size=max(1, part.num_rows))
                    summary.add(part)
                    rows += part.num_rows
                scores[name] = summary.note()
        with local.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return digest, rows, scores
