from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.errors import DataError
from fedge.types import ClientData, Examples


def _rows(count: int) -> Examples:
    x = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
    return Examples({"x": x, "mask": x[:, :1] > 2}, np.arange(count))


def test_length_is_the_number_of_rows() -> None:
    assert len(_rows(7)) == 7
    assert len(_rows(0)) == 0


def test_inputs_that_differ_in_rows_are_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"'x': 2.*'labels': 3"):
        Examples({"x": np.zeros((2, 1))}, np.zeros(3))


@given(st.lists(st.integers(0, 9), max_size=20))
def test_take_gives_the_rows_asked_for_in_their_order(rows: list[int]) -> None:
    full = _rows(10)
    part = full.take(np.array(rows, dtype=np.int64))
    assert part.labels.tolist() == rows
    assert part.inputs.keys() == full.inputs.keys()
    for name in full.inputs:
        np.testing.assert_array_equal(part.inputs[name], full.inputs[name][rows])


def test_take_accepts_a_slice() -> None:
    assert _rows(10).take(slice(2, 5)).labels.tolist() == [2, 3, 4]


def test_client_data_may_hold_nothing_out() -> None:
    client = ClientData("ward-3", _rows(4))
    assert client.test is None
    assert len(client.train) == 4


@pytest.mark.parametrize(
    ("inputs", "labels"), [(np.zeros((2, 3)), np.zeros(2)), ({"x": np.zeros((2, 3))}, [0, 1])]
)
def test_examples_are_arrays_by_name(inputs: Any, labels: Any) -> None:
    with pytest.raises(DataError, match="inputs must be"):
        Examples(inputs, labels)
