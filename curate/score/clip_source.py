"""Where a CLIP model comes from: its shape, identity and files, found without loading torch.

A model is `local-dir:FOLDER`, `hf-hub:owner/name`, or a name of open_clip with a tag or a file of weights. Nothing is
downloaded here: what is missing is a WeightsError with the command that gets it.
"""

import difflib
import importlib.util
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from curate.errors import ConfigError, WeightsError
from curate.score.weight_files import sha256_of, sha256_of_folder
from curate.score.weights import by_clip_tag, find, in_hub_cache

CONFIG_NAME = "open_clip_config.json"
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")
WEIGHT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


class ClipSource:
    """One model, as an entry names it; `where` is that entry, for errors."""

    def __init__(self, where: str, model: str, pretrained: str | None) -> None:
        self.where, self.model, self.pretrained = where, model, pretrained
        self.folder = Path(model.removeprefix("local-dir:")).expanduser().absolute() if self.is_local else None
        self.hub = model.removeprefix("hf-hub:") if model.startswith("hf-hub:") else None
        if (self.folder or self.hub) and pretrained:
            raise ConfigError(f"{where}.pretrained: {model} brings its own weights; remove the key")
        if not (self.folder or self.hub or pretrained):
            raise ConfigError(f"{where}.pretrained: required; a tag of open_clip (e.g. openai) or a file of weights")
        file = Path(pretrained).expanduser().absolute() if pretrained and _is_path(pretrained) else None
        self.file = file  # weights that the user names, not a tag

    @property
    def is_local(self) -> bool:
        """Whether the model is a folder of the user's."""
        return self.model.startswith("local-dir:")

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """open_clip's model_cfg. Raises WeightsError or ConfigError."""
        if self.folder:
            return self._read(self.folder / CONFIG_NAME)
        if self.hub:
            cached = in_hub_cache(self.hub, CONFIG_NAME)
            if cached is None:
                raise WeightsError(f"{self.where}: {self.model} is not on this machine; {self._pull()}")
            return self._read(cached)
        folder = _configs()
        path = folder / f"{self.model.replace('/', '-')}.json"
        if not path.is_file():
            near = difflib.get_close_matches(self.model, [file.stem for file in folder.glob("*.json")], 3)
            raise ConfigError(f"{self.where}.model: open_clip has no {self.model!r}; near: {', '.join(near) or 'none'}")
        found: Mapping[str, Any] = json.loads(path.read_text())
        return found

    @property
    def width(self) -> int:
        """Length of the embeddings."""
        return int(self.config["embed_dim"])

    @property
    def is_sigmoid(self) -> bool:
        """Whether it was trained with SigLIP's loss, whose bias gives a probability."""
        return self.config.get("init_logit_bias") is not None

    def identity(self) -> Mapping[str, Any]:
        """The folder or file by content, a published model by its name."""
        if self.folder:
            return {"model": "local-dir", "sha256": sha256_of_folder(self.folder) if self.folder.is_dir() else None}
        if self.file:
            return {"model": self.model, "sha256": sha256_of(self.file) if self.file.is_file() else None}
        return {"model": self.model, "pretrained": self.pretrained}

    def check(self) -> None:
        """Raise WeightsError when files are missing, ConfigError when the names do not go together."""
        if self.folder:
            if not any((self.folder / name).is_file() for name in WEIGHT_NAMES):
                raise WeightsError(f"{self.where}.model: {self.folder} holds none of {', '.join(WEIGHT_NAMES)}")
        elif self.hub:
            if not any(in_hub_cache(self.hub, name) for name in WEIGHT_NAMES):
                raise WeightsError(f"{self.where}: the weights of {self.model} are not here; {self._pull()}")
        elif self.file:
            if not self.file.is_file():
                raise WeightsError(f"{self.where}.pretrained: no file {self.file}")
        else:
            self._check_tag()
        if not self.folder:
            self._check_text_tower()

    def _check_text_tower(self) -> None:
        """Some models take their tokenizer, or the shape of their text tower, from another repository of the hub."""
        text = self.config.get("text_cfg", {})
        for key, names in (("hf_tokenizer_name", TOKENIZER_NAMES), ("hf_model_name", ("config.json",))):
            repository = text.get(key)
            if repository and not any(in_hub_cache(repository, name) for name in names):
                wanted = f"`hf download {repository} --include '*.json' '*.model'`"
                raise WeightsError(f"{self.where}: {self.model} needs {repository} (its text tower); {wanted}")

    def _check_tag(self) -> None:
        known = by_clip_tag(self.model, self.pretrained or "")
        if known is not None:
            if find(known) is None:
                raise WeightsError(
                    f"{self.where}: {known.name} is not on this machine; `curate weights pull {known.name}`"
                )
            return
        from curate.score.clip_tags import cached_tag  # noqa: PLC0415  # torch, for tags outside of the manifest only

        cached_tag(self.where, self.model, self.pretrained or "")

    def _read(self, path: Path) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = json.loads(path.read_text())["model_cfg"]
            if int(found["embed_dim"]) < 1 or not isinstance(found["text_cfg"], dict):
                raise ValueError("its embed_dim or text_cfg is none")
        except FileNotFoundError:
            raise WeightsError(f"{self.where}.model: no {path}; a model folder has it beside its weights") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{self.where}.model: {path} is not an open_clip configuration: {error}") from None
        return found

    def _pull(self) -> str:
        return f"on a machine with internet: `hf download {self.hub}`, and bring its cache ($HF_HOME) here"


def _is_path(pretrained: str) -> bool:
    return Path(pretrained).suffix in (".pt", ".pth", ".bin", ".safetensors", ".ckpt") or "/" in pretrained


def _configs() -> Path:
    spec = importlib.util.find_spec("open_clip")  # finds without importing
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("open_clip is not installed; `pip install open_clip_torch`")
    return Path(spec.submodule_search_locations[0]) / "model_configs"
