"""MoDE: one subset for each data expert, by clusters of captions (Ma et al. 2024, arXiv 2404.16030;
facebookresearch/MetaCLIP apps/mode).

Captions are clustered twice, finely and then coarsely; each coarse cell is what one CLIP expert trains on. The pool is
usually one that was balanced before (configs/metaclip.yaml).
"""

from curate.balance.step import experts_step
from curate.engine.job import Job
from curate.errors import ConfigError
from pipelines.frame import find_copies, release_subsets, scored_pool


def run(job: Job) -> None:
    """Pairs, images, caption features, experts, emit. Raises ConfigError without `experts`."""
    recipe = job.recipe
    if recipe.experts is None:
        raise ConfigError("mode: the section `experts` is required; see configs/mode.yaml")

    # Image-text pairs, their images, and the features of captions; copies, where the recipe looks for them.
    tables = scored_pool(job)
    tables += find_copies(job, tables)

    # Fine and coarse clusters of captions.
    experts = experts_step(recipe.experts, job.store, tables, job.shards)
    job.across(experts)
    tables += experts.tables

    # A subset for each expert, and what trainers read.
    release_subsets(job, tables)
