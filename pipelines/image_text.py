"""Image-text curation: fetch, score, deduplicate, select, emit. The numbers stand in the recipe file.

The order is COYO's and LAION's: what is cheap and per image comes first, what looks across images next, selection last.
"""

from curate.dedup.step import dedup_step
from curate.emit.step import emit_step
from curate.engine.job import Job
from curate.fetch.stage import fetch_stage
from curate.ingest.adopt import adopt_stage
from curate.ingest.features import adopt_features_stage
from curate.ingest.step import ingest_step
from curate.score.stage import score_stages
from curate.score.text_count import text_count_steps
from curate.score.weight_facts import weights_behind
from curate.select.step import select_stage, threshold_step


def run(job: Job) -> None:
    """Everything that `recipe` names, in order; sections that are left out are left out here too."""
    recipe, store = job.recipe, job.store

    # Which samples exist: a row per (url, text), of all sources and earlier runs, once.
    samples = job.ingest(ingest_step(recipe.ingest, store))

    # Their images, by URL or where an existing pool keeps them, and all scores from one decode.
    images = adopt_stage(samples) if recipe.ingest.adopt else fetch_stage(recipe.fetch, samples)
    scores = score_stages(recipe.score, samples, images.tables[0])
    # Features that a pool brought along (DataComp's .npz) become embeddings without a model.
    features = [adopt_features_stage(recipe.ingest, store, samples)] if recipe.ingest.features else []
    job.stream(images, *features, *scores)
    tables = [samples, *(spec for stage in (images, *features, *scores) for spec in stage.tables)]

    # How often a text stands in the whole pool, where the recipe asks.
    for counts in text_count_steps(recipe.score, samples, job.shards):
        job.across(counts)
        tables += counts.tables

    # Copies across the whole pool: one of each group stays.
    if recipe.dedup:
        duplicates = dedup_step(recipe.dedup, tables, job.shards, store)
        job.across(duplicates)
        tables += duplicates.tables

    # Subsets are SQL over the columns; fractions become numbers first.
    if not recipe.subsets:
        return
    thresholds = threshold_step(recipe.subsets, tables, job.shards)
    job.across(thresholds)
    resolved = thresholds.values(store) or {}
    members = select_stage(recipe.subsets, tables, job.shards, resolved)
    job.stream(members)

    # And what trainers read.
    subsets = dict(zip(recipe.subsets, members.tables, strict=True))
    weights = weights_behind(tables)
    job.across(emit_step(recipe.emit, recipe, tables, subsets, job.shards, resolved, job.set_aside, weights))
