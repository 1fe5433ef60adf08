"""LVD-142M: images near curated seed sets, found in a deduplicated crawl (DINOv2, Oquab et al. 2023, §3 and App. A).

Copies go first, within the pool and against the evaluation sets; then large seed sets retrieve by nearest neighbours
and small ones by clusters; what is retrieved and what is taken as it is make the set.
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
from curate.retrieve.step import cells_step, retrieve_step
from curate.score.stage import score_stages
from curate.score.weight_facts import weights_behind
from curate.select.step import select_stage, threshold_step


def run(job: Job) -> None:
    """Crawl, deduplicate, retrieve, emit. Raises ConfigError without `cells` and `retrieve`."""
    recipe, store = job.recipe, job.store
    if recipe.cells is None or recipe.retrieve is None:
        raise ConfigError("lvd142m: the sections `cells` and `retrieve` are required; see configs/lvd142m.yaml")

    # The crawl, and the seed sets that are taken as they are.
    samples = job.ingest(ingest_step(recipe.ingest, store))

    # Images, their safety scores, copy-detection features (SSCD) and retrieval features, from one decode.
    images = adopt_stage(samples) if recipe.ingest.adopt else fetch_stage(recipe.fetch, samples)
    scores = score_stages(recipe.score, samples, images.tables[0])
    features = [adopt_features_stage(recipe.ingest, store, samples)] if recipe.ingest.features else []
    job.stream(images, *features, *scores)
    tables = [samples, *(spec for stage in (images, *features, *scores) for spec in stage.tables)]

    # Self-deduplication, then relative deduplication against the evaluation sets.
    if recipe.dedup:
        duplicates = dedup_step(recipe.dedup, tables, job.shards, store)
        job.across(duplicates)
        tables += duplicates.tables

    # Clusters of what is left: the index for nearest neighbours, and the unit of cluster-based retrieval.
    cells = cells_step(recipe.cells, store, tables, job.shards)
    job.across(cells)
    tables += cells.tables

    # Retrieval for each seed set; the table of the sets with their own counts, as table 15 has it.
    retrieve = retrieve_step(recipe.retrieve, cells)
    job.across(retrieve)
    tables += retrieve.tables
    report = retrieve.report(store)
    if report is not None and not job.dry:
        print_sets(report)

    # What was retrieved becomes subsets, and what trainers read.
    thresholds = threshold_step(recipe.subsets, tables, job.shards)
    job.across(thresholds)
    resolved = thresholds.values(store) or {}
    members = select_stage(recipe.subsets, tables, job.shards, resolved)
    job.stream(members)
    subsets = dict(zip(recipe.subsets, members.tables, strict=True))
    weights = weights_behind(tables)
    job.across(emit_step(recipe.emit, recipe, tables, subsets, job.shards, resolved, job.set_aside, weights))
