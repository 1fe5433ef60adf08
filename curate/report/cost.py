"""What a recipe would take for N rows: shards, core-hours, GPU-hours and storage, by multiplying measured rates.

The rates stand in rates.yaml beside this file, each with where it is from; a rate that nobody measured is missing, and
what needs it is named and left out of the sums, which are then said to be too small. CPU rates are of the machine that
the file names; GPU rates were published by others, and are told so. Everything is linear in rows but for the search
among hashes. It refuses to guess how many URLs answer (all are taken to) and how much a subset selects.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from curate.config import DedupSettings, Recipe
from curate.vectors import points_within

RATES = Path(__file__).with_name("rates.yaml")
MS_PER_HOUR = 3_600_000
UNKNOWN = math.nan  # of a figure without a rate; NaN spreads where it must not be forgotten

Rates = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """A step of the estimate. NaN: no rate. `gpu_hours` take the place of the model's core-hours, they add nothing."""

    step: str
    what: str
    core_hours: float = 0.0
    gpu_hours: float | None = None  # None: nothing here is done on a GPU
    stored_bytes: float = 0.0


def load_rates() -> Rates:
    """The rates that come with curate."""
    rates: Rates = yaml.safe_load(RATES.read_text(encoding="utf-8"))
    return rates


def estimate(recipe: Recipe, rows: float, rates: Rates) -> list[Line]:
    """A line for each step of the recipe, in the order of a run."""
    cpu, stored = rates["cpu_ms"], rates["bytes"]
    hours = rows / MS_PER_HOUR
    lines = [Line("ingest", f"{rows:,.0f} rows", hours * cpu["ingest"], None, rows * stored["samples"])]
    if not recipe.ingest.sources:
        lines.append(Line("adopt", "pictures stay where they are", UNKNOWN, None, rows * stored["images"]))
    else:
        size = _nearest(stored["pictures"], recipe.fetch.image_size)
        held = rows * (stored["images"] + stored["pictures"][size])
        what = f"{recipe.fetch.image_size} px (rates of {size}), every URL answers"
        if recipe.fetch.where is not None:
            what += "; fetch.where asks for fewer"
        lines.append(Line("fetch", what, hours * _nearest_ms(cpu["fetch"], size), None, held))
    lines += _scores(recipe, rows, rates)
    lines += [_dedup(entry, recipe, rows, rates) for entry in recipe.dedup]
    lines += _clusters(recipe, rows, rates)
    if recipe.balance is not None:
        lines.append(Line("balance", "matching and drawing", hours * cpu["metaclip"], None, rows * stored["table"]))
    if recipe.experts is not None:
        count = recipe.experts.fine
        lines.append(_product("experts", f"{count:,} fine clusters", rows, count, recipe.experts.by, recipe, rates))
    if recipe.subsets:
        held = rows * len(recipe.subsets) * stored["table"]
        lines.append(Line("select", f"{len(recipe.subsets)} subsets, tables alone", UNKNOWN, None, held))
    return lines


def gpu_hours_per_million(recipe: Recipe, rates: Rates) -> tuple[float, list[str]]:
    """(GPU-hours for a million images by the published rates, models that a GPU would run and that have no rate)."""
    lines = [line for line in _scores(recipe, 1e6, rates) if line.gpu_hours is not None]
    known = sum(line.gpu_hours or 0 for line in lines if not math.isnan(line.gpu_hours or 0))
    return known, [line.what for line in lines if math.isnan(line.gpu_hours or 0)]


def _scores(recipe: Recipe, rows: float, rates: Rates) -> Iterator[Line]:
    hours = rows / MS_PER_HOUR
    images = False
    for name, entry in recipe.score.items():
        kind, parts = str(entry["scorer"]), _parts(entry, rates)
        networks = [part for part in parts if part in rates["networks"]]
        images |= kind not in rates["of_text"]
        core = hours * sum(rates["cpu_ms"].get(part, UNKNOWN) for part in parts)
        gpu = None
        if networks:
            gpu = sum(rows / 3600 / rates["gpu_images_s"].get(part, UNKNOWN) for part in networks)
        held = rows * (rates["bytes"]["table"] + sum(2 * rates["networks"].get(part, 0) for part in networks))
        what = name if parts == [name] else f"{name}: {', '.join(parts)}"
        yield Line("score", what, core, gpu, held)
    if images:
        yield Line("score", "decoding, once for all", hours * rates["cpu_ms"]["decode"])


def _parts(entry: Mapping[str, Any], rates: Rates) -> list[str]:
    """What an entry computes, by the names of the rates."""
    kind = str(entry["scorer"])
    model = str(entry.get("model") or entry.get("weights") or rates["default_model"].get(kind, ""))
    model = rates["same_as"].get(model, model).removesuffix("-quickgelu")
    if kind == "clip":
        return [model if model in rates["networks"] else f"clip {model}"]
    if kind == "clip_text_masked":
        return ["text_density", f"clip {model}"]
    if kind in rates["of_features"]:
        return ["head"]
    if kind in rates["with_model"]:
        return [model]
    return [kind]


