"""DataComp's filtering track: the pool's safety steps, and every baseline as a subset of one run (Gadre et al. 2023,
arXiv 2304.14108, §3, §5, App. D and E; mlfoundations/datacomp baselines/apply_filter.py).

The baselines share their scores; the image-based one needs cells of the pool besides, and its intersection with CLIP
scores made DataComp-1B.
"""

from curate.engine.job import Job
from curate.errors import ConfigError
from curate.retrieve.step import cells_step
from pipelines.frame import find_copies, release_subsets, retrieve_sets, scored_pool


def run(job: Job) -> None:
    """Pool, safety, cells, cells of ImageNet, baselines. Raises ConfigError without `cells` and `retrieve`."""
    recipe = job.recipe
    if recipe.cells is None or recipe.retrieve is None:
        raise ConfigError("datacomp: the sections `cells` and `retrieve` are required; see configs/datacomp.yaml")

    # CommonPool, or any pool of pairs, with what safety and baselines read: NSFW of image and text, language, CLIP.
    tables = scored_pool(job)

    # Near-duplicates of the evaluation sets.
    tables += find_copies(job, tables)

    # The pool's cells: DataComp's own centroids, or trained here.
    cells = cells_step(recipe.cells, job.store, tables, job.shards)
    job.across(cells)
    tables += cells.tables

    # All images of every cell that is nearest to an ImageNet image.
    tables += retrieve_sets(job, cells)

    # The baselines, and what trainers read.
    release_subsets(job, tables)
