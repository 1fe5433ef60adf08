"""LVD-1689M: balanced sampling over hierarchical clusters, retrieval, and curated sets as they are, as three subsets
(DINOv3, Siméoni et al. 2025, §3.1; clustering and sampling of Vo et al. 2024, arXiv 2405.15613).

A trainer mixes the subsets; DINOv3 draws batches of ImageNet-1k alone in a tenth of its steps.
"""

from curate.dedup.step import dedup_step
from curate.emit.step import emit_step
from curate.engine.job import Job
from curate.errors import ConfigError
from curate.fetch.stage import fetch_stage
from curate.ingest.adopt import adopt_stage
from curate.ingest.features import adopt_features_stage
from curate.ingest.step import ingest_step
from curate.report.sets import print_sets
from curate.retrieve.step import cells_step, hierarchy_step, retrieve_step
from curate.score.stage import score_stages
from curate.score.weight_facts import weights_behind
from curate.select.step import select_stage, threshold_step


def run(job: Job) -> None:
    """Crawl, cluster, sample, retrieve, emit. Raises ConfigError without `cells` and `hierarchy`."""
    recipe, store = job.recipe, job.store
    if recipe.cells is None or recipe.hierarchy is None:
        raise ConfigError("lvd1689m: the sections `cells` and `hierarchy` are required; see configs/lvd1689m.yaml")

    # The crawl, and the seed sets that are taken as they are.
    samples = job.ingest(ingest_step(recipe.ingest, store))

    # Images, their safety scores and the features that are clustered, from one decode.
    images = adopt_stage(samples) if recipe.ingest.adopt else fetch_stage(recipe.fetch, samples)
    scores = score_stages(recipe.score, samples, images.tables[0])
    features = [adopt_features_stage(recipe.ingest, store, samples)] if recipe.ingest.features else []
    job.stream(images, *features, *scores)
    tables = [samples, *(spec for stage in (images, *features, *scores) for spec in stage.tables)]

    # Copies, before they make clusters of their own.
    if recipe.dedup:
        duplicates = dedup_step(recipe.dedup, tables, job.shards, store)
        job.across(duplicates)
        tables += duplicates.tables

    # The lowest level of the clusters, over the whole pool.
    cells = cells_step(recipe.cells, store, tables, job.shards)
    job.across(cells)
    tables += cells.tables

    # The levels above it, and a sample in which every concept has its share.
    hierarchy = hierarchy_step(recipe.hierarchy, cells)
    job.across(hierarchy)
    tables += hierarchy.tables

    # Images near seed sets, as for LVD-142M.
    if recipe.retrieve is not None:
        retrieve = retrieve_step(recipe.retrieve, cells)
        job.across(retrieve)
        tables += retrieve.tables
        report = retrieve.report(store)
        if report is not None and not job.dry:
            print_sets(report)

    # Each part is a subset, and what trainers read.
    thresholds = threshold_step(recipe.subsets, tables, job.shards)
    job.across(thresholds)
    resolved = thresholds.values(store) or {}
    members = select_stage(recipe.subsets, tables, job.shards, resolved)
    job.stream(members)
    subsets = dict(zip(recipe.subsets, members.tables, strict=True))
    weights = weights_behind(tables)
    job.across(emit_step(recipe.emit, recipe, tables, subsets, job.shards, resolved, job.set_aside, weights))
