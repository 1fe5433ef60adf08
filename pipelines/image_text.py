"""Image-text curation: fetch, score, deduplicate, select, emit. The numbers stand in the recipe file.

The order is COYO's and LAION's: what is cheap and per image comes first, what looks across images next, selection last.
"""

from curate.engine.job import Job
from pipelines.frame import find_copies, release_subsets, scored_pool


def run(job: Job) -> None:
    """Everything that the recipe names, in order; sections that are left out are left out here too."""
    # Pairs, their images, and every score.
    tables = scored_pool(job)

    # Copies across the whole pool: one of each group stays.
    tables += find_copies(job, tables)

    # Subsets are SQL over the columns, and what trainers read. A recipe without any publishes its table.
    release_subsets(job, tables)
