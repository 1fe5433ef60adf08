"""MetaCLIP: captions that contain entries of a metadata list, with frequent entries held down (Xu et al. 2023, arXiv
2309.16671, §3; facebookresearch/MetaCLIP).

Language comes first, then matching, then the download of what has matched (`fetch.where`), safety and copies;
balancing is last, over what then remains, so that nothing that is balanced is dropped afterwards.
"""

from curate.balance.stage import match_stage
from curate.balance.step import balance_step
from curate.engine.job import Job
from curate.errors import ConfigError
from pipelines.frame import find_copies, release_subsets, scored_pool


def run(job: Job) -> None:
    """Pairs, matches, images, scores, copies, balance, emit. Raises ConfigError without `balance`."""
    recipe = job.recipe
    balanced = recipe.balance
    if balanced is None:
        raise ConfigError("metaclip: the section `balance` is required; see configs/metaclip.yaml")

    # Image-text pairs, their language and the entries that they contain; images and safety of those that have both.
    tables = scored_pool(job, before_fetch=lambda known: [match_stage(balanced, known)])

    # Copies of images.
    tables += find_copies(job, tables)

    # Entries counted over what the recipe's condition leaves, and captions drawn by them.
    balance = balance_step(balanced, job.store, tables, job.shards)
    job.across(balance)
    tables += balance.tables

    # What was drawn, and what trainers read.
    release_subsets(job, tables)
