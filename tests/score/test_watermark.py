"""The watermark detector: both checkpoint layouts, torchvision's preprocessing, and which index is the watermark."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from curate.errors import WeightsError
from curate.score.watermark import WatermarkDetector, build_net


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the plain layout, with normalisation statistics that are not the initial ones."""
    torch.manual_seed(0)
    net = build_net()
    for name, buffer in net.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("watermark") / "plain.pt"
    torch.save(net.state_dict(), path)
    return path


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((310, 420)))
    return [smooth, rng.integers(0, 256, (300, 200, 3), dtype=np.uint8)]


@pytest.mark.parametrize("layout", ["plain", "nested"])
def test_equals_the_published_example(checkpoint: Path, tmp_path: Path, layout: str) -> None:
    """The published example, network and transform stated again; index 0 is the watermark, not 1. inference.py's file
    has the state under "weights", example_use.py's is the state itself."""
    net = timm.create_model("efficientnet_b3", num_classes=2)
    net.classifier = nn.Sequential(
        nn.Linear(in_features=1536, out_features=625), nn.ReLU(), nn.Dropout(p=0.3),
        nn.Linear(in_features=625, out_features=256), nn.ReLU(), nn.Linear(in_features=256, out_features=2),
    )  # fmt: skip
    state = torch.load(checkpoint, weights_only=True)
    net.load_state_dict(state)
    torch.save(state if layout == "plain" else {"weights": state}, tmp_path / "file.pt")
    steps = [
        transforms.Resize((256, 256)),
        transforms.ToTensor(),
        transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    ]
    batch = torch.stack([transforms.Compose(steps)(Image.fromarray(picture)) for picture in pictures()])
    with torch.no_grad():
        wanted = torch.softmax(net.eval()(batch), dim=1)[:, 0].numpy()
    got = WatermarkDetector.from_file(tmp_path / "file.pt", batch_size=1 + (layout == "plain"))(pictures())
    np.testing.assert_allclose(got["watermark_score"], wanted, atol=1e-5)


def test_odd_pictures(checkpoint: Path) -> None:
    """Extreme shapes and greyscale are pictures too; an empty batch has no rows."""
    detector = WatermarkDetector.from_file(checkpoint)
    shapes = [(1, 1, 3), (1, 5000, 3), (30, 20), (30, 20, 1)]
    got = detector([np.zeros(shape, dtype=np.uint8) for shape in shapes])["watermark_score"]
    assert got.shape == (4,) and np.isfinite(got).all()
    assert detector([])["watermark_score"].shape == (0,)


def test_another_file_is_refused(tmp_path: Path) -> None:
    """A missing, damaged or different checkpoint is named in the plan."""
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for name in ("none.pt", "junk.pt", "other.pt", "list.pt"):
        with pytest.raises(WeightsError, match=name):
            WatermarkDetector.from_file(tmp_path / name)
