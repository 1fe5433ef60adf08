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
    table = Table("recipe", "makes", "paper", "needs", "unverified")
    for stem, about in told.items():
        table.add_row(stem, escape(about.title), escape(about.paper), str(len(about.needs)), str(len(about.unverified)))
    out.print(table)
    out.print(
        "curate recipes NAME tells one in full; curate run configs/NAME.yaml --set ingest.sources=… runs it",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def _print_one(out: Console, name: str, about: About, recipe: Recipe) -> None:
    def line(text: str) -> None:
        out.print(text, markup=False, soft_wrap=True)

    line(f"{name}: {about.title}")
    line(f"  paper: {about.paper}")
    line(f"  subsets: {', '.join(recipe.subsets) or 'none, the table alone'}")
    for title, entries in (("needs", about.needs), ("unverified", about.unverified)):
        line(f"  {title}:{'' if entries else ' nothing'}")
        for entry in entries:
            line(f"    - {entry}")
