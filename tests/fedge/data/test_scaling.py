import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.data import combine, moments, site_stats
from fedge.errors import DataError
from fedge.types import Array, Examples


def _examples(x: Array) -> Examples:
    return Examples({"x": x}, np.zeros(len(x)))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(10, 50), min_size=1, max_size=5))
def test_sums_from_sites_give_the_pooled_scale(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    parts = [(rng.normal(size=(n, 3)) * [1, 10, 100] + [0, 50, -1e4]) for n in sizes]
    mean, std = combine(moments(_examples(p)) for p in parts).standardize()
    pooled = torch.from_numpy(np.concatenate(parts))
    assert mean == pytest.approx(pooled.mean(0).numpy(), rel=1e-6, abs=1e-6)
    assert std == pytest.approx(pooled.std(0).numpy(), rel=1e-5)
    assert mean.dtype == std.dtype == np.float32


def test_a_sites_own_scale_is_torchs() -> None:
    x = np.random.default_rng(0).normal(3, 2, (20, 4)).astype(np.float32)
    stats = site_stats(_examples(x))
    assert list(stats) == ["site_mean", "site_std"]
    assert stats["site_mean"] == pytest.approx(torch.from_numpy(x).mean(0).numpy(), rel=1e-6)
    assert stats["site_std"] == pytest.approx(torch.from_numpy(x).std(0).numpy(), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6, -3.7])
def test_a_constant_column_is_centred_not_blown_up(value: float) -> None:
    x = np.full((40, 1), value, np.float32)
    pooled = combine([moments(_examples(x[:15])), moments(_examples(x[15:]))]).standardize()
    own = site_stats(_examples(x))
    for mean, std in (pooled, (own["site_mean"], own["site_std"])):
        assert std == 1.0
        assert abs(x - mean).max() == 0.0


def test_small_sites_are_left_out_of_the_sum() -> None:
    small, large = (moments(_examples(np.full((n, 1), float(n)))) for n in (9, 10))
    assert combine([small, large]).count == 10
    assert combine([small, large], min_rows=9).count == 19
    with pytest.raises(DataError, match=r"no site has 10 rows \(rows per site: 9, 9\)"):
        combine([small, small])
    with pytest.raises(DataError, match="rows per site: none"):
        combine([])


def test_sites_with_other_columns_are_refused() -> None:
    a, b = (moments(_examples(np.ones((12, d)))) for d in (2, 3))
    with pytest.raises(DataError, match=r"differ in columns: \[2, 3\]"):
        combine([a, b])


def test_rows_that_cannot_be_scaled_are_refused() -> None:
    with pytest.raises(DataError, match="1 values are NaN"):
        moments(_examples(np.array([[1.0], [np.nan]])))
    with pytest.raises(DataError, match="wants a single one"):
        moments(_examples(np.zeros((4, 2, 2))))
    with pytest.raises(DataError, match="wants a single one"):
        site_stats(Examples({"a": np.zeros((2, 1)), "b": np.zeros((2, 1))}, np.zeros(2)))
    with pytest.raises(DataError, match="1 training rows"):
        site_stats(_examples(np.zeros((1, 2))))
    with pytest.raises(DataError, match="statistics of 1 rows"):
        moments(_examples(np.zeros((1, 2)))).standardize()
