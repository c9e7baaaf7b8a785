"""Which rows a step sees: a function of settings and a seed alone, the same for every engine."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from fedge.config import Schedule, TrainConfig
from fedge.errors import DataError
from fedge.seeds import derive_seed
from fedge.types import Indices


def batch_indices(num_rows: int, config: TrainConfig, seed: int) -> Iterator[Indices]:
    """Row numbers of one training step after another.

    Each pass over the rows is a permutation of its own, drawn from a Philox generator keyed by
    ``derive_seed(seed, pass)`` with passes counted from 0, and cut into ``batch_size`` pieces; the
    last piece of a pass may be smaller. The sequence ends after ``epochs`` passes or ``steps``
    pieces.

    Yields:
        int64 arrays of 1 … ``batch_size`` row numbers.

    Raises:
        DataError: If there are no rows.
    """
    if num_rows < 1:
        raise DataError("there are no rows to train on; give at least one")
    left = num_steps(num_rows, config)
    number = 0
    while left > 0:
        order = _pass(num_rows, config.shuffle, derive_seed(seed, number))
        for start in range(0, num_rows, config.batch_size)[:left]:
            yield order[start : start + config.batch_size]
            left -= 1
        number += 1


def num_steps(num_rows: int, config: TrainConfig) -> int:
    """How many steps :func:`batch_indices` yields."""
    if config.steps is not None:
        return config.steps
    return math.ceil(num_rows / config.batch_size) * (config.epochs or 1)


def learning_rates(num_rows: int, config: TrainConfig) -> Iterator[float] | None:
    """The learning rate of one step after another; None where it stays ``config.lr``."""
    if config.schedule == Schedule():
        return None
    total = num_steps(num_rows, config)
    return (config.lr * config.schedule.factor(t, total) for t in range(total))


def _pass(num_rows: int, shuffle: bool, seed: int) -> Indices:
    if not shuffle:
        return np.arange(num_rows)
    return np.random.Generator(np.random.Philox(seed)).permutation(num_rows)
