"""A fraction as a number: DataComp's definition, exactly, at any size."""

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.select import top
from curate.select.top import Part, Search, look, merge, resolve, sortable, unsorted


def _resolve(shards: list[np.ndarray], fraction: float) -> float | None:
    def one_pass(open_: Mapping[str, Search]) -> dict[str, Part]:
        found: dict[str, Part] = {}
        for name, search in open_.items():
            part = look(search, shards[0])
            for values in shards[1:]:
                part = merge([part, look(search, values)])
            found[name] = part
        return found

    return resolve({"x": fraction}, one_pass)["x"]


def _datacomp(values: np.ndarray, fraction: float) -> float:
    falling = np.sort(values)[::-1]
    return float(falling[min(int(len(values) * fraction), len(values) - 1)])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(allow_nan=False) | st.sampled_from([0.0, 1.0, 0.25]), min_size=1, max_size=80),
    st.floats(min_value=1e-6, max_value=1),
    st.integers(1, 5),
)
def test_equals_sorting(values: list[float], fraction: float, parts: int) -> None:
    """Guards against an approximate quantile: the release must hold exactly the rows that the paper's rule keeps."""
    every = np.array(values) + 0.0
    assert _resolve(np.array_split(every, parts), fraction) == _datacomp(every, fraction)


@pytest.mark.parametrize("gathered", [1, 500, 10**9])
def test_equals_sorting_when_values_never_fit_in_memory(gathered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the passes below the first digit, which small tests would not reach."""
    monkeypatch.setattr(top, "GATHERED", gathered)
    draw = np.random.default_rng(0)
    values = np.concatenate([draw.normal(0.25, 0.05, 50_000), np.full(10_000, 0.25), draw.normal(-1, 1, 1000)])
    for fraction in (0.001, 0.013, 0.3, 0.503, 0.9999, 1.0):
        found = _resolve(np.array_split(draw.permutation(values), 7), fraction)
        assert found == _datacomp(values, fraction)


def test_no_rows_have_no_threshold() -> None:
    """Guards against a crash, or a 0, where nothing was scored."""
    assert _resolve([np.array([])], 0.5) is None


def test_sortable_bits_keep_the_order() -> None:
    """Guards against negative scores that sort backwards."""
    values = np.array([-np.inf, -2.5, -1e-300, 0.0, 5e-324, 0.3, 1e9, np.inf])
    bits = sortable(values)
    assert (np.diff(bits.astype(object)) > 0).all()
    assert [unsorted(int(bit)) for bit in bits] == values.tolist()
