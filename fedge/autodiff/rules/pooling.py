"""Pooling in any number of spatial dimensions."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attribute, static_dims
from fedge.autodiff.registry import Gradients, vjp_rule
from fedge.autodiff.rules.positions import add_at
from fedge.autodiff.rules.windows import Windows, windows_of
from fedge.types import Array


@vjp_rule("MaxPool")
def max_pool(op: Ops, node: ir.Node, dy: Value, _indices: Value | None = None) -> Gradients:
    """dy goes to the first maximum of each window, in the order rows are stored."""
    x = node.inputs[0]
    windows = windows_of(node, attribute(node, "kernel_shape"))
    if windows.tiling:
        return _tiled_max_pool(op, node, dy, windows)
    if len(node.outputs) == 1:
        node.resize_outputs(2)
    indices = node.outputs[1]
    indices.name = indices.name or f"{node.outputs[0].name}@indices"
    node.attributes.pop("storage_order", None)
    return add_at(op, x, indices, dy)


def _tiled_max_pool(op: Ops, node: ir.Node, dy: Value, windows: Windows) -> Value:
    """Without indices, which make ONNX Runtime's MaxPool 15 times slower.

    An element that equals its window's maximum scores the more the earlier it comes in the
    window; dy goes where the score is the window's best.
    """
    x, y = _crop(op, node.inputs[0], windows), node.outputs[0]
    taps = math.prod(windows.kernel)
    order = np.arange(taps, 0, -1, dtype=np.float32).reshape(windows.kernel)
    score = op.Mul(_same(op, x, _repeat(op, y, windows)), np.tile(order, windows.count))
    best = op.MaxPool(score, kernel_shape=windows.kernel, strides=windows.stride)
    dx = op.Mul(_same(op, score, _repeat(op, best, windows)), _repeat(op, dy, windows))
    if not any(windows.rest):
        return dx
    return op.Pad(dx, op.ints([0] * (4 + len(windows.rest)) + list(windows.rest)))


def _crop(op: Ops, x: Value, windows: Windows) -> Value:
    """Without the elements after the last window."""
    if not any(windows.rest):
        return x
    rank = len(windows.rest)
    stop = [s - r for s, r in zip(windows.size, windows.rest, strict=True)]
    return op.Slice(x, op.ints([0] * rank), op.ints(stop), op.ints(range(2, 2 + rank)))


def _repeat(op: Ops, x: Value, windows: Windows) -> Value:
    """Each element repeated over its window."""
    scales = np.array([1, 1, *windows.kernel], np.float32)
    return op.Resize(
        x,
        None,
        scales,
        mode="nearest",
        nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )


def _same(op: Ops, a: Value, b: Value) -> Value:
    """1 where equal, else 0."""
    return op.Cast(op.Equal(a, b), to=int(ir.DataType.FLOAT))


@vjp_rule("AveragePool")
def average_pool(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy / count goes to every element of its window."""
    windows = windows_of(node, attribute(node, "kernel_shape"))
    scale = 1 / _counts(windows, attribute(node, "count_include_pad", 0), node)
    return spread(op, node.inputs[0], op.Mul(dy, scale.astype(np.float32)), windows)


def spread(op: Ops, x: Value, dy: Value, windows: Windows) -> Value:
    """The gradient by x of sums over windows: dy goes to every element of its window."""
    spread_out = op.ConvTranspose(
        op.reshape(dy, (-1, 1, *windows.count)),
        np.ones((1, 1, *windows.kernel), np.float32),
        strides=windows.stride,
        dilations=windows.dilation,
        pads=windows.padding,
        output_padding=windows.rest,
    )
    return op.reshape_like(spread_out, x)


@vjp_rule("GlobalAveragePool")
def global_average_pool(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy / count goes to every position."""
    size = static_dims(node.inputs[0], slice(2, None))
    return op.Mul(dy, np.full(size, 1 / math.prod(size), np.float32))


def _counts(windows: Windows, include_pad: int, node: ir.Node) -> Array:
    """How many elements each window averages, shape ``count``."""
    given = attribute(node, "pads") or [0] * 2 * len(windows.size)
    counts = np.ones(())
    for axis, size in enumerate(windows.size):
        begin, after = windows.begin[axis], given[len(windows.size) + axis]
        low, high = (-begin, size + after) if include_pad else (0, size)
        starts = np.arange(windows.count[axis]) * windows.stride[axis] - begin
        taps = starts[:, None] + np.arange(windows.kernel[axis]) * windows.dilation[axis]
        counts = np.multiply.outer(counts, ((taps >= low) & (taps < high)).sum(1))
    return counts
