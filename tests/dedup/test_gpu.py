"""Dedup on a CUDA device against itself on the CPU: the same pairs, the same groups."""

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from curate.config import DedupSettings
from curate.dedup.cells import assign_cells
from curate.dedup.components import groups
from curate.dedup.cosine import cross_above, edges_above, nearest_above, pairs_above
from curate.dedup.cosine_block import Block, VectorArray
from curate.dedup.reference_vectors import NearestVectors
from curate.dedup.semdedup import similarity_to_earlier
from tests.dedup.pool import VectorPool, in_small_cells, planted

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def _vectors() -> VectorArray:
    """6,000 in clusters, near copies at cosines about the threshold, and a crowd: enough for cut and rounded rows."""
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((40, 512))[draw.integers(0, 40, 6_000)] + draw.standard_normal((6_000, 512))
    copies = draw.permutation(6_000).reshape(2, -1)[:, :1_500]
    vectors[copies[1]] = vectors[copies[0]] + draw.uniform(0.2, 0.7, (1_500, 1)) * draw.standard_normal((1_500, 512))
    vectors[:400] = vectors[0] + 0.01 * draw.standard_normal((400, 512))
    return vectors.astype(np.float16)


def test_kernels_give_the_same_pairs() -> None:
    """Guards against tensor cores whose rounding decides a pair."""
    vectors = _vectors()
    if torch.cuda.get_device_capability() >= (8, 0):
        assert Block(vectors, 0.9, "cuda").heads.dtype == torch.bfloat16
    edges = [groups(6_000, edges_above(vectors, 0.9, device=device)[0]) for device in ("cpu", "cuda")]
    np.testing.assert_array_equal(*edges)
    for kernel in (
        lambda device: pairs_above(vectors, 0.9, device=device),
        lambda device: nearest_above(vectors, 0.6, 16, device=device),
        lambda device: cross_above(vectors[:500], vectors, 0.8, device=device),
    ):
        (here, cosine), (there, same) = kernel("cpu"), kernel("cuda")
        np.testing.assert_array_equal(here, there)
        np.testing.assert_allclose(cosine, same, atol=1e-6)
        assert len(here) > 2_000
    centres = vectors[::60].astype(np.float32)
    np.testing.assert_array_equal(
        np.sort(assign_cells(vectors, centres, 6, device="cpu")[0]),
        np.sort(assign_cells(vectors, centres, 6, device="cuda")[0]),
    )
    order = np.random.default_rng(1).permutation(6_000)
    np.testing.assert_array_equal(
        similarity_to_earlier(vectors, order, 0.1, device="cpu")[0],
        similarity_to_earlier(vectors, order, 0.1, device="cuda")[0],
    )
    found = [NearestVectors(vectors[:300], 0.8, device).of(vectors[300:]) for device in ("cpu", "cuda")]
    np.testing.assert_array_equal(found[0][0], found[1][0])


@pytest.mark.parametrize("form", ["threshold", "dinov2", "semdedup"])
def test_the_step_gives_the_same_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Guards against rows that enter other cells, or are decided otherwise, where a worker has a GPU."""
    in_small_cells(monkeypatch)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)  # cells are trained once for a pool
    more = {"threshold": {"threshold": 0.9}, "dinov2": {"neighbours": 3}, "semdedup": {"eps": 0.1}}[form]
    rule = DedupSettings.model_validate({"by": "embedding_toy", "form": form, "keep": "key", **more})
    told = []
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda device=device: device == "cuda")
        pool = VectorPool(tmp_path / device, planted(900), 100)
        told.append([(row["is_duplicate"], row["duplicate_group"]) for row in pool.rows(pool.run(rule)[0])])
    assert told[0] == told[1] and sum(gone for gone, _ in told[0]) > 100
