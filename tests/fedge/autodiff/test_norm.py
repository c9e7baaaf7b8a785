"""Normalization against torch, over drawn shapes; running statistics as torch keeps them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import parser
from torch import nn
from torch.nn import functional as F

from fedge.autodiff import vjp
from fedge.autodiff.prepare import finish, load, normalize
from fedge.autodiff.rewrite import batch_statistics
from fedge.types import Array, Params

Check = Callable[..., None]
Run = Callable[[onnx.ModelProto, Params], Params]
few = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
sizes = st.integers(1, 5)
seeds = st.integers(0, 999)


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(n=st.integers(2, 5), seed=seeds, rank=st.integers(0, 3), momentum=st.sampled_from([0.9, 0]))
@few
def test_batch_norm_in_training_mode(
    check: Check, n: int, seed: int, rank: int, momentum: float
) -> None:
    x, w, b = 2 + 3 * normal(seed, n, 3, *[4] * rank), normal(seed + 1, 3), normal(seed + 2, 3)
    stats = [np.zeros(3, np.float32), np.ones(3, np.float32)]

    def batch(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, None, None, w, b, training=True, eps=1e-3)

    check(
        "BatchNormalization",
        batch,
        [x, w, b, *stats],
        constant=[3, 4],
        outputs=3,
        training_mode=1,
        epsilon=1e-3,
        momentum=float(momentum),
    )


@pytest.mark.parametrize("uses", [1, 2])
def test_running_statistics_are_torchs(run_model: Run, uses: int) -> None:
    """Unbiased variance; a module used twice blends twice."""
    text = (
        '<ir_version: 8, opset_import: ["" : 17]>'
        "g (float[N,3,4] x) => (float[N,3,4] y) <float[3] w = {1,2,3}, float[3] b = {0,0,1},"
        " float[3] mean = {0,1,2}, float[3] var = {1,1,2}>"
        "{h, h1, h2 = BatchNormalization<training_mode=1, momentum=0.9>(x, w, b, mean, var)"
        + (
            " y, y1, y2 = BatchNormalization<training_mode=1, momentum=0.9>(h, w, b, mean, var)}"
            if uses == 2
            else " y = Identity(h)}"
        )
    )
    forward = load(normalize(parser.parse_model(text)), ["w", "b", "mean", "var"])
    after = batch_statistics(forward)
    outputs = {"y": forward.graph.outputs[0], **{f"{n}@next": v for n, v in after.items()}}
    found = finish(forward, [*forward.inputs, *forward.params.values()], outputs)
    x = 2 * normal(0, 5, 3, 4) + 1
    module = nn.BatchNorm1d(3)
    start = {"w": [1.0, 2, 3], "b": [0.0, 0, 1], "mean": [0.0, 1, 2], "var": [1.0, 1, 2]}
    slots = [module.weight, module.bias, module.running_mean, module.running_var]
    for slot, values in zip(slots, start.values(), strict=True):
        assert slot is not None
        slot.data = torch.tensor(values)
    wanted = torch.tensor(x)
    for _ in range(uses):
        wanted = module(wanted)
    feeds = {"x": x, **{n: np.array(v, np.float32) for n, v in start.items()}}
    result = run_model(found, feeds)
    np.testing.assert_allclose(result["y"], wanted.detach().numpy(), atol=1e-5)
    assert module.running_mean is not None
    assert module.running_var is not None
    np.testing.assert_allclose(result["mean@next"], module.running_mean.numpy(), rtol=1e-5)
    np.testing.assert_allclose(result["var@next"], module.running_var.numpy(), rtol=1e-5)


@pytest.mark.parametrize(("axis", "opset"), [(-1, 17), (1, 17), (2, 21), (-2, 23)])
@given(n=sizes, seed=seeds, bias=st.booleans())
@few
def test_layer_norm(check: Check, axis: int, opset: int, n: int, seed: int, bias: bool) -> None:
    x = 1 + 2 * normal(seed, n, 4, 5)
    shape = x.shape[axis:]
    operands = [x, normal(seed + 1, *shape), normal(seed + 2, *shape)][: 2 + bias]
    check(
        "LayerNormalization",
        lambda x, w, b=None: F.layer_norm(x, shape, w, b, 1e-3),
        operands,
        opset,
        axis=axis,
        epsilon=1e-3,
    )


def test_every_output_of_layer_norm(run_model: Run) -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 17]>'
        "g (float[N,4] x) => (float[N,4] y, float[N,1] mean, float[N,1] inverse)"
        "<float[4] w = {1,2,3,4}> {y, mean, inverse = LayerNormalization(x, w)}"
    )
    x = 2 * normal(0, 3, 4)
    cotangents = {
        n: normal(i, 3, 4 if n == "y" else 1) for i, n in enumerate(["y", "mean", "inverse"])
    }
    given = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    mean = given.mean(1, keepdim=True)
    inverse = ((given - mean).square().mean(1, keepdim=True) + 1e-5).rsqrt()
    y = (given - mean) * inverse * torch.tensor([1.0, 2, 3, 4])
    wanted = {"y": y, "mean": mean, "inverse": inverse}
    for names in (["mean"], ["inverse"], ["y", "mean", "inverse"]):
        found = vjp(parser.parse_model(text), outputs=names, wrt=["x"])
        feeds = {"x": x, **{f"{n}@cotangent": cotangents[n] for n in names}}
        loss = sum((wanted[n] * torch.tensor(cotangents[n])).sum() for n in names)
        (grad,) = torch.autograd.grad(loss, given, retain_graph=True)
        np.testing.assert_allclose(run_model(found, feeds)["x@grad"], grad.numpy(), atol=1e-5)


@pytest.mark.parametrize("axis", [-1, 1])
@given(n=sizes, seed=seeds)
@few
def test_rms_norm(check: Check, axis: int, n: int, seed: int) -> None:
    x = normal(seed, n, 4, 5)
    w = normal(seed + 1, *x.shape[axis:])
    check(
        "RMSNormalization",
        lambda x, w: F.rms_norm(x, w.shape, w, eps=1e-3),
        [x, w],
        23,
        axis=axis,
        epsilon=1e-3,
    )


@pytest.mark.parametrize("opset", [18, 21])
@given(n=sizes, seed=seeds, groups=st.sampled_from([1, 2, 6]), rank=st.integers(1, 2))
@few
def test_group_norm(check: Check, opset: int, n: int, seed: int, groups: int, rank: int) -> None:
    count = 6 if opset >= 21 else groups
    x = 1 + normal(seed, n, 6, *[3] * rank)

    def reference(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        w, b = (v.repeat_interleave(6 // count) for v in (w, b))
        return F.group_norm(x, groups, w, b, eps=1e-3)

    operands = [x, normal(seed + 1, count), normal(seed + 2, count)]
    check(
        "GroupNormalization",
        reference,
        operands,
        opset,
        checked=opset >= 21,  # the form with weights per group is deprecated
        num_groups=groups,
        epsilon=1e-3,
    )


def test_layers_after_group_norm_know_their_shape(run_model: Run) -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 21]>'
        "g (float[N,4,3] x) => (float[N,12] y) <float[4] w = {1,2,3,4}>"
        "{h = GroupNormalization<num_groups=2>(x, w, w) y = Flatten(h)}"
    )
    found = vjp(parser.parse_model(text), outputs=["y"], wrt=["w"])
    feeds = {"x": normal(0, 2, 4, 3), "y@cotangent": np.ones((2, 12), np.float32)}
    assert run_model(found, feeds)["w@grad"].shape == (4,)
