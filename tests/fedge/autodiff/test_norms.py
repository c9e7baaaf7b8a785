"""Reductions by norms and products, pooling by norms and determinants, against torch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedge.types import Array

Check = Callable[..., None]
Function = Callable[[torch.Tensor, tuple[int, ...], bool], torch.Tensor]
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


def _product(x: torch.Tensor, dims: tuple[int, ...], keep: bool) -> torch.Tensor:
    for dim in sorted(dims)[::-1]:
        x = x.prod(dim, keepdim=keep)
    return x


REDUCTIONS: dict[str, Function] = {
    "ReduceL1": lambda x, d, k: x.abs().sum(d, keepdim=k),
    "ReduceL2": lambda x, d, k: torch.linalg.vector_norm(x, dim=d, keepdim=k),
    "ReduceSumSquare": lambda x, d, k: (x * x).sum(d, keepdim=k),
    "ReduceLogSum": lambda x, d, k: x.sum(d, keepdim=k).log(),
    "ReduceLogSumExp": lambda x, d, k: x.logsumexp(d, keepdim=k),
    "ReduceProd": _product,
}


@pytest.mark.parametrize("op_type", REDUCTIONS)
@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("axes", [None, (1,), (0, -1)])
@pytest.mark.parametrize("keep", [False, True])
def test_reductions(
    check: Check, op_type: str, opset: int, axes: tuple[int, ...] | None, keep: bool
) -> None:
    x = normal(3, 3, 4, 2)
    x = np.abs(x) + np.float32(0.1) if op_type == "ReduceLogSum" else x
    dims = tuple(range(3)) if axes is None else tuple(a % 3 for a in axes)
    given_ = [] if axes is None or opset < 18 else [np.array(axes, np.int64)]
    attributes = {"axes": list(axes)} if axes is not None and opset < 18 else {}
    check(
        op_type,
        lambda t, *_: REDUCTIONS[op_type](t, dims, keep),
        [x, *given_],
        opset,
        keepdims=int(keep),
        **attributes,
    )


@pytest.mark.parametrize("zeros", [[], [0], [0, 2]])
def test_products_and_norms_of_zeros(check: Check, zeros: list[int]) -> None:
    x = normal(0, 2, 4)
    x[:, zeros] = 0
    check("ReduceProd", lambda t: t.prod(1), [x], axes=[1], keepdims=0)
    check("ReduceL2", lambda t: t.norm(dim=1), [x * 0], axes=[1], keepdims=0)


@pytest.mark.parametrize("p", [1, 2])
@given(n=sizes, axis=st.sampled_from([1, -1]), seed=seeds)
@few
def test_lp_normalization(check: Check, p: int, n: int, axis: int, seed: int) -> None:
    x = normal(seed, n, 3, 4)
    check("LpNormalization", lambda t: F.normalize(t, p, axis), [x], 22, axis=axis, p=p)


@pytest.mark.parametrize("p", [1, 2, 3])
@given(n=sizes, rank=st.integers(1, 2), stride=st.integers(1, 3), seed=seeds)
@few
def test_lp_pool(check: Check, p: int, n: int, rank: int, stride: int, seed: int) -> None:
    x = normal(seed, n, 2, *[5] * rank)
    pool = (F.avg_pool1d, F.avg_pool2d)[rank - 1]

    def reference(t: torch.Tensor) -> torch.Tensor:
        return (pool(t.abs() ** p, 2, stride) * 2**rank) ** (1 / p)

    check("LpPool", reference, [x], kernel_shape=[2] * rank, strides=[stride] * rank, p=p)
    dims = tuple(range(2, 2 + rank))

    def whole(t: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(t, p, dims, keepdim=True)

    check("GlobalLpPool", whole, [x], p=p)


@given(n=sizes, size=st.sampled_from([1, 3, 5]), seed=seeds)
@few
def test_local_response_normalization(check: Check, n: int, size: int, seed: int) -> None:
    x = normal(seed, n, 4, 3, 2)
    numbers = {"alpha": 0.5, "beta": 0.6, "bias": 1.5}

    def reference(t: torch.Tensor) -> torch.Tensor:
        return F.local_response_norm(t, size, 0.5, 0.6, 1.5)

    check("LRN", reference, [x], size=size, **numbers)


def _leibniz(x: torch.Tensor) -> torch.Tensor:
    """Σ over permutations: its gradient is right where a determinant is 0, unlike torch's own."""
    size = x.shape[-1]
    total = torch.zeros(x.shape[:-2], dtype=x.dtype)
    for order in permutations(range(size)):
        swaps = sum(order[i] > order[j] for j in range(size) for i in range(j))
        total = total + (-1) ** swaps * x[..., range(size), order].prod(-1)
    return total


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("singular", [False, True])
def test_determinants(check: Check, size: int, singular: bool) -> None:
    x = normal(size, 3, size, size)
    x[:, 0] *= not singular
    check("Det", _leibniz, [x])
