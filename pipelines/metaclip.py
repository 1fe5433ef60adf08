"""MetaCLIP: captions that contain entries of a metadata list, with frequent entries held down (Xu et al. 2023, arXiv
2309.16671, §3; facebookresearch/MetaCLIP).

Language comes first, then matching and download, safety and copies; balancing is last, over what then remains, so that
nothing that is balanced is dropped afterwards.
"""

from curate.balance.step import balance_step
from curate.dedup.step import dedup_step
from curate.emit.step import emit_step
from curate.engine.job import Job
from curate.errors import ConfigError
from curate.fetch.stage import fetch_stage
from curate.ingest.adopt import adopt_stage
from curate.ingest.step import ingest_step
from curate.score.stage import score_stages
from curate.score.weight_facts import weights_behind
from curate.select.step import select_stage, threshold_step


def run(job: Job) -> None:
    """Pairs, images, scores, copies, balance, emit. Raises ConfigError without `balance`."""
    recipe, store = job.recipe, job.store
    if recipe.balance is None:
        raise ConfigError("metaclip: the section `balance` is required; see configs/metaclip.yaml")

    # Image-text pairs; whatever the source knows of their language is used before anything is fetched.
    samples = job.ingest(ingest_step(recipe.ingest, store))

    # Images, language and safety.
    images = adopt_stage(samples) if recipe.ingest.adopt else fetch_stage(recipe.fetch, samples)
    scores = score_stages(recipe.score, samples, images.tables[0])
    job.stream(images, *scores)
    tables = [samples, *(spec for stage in (images, *scores) for spec in stage.tables)]

    # Copies of images.
    if recipe.dedup:
        duplicates = dedup_step(recipe.dedup, tables, job.shards, store)
        job.across(duplicates)
        tables += duplicates.tables

    # Substring matching and balancing, counted over what the recipe's condition leaves.
    balance = balance_step(recipe.balance, store, tables, job.shards)
    job.across(balance)
    tables += balance.tables

    # What was drawn, and what trainers read.
    thresholds = threshold_step(recipe.subsets, tables, job.shards)
    job.across(thresholds)
    resolved = thresholds.values(store) or {}
    members = select_stage(recipe.subsets, tables, job.shards, resolved)
    job.stream(members)
    subsets = dict(zip(recipe.subsets, members.tables, strict=True))
    weights = weights_behind(tables)
    job.across(emit_step(recipe.emit, recipe, tables, subsets, job.shards, resolved, job.set_aside, weights))
