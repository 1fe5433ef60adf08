"""LVD-142M: images near curated seed sets, found in a deduplicated crawl (DINOv2, Oquab et al. 2023, §3 and App. A).

Copies go first, within the pool and against the evaluation sets; then large seed sets retrieve by nearest neighbours
and small ones by clusters; what is retrieved and what is taken as it is make the set.
"""

from curate.engine.job import Job
from curate.errors import ConfigError
from curate.retrieve.step import cells_step
from pipelines.frame import find_copies, release_subsets, retrieve_sets, scored_pool


def run(job: Job) -> None:
    """Crawl, deduplicate, retrieve, emit. Raises ConfigError without `cells` and `retrieve`."""
    recipe = job.recipe
    if recipe.cells is None or recipe.retrieve is None:
        raise ConfigError("lvd142m: the sections `cells` and `retrieve` are required; see configs/lvd142m.yaml")

    # The crawl and the seed sets that are taken as they are: images, their safety scores, faces, copy-detection
    # features (SSCD) and retrieval features, from one decode.
    tables = scored_pool(job)

    # Equal hashes, then self-deduplication, then relative deduplication against the evaluation sets.
    tables += find_copies(job, tables)

    # Clusters of what is left: the index for nearest neighbours, and the unit of cluster-based retrieval.
    cells = cells_step(recipe.cells, job.store, tables, job.shards)
    job.across(cells)
    tables += cells.tables

    # Retrieval for each seed set, and the table of the sets with their own counts, as table 15 has it.
    tables += retrieve_sets(job, cells)

    # What was retrieved, with faces blurred.
    release_subsets(job, tables)
