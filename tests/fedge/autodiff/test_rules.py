"""Every rule against torch autograd in float64, over drawn shapes and attributes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedge.autodiff import supported
from fedge.types import Array

Check = Callable[..., None]
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


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def positive(seed: int, *shape: int) -> Array:
    return np.abs(normal(seed, *shape)) + np.float32(0.2)


ELEMENTWISE: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any]]] = {
    "Identity": (lambda x: x * 1, {}),
    "Neg": (torch.neg, {}),
    "Abs": (torch.abs, {}),
    "Exp": (torch.exp, {}),
    "Erf": (torch.erf, {}),
    "Relu": (torch.relu, {}),
    "LeakyRelu": (lambda x: F.leaky_relu(x, 0.2), {"alpha": 0.2}),
    "Elu": (lambda x: F.elu(x, 0.7), {"alpha": 0.7}),
    "Sigmoid": (torch.sigmoid, {}),
    "Tanh": (torch.tanh, {}),
    "Softplus": (F.softplus, {}),
    "HardSigmoid": (F.hardsigmoid, {"alpha": 1 / 6}),
}
POSITIVE = {"Log": torch.log, "Sqrt": torch.sqrt, "Reciprocal": torch.reciprocal}
# Operators that have a body in ONNX instead of a rule here.
EXPANDED: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any], int]] = {
    "HardSwish": (F.hardswish, {}, 17),
    "Mish": (F.mish, {}, 18),
    "Selu": (F.selu, {}, 18),
    "Softsign": (F.softsign, {}, 18),
    "Gelu": (F.gelu, {}, 20),
    "Celu": (lambda x: F.celu(x, 1.0), {}, 17),
    "ThresholdedRelu": (lambda x: F.threshold(x, 0.5, 0.0), {"alpha": 0.5}, 18),
}
BINARY = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div}


@pytest.mark.parametrize("op_type", ELEMENTWISE)
@given(n=sizes, m=sizes, seed=seeds)
@few
def test_elementwise(check: Check, op_type: str, n: int, m: int, seed: int) -> None:
    reference, attributes = ELEMENTWISE[op_type]
    check(op_type, reference, [3 * normal(seed, n, m)], **attributes)


@pytest.mark.parametrize("op_type", POSITIVE)
@given(n=sizes, seed=seeds)
@few
def test_elementwise_of_positive_numbers(check: Check, op_type: str, n: int, seed: int) -> None:
    check(op_type, POSITIVE[op_type], [positive(seed, n, 3)])


@pytest.mark.parametrize("op_type", EXPANDED)
@given(n=sizes, seed=seeds)
@few
def test_operators_with_a_body_are_expanded(check: Check, op_type: str, n: int, seed: int) -> None:
    reference, attributes, opset = EXPANDED[op_type]
    check(op_type, reference, [2 * normal(seed, n, 4)], opset, **attributes)


@pytest.mark.parametrize("op_type", BINARY)
@given(
    shapes=st.sampled_from(
        [
            ((3, 4), (3, 4)),
            ((3, 4), (4,)),
            ((3, 4), ()),
            ((3, 4), (1, 4)),
            ((3, 1), (4,)),
            ((1, 4), (4,)),
            ((2, 3, 4), (3, 1)),
            ((2, 1, 4), (5, 3, 1)),
            ((3,), (2, 1)),
        ]
    ),
    seed=seeds,
)
@few
def test_broadcasting(
    check: Check, op_type: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], seed: int
) -> None:
    left, right = shapes
    if len(left) == len(right) and left[0] != 1 and right[0] not in (1, left[0]):
        return
    if len(right) >= len(left) and right[0] == left[0] != 1:
        right = (1, *right[1:])  # a constant cannot have the batch's size
    check(op_type, BINARY[op_type], [normal(seed, *left), positive(seed + 1, *right)])


@given(n=sizes, seed=seeds)
@few
def test_pow(check: Check, n: int, seed: int) -> None:
    check("Pow", torch.pow, [positive(seed, n, 3), normal(seed + 1, 3)])
    check("Pow", torch.pow, [normal(seed, n, 3), np.array(2, np.float32)], constant=[1])


@given(n=sizes, seed=seeds, low=st.booleans(), high=st.booleans())
@few
def test_clip(check: Check, n: int, seed: int, low: bool, high: bool) -> None:
    bounds = [np.array(b, np.float32) if on else None for b, on in ((-0.5, low), (0.7, high))]
    while bounds and bounds[-1] is None:
        bounds.pop()

    def reference(x: torch.Tensor, *given: torch.Tensor | None) -> torch.Tensor:
        edges = [None if b is None else b.item() for b in (*given, None, None)][:2]
        return x * 1 if edges == [None, None] else torch.clamp(x, *edges)

    check("Clip", reference, [normal(seed, n, 6), *bounds], constant=[1, 2])


@given(n=sizes, seed=seeds)
@few
def test_where_and_cast(check: Check, n: int, seed: int) -> None:
    condition = normal(seed, n, 3) > 0
    check("Where", torch.where, [condition, normal(seed, 3), normal(seed + 1, 1, 3)])
    check("Cast", lambda x: x * 1, [normal(seed, n, 3)], to=1)


@given(
    n=sizes, k=sizes, m=sizes, seed=seeds, ta=st.booleans(), tb=st.booleans(), c=st.integers(0, 4)
)
@few
def test_gemm(check: Check, n: int, k: int, m: int, seed: int, ta: bool, tb: bool, c: int) -> None:
    bias_shape = [None, (m,), (1, m), (), (m,)][c]
    a, b = normal(seed, *((k, n) if ta else (n, k))), normal(seed + 1, *((m, k) if tb else (k, m)))
    operands = [a, b] if bias_shape is None else [a, b, normal(seed + 2, *bias_shape)]
    beta = 0.5 if c == 4 else 1.0

    def reference(a: torch.Tensor, b: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        product = 0.7 * (a.T if ta else a) @ (b.T if tb else b)
        return product + beta * bias[0] if bias else product

    data = 9 if ta else 0  # the batch is not the axis that is summed over
    check(
        "Gemm", reference, operands, data=data, transA=int(ta), transB=int(tb), alpha=0.7, beta=beta
    )


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((3, 4), (4, 2)),
        ((3, 5, 4), (4, 2)),
        ((3, 2, 5, 4), (4, 2)),
        ((3, 5, 4), (1, 4, 2)),
        ((3, 2, 5, 4), (2, 4, 3)),
        ((3, 2, 5, 4), (1, 4, 3)),
        ((3, 4), (4,)),
        ((3, 5, 4), (4,)),
        ((4,), (4,)),
        ((4,), (4, 3)),
        ((4,), (2, 4, 3)),
        ((3, 4), (2, 4, 5)),
    ],
)
def test_matmul(check: Check, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    data = 0 if len(left) > 1 else 1 if len(right) > 2 else 9
    check("MatMul", torch.matmul, [normal(0, *left), normal(1, *right)], data=data)


@pytest.mark.parametrize("axis", [1, -1, 0])
@given(n=sizes, m=st.integers(2, 6), seed=seeds)
@few
def test_softmax(check: Check, axis: int, n: int, m: int, seed: int) -> None:
    x = 4 * normal(seed, n, m, 2)
    check("Softmax", lambda t: F.softmax(t, axis), [x], axis=axis)
    check("LogSoftmax", lambda t: F.log_softmax(t, axis), [x], axis=axis)


@pytest.mark.parametrize("opset", [17, 18, 21])
@pytest.mark.parametrize("axes", [None, [1], [-1], [0], [0, 2], [1, 2]])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_sums_and_means(check: Check, opset: int, axes: list[int] | None, keepdims: int) -> None:
    x = normal(0, 3, 4, 2)
    dims = tuple(range(3)) if axes is None else tuple(axes)
    as_input = [] if axes is None else [ints(*axes)]
    check(
        "ReduceSum",
        lambda t, *_: t.sum(dims, keepdim=bool(keepdims)),
        [x, *as_input],
        opset,
        keepdims=keepdims,
    )
    operands, attributes = ([x, *as_input], {}) if opset >= 18 else ([x], {"axes": axes})
    attributes = {k: v for k, v in attributes.items() if v is not None}
    check(
        "ReduceMean",
        lambda t, *_: t.mean(dims, keepdim=bool(keepdims)),
        operands,
        opset,
        keepdims=keepdims,
        **attributes,
    )


@given(n=sizes, seed=seeds)
@few
def test_reshaping(check: Check, n: int, seed: int) -> None:
    x = normal(seed, n, 3, 4)
    check("Flatten", lambda t: t.flatten(1), [x])
    check("Flatten", lambda t: t.reshape(-1, 4), [x], axis=2)
    check("Reshape", lambda t, _: t.reshape(n, 12), [x, ints(-1, 12)])
    check("Reshape", lambda t, _: t.reshape(n, 2, 6), [x, ints(0, 2, 6)])
    check("Reshape", lambda t, _: t.reshape(-1), [x, ints(-1)])
    check("Transpose", lambda t: t.permute(1, 2, 0), [x], perm=[1, 2, 0])
    check("Transpose", lambda t: t.permute(2, 1, 0), [x])
    check("Unsqueeze", lambda t, _: t.unsqueeze(1).unsqueeze(-1), [x, ints(1, -1)])
    check("Squeeze", lambda t, _: t.squeeze(1), [normal(seed, n, 1, 3), ints(1)])
    check("Expand", lambda t, _: t.expand(2, n, 3, 4), [x, ints(2, 1, 1, 1)])


@given(n=sizes, m=sizes, seed=seeds)
@few
def test_concat(check: Check, n: int, m: int, seed: int) -> None:
    left, right = normal(seed, n, 3), normal(seed + 1, m, 3)
    check("Concat", lambda a, b: torch.cat([a, b]), [left, right], axis=0)
    check("Concat", lambda a: a * 1, [left], axis=-1)


@given(
    n=st.integers(1, 3),
    rank=st.integers(1, 3),
    group=st.sampled_from([1, 1, 2, 3]),
    channels=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    extra=st.integers(0, 3),
    bias=st.booleans(),
    seed=seeds,
)
@settings(few, max_examples=40)
def test_conv(
    check: Check,
    n: int,
    rank: int,
    group: int,
    channels: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: int,
    extra: int,
    bias: bool,
    seed: int,
) -> None:
    size = dilation * (kernel - 1) + 1 + extra
    x = normal(seed, n, group * channels, *[size + i for i in range(rank)])
    w = normal(seed + 1, group * 2, channels, *[kernel] * rank)
    operands = [x, w, normal(seed + 2, group * 2)] if bias else [x, w]
    torch_conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]

    def reference(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return torch_conv(x, w, b, stride, padding, dilation, group)

    check(
        "Conv",
        reference,
        operands,
        strides=[stride] * rank,
        dilations=[dilation] * rank,
        pads=[padding] * 2 * rank,
        group=group,
    )


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(
    ("group", "inside", "out", "kernel"),
    [
        (4, 4, 4, 3),  # depthwise
        (3, 3, 6, 3),  # depthwise, two outputs per channel
        (1, 1, 6, 5),  # a first layer
        (1, 20, 4, 3),  # many channels
        (2, 36, 4, 2),
        (1, 5, 7, 1),  # a point
    ],
)
def test_conv_forms(
    check: Check, group: int, inside: int, out: int, kernel: int, stride: int, dilation: int
) -> None:
    def reference(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, w, None, stride, 1, dilation, group)

    operands = [normal(0, 3, inside, 11, 10), normal(1, out, inside // group, kernel, kernel)]
    attributes = {"strides": [stride] * 2, "dilations": [dilation] * 2, "pads": [1] * 4}
    check("Conv", reference, operands, group=group, **attributes)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("size", "kernel", "stride"), [(7, 2, 2), (8, 3, 2), (6, 4, 1), (9, 2, 3)])
def test_conv_auto_pad(check: Check, auto_pad: str, size: int, kernel: int, stride: int) -> None:
    def reference(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if auto_pad != "VALID":
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            less, more = total // 2, total - total // 2
            x = F.pad(x, (less, more) if auto_pad == "SAME_UPPER" else (more, less))
        return F.conv1d(x, w, None, stride)

    operands = [normal(0, 2, 3, size), normal(1, 4, 3, kernel)]
    check("Conv", reference, operands, strides=[stride], auto_pad=auto_pad)


@given(
    n=st.integers(1, 3),
    rank=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padded=st.booleans(),
    ceil=st.booleans(),
    extra=st.integers(0, 4),
    rounded=st.booleans(),
    seed=seeds,
)
@settings(few, max_examples=40)
def test_max_pool(
    check: Check,
    n: int,
    rank: int,
    kernel: int,
    stride: int,
    padded: bool,
    ceil: bool,
    extra: int,
    rounded: bool,
    seed: int,
) -> None:
    """Rounded inputs have many ties: the first maximum gets the gradient, as in torch."""
    x = normal(seed, n, 2, *[kernel + extra + i for i in range(rank)])
    x = np.round(x) if rounded else x
    padding = kernel // 2 if padded else 0
    torch_pool = (F.max_pool1d, F.max_pool2d)[rank - 1]
    # With ceil_mode torch drops a window that starts in the padding; ONNX does not say.
    lasts = [-(-(n + 2 * padding - kernel) // stride) * stride for n in x.shape[2:]]
    assume(not ceil or all(a < n + padding for a, n in zip(lasts, x.shape[2:], strict=True)))
    check(
        "MaxPool",
        lambda t: torch_pool(t, kernel, stride, padding, ceil_mode=ceil),
        [x],
        kernel_shape=[kernel] * rank,
        strides=[stride] * rank,
        pads=[padding] * 2 * rank,
        ceil_mode=int(ceil),
    )


@given(
    n=st.integers(1, 3),
    rank=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padded=st.booleans(),
    include=st.booleans(),
    extra=st.integers(0, 4),
    seed=seeds,
)
@settings(few, max_examples=20)
def test_average_pool(
    check: Check,
    n: int,
    rank: int,
    kernel: int,
    stride: int,
    padded: bool,
    include: bool,
    extra: int,
    seed: int,
) -> None:
    x = normal(seed, n, 2, *[kernel + extra + i for i in range(rank)])
    padding = kernel // 2 if padded else 0
    torch_pool = (F.avg_pool1d, F.avg_pool2d)[rank - 1]
    check(
        "AveragePool",
        lambda t: torch_pool(t, kernel, stride, padding, count_include_pad=include),
        [x],
        kernel_shape=[kernel] * rank,
        strides=[stride] * rank,
        pads=[padding] * 2 * rank,
        count_include_pad=int(include),
    )


@given(n=sizes, rank=st.integers(1, 3), seed=seeds)
@few
def test_global_average_pool(check: Check, n: int, rank: int, seed: int) -> None:
    x = normal(seed, n, 2, *range(2, 2 + rank))
    dims = tuple(range(2, 2 + rank))
    check("GlobalAveragePool", lambda t: t.mean(dims, keepdim=True), [x])


@given(
    n=st.integers(1, 2),
    rank=st.integers(1, 2),
    group=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 1),
    more=st.integers(0, 2),
    seed=seeds,
)
@settings(few, max_examples=20)
def test_conv_transpose(
    check: Check,
    n: int,
    rank: int,
    group: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: int,
    more: int,
    seed: int,
) -> None:
    assume(more < stride and dilation * (kernel - 1) + 1 > 2 * padding)
    x, w = normal(seed, n, 2 * group, *[3] * rank), normal(seed, 2 * group, 2, *[kernel] * rank)
    torch_conv = (F.conv_transpose1d, F.conv_transpose2d)[rank - 1]

    def reference(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch_conv(x, w, b, stride, padding, more, group, dilation)

    check(
        "ConvTranspose",
        reference,
        [x, w, normal(seed + 2, 2 * group)],
        strides=[stride] * rank,
        dilations=[dilation] * rank,
        pads=[padding] * 2 * rank,
        output_padding=[more] * rank,
        group=group,
    )


@given(n=sizes, seed=seeds)
@few
def test_extremes(check: Check, n: int, seed: int) -> None:
    x = normal(seed, n, 3, 4)
    check("Max", torch.maximum, [x, normal(seed + 1, 3, 1)])
    check("Min", torch.minimum, [x, np.array(0, np.float32)])
    check("ReduceMax", lambda t: t.amax((1, 2), keepdim=True), [np.round(x)], axes=[1, 2])
    check("ReduceMin", lambda t: t.amin(2), [np.round(x)], axes=[-1], keepdims=0)
    check("GlobalMaxPool", lambda t: t.amax(2, keepdim=True), [x])


@given(n=sizes, seed=seeds)
@few
def test_picking(check: Check, n: int, seed: int) -> None:
    table, x = normal(seed, 5, 3), normal(seed, n, 5, 2)
    tokens = np.random.default_rng(seed).integers(0, 5, (n, 4))
    check("Gather", lambda t, i: t[i], [table, tokens], data=1)
    check("Gather", lambda t, i: t[:, i], [x, ints(0, 2, 2, 4)], axis=1)
    check("Gather", lambda t, i: t[:, 3], [x, np.array(3, np.int64)], axis=1)
    check("Slice", lambda t, *_: t[:, 1:4], [x, ints(1), ints(4), ints(1)])
    check(
        "Slice", lambda t, *_: t[:, -3:, :1], [x, ints(-3, 0), ints(99, 1), ints(1, 2), ints(1, 1)]
    )
    check("Pad", lambda t, _: F.pad(t, (1, 0, 2, 3)), [x, ints(0, 2, 1, 0, 3, 0)])
    check("Pad", lambda t, _: F.pad(t, (0, 0, -1, 1)), [x, ints(0, -1, 0, 0, 1, 0)])


@given(n=sizes, seed=seeds, rank=st.integers(1, 2))
@few
def test_normalization(check: Check, n: int, seed: int, rank: int) -> None:
    x, w, b = normal(seed, n, 3, *[4] * rank), normal(seed + 1, 3), normal(seed + 2, 3)
    mean, variance = normal(seed + 3, 3), positive(seed + 4, 3)

    def instance(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.instance_norm(x, None, None, w, b, eps=1e-3)

    def frozen(x: torch.Tensor, *p: torch.Tensor) -> torch.Tensor:
        w, b, m, v = (t.reshape(-1, *[1] * rank) for t in p)
        return (x - m) / torch.sqrt(v + 1e-5) * w + b

    check("InstanceNormalization", instance, [x, w, b], epsilon=1e-3)
    check("BatchNormalization", frozen, [x, w, b, mean, variance])


@pytest.mark.parametrize("opset", [17, 21])
def test_layer_normalization_is_expanded(check: Check, opset: int) -> None:
    x, w, b = normal(0, 3, 4, 6), normal(1, 6), normal(2, 6)
    check("LayerNormalization", lambda *t: F.layer_norm(t[0], (6,), *t[1:]), [x, w, b], opset)


@given(n=sizes, seed=seeds)
@few
def test_prelu_is_expanded(check: Check, n: int, seed: int) -> None:
    check("PRelu", lambda x, a: torch.where(x < 0, a * x, x), [normal(seed, n, 3), normal(seed, 3)])


def test_every_rule_is_tested() -> None:
    """A new rule needs a test that names its operator, as an argument or in a text model."""
    text = "".join(p.read_text("utf-8") for p in Path(__file__).parent.glob("test_*.py"))
    assert not [o for o in supported() if not re.search(rf'"{o}"|= {o}[<({{]', text)]
