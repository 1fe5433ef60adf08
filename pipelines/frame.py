"""What every recipe begins and ends with: a scored pool without copies, and a release of its subsets.

Named in a recipe's own file at the place where its paper has them; what lies between is the recipe. This is no pipeline
of its own, and no number stands here.
"""

from collections.abc import Callable, Sequence

from curate.dedup.step import dedup_step, images_to_measure
from curate.emit.step import emit_step
from curate.engine.job import Job
from curate.errors import ConfigError
from curate.fetch.stage import fetch_stage
from curate.ingest.adopt import adopt_stage, joined_stage
from curate.ingest.features import adopt_features_stage
from curate.ingest.step import ingest_step
from curate.report.sets import print_sets
from curate.retrieve.step import CellsStep, centroids_step, retrieve_step
from curate.schema import TableSpec
from curate.score.pool_counts import pool_count_steps
from curate.score.reference_images import reference_images_step
from curate.score.seed_images import seed_images_step
from curate.score.stage import image_stages, text_stages
from curate.score.weight_facts import weights_behind
from curate.select.step import select_stage, threshold_step
from curate.stage import Stage

BeforeFetch = Callable[[list[TableSpec]], Sequence[Stage]]


def scored_pool(job: Job, before_fetch: BeforeFetch | None = None) -> list[TableSpec]:
    """Ingest, fetch and score; the tables of the pool so far. `before_fetch` gives stages that read texts alone, from
    the tables that are there without images: `fetch.where` may read what they write."""
    recipe, store = job.recipe, job.store

    # Which samples exist: a row per (url, text), of all sources and earlier runs, once.
    ingest = ingest_step(recipe.ingest, store)
    samples = job.ingest(ingest)

    # What texts say by themselves comes first, so that a recipe may fetch by it.
    texts = text_stages(recipe.score, samples)
    if before_fetch is not None:
        texts += before_fetch([samples, *tables_of(texts)])

    # Their images, by URL or where an existing pool keeps them (one that joins a crawl is copied), and all scores from
    # one decode. Features that a pool brought along (DataComp's .npz) become embeddings without a model.
    images: Stage = adopt_stage(samples)
    if recipe.ingest.sources:
        images = joined_stage(fetch_stage(recipe.fetch, samples, tables_of(texts)), samples, ingest.tars)
    features = [adopt_features_stage(recipe.ingest, store, samples)] if recipe.ingest.features else []
    scores = image_stages(recipe.score, samples, images.tables[0])
    job.stream(*texts, images, *features, *scores)
    tables = [samples, *tables_of([images, *features, *scores, *texts])]

    # How often a text, a URL or a word stands in the whole pool, where the recipe asks.
    for counts in pool_count_steps(recipe.score, samples, job.shards):
        job.across(counts)
        tables += counts.tables
    return tables


def tables_of(stages: Sequence[Stage]) -> list[TableSpec]:
    """What they write, in their order."""
    return [spec for stage in stages for spec in stage.tables]


def find_copies(job: Job, tables: list[TableSpec]) -> list[TableSpec]:
    """Copies across the whole pool, by the rules of `dedup` in their order: one of each group stays. Evaluation sets
    that come as images are measured first, by the scorers of the pool's own."""
    if not job.recipe.dedup:
        return []
    references = reference_images_step(images_to_measure(job.recipe.dedup, tables), job.recipe.score)
    if references.folders:
        job.across(references)
    centroids = pool_cells(job, tables)
    duplicates = dedup_step(job.recipe.dedup, tables, job.shards, job.store, references.folders, centroids)
    job.across(duplicates)
    return list(duplicates.tables)


def pool_cells(job: Job, tables: list[TableSpec]) -> tuple[str, str] | None:
    """Column and file of the section `cells`, trained first where a rule of dedup compares in them, too."""
    if all(rule.cells != "pool" for rule in job.recipe.dedup):
        return None
    if job.recipe.cells is None:
        raise ConfigError("dedup.cells: pool: there is no section `cells`")
    trained = centroids_step(job.recipe.cells, job.store, tables, job.shards)
    job.across(trained)
    return trained.by, trained.path


def retrieve_sets(job: Job, cells: CellsStep) -> list[TableSpec]:
    """Retrieval for each set of `retrieve`, images among them embedded first; prints the sets with their own counts, as
    LVD-142M's table 15 has them."""
    if job.recipe.retrieve is None:
        return []
    images = {one.name: one.images for one in job.recipe.retrieve.sets if one.images is not None}
    seeds = seed_images_step(images, job.recipe.score, cells.settings.by, job.store)
    job.across(seeds)
    retrieve = retrieve_step(job.recipe.retrieve, cells, seeds.folders)
    job.across(retrieve)
    report = retrieve.report(job.store)
    if report is not None and not job.dry:
        print_sets(report)
    return list(retrieve.tables)


def release_subsets(job: Job, tables: list[TableSpec]) -> None:
    """Subsets by SQL over the columns, fractions made numbers first; then what trainers read. Nothing without any."""
    recipe, store = job.recipe, job.store
    if not recipe.subsets:
        return
    thresholds = threshold_step(recipe.subsets, tables, job.shards)
    job.across(thresholds)
    resolved = thresholds.values(store) or {}
    members = select_stage(recipe.subsets, tables, job.shards, resolved)
    job.stream(members)
    subsets = dict(zip(recipe.subsets, members.tables, strict=True))
    weights = weights_behind(tables)
    job.across(emit_step(recipe.emit, recipe, tables, subsets, job.shards, resolved, job.set_aside, weights))
