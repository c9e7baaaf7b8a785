"""Convolution in any number of spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attribute, static_shape
from fedge.autodiff.registry import Gradients, vjp_rule
from fedge.autodiff.rules.windows import (
    Cutter,
    Windows,
    transposed_windows_of,
    windows_of,
)


@vjp_rule("Conv")
def conv(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """Y = X ∗ W + b: dX by ConvTranspose, dW by matrix products of shifted copies."""
    w = node.inputs[1]
    windows = windows_of(node, static_shape(w)[2:])
    group = attribute(node, "group", 1)
    db = op.sum(dy, [0, *range(2, 2 + len(windows.size))])
    dx = _input(op, dy, w, windows, group)
    return dx, _weight(op, (node.inputs[0], dy, w), windows, group), db


def _input(op: Ops, dy: Value, w: Value, windows: Windows, group: int) -> Value:
    """dX = Wᵀ applied at every position; a Conv where the kernel is one point, which is faster."""
    if windows.pointwise and group == 1:
        rank = 2 + len(windows.size)
        return op.Conv(dy, op.Transpose(w, perm=[1, 0, *range(2, rank)]))
    return op.ConvTranspose(
        dy,
        w,
        strides=windows.stride,
        dilations=windows.dilation,
        pads=windows.padding,
        output_padding=windows.rest,
        group=group,
    )


@vjp_rule("ConvTranspose")
def conv_transpose(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """The transpose of Conv: dX is the Conv of dY, and X and dY change places in dW."""
    x, w = node.inputs[:2]
    group = attribute(node, "group", 1)
    windows = transposed_windows_of(node, static_shape(w)[2:])
    dx = op.Conv(
        dy,
        w,
        strides=windows.stride,
        dilations=windows.dilation,
        pads=windows.padding,
        group=group,
    )
    db = op.sum(dy, [0, *range(2, 2 + len(windows.size))])
    return dx, _weight(op, (dy, x, w), windows, group), db


def _weight(op: Ops, operands: tuple[Value, Value, Value], windows: Windows, group: int) -> Value:
    """dW[o, i, tap] = Σ over rows and positions of small[·, o, ·] large[·, i, · shifted by tap].

    ``operands`` are large (what windows slide over), small (one position per window) and W.
    """
    large, small, w = operands
    out, per_group = static_shape(w)[0] // group, static_shape(w)[1]
    if group > 1 and out == per_group == 1:
        sums, order = _depthwise_products(op, (large, small), windows, group)
    else:
        products, order = _products(op, operands, windows, group)
        sums = [op.sum(p, [0]) for p in products]
    sums = [op.reshape(s, (group, per_group, -1, out)) for s in sums]
    total = sums[0] if len(sums) == 1 else op.Concat(*sums, axis=2)  # [G, I, T, O]
    if order != sorted(order):
        total = op.Gather(total, op.ints(np.argsort(order).tolist()), axis=2)
    return op.reshape(op.transpose(total, (0, 3, 1, 2)), static_shape(w))


def weight_by_row(
    op: Ops, operands: tuple[Value, Value, Value], windows: Windows, group: int
) -> Value:
    """The gradient of W by each row alone, [N, G, I, TO]: its elements in another order."""
    products, _ = _products(op, operands, windows, group)
    return products[0] if len(products) == 1 else op.Concat(*products, axis=3)


def _products(
    op: Ops, operands: tuple[Value, Value, Value], windows: Windows, group: int
) -> tuple[list[Value], list[int]]:
    """Per row, large times small under every tap: [N, G, I, some taps · O] each, and those taps.

    Along the first spatial axis small is moved against large, along the others large is sliced:
    for 3×3 that is 3 + 3 copies where im2col makes 9, and the matrices are wider. Moving adds
    whole lines of zeros, long contiguous copies. With a stride s, taps whose offsets along the
    first axis agree modulo s share a slice.

    Shapes: G groups, I and O channels per group, T taps.
    """
    large, small, w = operands
    out, per_group = static_shape(w)[0] // group, static_shape(w)[1]
    lines, line = windows.count[0], math.prod(windows.count[1:])
    small = op.Reshape(small, op.ints([0, group, out, lines * line]))
    cut = Cutter(op, large, windows)
    products: list[Value] = []
    order: list[int] = []
    columns = windows.starts(1)
    for first, moves in windows.first_axis_moves().items():
        last = max(moves.values())
        y = _side_by_side(op, _moved(op, small, moves, line), 2)
        y = op.Transpose(y, perm=[0, 1, 3, 2])
        for number, column in enumerate(columns):
            x = cut((first, *column), lines + last)
            x = op.Reshape(x, op.ints([0, group, per_group, (lines + last) * line]))
            products.append(op.MatMul(x, y))
            order += [tap * len(columns) + number for tap in moves]
    return products, order


def _depthwise_products(
    op: Ops, operands: tuple[Value, Value], windows: Windows, channels: int
) -> tuple[list[Value], list[int]]:
    """:func:`_products` summed over the rows, where each channel is a group: [C, 1, some taps].

    Rows go behind the channels first: one product per channel instead of one per channel and row.
    """
    large, small = operands
    line = math.prod(windows.count[1:])
    small = op.Reshape(small, op.ints([0, channels, windows.count[0] * line]))
    small = op.Unsqueeze(op.Transpose(small, perm=[1, 0, 2]), op.ints([1]))
    cut = Cutter(op, large, windows, rows_behind=True)
    flat = op.ints([channels, 1, -1])
    products: list[Value] = []
    order: list[int] = []
    columns = windows.starts(1)
    for first, moves in windows.first_axis_moves().items():
        last = max(moves.values())
        moved = [op.Reshape(v, flat) for v in _moved(op, small, moves, line)]
        y = op.Transpose(_side_by_side(op, moved, 1), perm=[0, 2, 1])
        for number, column in enumerate(columns):
            x = cut((first, *column), windows.count[0] + last)
            products.append(op.MatMul(op.Reshape(x, flat), y))
            order += [tap * len(columns) + number for tap in moves]
    return products, order


def _moved(op: Ops, x: Value, moves: Mapping[int, int], line: int) -> list[Value]:
    """``x`` moved by each number of lines along its last axis, the fourth, with zeros around."""
    last = max(moves.values())
    pads = [[0, 0, 0, m * line, 0, 0, 0, (last - m) * line] for m in moves.values()]
    return [op.Pad(x, op.ints(p)) if any(p) else x for p in pads]


def _side_by_side(op: Ops, values: Sequence[Value], axis: int) -> Value:
    return values[0] if len(values) == 1 else op.Concat(*values, axis=axis)
