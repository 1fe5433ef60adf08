"""The demo's tiny CLIP: loads through open_clip's public factory, tells true captions from wrong, is repeatable."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from curate.demo.drawing import wrong_caption
from curate.demo.paths import weights_dir
from curate.demo.planting import SEEDS_PER_WEB, WEBS
from curate.demo.train import TEST_SEED, TRAIN_SEED, auc, drawn, similarities, train


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may ask a model hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_true_captions_beat_wrong_ones() -> None:
    """Guards the shipped weights: on drawings never seen in training or measuring, AUC is at least 0.95."""
    drawings = drawn(300, TEST_SEED + 500_000)
    rng = np.random.default_rng(3)
    images = [drawing.image for drawing in drawings]
    true = similarities(weights_dir(), images, [drawing.caption for drawing in drawings])
    wrong = similarities(weights_dir(), images, [wrong_caption(drawing, drawings, rng) for drawing in drawings])
    assert auc(true, wrong) >= 0.95


def test_weights_are_small_and_loadable_by_name() -> None:
    """Guards `model: local-dir:…` in a recipe, and the size of the package."""
    model = open_clip.create_model(f"local-dir:{weights_dir()}")
    tokens = open_clip.get_tokenizer(f"local-dir:{weights_dir()}")(
        ["a red star", "xylophone © 2024 ünïcode 漢字", "", "word " * 99]
    )
    assert tokens.shape == (4, 24) and tokens.dtype == torch.int64
    assert tokens.argmax(-1).tolist()[0] == 4  # [BOS] a red star [EOS]: the text is pooled where its end is
    with torch.inference_mode():
        assert torch.isfinite(model.encode_text(tokens)).all()
    assert sum(path.stat().st_size for path in weights_dir().iterdir()) < 4_000_000
    assert json.loads((weights_dir() / "training.json").read_text("utf-8"))["unseen_drawings"]["all"] >= 0.95


def test_training_is_repeatable(tmp_path: Path) -> None:
    """Guards the claim that anyone can make the same weights: two short trainings give the same bytes."""
    torch.set_num_threads(1)
    for name in ("first", "again"):
        train(tmp_path / name, count=96, epochs=1, seed=0, batch=48)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_training_draws_what_no_web_shows() -> None:
    """Guards the split between the demo's pictures and those that its model was trained on."""
    assert SEEDS_PER_WEB * WEBS <= TRAIN_SEED < TEST_SEED


def test_auc_counts_pairs() -> None:
    """Guards the measure itself against a brute-force count, with ties."""
    true, wrong = np.float32([0.9, 0.5, 0.5]), np.float32([0.5, 0.1])
    pairs = [1.0 if t > w else 0.5 if t == w else 0.0 for t in true for w in wrong]
    assert auc(true, wrong) == pytest.approx(np.mean(pairs))
