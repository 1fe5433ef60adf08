"""Networks of other libraries as scorers: tiny random models, against the library's own forward."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)  # fmt: skip

from curate.errors import ConfigError, WeightsError
from curate.score.decode import Picture, decode
from curate.score.registry import build
from curate.score.scorer import Device, ImageScorer
from tests.score.tiny import encoded, picture, tiny_clip

SHARED = os.environ.get("CURATE_SHARED")


def pictures(count: int) -> list[Picture]:
    found = [decode(encoded(picture(seed, (90 + 7 * seed, 70)), "PNG")) for seed in range(count)]
    return [item for item in found if isinstance(item, Picture)]


def scored(entry: dict[str, object], items: Sequence[Picture]) -> dict[str, np.ndarray]:
    """One entry's columns for these pictures, as the stage would ask for them."""
    (scorer,) = build({"x": entry})
    assert isinstance(scorer, ImageScorer)
    scorer.check()
    scorer.load(Device())
    columns = scorer.score([scorer.prepare(item, None) for item in items])
    assert set(columns) == {field.name for field in (*scorer.fields, *scorer.embeddings)}
    return {name: np.asarray(values) for name, values in columns.items()}


def processor(folder: Path, size: int) -> None:
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)


def test_hf_classifier_is_the_pipeline(tmp_path: Path) -> None:
    """Guards against labels out of order, logits in place of probabilities, and preprocessing of our own."""
    torch.manual_seed(0)
    labels = {0: "Safe", 1: "not safe", 2: "n/a"}
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        id2label=labels, label2id={label: number for number, label in labels.items()},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    processor(tmp_path, 32)
    items = pictures(5)
    found = scored({"scorer": "hf_classifier", "model": str(tmp_path)}, items)
    assert list(found) == ["p_safe", "p_not_safe", "p_n_a"]
    classify = pipeline("image-classification", model=str(tmp_path), top_k=3)
    for row, item in enumerate(items):
        expected = {answer["label"]: answer["score"] for answer in classify(item.rgb)}
        assert found["p_safe"][row] == pytest.approx(expected["Safe"], abs=1e-5)
        assert found["p_not_safe"][row] == pytest.approx(expected["not safe"], abs=1e-5)


def test_hf_embed_is_the_class_token(tmp_path: Path) -> None:
    """Guards against a pooled or unnormalised feature where DINOv2's card says the class token, and against another
    preprocessing than its own (shorter side, centre cut): transformers' pipeline on the same pictures."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).eval().save_pretrained(tmp_path)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessor(**sizes, resample=3).save_pretrained(tmp_path)
    items = pictures(3)
    found = scored({"scorer": "hf_embed", "model": str(tmp_path)}, items)["x_image"]
    features = pipeline("image-feature-extraction", model=str(tmp_path))([item.rgb for item in items])
    tokens = np.stack([np.asarray(one[0][0]) for one in features])
    assert np.allclose(found, tokens / np.linalg.norm(tokens, axis=1, keepdims=True), atol=1e-5)
    fast = scored({"scorer": "hf_embed", "model": str(tmp_path), "preprocess": "fast"}, items)["x_image"]
    assert np.allclose(fast, found, atol=1e-5)


def test_timm_models(tmp_path: Path) -> None:
    """Guards against another transform than timm's, and against weights that only partly fit."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False, num_classes=3).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    items = pictures(3)
    entry = {"scorer": "timm_classifier", "model": "resnet10t", "labels": ["a", "b", "c"]}
    found = scored(entry | {"weights": str(tmp_path / "w.safetensors")}, items)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    batch = torch.stack([transform(item.rgb) for item in items])
    with torch.inference_mode():
        shares = model(batch).softmax(dim=-1).numpy()
        features = torch.nn.functional.normalize(
            model.forward_head(model.forward_features(batch), pre_logits=True), dim=-1
        )
    assert np.allclose(np.stack(list(found.values()), axis=1), shares, atol=1e-5)
    embed = {"scorer": "timm_embed", "model": "resnet10t", "weights": str(tmp_path / "w.pth"), "width": 512}
    assert np.allclose(scored(embed, items)["x_image"], features.numpy(), atol=1e-5)
    fast = scored(embed | {"preprocess": "fast"}, items)["x_image"]
    assert (fast * features.numpy()).sum(axis=1).min() > 0.9999 and not np.array_equal(fast, features.numpy())
    with pytest.raises(WeightsError, match="is not a resnet10t of 4 classes"):
        scored(entry | {"weights": str(tmp_path / "w.pth"), "labels": list("abcd")}, items)
    with pytest.raises(ConfigError, match=r"score\.x\.width: the model gives 512 numbers, not 500"):
        scored(embed | {"width": 500}, items)


