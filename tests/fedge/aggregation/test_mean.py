from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.aggregation import WeightedMean
from fedge.errors import UpdateError


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=8), st.integers(0, 99))
def test_is_numpys_average(weights: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    models = [rng.standard_normal((3, 2)).astype(np.float32) for _ in weights]
    mean = WeightedMean()
    for model, weight in zip(models, weights, strict=True):
        mean.add({"w": model}, weight)
    wanted = np.average(np.array(models, np.float64), axis=0, weights=weights)
    got = mean.result()["w"]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)
    assert mean.total_weight == sum(weights)


def test_rank_0_and_a_single_client() -> None:
    mean = WeightedMean()
    mean.add({"s": np.float32(0.1)}, 3)
    mean.add({"s": np.float32(0.1)}, 4)
    assert np.float32(mean.result()["s"]) == np.float32(0.1)


def test_the_clients_arrays_are_left_alone() -> None:
    given_ = np.ones(2, np.float64)
    mean = WeightedMean()
    mean.add({"w": given_}, 1)
    mean.add({"w": given_ * 3}, 1)
    assert mean.result()["w"].tolist() == [2.0, 2.0]
    assert given_.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_out_of_range_are_refused(weight: float) -> None:
    with pytest.raises(UpdateError, match="above 0 and finite"):
        WeightedMean().add({"w": np.ones(2)}, weight)


def test_other_names_or_shapes_are_refused_and_not_added() -> None:
    mean = WeightedMean()
    mean.add({"w": np.ones(2)}, 1)
    for other in ({"w": np.ones(3)}, {"v": np.ones(2)}, {}):
        with pytest.raises(UpdateError, match="do not fit"):
            mean.add(other, 1)
    assert mean.result()["w"].tolist() == [1.0, 1.0]
    with pytest.raises(UpdateError, match="no clients"):
        WeightedMean().result()
