"""DINOv2's table 15 with a run's own counts: which seed set retrieved how many images, how well, and how widely."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

RIGHT = ("seeds", "retrieved", "final", "different", "recall", "share")


def print_sets(report: Mapping[str, Any], out: Console | None = None) -> None:
    """`report` is what the step `retrieve` left. `retrieved`: before the cap; `final`: what the set gives."""
    out = out or Console(width=None if sys.stdout.isatty() else 160, emoji=False)
    table = Table("set", "how", *RIGHT, title="retrieved, in the form of LVD-142M's table 15")
    for column in table.columns[2:]:
        column.justify = "right"
    for line in report["sets"]:
        how = {"sample": "sample, k={k}", "cluster": "{cells} cells", "as_is": "as is"}[line["how"]].format(**line)
        numbers = [_number(line[name]) for name in ("seeds", "retrieved", "final", "different_images")]
        recall = "" if line.get("recall") is None else f"{line['recall']:.3f}"
        table.add_row(escape(line["set"]), how, *numbers, recall, f"{100 * line['share']:.1f} %")
    table.add_section()
    table.add_row("total", "", "", "", _number(report["final"]), _number(report["different_images"]), "", "")
    out.print(table)
    spread = f"cells covered: {report['cells_covered']:,}; equally filled ones would be {report['effective_cells']:,}"
    out.print(spread, markup=False, soft_wrap=True)


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
