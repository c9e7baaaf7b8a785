from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedge import params as algebra
from fedge.errors import ArtifactError
from fedge.types import Params

FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    elements=st.floats(-1e3, 1e3, width=32),
)
PARAMS = st.dictionaries(st.text(max_size=5), FLOATS, max_size=4)


@given(PARAMS)
def test_subtracting_itself_leaves_zero_and_adding_zero_changes_nothing(a: Params) -> None:
    zero = algebra.subtract(a, a)
    assert algebra.l2_norm(zero) == 0
    for name, value in algebra.add(a, zero).items():
        np.testing.assert_array_equal(value, a[name])


@given(PARAMS, st.floats(-8, 8, width=16))
def test_scale_keeps_dtype_and_scales_the_norm(a: Params, factor: float) -> None:
    scaled = algebra.scale(a, factor)
    assert all(v.dtype == np.float32 for v in scaled.values())
    expected = abs(factor) * algebra.l2_norm(a)
    assert algebra.l2_norm(scaled) == pytest.approx(expected, rel=1e-5, abs=1e-30)


@given(PARAMS)
def test_the_norm_is_that_of_all_values_in_one_vector(a: Params) -> None:
    flat = np.concatenate([np.zeros(0), *(v.ravel().astype(np.float64) for v in a.values())])
    assert algebra.l2_norm(a) == pytest.approx(float(np.linalg.norm(flat)), rel=1e-12)


def test_the_norm_does_not_overflow_in_half_precision() -> None:
    assert algebra.l2_norm({"w": np.full(4, 6e4, np.float16)}) == pytest.approx(
        2 * float(np.float16(6e4))
    )


@pytest.mark.parametrize(
    "function", [algebra.add, algebra.subtract, algebra.relative_distance], ids=lambda f: f.__name__
)
def test_different_names_are_refused_on_both_sides(
    function: Callable[[Params, Params], object],
) -> None:
    one = np.ones(1)
    with pytest.raises(ArtifactError, match=r"only left \['a'\], only right \['b'\]"):
        function({"a": one, "c": one}, {"b": one, "c": one})


def test_relative_distance_is_per_tensor() -> None:
    reference = {"big": np.array([300.0, 400.0]), "zero": np.zeros(2), "moved": np.zeros(1)}
    a = {"big": np.array([300.0, 405.0]), "zero": np.zeros(2), "moved": np.array([1e-9])}
    distance = algebra.relative_distance(a, reference)
    assert distance == {"big": pytest.approx(0.01), "zero": 0.0, "moved": math.inf}


def test_a_gradient_that_cancels_is_measured_by_the_whole() -> None:
    reference = {"w": np.array([3.0, 4.0]), "b": np.array([1e-12])}
    a = {"w": np.array([3.0, 4.0]), "b": np.array([5e-9])}
    assert algebra.relative_distance(a, reference)["b"] > 1000
    assert algebra.gradient_distance(a, reference)["b"] == pytest.approx(1e-7, rel=1e-3)
    moved = {"w": np.array([3.0, 4.05]), "b": np.array([1e-12])}
    assert algebra.gradient_distance(moved, reference)["w"] == pytest.approx(0.01)


def test_select_follows_the_names_given() -> None:
    a = {"x": np.ones(1), "y": np.ones(2), "z": np.ones(3)}
    assert list(algebra.select(a, ["z", "x"])) == ["z", "x"]


def test_copies_share_no_memory_and_can_be_written() -> None:
    a = {"w": np.frombuffer(b"\0" * 8, np.float32)}
    copied = algebra.copy(a)
    copied["w"][0] = 1
    assert a["w"][0] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_found(bad: float) -> None:
    good = {"w": np.zeros((2, 2)), "steps": np.array(3)}
    assert algebra.all_finite(good)
    assert not algebra.all_finite({**good, "b": np.array([0, bad])})
