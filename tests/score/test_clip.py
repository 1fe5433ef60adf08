"""The CLIP scorer against open_clip's own forward, and its two ways of preprocessing against each other."""

import os
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from curate.errors import ConfigError, WeightsError
from curate.score.clip import ClipScorer, ClipSettings
from curate.score.clip_source import ClipSource
from curate.score.decode import Picture, decode
from curate.score.scorer import Device
from tests.score.tiny import WIDTH, encoded, picture, tiny_clip

SHARED = os.environ.get("CURATE_SHARED")


def loaded(folder: Path, **settings: object) -> ClipScorer:
    scorer = ClipScorer("clip_tiny", ClipSettings(model=f"local-dir:{folder}", **settings))
    scorer.check()
    scorer.load(Device())
    return scorer


def pictures(count: int) -> list[Picture]:
    found = [decode(encoded(picture(seed, (40 + 31 * (seed % 5), 200 - 17 * (seed % 7))))) for seed in range(count)]
    return [item for item in found if isinstance(item, Picture)]


def test_exact_pixels_have_the_bits_of_open_clips_transform(tmp_path: Path) -> None:
    """Guards against a transform that is nearly open_clip's: the model's input must be equal, not close."""
    folder = tiny_clip(tmp_path)
    scorer = loaded(folder)
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    seen: list[torch.Tensor] = []
    scorer.model._model.encode_image = lambda batch: seen.append(batch.clone()) or torch.zeros(len(batch), WIDTH)
    found = pictures(12)
    scorer.model.embed_images([scorer.model.pixels.resized(item.rgb) for item in found], "exact")
    assert torch.equal(seen[0], torch.stack([preprocess(item.image) for item in found]))


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_fast_is_near_exact(tmp_path: Path, mode: str) -> None:
    """Guards against another kernel, phase or crop in the resize on the device."""
    folder = tiny_clip(tmp_path)
    config = folder / "open_clip_config.json"
    config.write_text(
        config.read_text().replace('"preprocess_cfg": {}', f'"preprocess_cfg": {{"resize_mode": "{mode}"}}')
    )
    exact, fast = loaded(folder), loaded(folder, preprocess="fast")
    found = pictures(30)
    a = exact.model.embed_images([exact.prepare(item, None).pixels for item in found], "exact")
    b = fast.model.embed_images([fast.prepare(item, None).pixels for item in found], "fast")
    assert np.abs(a - b).max() < 0.02
    assert (a * b).sum(axis=1).min() > 0.999


def test_sigmoid_models_give_their_probability(tmp_path: Path) -> None:
    """Guards against SigLIP's scale and bias being left out."""
    folder = tiny_clip(tmp_path, sigmoid=True)
    scorer = loaded(folder)
    assert [field.name for field in scorer.fields] == ["clip_similarity_tiny", "clip_probability_tiny"]
    item = pictures(1)[0]
    columns = scorer.score([scorer.prepare(item, "a cat"), scorer.prepare(item, None)])
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a cat"])
    with torch.inference_mode():
        (logit,) = model.eval().get_logits(preprocess(item.image)[None], tokens)[0]
    assert columns["clip_probability_tiny"][0] == pytest.approx(float(torch.sigmoid(logit)), rel=1e-5)
    assert columns["clip_probability_tiny"][1] is None


def test_texts_are_embedded_once(tmp_path: Path) -> None:
    """Guards against paying the text tower for every row of a shard that repeats its captions."""
    scorer = loaded(tiny_clip(tmp_path))
    sizes: list[int] = []
    real = scorer.model._text_features
    scorer.model._text_features = lambda tokens: sizes.append(len(tokens)) or real(tokens)
    image = pictures(1)[0]
    scorer.begin()
    for _ in range(3):
        scorer.score([scorer.prepare(image, text) for text in ("a", "b", "a", None, "b")])
    assert sizes == [2]
    scorer.begin()
    scorer.score([scorer.prepare(image, "a")])
    assert sizes == [2, 1]


def test_short_texts_cost_little_and_change_nothing(tmp_path: Path) -> None:
    """Guards against 77 tokens of work for ten of caption, and against another feature than open_clip's."""
    model = loaded(tiny_clip(tmp_path, context=77)).model
    texts = ["", "a cat", "word " * 12, "word " * 30, "word " * 200, "a cat on a mat", "word " * 46]
    tokens = np.stack([model.tokens(text) for text in texts])
    shapes: list[tuple[int, ...]] = []
    real = model._text_features
    model._text_features = lambda rows: shapes.append(tuple(rows.shape)) or real(rows)
    vectors = model.embed_texts(tokens)
    assert sorted(shapes) == [(1, 32), (1, 48), (1, 77), (4, 16)]
    with torch.inference_mode():
        expected = model._model.encode_text(torch.from_numpy(tokens), normalize=True).numpy()
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_weights_in_a_file_of_the_users(tmp_path: Path) -> None:
    """Guards against a file of weights being taken for a tag, and against its place being its identity."""
    open_clip.add_model_config(tiny_clip(tmp_path / "m"))
    file = tmp_path / "m" / "open_clip_model.safetensors"
    source = ClipSource("score.a", "ViT-B-32", str(file))
    source.check()
    assert source.width == 512 and "sha256" in source.identity()
    with pytest.raises(WeightsError, match=r"no file .*/none\.safetensors"):
        ClipSource("score.a", "ViT-B-32", str(tmp_path / "none.safetensors")).check()
    with pytest.raises(ConfigError, match="brings its own weights"):
        ClipSource("score.a", "hf-hub:a/b", "openai")


@pytest.mark.skipif(SHARED is None, reason="CURATE_SHARED is not set: no real images here")
def test_real_files_of_every_kind(tmp_path: Path) -> None:
    """Guards against modes (palette, grey, transparency) that drawn JPEGs never have."""
    folder = tiny_clip(tmp_path)
    scorer = loaded(folder)
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocess.transforms[-1].mean, preprocess.transforms[-1].std))
    files = sorted(path for path in Path(str(SHARED), "realdata", "images").rglob("*") if path.is_file())[::8]
    for file in files:
        found = decode(file.read_bytes())
        assert isinstance(found, Picture)
        pixels = torch.from_numpy(np.array(scorer.model.pixels.resized(found.rgb))).permute(2, 0, 1)
        with Image.open(file) as image:
            # Transparency stands on white here, as fetch stores it; open_clip drops it to whatever lies beneath.
            expected = preprocess(found.rgb if image.has_transparency_data else image.convert("RGB"))
            own = preprocess(image)  # open_clip converts after its resize: equal for RGB files, close for others
        assert torch.equal(pixels.float().div(255).sub(mean).div(std), expected), file
        if image.mode == "RGB":
            assert torch.equal(expected, own), file
