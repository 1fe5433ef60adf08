"""DataComp's image-based filter: cells of the pool that are nearest to an ImageNet image, and the intersection that
made DataComp-1B (Gadre et al. 2023, arXiv 2304.14108, §5 and App. E; baselines/apply_filter.py).
"""

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
    """Pool, cells, cells of ImageNet, captions, emit. Raises ConfigError without `cells` and `retrieve`."""
    recipe, store = job.recipe, job.store
    if recipe.cells is None or recipe.retrieve is None:
        raise ConfigError(
            "datacomp_image: the sections `cells` and `retrieve` are required; see configs/datacomp_image.yaml"
        )

    # CommonPool, or any pool of pairs.
    samples = job.ingest(ingest_step(recipe.ingest, store))

    # Images and CLIP scores, or the features that CommonPool's .npz files bring along.
    images = adopt_stage(samples) if recipe.ingest.adopt else fetch_stage(recipe.fetch, samples)
    scores = score_stages(recipe.score, samples, images.tables[0])
    features = [adopt_features_stage(recipe.ingest, store, samples)] if recipe.ingest.features else []
    job.stream(images, *features, *scores)
    tables = [samples, *(spec for stage in (images, *features, *scores) for spec in stage.tables)]

    # The pool's cells: DataComp's own centroids, or trained here.
    cells = cells_step(recipe.cells, store, tables, job.shards)
    job.across(cells)
    tables += cells.tables

    # All images of every cell that is nearest to a seed image.
    retrieve = retrieve_step(recipe.retrieve, cells)
    job.across(retrieve)
    tables += retrieve.tables
    report = retrieve.report(store)
    if report is not None and not job.dry:
        print_sets(report)

    # Captions and CLIP scores cut further; then what trainers read.
    thresholds = threshold_step(recipe.subsets, tables, job.shards)
    job.across(thresholds)
    resolved = thresholds.values(store) or {}
    members = select_stage(recipe.subsets, tables, job.shards, resolved)
    job.stream(members)
    subsets = dict(zip(recipe.subsets, members.tables, strict=True))
    weights = weights_behind(tables)
    job.across(emit_step(recipe.emit, recipe, tables, subsets, job.shards, resolved, job.set_aside, weights))
