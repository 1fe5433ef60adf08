"""Aesthetic heads against the reference module built with torch."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from curate.errors import WeightsError
from curate.score.aesthetic import AestheticHead

SHARED = os.environ.get("CURATE_SHARED")
PUBLISHED = [
    "sac+logos+ava1-l14-linearMSE.pth",
    "ava+logos-l14-linearMSE.pth",
    "ava+logos-l14-reluMSE.pth",
    "sa_0_4_vit_l_14_linear.pth",
    "sa_0_4_vit_b_32_linear.pth",
    "sa_0_4_vit_b_16_linear.pth",
]


def reference(*, relu: bool, width: int = 768) -> nn.Module:
    """The published module (simple_inference.py:46-61), in evaluation mode."""
    sizes, drops = [width, 1024, 128, 64, 16, 1], [0.2, 0.2, 0.1, None, None]
    parts: list[nn.Module] = []
    for i, drop in enumerate(drops):
        parts.append(nn.Linear(sizes[i], sizes[i + 1]))
        if relu and i < 4:
            parts.append(nn.ReLU())
        if drop is not None:
            parts.append(nn.Dropout(drop))
    module = nn.Module()
    module.layers = nn.Sequential(*parts)
    return module.eval()


def unit_rows(count: int, width: int) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def answers(module: nn.Module, rows: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module(torch.from_numpy(rows)).numpy()[:, 0]


@pytest.mark.parametrize("relu", [False, True])
def test_v2_equals_the_reference_module(tmp_path: Path, relu: bool) -> None:
    """The ReLU variant read as linear (or the reverse) gives plausible, wrong scores."""
    torch.manual_seed(0)
    module = reference(relu=relu)
    torch.save(module.state_dict(), tmp_path / "head.pth")
    rows = unit_rows(200, 768)
    got = AestheticHead.from_file(tmp_path / "head.pth")(rows)
    np.testing.assert_allclose(got, answers(module.layers, rows), atol=1e-5)


def test_v1_equals_one_dense_layer(tmp_path: Path) -> None:
    """v1 files have two keys and no `layers.`."""
    module = nn.Linear(512, 1)
    torch.save(module.state_dict(), tmp_path / "head.pth")
    rows = unit_rows(50, 512)
    np.testing.assert_allclose(AestheticHead.from_file(tmp_path / "head.pth")(rows), answers(module, rows), atol=1e-5)


@pytest.mark.skipif(SHARED is None, reason="needs the published heads: set CURATE_SHARED")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_heads(name: str) -> None:
    """Every published file is read as what it is, and answers as the reference module does."""
    path = Path(SHARED or "") / "reference" / name
    head = AestheticHead.from_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    module = nn.Linear(head.width, 1) if "weight" in state else reference(relu="relu" in name)
    module.load_state_dict(state)
    rows = unit_rows(200, head.width)
    got = head(rows)
    np.testing.assert_allclose(got, answers(getattr(module, "layers", module), rows), atol=1e-5)
    assert 2 < got.mean() < 8


def test_a_row_without_numbers_has_no_score(tmp_path: Path) -> None:
    """NaN features must not become a score through ReLU, which maps NaN comparisons to 0."""
    torch.save(reference(relu=True).state_dict(), tmp_path / "head.pth")
    head = AestheticHead.from_file(tmp_path / "head.pth")
    rows = unit_rows(3, 768)
    rows[1, 5] = np.nan
    assert np.isnan(head(rows)).tolist() == [False, True, False]
    assert head(rows[:0]).shape == (0,)
    with pytest.raises(ValueError, match="expected features"):
        head(unit_rows(2, 512))


class Evil:
    """Unpickling this would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.path),))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    """A `.pth` is a pickle: one from the web must not run code here."""
    with (tmp_path / "evil.pth").open("wb") as file:
        pickle.dump(Evil(tmp_path / "owned"), file)
    torch.save({"weight": Evil(tmp_path / "owned")}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth", "none.pth"):
        with pytest.raises(WeightsError):
            AestheticHead.from_file(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_another_model_is_refused(tmp_path: Path) -> None:
    """A state_dict with other layers is named, not run."""
    torch.save(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1)).state_dict(), tmp_path / "other.pth")
    torch.save(nn.Linear(4, 2).state_dict(), tmp_path / "wide.pth")
    for name in ("other.pth", "wide.pth"):
        with pytest.raises(WeightsError, match=name):
            AestheticHead.from_file(tmp_path / name)
