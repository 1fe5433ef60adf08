"""A `transformers` model that an entry names: a folder, or a repository of the Hugging Face hub that is cached here.

Found and read (its config.json) without loading torch; nothing is downloaded.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from curate.errors import WeightsError
from curate.score.weight_files import sha256_of_folder
from curate.score.weights import in_hub_cache

# Safetensors only: transformers would read a pickled .bin as well. Its `trust_remote_code=False` is written out at each
# call, since without it a model with code of its own asks on the terminal whether to run that.
WEIGHT_NAMES = ("model.safetensors", "model.safetensors.index.json")


class HubModel:
    """One model; `where` is the recipe's key, for errors."""

    def __init__(self, where: str, name: str) -> None:
        self.where, self.name = where, name
        given = Path(name).expanduser().absolute()
        self._folder = given if given.is_dir() or name.startswith(("/", "./", "../", "~")) else None

    @property
    def source(self) -> str:
        """What `from_pretrained` is given."""
        return str(self._folder) if self._folder else self.name

    def file(self, name: str) -> Path | None:
        """One of its files, if it is here."""
        if self._folder is not None:
            return self._folder / name if (self._folder / name).is_file() else None
        return in_hub_cache(self.name, name)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json. Raises WeightsError."""
        found = self.file("config.json")
        if found is None:
            raise WeightsError(f"{self.where}: {self._absent()}")
        try:
            content = json.loads(found.read_text())
        except ValueError as error:
            raise WeightsError(f"{self.where}: {found} is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise WeightsError(f"{self.where}: {found} is not a model's configuration")
        return content

    def identity(self) -> Mapping[str, Any]:
        """A folder by content, a repository by name and the commit that is cached."""
        if self._folder is not None:
            return {"model": "folder", "sha256": sha256_of_folder(self._folder) if self._folder.is_dir() else None}
        found = self.file("config.json")
        return {"model": self.name, "commit": found.parent.name if found else None}  # snapshots/<commit>/config.json

    def check(self) -> None:
        """Raises WeightsError when the weights are not here."""
        if not any(self.file(name) for name in WEIGHT_NAMES):
            raise WeightsError(f"{self.where}: no {' or '.join(WEIGHT_NAMES)}; {self._absent()}")

    def unloadable(self, error: Exception) -> WeightsError:
        """What `transformers` said on loading; its own advice, `trust_remote_code=True`, is none here."""
        if "custom code" in str(error):
            said = "it brings Python of its own, which is never run; use a model that `transformers` knows"
        else:
            said = (str(error).splitlines() or [type(error).__name__])[0]
        return WeightsError(f"{self.where}: {self.name}: {said}")

    def _absent(self) -> str:
        if self._folder is not None:
            return f"{self._folder} is no folder that `save_pretrained` wrote"
        return f"{self.name} is not on this machine; `hf download {self.name}` (or bring a cache, $HF_HOME)"
