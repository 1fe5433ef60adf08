"""LVD-1689M: balanced sampling over hierarchical clusters, retrieval, and curated sets as they are, as three subsets
(DINOv3, Siméoni et al. 2025, §3.1; clustering and sampling of Vo et al. 2024, arXiv 2405.15613).

A trainer mixes the subsets; DINOv3 draws batches of ImageNet-1k alone in a tenth of its steps.
"""

from curate.engine.job import Job
from curate.errors import ConfigError
from curate.retrieve.step import cells_step, hierarchy_step
from pipelines.frame import find_copies, release_subsets, retrieve_sets, scored_pool


def run(job: Job) -> None:
    """Crawl, cluster, sample, retrieve, emit. Raises ConfigError without `cells` and `hierarchy`."""
    recipe = job.recipe
    if recipe.cells is None or recipe.hierarchy is None:
        raise ConfigError("lvd1689m: the sections `cells` and `hierarchy` are required; see configs/lvd1689m.yaml")

    # The crawl and the seed sets that are taken as they are, with the features that are clustered.
    tables = scored_pool(job)

    # Copies, before they make clusters of their own.
    tables += find_copies(job, tables)

    # The lowest level of the clusters, over the whole pool.
    cells = cells_step(recipe.cells, job.store, tables, job.shards)
    job.across(cells)
    tables += cells.tables

    # The levels above it, and a sample in which every concept has its share.
    hierarchy = hierarchy_step(recipe.hierarchy, cells)
    job.across(hierarchy)
    tables += hierarchy.tables

    # Images near seed sets, as for LVD-142M.
    tables += retrieve_sets(job, cells)

    # Each part is a subset, and what trainers read.
    release_subsets(job, tables)
