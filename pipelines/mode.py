"""MoDE: one subset for each data expert, by clusters of captions (Ma et al. 2024, arXiv 2404.16030;
facebookresearch/MetaCLIP apps/mode).

Captions are clustered twice, finely and then coarsely; each coarse cell is what one CLIP expert trains on. The pool is
usually one that was balanced before (configs/metaclip.yaml).
"""

from curate.balance.step import experts_step
from curate.emit.step import emit_step
from curate.engine.job import Job
from curate.errors import ConfigError
from curate.fetch.stage import fetch_stage
from curate.ingest.adopt import adopt_stage
from curate.ingest.features import adopt_features_stage
from curate.ingest.step import ingest_step
from curate.score.stage import score_stages
from curate.score.weight_facts import weights_behind
from curate.select.step import select_stage, threshold_step


def run(job: Job) -> None:
    """Pairs, images, caption features, experts, emit. Raises ConfigError without `experts`."""
    recipe, store = job.recipe, job.store
    if recipe.experts is None:
        raise ConfigError("mode: the section `experts` is required; see configs/mode.yaml")

    # Image-text pairs.
    samples = job.ingest(ingest_step(recipe.ingest, store))

    # Images, and the features of captions.
    images = adopt_stage(samples) if recipe.ingest.adopt else fetch_stage(recipe.fetch, samples)
    scores = score_stages(recipe.score, samples, images.tables[0])
    features = [adopt_features_stage(recipe.ingest, store, samples)] if recipe.ingest.features else []
    job.stream(images, *features, *scores)
    tables = [samples, *(spec for stage in (images, *features, *scores) for spec in stage.tables)]

    # Fine and coarse clusters of captions.
    experts = experts_step(recipe.experts, store, tables, job.shards)
    job.across(experts)
    tables += experts.tables

    # A subset for each expert, and what trainers read.
    thresholds = threshold_step(recipe.subsets, tables, job.shards)
    job.across(thresholds)
    resolved = thresholds.values(store) or {}
    members = select_stage(recipe.subsets, tables, job.shards, resolved)
    job.stream(members)
    subsets = dict(zip(recipe.subsets, members.tables, strict=True))
    weights = weights_behind(tables)
    job.across(emit_step(recipe.emit, recipe, tables, subsets, job.shards, resolved, job.set_aside, weights))