def _dedup(entry: DedupSettings, recipe: Recipe, rows: float, rates: Rates) -> Line:
    cpu, hours, held = rates["cpu_ms"], rows / MS_PER_HOUR, rows * rates["bytes"]["table"]
    against = f", against {', '.join(one.name for one in entry.against)}" if entry.against else ""
    if entry.by.startswith("embedding_"):
        width = _width(entry.by.removeprefix("embedding_"), recipe, rates)
        core = hours * cpu["vectors_256"] * width / 256
        return Line("dedup", f"{entry.by}, {entry.form}{against}", core, None, held)
    if entry.radius:
        grown = (rows / cpu["hashes"]["at"]) ** (cpu["hashes"]["exponent"] - 1)
        return Line("dedup", f"{entry.by} within {entry.radius} bits{against}", hours * cpu["hashes"]["ms"] * grown,
                    None, held)  # fmt: skip
    return Line("dedup", f"equal {entry.by}{against}", hours * cpu["url_count"], None, held)


def _clusters(recipe: Recipe, rows: float, rates: Rates) -> Iterator[Line]:
    if recipe.cells is not None:
        cells = recipe.cells
        width, sampled, how = _width(cells.by.rpartition("_")[0], recipe, rates), 0.0, "given"
        if not cells.centroids:
            seen = cells.points_per_cell
            if not math.isnan(width):
                seen = points_within(cells.count, seen, int(width), cells.memory_gb, "cells")
            sampled = min(rows, seen * cells.count)
            how = f"trained in {cells.memory_gb:g} GB"
            how += "" if seen == cells.points_per_cell else f" on {seen} rows each, not {cells.points_per_cell}"
        what = f"{cells.count:,} cells, {how}"
        yield _product("cells", what, rows + cells.iterations * sampled, cells.count, cells.by, recipe, rates)
    if recipe.hierarchy is not None and recipe.cells is not None:
        splits = recipe.hierarchy.splits
        if splits > 1:
            yield _product("hierarchy", f"each cell into {splits:,}", rows, splits, recipe.cells.by, recipe, rates)
        yield Line("hierarchy", f"{len(recipe.hierarchy.levels)} levels above the cells", UNKNOWN)
    if recipe.retrieve is not None:
        yield Line("retrieve", f"{len(recipe.retrieve.sets)} sets: seeds are not counted in a plan", UNKNOWN)


def _product(step: str, what: str, rows: float, count: int, by: str, recipe: Recipe, rates: Rates) -> Line:
    """Rows against `count` centres, as one matrix product."""
    width = _width(by.rpartition("_")[0], recipe, rates)
    core = 2 * rows * count * width / rates["flop_cpu_s"] / 3600
    return Line(step, what, core, None, rows * rates["bytes"]["table"])


def _width(name: str, recipe: Recipe, rates: Rates) -> float:
    """Numbers in an image vector of an entry of `score:`."""
    entry = recipe.score.get(name)
    parts = _parts(entry, rates) if entry else []
    width = rates["networks"].get(parts[0]) if parts else None
    return UNKNOWN if not width else width / (2 if parts[0].startswith("clip ") else 1)


def _nearest(sizes: Mapping[int, float], wanted: int) -> int:
    return min(sizes, key=lambda size: abs(size - wanted))


def _nearest_ms(fetch: Mapping[int, float], size: int) -> float:
    return fetch[_nearest(fetch, size)]


def print_estimate(out: Console, recipe: Recipe, rows: float, rates: Rates) -> None:
    """The lines of the estimate with their sums, on what they rest, and what the authors of the recipe say."""
    lines = estimate(recipe, rows, rates)
    shards = math.ceil(rows / recipe.ingest.rows_per_shard)
    table = Table("step", "what", "core-hours", "GPU-hours", "stored", title=f"{rows:,.0f} rows in {shards:,} shards")
    for column in table.columns[2:]:
        column.justify = "right"
    for line in lines:
        gpu = "" if line.gpu_hours is None else _hours(line.gpu_hours)
        table.add_row(line.step, escape(line.what), _hours(line.core_hours), gpu, _size(line.stored_bytes))
    table.add_section()
    core, on_gpu, stored = (
        _sum([value for value in values if value is not None])
        for values in zip(*((line.core_hours, line.gpu_hours, line.stored_bytes) for line in lines), strict=True)
    )
    table.add_row("total", "without a GPU, and with", _told(core, _hours), _told(on_gpu, _hours), _told(stored, _size))
    out.print(table)
    measured, published = rates["measured"], rates["published"]
    for words in (
        f"core-hours: CPU-seconds measured on {measured['date']}, {measured['machine']}; networks with random weights",
        f"GPU-hours: in place of those models' core-hours; not measured here: {published['gpu']}",
        f"stored: without releases, whose share of the pool is not known before; pictures: {published['pictures']}",
        "no rate: nobody measured it here, and no figure was published; a sum with + leaves such lines out",
        f"published: {recipe.about.published or 'nothing'}" if recipe.about else "",
    ):
        if words:
            out.print(words, markup=False, soft_wrap=True)


def _sum(values: list[float]) -> tuple[float, bool]:
    """(the sum of what is known, whether all is)."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known), len(known) == len(values)


def _told(total: tuple[float, bool], words: Callable[[float], str]) -> str:
    known, whole = total
    return words(known) if whole else f"{words(known)} +" if known else "no rate +"


def _hours(value: float) -> str:
    return "no rate" if math.isnan(value) else f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return "no rate" if math.isnan(value) else f"{value:,.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"
