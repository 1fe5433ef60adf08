"""What a recipe writes where a scorer needs a file: a name of the manifest, or a path of the user's.

Identity is content either way, known for manifest entries without the file being here.
"""

from functools import cached_property
from pathlib import Path

from curate.errors import WeightsError
from curate.score.weight_files import sha256_of
from curate.score.weights import find, named, require


class WeightRef:
    """One file of weights; `where` is the recipe's key, for errors."""

    def __init__(self, where: str, value: str) -> None:
        self.where, self.value = where, value
        self._file = Path(value).expanduser().absolute() if "/" in value or "." in value else None

    @cached_property
    def sha256(self) -> str | None:
        """The content's hash; None when the user's file is not there (then `path` raises)."""
        if self._file is None:
            weight = named(self.value)
            held = find(weight) if weight.sha256 is None else None
            return weight.sha256 if held is None else sha256_of(held)
        return sha256_of(self._file) if self._file.is_file() else None

    def path(self) -> Path:
        """The file. Raises WeightsError with the command that gets it."""
        if self._file is None:
            return require(self.value, self.where)
        if not self._file.is_file():
            raise WeightsError(f"{self.where}: no file {self._file}; `curate weights ls` shows the names there are")
        return self._file
