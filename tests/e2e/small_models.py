"""A small model for every scorer that `configs/` names: random weights in the published file's form, made on the spot.

What they say means nothing, but it is computed as the full-size models' answers are: by the same scorer from the same
pixels and words. Scorers without weights, and PP-OCR's detector, which comes in a wheel, stay what they are.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)

from curate.demo.paths import weights_dir
from curate.score.clip_source import CONFIG_NAME
from curate.score.watermark import build_net
from tests.score.onnx_bytes import node, write_onnx
from tests.score.test_aesthetic import reference
from tests.score.test_faces import write_scrfd
from tests.score.test_nsfw import write_model
from tests.score.test_opennsfw2 import draw_weights, write_h5
from tests.score.test_text import tiny_bert, tokenizer
from tests.score.test_vlm import tiny_vlm
from tests.score.test_wordnet import EXCEPTIONS, INDEX
from tests.score.tiny import tiny_clip

FEATURES = 16  # numbers of an embedding that is no CLIP's
HEADS = ("laion_aesthetic_v1", "laion_aesthetic_v2", "laion_nsfw")
NOUNS = "house n 1 1 @ 1 1 03544360  \ntree n 1 1 @ 1 1 13104059  \n"  # of the drawings' captions

Entry = Mapping[str, Any]


class SmallModels:
    """Makes each model once, in a folder. `trained`: CLIPs in whose place the demo's stands, small and trained."""

    def __init__(self, folder: Path, trained: Sequence[str] = ("ViT-B-32-quickgelu",)) -> None:
        self._folder, self._trained = folder, trained
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)

    def section(self, score: Mapping[str, Entry]) -> dict[str, dict[str, Any]]:
        """A recipe's `score:` section with small models in the place of its own."""
        return {
            name: {key: value for key, value in entry.items() if key != "pretrained"} | self._weights(entry, score)
            for name, entry in score.items()
        }

    def _weights(self, entry: Entry, score: Mapping[str, Entry]) -> dict[str, Any]:
        kind = str(entry["scorer"])
        if kind in ("clip", "clip_text_masked"):
            return {"model": f"local-dir:{self._clip(str(entry['model']))}"}
        if kind in HEADS:
            config = json.loads((self._clip(str(score[entry["features"]]["model"])) / CONFIG_NAME).read_text())
            return {"weights": str(self._head(kind, config["model_cfg"]["embed_dim"]))}
        make = getattr(self, f"_{kind}", None)
        settings: dict[str, Any] = {} if make is None else make(self._folder / kind)
        return settings

    def _clip(self, model: str) -> Path:
        if model in self._trained:
            return weights_dir()
        folder = self._folder / f"clip-{zlib.crc32(model.encode()):08x}"
        return folder if folder.exists() else tiny_clip(folder, seed=zlib.crc32(model.encode()) % 1000)

    def _head(self, kind: str, width: int) -> Path:
        place = self._folder / f"{kind}-{width}"
        if place.exists():
            return place
        if kind == "laion_aesthetic_v1":
            torch.save({"weight": torch.randn(1, width), "bias": torch.randn(1)}, place)
        elif kind == "laion_aesthetic_v2":
            torch.save(reference(relu=False, width=width).state_dict(), place)
        else:
            write_model(place, width=width)
        return place

    def _opennsfw2(self, place: Path) -> dict[str, Any]:
        if not place.exists():
            write_h5(place, draw_weights())
        return {"weights": str(place)}

    def _watermark(self, place: Path) -> dict[str, Any]:
        if not place.exists():
            torch.save(build_net().state_dict(), place)
        return {"weights": str(place)}

    def _gantman(self, place: Path) -> dict[str, Any]:
        if not place.exists():
            weights = np.random.default_rng(0).normal(size=(8 * 8 * 3, 5)) / 4
            nodes = [node("Flatten", ["x"], ["f"], axis=1), node("MatMul", ["f", "w"], ["m"])]
            nodes.append(node("Softmax", ["m"], ["y"], axis=1))
            write_onnx(place, nodes, {"x": ["n", 8, 8, 3]}, {"y": ["n", 5]}, {"w": weights})
        return {"weights": str(place)}

    def _faces(self, place: Path) -> dict[str, Any]:
        return {"detector": "scrfd", "weights": str(place if place.exists() else write_scrfd(place))}

    def _vlm_yes_no(self, place: Path) -> dict[str, Any]:
        return {"model": str(place if place.exists() else tiny_vlm(place))}

    def _torchscript_embed(self, place: Path) -> dict[str, Any]:
        if not place.exists():
            first = torch.nn.Conv2d(3, FEATURES, 32, 32, bias=False)
            net = torch.nn.Sequential(first, torch.nn.Tanh(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
            torch.jit.script(net.eval()).save(str(place))
        return {"weights": str(place), "width": FEATURES}

    def _hf_embed(self, place: Path) -> dict[str, Any]:
        if not place.exists():
            sizes = {"hidden_size": FEATURES, "num_hidden_layers": 2, "num_attention_heads": 2}
            config = Dinov2Config(**sizes, image_size=28, patch_size=14, initializer_range=0.5)
            Dinov2Model(config).eval().save_pretrained(place)
            ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(place)
        return {"model": str(place)}

    def _onnx_embed(self, place: Path) -> dict[str, Any]:
        if not place.exists():
            weights = np.random.default_rng(1).normal(size=(16 * 16 * 3, FEATURES)) / 16
            nodes = [node("Flatten", ["x"], ["f"], axis=1), node("MatMul", ["f", "w"], ["y"])]
            write_onnx(place, nodes, {"x": ["n", 3, 16, 16]}, {"y": ["n", FEATURES]}, {"w": weights})
        return {"weights": str(place), "side": 16, "width": FEATURES}

    def _hf_text_classifier(self, place: Path) -> dict[str, Any]:
        if not place.exists():
            labels = {0: "toxic", 1: "insult", 2: "threat"}
            config = BertConfig(
                vocab_size=10, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                id2label=labels, label2id={word: at for at, word in labels.items()}, initializer_range=0.5,
            )  # fmt: skip
            BertForSequenceClassification(config).save_pretrained(place)
            PreTrainedTokenizerFast(
                tokenizer_object=tokenizer(), pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                sep_token="[SEP]", model_max_length=512,
            ).save_pretrained(place)  # fmt: skip
        return {"model": str(place)}

    def _hf_text_embed(self, place: Path) -> dict[str, Any]:
        if not place.exists():
            tiny_bert(place)
        return {"model": str(place)}

    def _synset_words(self, place: Path) -> dict[str, Any]:
        if not place.exists():
            place.mkdir()
            for part, lines in INDEX.items():
                (place / f"index.{part}").write_text(lines + NOUNS * (part == "noun"))
                (place / f"{part}.exc").write_text(EXCEPTIONS[part])
            (place / "ids.txt").write_text("n02084071\nn03544360\nn13104059\n")
        return {"wordnet": str(place), "synsets": str(place / "ids.txt")}
