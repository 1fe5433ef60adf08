"""The CLIP scorer on a CUDA device against itself on the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from curate.score.clip import ClipScorer, ClipSettings
from curate.score.decode import Picture, decode
from curate.score.scorer import Device
from tests.score.tiny import encoded, picture, tiny_clip

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 5e-3), ("bf16", 3e-2)])
@pytest.mark.parametrize("preprocess", ["exact", "fast"])
def test_cuda_is_near_the_cpu(tmp_path: Path, precision: str, tolerance: float, preprocess: str) -> None:
    """Guards against channels-last, mixed precision or the resize on the device changing more than rounding does."""
    folder = f"local-dir:{tiny_clip(tmp_path)}"
    found = [decode(encoded(picture(seed, (50 + 9 * seed, 80)), "PNG")) for seed in range(20)]
    pictures = [item for item in found if isinstance(item, Picture)]
    columns = []
    for device in ("cpu", "cuda"):
        scorer = ClipScorer("clip_tiny", ClipSettings(model=folder, precision=precision, preprocess=preprocess))
        scorer.load(Device(device))
        columns.append(scorer.score([scorer.prepare(item, f"thing {row % 3}") for row, item in enumerate(pictures)]))
    for name in columns[0]:
        assert np.abs(np.asarray(columns[0][name]) - np.asarray(columns[1][name])).max() < tolerance
