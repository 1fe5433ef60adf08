"""How the scores of a subset are spread, for its card: least, mean and most of each, counted a tar at a time.

No quantiles: they would need all values at once, and a subset may have a hundred million. The manifest has them all.
"""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


class Summary:
    """Takes the manifest's rows of one subset in order; the same rows give the same numbers to the last bit."""

    def __init__(self, names: Iterable[str]) -> None:
        self._found: dict[str, list[tuple[float, float, float, int]]] = {name: [] for name in names}
        self._rows = 0

    def add(self, rows: pa.Table) -> None:
        """Count the rows of a tar."""
        self._rows += rows.num_rows
        for name, found in self._found.items():
            values = pc.cast(rows.column(name), pa.float64())
            values = values.filter(pc.is_finite(values))
            if len(values):
                ends = pc.min_max(values).as_py()
                found.append((ends["min"], pc.sum(values).as_py(), ends["max"], len(values)))

    def note(self) -> dict[str, Any]:
        """For each column {least, mean, most, unknown}: how many rows have no value; None where none has one."""
        noted: dict[str, Any] = {}
        for name, found in self._found.items():
            known = sum(count for *_, count in found)
            noted[name] = {
                "least": min((least for least, *_ in found), default=None),
                "mean": sum(total for _, total, _, _ in found) / known if known else None,
                "most": max((most for _, _, most, _ in found), default=None),
                "unknown": self._rows - known,
            }
        return noted
