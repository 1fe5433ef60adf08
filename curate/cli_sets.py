"""The words about what recipes bring along: `pack` (a set of images) and `entries` (MetaCLIP's metadata).

Thin: `curate.cli` guards and registers them. Nothing is fetched: WordNet and counts are the user's own files.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from curate.errors import PlanError
from curate.metrics import progress
from curate.store import Store

out = Console(width=None if sys.stdout.isatty() else 160, emoji=False)


def pack(
    images: Annotated[str, typer.Argument(help="A folder or URL, …*.tar, or datasets:NAME@COMMIT[:SPLIT].")],
    name: Annotated[str, typer.Option(help="What the column `dataset` says of its rows.")],
    folder: Annotated[str, typer.Option("--out", help="A folder or URL for the tars.")],
) -> None:
    """Make a set of images ready to join a crawl as it is: WebDataset tars, byte for byte.

    Then `ingest: {sources: […], adopt: [seeds/imagenet1k]}`, and the set is `where: dataset = 'imagenet1k'`.

    Example: `curate pack photos/ --name imagenet1k --out seeds/imagenet1k`
    """
    from curate.ingest.pack import pack as write  # noqa: PLC0415  # only here

    with progress("pack", 1) as ticker:
        images_seen, unusable = write(images, name, folder, ticker)
    told = f"{folder}: {images_seen:,} images of {name}, of which {unusable:,} cannot be opened"
    out.print(told, markup=False, soft_wrap=True)


def entries(
    to: Annotated[Path, typer.Option("--out", help="The list: an entry a line, as balance.entries takes it.")],
    wordnet: Annotated[Path | None, typer.Option(help="WordNet's folder: index.noun, index.verb, ….")] = None,
    unigrams: Annotated[Path | None, typer.Option(help="Lines of word, tab, occurrences in Wikipedia.")] = None,
    bigrams: Annotated[Path | None, typer.Option(help="Lines of two words, tab, mutual information.")] = None,
    titles: Annotated[Path | None, typer.Option(help="Lines of article title, tab, views.")] = None,
    least_count: Annotated[float, typer.Option(help="Of unigrams.")] = 100,
    least_information: Annotated[float, typer.Option(help="Of bigrams.")] = 30,
    least_views: Annotated[float, typer.Option(help="Of titles.")] = 70,
) -> None:
    """Build MetaCLIP's metadata from WordNet and Wikipedia counts, in the paper's order and with its thresholds.

    Example: `curate entries --wordnet dict/ --unigrams uni.tsv --bigrams pmi.tsv --titles views.tsv --out entries.txt`
    """
    from curate.balance.metadata import at_least, scored, wordnet_names  # noqa: PLC0415  # only here
    from curate.balance.metadata import entries as put_together  # noqa: PLC0415

    files = [] if wordnet is None else sorted(wordnet.glob("index.[anv]*"))
    if wordnet is not None and not files:
        raise PlanError(f"--wordnet {wordnet}: no index.noun, index.verb, index.adj or index.adv there")
    if to.suffix == ".json":
        raise PlanError(f"--out {to}: the list is text, an entry a line; a name in .json would be read as JSON")
    if wordnet is None and unigrams is None and bigrams is None and titles is None:
        raise PlanError("entries: name at least one of --wordnet, --unigrams, --bigrams, --titles")
    counted = ((unigrams, least_count), (bigrams, least_information), (titles, least_views))
    found = put_together(
        wordnet_names(files), *(at_least(scored(path), least) for path, least in counted if path is not None)
    )
    store = Store(str(to.parent))
    store.check(writable=True)
    store.put_bytes(to.name, "".join(f"{entry}\n" for entry in found).encode())  # whole or not at all
    out.print(f"wrote {to}: {len(found):,} entries", markup=False)
