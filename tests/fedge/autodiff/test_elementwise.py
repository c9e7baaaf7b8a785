"""Trigonometric functions, activations by cases, means and remainders against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedge.types import Array

Check = Callable[..., None]
few = settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
sizes = st.integers(1, 4)
seeds = st.integers(0, 999)


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inside(seed: int, *shape: int) -> Array:
    """Between −0.95 and 0.95."""
    return np.random.default_rng(seed).uniform(-0.95, 0.95, shape).astype(np.float32)


# Operator -> torch's, and where its argument lies.
FUNCTIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[..., Array]]] = {
    "Sin": (torch.sin, normal),
    "Cos": (torch.cos, normal),
    "Tan": (torch.tan, inside),
    "Asin": (torch.asin, inside),
    "Acos": (torch.acos, inside),
    "Atan": (torch.atan, normal),
    "Sinh": (torch.sinh, normal),
    "Cosh": (torch.cosh, normal),
    "Asinh": (torch.asinh, normal),
    "Acosh": (torch.acosh, lambda *a: 2.1 + inside(*a)),
    "Atanh": (torch.atanh, inside),
}
ACTIVATIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, Any]]] = {
    "Selu": (F.selu, {}),
    "Celu": (lambda x: F.celu(x, 0.7), {"alpha": 0.7}),
    "Softsign": (F.softsign, {}),
    "ThresholdedRelu": (lambda x: F.threshold(x, 0.3, 0.0), {"alpha": 0.3}),
    "Shrink": (lambda x: F.softshrink(x, 0.4), {"lambd": 0.4, "bias": 0.4}),
}


@pytest.mark.parametrize("op_type", FUNCTIONS)
@given(n=sizes, m=sizes, seed=seeds)
@few
def test_functions(check: Check, op_type: str, n: int, m: int, seed: int) -> None:
    reference, draw = FUNCTIONS[op_type]
    check(op_type, reference, [draw(seed, n, m)], opset=22)
    check(op_type, reference, [draw(seed, n, m)])


@pytest.mark.parametrize("op_type", ACTIVATIONS)
@given(n=sizes, m=sizes, seed=seeds)
@few
def test_activations(check: Check, op_type: str, n: int, m: int, seed: int) -> None:
    reference, attributes = ACTIVATIONS[op_type]
    check(op_type, reference, [2 * normal(seed, n, m)], **attributes)


@given(n=sizes, seed=seeds, wide=st.booleans())
@few
def test_prelu_broadcasts_its_slope(check: Check, n: int, seed: int, wide: bool) -> None:
    slope = normal(seed + 1, *((3, 1) if wide else (1,)))
    check("PRelu", lambda x, a: torch.where(x < 0, a * x, x), [normal(seed, n, 3, 2), slope])


@given(n=sizes, seed=seeds)
@few
def test_means_and_remainders(check: Check, n: int, seed: int) -> None:
    x, row, column = normal(seed, n, 3, 4), normal(seed + 1, 4), normal(seed + 2, 3, 1)
    check("Mean", lambda a, b, c: (a + b + c) / 3, [x, row, column])
    check("Mean", lambda a: a * 1, [x])
    check("Mod", torch.fmod, [5 * x, 0.6 + np.abs(column)], fmod=1)


def test_whole_numbers_as_exponents(check: Check) -> None:
    exponents = np.array([[0, 1, 2, 3]], np.int64)
    check("Pow", torch.pow, [np.abs(normal(0, 3, 4)) + 0.1, exponents])
