"""open_clip's published tags that the weights manifest does not list: known, fitting, and on this machine?

Apart from `clip_source.py` because open_clip's list can only be had by loading torch.
"""

import difflib

import open_clip
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

from curate.errors import ConfigError, WeightsError
from curate.score.weights import in_hub_cache

NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def cached_tag(where: str, model: str, tag: str) -> None:
    """Raise ConfigError for an unknown tag or one of another activation, WeightsError when its file is not here.

    open_clip only warns of the second (`ViT-L-14` with `openai`, which was trained with QuickGELU), and then every
    score is a little wrong.
    """
    config = get_pretrained_cfg(model, tag)
    if not config:
        tags = list_pretrained_tags_by_model(model)
        near = difflib.get_close_matches(tag, tags, 3) or tags
        raise ConfigError(f"{where}.pretrained: {tag!r} is no tag of {model} and no file; there are {', '.join(near)}")
    built = open_clip.get_model_config(model) or {}
    if bool(config.get("quick_gelu", False)) != bool(built.get("quick_gelu", False)):
        other = model.removesuffix("-quickgelu") if model.endswith("-quickgelu") else f"{model}-quickgelu"
        raise ConfigError(f"{where}.model: {tag} was trained with another activation; write model: {other}")
    repository, _, file = str(config.get("hf_hub", "")).rpartition("/")
    names = (file,) if file else NAMES
    if not repository or not any(in_hub_cache(repository, name) for name in names):
        source = f"`hf download {repository}`" if repository else f"download {config.get('url')} and name the file"
        raise WeightsError(f"{where}: {model} / {tag} is not on this machine; {source}, or name a file of weights")