def test_torchscript_is_sscds_form(tmp_path: Path) -> None:
    """Guards against another input than SSCD's 320 x 320 and ImageNet's numbers (RECIPES 3)."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 32, 32), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
    torch.jit.script(net).save(str(tmp_path / "net.torchscript.pt"))
    items = pictures(3)
    entry = {"scorer": "torchscript_embed", "weights": str(tmp_path / "net.torchscript.pt"), "width": 6}
    found = scored(entry, items)["x_image"]
    published = transforms.Compose([
        transforms.Resize([320, 320]), transforms.ToTensor(),
        transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    ])  # fmt: skip
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(net(torch.stack([published(item.rgb) for item in items])), dim=-1)
    assert np.allclose(found, expected.numpy(), atol=1e-6)
    fast = scored(entry | {"preprocess": "fast"}, items)["x_image"]
    assert (fast * found).sum(axis=1).min() > 0.9999 and not np.array_equal(fast, found)
    (tmp_path / "bad.pt").write_bytes(b"not a model")
    with pytest.raises(WeightsError, match="is not a TorchScript file"):
        scored(entry | {"weights": str(tmp_path / "bad.pt")}, items)


@pytest.mark.skipif(SHARED is None, reason="CURATE_SHARED is not set: no real network here")
def test_onnx_embedding_of_bytes(tmp_path: Path) -> None:
    """Guards against a network of bytes, fixed at one image, being given floats or a batch."""
    file = Path(str(SHARED), "reference", "coral_mobilenet")
    (path,) = file.glob("*extractor.derived.onnx")
    items = pictures(3)
    found = scored({"scorer": "onnx_embed", "weights": str(path), "width": 1024}, items)["x_image"]
    session = ort.InferenceSession(str(path))
    for row, item in enumerate(items):
        small = np.asarray(item.rgb.resize((224, 224), Image.Resampling.BILINEAR))[None]
        (plain,) = session.run(None, {session.get_inputs()[0].name: small})
        vector = plain.reshape(-1).astype(np.float32)
        assert np.allclose(found[row], vector / np.linalg.norm(vector), atol=1e-6)


def test_zero_shot_is_clips_own_softmax(tmp_path: Path) -> None:
    """Guards against prompts out of order and a missing temperature."""
    import open_clip

    folder = tiny_clip(tmp_path)
    prompts = {"cat": "a photo of a cat", "weapon": ["a gun", "a knife"]}
    section = {
        "clip_tiny": {"scorer": "clip", "model": f"local-dir:{folder}"},
        "kinds": {"scorer": "clip_zero_shot", "features": "clip_tiny", "prompts": prompts},
    }
    _, scorer = build(section)
    scorer.load(Device())
    features = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    found = scorer.score(features)  # type: ignore[attr-defined]
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.inference_mode():
        said = model.encode_text(tokenizer(["a photo of a cat", "a gun", "a knife"]), normalize=True)
        directions = torch.nn.functional.normalize(torch.stack([said[0], said[1:].mean(dim=0)]), dim=-1)
        expected = (model.logit_scale.exp() * torch.from_numpy(features) @ directions.T).softmax(dim=-1).numpy()
    assert np.allclose(found["p_cat"], expected[:, 0], atol=1e-5)
    assert np.allclose(found["p_weapon"], expected[:, 1], atol=1e-5)
    with pytest.raises(ConfigError, match=r"score\.kinds\.prompts"):
        build(section | {"kinds": section["kinds"] | {"prompts": {"one": "a"}}})


def test_absent_models_fail_in_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a missing repository that shows on a worker."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="hf download nobody/nothing"):
        build({"x": {"scorer": "hf_embed", "model": "nobody/nothing"}})
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4}))
    (scorer,) = build({"x": {"scorer": "hf_embed", "model": str(tmp_path)}})
    with pytest.raises(WeightsError, match=r"no model.safetensors"):
        scorer.check()
