"""Clusters, search and experts on a CUDA device against themselves on the CPU; `pytest -m gpu tests/gpu`."""

import os
from typing import Literal

import numpy as np
import pytest
import torch

from curate.balance import mode
from curate.retrieve.cells import Cells, assign, nearest, train
from curate.retrieve.search import by_cell, exact, search

CUDA = os.environ.get("CURATE_TEST_DEVICE", "cuda")  # cpu: the tests themselves can be tried without a device
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]

RNG = np.random.default_rng(0)
CENTRES = RNG.standard_normal((40, 32))
POOL = (CENTRES[RNG.integers(0, 40, 20_000)] + 0.5 * RNG.standard_normal((20_000, 32))).astype(np.float16)
POOL[[5, 6]] = [[0.0], [np.nan]]
ROWS, SEEDS = np.arange(len(POOL)), POOL[::50] + np.float16(0.01)


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
def test_what_is_found_does_not_depend_on_the_device(metric: Literal["cosine", "l2", "ip"]) -> None:
    """Guards the same bytes on every machine: cells, probes and neighbours are settled in float64 where need be."""
    trained = train(POOL, 64, "cosine" if metric == "cosine" else "l2", iterations=5)
    cells = Cells(trained.centroids, metric)
    (here,), (there,) = list(assign(cells, [POOL])), list(assign(cells, [POOL], CUDA))
    assert np.array_equal(here[0], there[0]) and np.array_equal(here[1], there[1], equal_nan=True)
    probes = nearest(cells, SEEDS, 5)
    assert np.array_equal(np.sort(probes, axis=1), np.sort(nearest(cells, SEEDS, 5, CUDA), axis=1))
    blocks = list(by_cell(here[0], ROWS, POOL))
    assert np.array_equal(search(SEEDS, probes, blocks, 6).rows, search(SEEDS, probes, blocks, 6, CUDA).rows)
    assert np.array_equal(exact(SEEDS, blocks, 4).rows, exact(SEEDS, blocks, 4, CUDA).rows)


@pytest.mark.parametrize("batch", [None, 2_000])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_training_is_as_good_on_a_device(metric: Literal["cosine", "l2"], batch: int | None) -> None:
    """Guards FAISS's GPU k-means and our mini-batches: centroids as near to the points, none of them NaN."""

    def spread(device: str) -> float:
        found = train(POOL, 64, metric, "kmeans++", 10, 1, device, batch)
        return float(np.nanmean(next(assign(found, [POOL]))[1] ** 2))

    assert spread(CUDA) <= 1.05 * spread("cpu")


def test_experts_are_assigned_alike() -> None:
    """Guards MoDE's captions: the expert of a caption does not depend on the device."""
    experts = mode.train(POOL[:4000], 16, 4, 5, 5, 1, CUDA)
    (here,), (there,) = list(mode.assign(experts, [POOL])), list(mode.assign(experts, [POOL], CUDA))
    assert np.array_equal(here[0], there[0]) and np.array_equal(here[1], there[1])
