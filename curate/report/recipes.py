"""What `curate recipes` prints: the `about:` sections of recipe files, as a list or one of them in full.

Only what the files say; no recipe is planned or run here.
"""

import difflib
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from curate.config import About, Recipe
from curate.errors import ConfigError
from curate.report.cost import Rates, gpu_hours_per_million, load_rates


def print_recipes(out: Console, recipes: Mapping[str, Recipe], name: str | None) -> None:
    """All recipes that have an `about:`, a line each with paper, and counts of what is needed and unverified; or one.

    Raises ConfigError with near names for a `name` that is none of them.
    """
    told = {stem: recipe.about for stem, recipe in recipes.items() if recipe.about is not None}
    if name is not None:
        if name not in told:
            near = difflib.get_close_matches(name, told, 3) or list(told)
            raise ConfigError(f"recipes {name}: no such recipe; near: {', '.join(near)}")
        _print_one(out, name, told[name], recipes[name])
        return
    rates = load_rates()
    table = Table("recipe", "makes", "paper", "needs", "GPU-hours / 1 M", "unverified")
    for stem, about in told.items():
        hours = _gpu_hours(recipes[stem], rates)
        needs, unverified = str(len(about.needs)), str(len(about.unverified))
        table.add_row(stem, escape(about.title), escape(about.paper), needs, escape(hours), unverified)
    out.print(table)
    for line in (
        f"GPU-hours for a million images, not measured here: {rates['published']['gpu']}; `?`: a model without a rate",
        "curate recipes NAME tells one in full; curate plan configs/NAME.yaml --rows 1e9 estimates a run",
        "curate run configs/NAME.yaml --set ingest.sources=… runs it",
    ):
        out.print(line, markup=False, soft_wrap=True)


def _gpu_hours(recipe: Recipe, rates: Rates) -> str:
    """Hours by the published rates, and a question mark for each model that has none."""
    hours, without = gpu_hours_per_million(recipe, rates)
    known = [f"{hours:.2f}"] if hours else []
    return " + ".join([*known, *("?" for _ in without)]) or "0"


def _print_one(out: Console, name: str, about: About, recipe: Recipe) -> None:
    def line(text: str) -> None:
        out.print(text, markup=False, soft_wrap=True)

    rates = load_rates()
    without = gpu_hours_per_million(recipe, rates)[1]
    line(f"{name}: {about.title}")
    line(f"  paper: {about.paper}")
    line(f"  published: {about.published or 'no figure of time or money'}")
    line(f"  GPU-hours for a million images: {_gpu_hours(recipe, rates)} ({rates['published']['gpu']})")
    if without:
        line(f"    without a rate: {'; '.join(without)}")
    line(f"  subsets: {', '.join(recipe.subsets) or 'none, the table alone'}")
    for title, entries in (("needs", about.needs), ("unverified", about.unverified)):
        line(f"  {title}:{'' if entries else ' nothing'}")
        for entry in entries:
            line(f"    - {entry}")
