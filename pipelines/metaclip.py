"""MetaCLIP: captions that contain entries of a metadata list, with frequent entries held down (Xu et al. 2023, arXiv
2309.16671, §3; facebookresearch/MetaCLIP).

Language comes first, then matching and download, safety and copies; balancing is last, over what then remains, so that
nothing that is balanced is dropped afterwards.
"""

from curate.balance.step import balance_step
from curate.engine.job import Job
from curate.errors import ConfigError
from pipelines.frame import find_copies, release_subsets, scored_pool


def run(job: Job) -> None:
    """Pairs, images, scores, copies, balance, emit. Raises ConfigError without `balance`."""
    recipe = job.recipe
    if recipe.balance is None:
        raise ConfigError("metaclip: the section `balance` is required; see configs/metaclip.yaml")

    # Image-text pairs, their images, language and safety.
    tables = scored_pool(job)

    # Copies of images.
    tables += find_copies(job, tables)

    # Substring matching and balancing, counted over what the recipe's condition leaves.
    balance = balance_step(recipe.balance, job.store, tables, job.shards)
    job.across(balance)
    tables += balance.tables

    # What was drawn, and what trainers read.
    release_subsets(job, tables)
