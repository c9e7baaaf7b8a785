"""Losses and their gradients against torch in float64, at ordinary and extreme values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch.nn import functional as F

from fedge.artifacts.manifest import Optimizer
from fedge.autodiff import TrainingGraphs, training_graphs
from fedge.types import Array, Params

Run = Callable[[onnx.ModelProto, Params], Params]
seeds = st.integers(0, 99)


def shifted(loss: str, *row: int) -> TrainingGraphs:
    """y = x + b: the gradient by b, of a row's shape, shows the loss's own gradient summed."""
    node = helper.make_node("Add", ["x", "b"], ["y"])
    value = [helper.make_tensor_value_info(n, 1, ["N", *row]) for n in "xy"]
    bias = numpy_helper.from_array(np.zeros((1, *row), np.float32), "b")
    graph = helper.make_graph([node], "g", value[:1], value[1:], [bias])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return training_graphs(
        model, params=["b"], trainable=["b"], loss=loss, optimizer=Optimizer("sgd")
    )


def compare(
    run: Run, loss: str, reference: Callable[..., torch.Tensor], x: Array, labels: Array
) -> None:
    graphs = shifted(loss, *x.shape[1:])
    bias = torch.zeros((1, *x.shape[1:]), dtype=torch.float64, requires_grad=True)
    target = torch.tensor(labels)
    wanted = reference(
        torch.tensor(x).double() + bias, target if target.dtype == torch.int64 else target.double()
    )
    (grad,) = torch.autograd.grad(wanted, bias)
    feeds = {"x": x, "labels": labels, "b": np.zeros((1, *x.shape[1:]), np.float32)}
    found = run(graphs.grad, feeds)
    assert found["loss"].shape == ()
    np.testing.assert_allclose(found["loss"], wanted.item(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found["b@grad"], grad.numpy(), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(run(graphs.evaluate, feeds)["loss"], found["loss"])


@settings(max_examples=12)
@given(n=st.integers(1, 9), classes=st.integers(2, 7), seed=seeds)
def test_cross_entropy(run_model: Run, n: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, classes)).astype(np.float32) * 5
    compare(run_model, "cross_entropy", F.cross_entropy, x, rng.integers(0, classes, n))


def test_cross_entropy_per_position(run_model: Run) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    compare(run_model, "cross_entropy", F.cross_entropy, x, rng.integers(0, 3, (2, 4, 5)))


def test_cross_entropy_of_certain_and_wrong_rows(run_model: Run) -> None:
    x = np.array([[1e4, -1e4, 0], [1e4, -1e4, 0], [88, 0, -88]], np.float32)
    compare(run_model, "cross_entropy", F.cross_entropy, x, np.array([0, 1, 2]))


@settings(max_examples=12)
@given(n=st.integers(1, 9), width=st.integers(1, 3), seed=seeds)
def test_bce_with_logits(run_model: Run, n: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, width)).astype(np.float32) * 5
    labels = rng.integers(0, 2, (n, width)).astype(np.float32)
    compare(run_model, "bce_with_logits", F.binary_cross_entropy_with_logits, x, labels)


@pytest.mark.parametrize("logit", [0.0, 17.0, 30.0, 88.0, 1e4])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("label", [0.0, 1.0, 0.3])
def test_bce_is_stable(run_model: Run, logit: float, sign: int, label: float) -> None:
    x, y = (np.full((2, 1), v, np.float32) for v in (sign * logit, label))
    compare(run_model, "bce_with_logits", F.binary_cross_entropy_with_logits, x, y)


@settings(max_examples=12)
@given(n=st.integers(1, 9), width=st.integers(1, 3), seed=seeds)
def test_mse(run_model: Run, n: int, width: int, seed: int) -> None:
    x, y = np.random.default_rng(seed).standard_normal((2, n, width)).astype(np.float32)
    compare(run_model, "mse", F.mse_loss, x, y)
