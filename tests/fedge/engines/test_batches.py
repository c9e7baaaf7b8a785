from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.config import TrainConfig
from fedge.engines.batches import batch_indices, num_steps
from fedge.errors import DataError

rows = st.integers(1, 50)
sizes = st.integers(1, 60)


@given(rows, sizes, st.integers(1, 4), st.integers(0, 2**63))
def test_every_pass_sees_every_row_once(n: int, size: int, epochs: int, seed: int) -> None:
    config = TrainConfig(batch_size=size, epochs=epochs)
    batches = list(batch_indices(n, config, seed))
    assert len(batches) == num_steps(n, config)
    flat = np.concatenate(batches)
    assert len(flat) == n * epochs
    for number in range(epochs):
        assert sorted(flat[number * n : (number + 1) * n]) == list(range(n))
    assert all(0 < len(b) <= size for b in batches)


@given(rows, sizes, st.integers(1, 30))
def test_steps_are_exact_and_go_on_over_passes(n: int, size: int, steps: int) -> None:
    by_steps = list(batch_indices(n, TrainConfig(batch_size=size, steps=steps), 3))
    by_epochs = list(batch_indices(n, TrainConfig(batch_size=size, epochs=steps), 3))
    assert len(by_steps) == steps
    assert all(np.array_equal(a, b) for a, b in zip(by_steps, by_epochs, strict=False))


def test_order_depends_on_the_seed_alone() -> None:
    def order(seed: int) -> list[int]:
        return [int(i) for b in batch_indices(20, TrainConfig(batch_size=7), seed) for i in b]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_the_order_is_the_recorded_one() -> None:
    """A changed order changes every result of every run: this must not happen unnoticed."""
    batches = batch_indices(6, TrainConfig(batch_size=4, epochs=2), 42)
    assert [b.tolist() for b in batches] == [[2, 0, 1, 3], [4, 5], [3, 2, 1, 4], [5, 0]]


def test_without_shuffling_rows_keep_their_order() -> None:
    config = TrainConfig(batch_size=2, epochs=1, shuffle=False)
    assert [b.tolist() for b in batch_indices(3, config, 9)] == [[0, 1], [2]]


def test_no_rows_are_an_error() -> None:
    with pytest.raises(DataError, match="no rows"):
        list(batch_indices(0, TrainConfig(), 0))
