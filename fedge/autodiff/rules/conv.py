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

# ONNX Runtime packs the second matrix of a product: from so many rows on, the smaller one should
# be that (measured: 290 against 379 µs for 48 x 1088 by 16 x 1088, 69 against 53 µs with 6).
_WIDE = 16


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
    elif group == 1 and per_group * math.prod(windows.kernel) < out * windows.kernel[0]:
        return _gathered_weight(op, operands, windows)
    else:
        products, order = _products(op, operands, windows, group)
        sums = [op.sum(p, [0]) for p in products]
        if per_group < _WIDE:
            sums = [op.Transpose(s, perm=[0, 2, 1]) for s in sums]
    sums = [op.reshape(s, (group, -1, out, per_group)) for s in sums]
    total = _side_by_side(op, sums, 1)  # [G, T, O, I]
    if order != sorted(order):
        total = op.Gather(total, op.ints(np.argsort(order).tolist()), axis=1)
    return op.reshape(op.transpose(total, (0, 2, 3, 1)), static_shape(w))


def _gathered_weight(op: Ops, operands: tuple[Value, Value, Value], windows: Windows) -> Value:
    """dW by im2col, for first layers: few channels for every tap are less than small's many."""
    large, small, w = operands
    out, channels = static_shape(w)[:2]
    cut = Cutter(op, large, channels, windows)
    taps = [cut(start, windows.count[0]) for start in windows.starts()]
    positions = math.prod(windows.count)
    columns = op.Reshape(_side_by_side(op, taps, 1), op.ints([0, len(taps) * channels, positions]))
    small = op.Reshape(small, op.ints([0, out, positions]))
    product = op.MatMul(small, op.Transpose(columns, perm=[0, 2, 1]))  # [N, O, TI]
    total = op.reshape(op.sum(product, [0]), (out, len(taps), channels))
    return op.reshape(op.transpose(total, (0, 2, 1)), static_shape(w))


def weight_by_row(
    op: Ops, operands: tuple[Value, Value, Value], windows: Windows, group: int
) -> Value:
    """The gradient of W by each row alone, [N, G, ·, ·]: its elements in another order."""
    products, _ = _products(op, operands, windows, group)
    wide = static_shape(operands[2])[1] >= _WIDE
    return _side_by_side(op, products, 2 if wide else 3)


def _products(
    op: Ops, operands: tuple[Value, Value, Value], windows: Windows, group: int
) -> tuple[list[Value], list[int]]:
    """Per row, large times small under every tap, and which taps each product is of.

    Products are [N, G, some taps · O, I], or [N, G, I, some taps · O] where I is small.

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
    cut = Cutter(op, large, group * per_group, windows)
    products: list[Value] = []
    order: list[int] = []
    columns = windows.starts(1)
    for first, moves in windows.first_axis_moves().items():
        last = max(moves.values())
        y = _side_by_side(op, _moved(op, small, moves, line), 2)
        for number, column in enumerate(columns):
            x = cut((first, *column), lines + last)
            x = op.Reshape(x, op.ints([0, group, per_group, (lines + last) * line]))
            a, b = (x, y) if per_group < _WIDE else (y, x)
            products.append(op.MatMul(a, op.Transpose(b, perm=[0, 1, 3, 2])))
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
    cut = Cutter(op, large, channels, windows, rows_behind=True)
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
