"""Convolution in any number of spatial dimensions."""

from __future__ import annotations

import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attribute, static_shape
from fedge.autodiff.registry import Gradients, vjp_rule
from fedge.autodiff.rules.windows import (
    Windows,
    tap_slices,
    transposed_windows_of,
    windows_of,
)


@vjp_rule("Conv")
def conv(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """Y = X ∗ W + b: dX by ConvTranspose, dW as one matrix product over shifted copies of X."""
    w = node.inputs[1]
    windows = windows_of(node, static_shape(w)[2:])
    group = attribute(node, "group", 1)
    dx = op.ConvTranspose(
        dy,
        w,
        strides=windows.stride,
        dilations=windows.dilation,
        pads=windows.padding,
        output_padding=windows.rest,
        group=group,
    )
    db = op.sum(dy, [0, *range(2, 2 + len(windows.size))])
    return dx, _weight(op, (node.inputs[0], dy, w), windows, group), db


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
    Shapes: G groups, I and O channels per group, T taps, P positions.
    """
    w = operands[2]
    out, per_group = static_shape(w)[0] // group, static_shape(w)[1]
    total = op.sum(weight_by_row(op, operands, windows, group), [0])  # [(G,) O, TI]
    split = op.reshape(total, (group * out, -1, per_group))
    return op.reshape(op.transpose(split, (0, 2, 1)), static_shape(w))


def weight_by_row(
    op: Ops, operands: tuple[Value, Value, Value], windows: Windows, group: int
) -> Value:
    """The gradient of W by each row alone, [N, (G,) O, TI]: its elements in another order."""
    large, small, w = operands
    out, per_group = static_shape(w)[0] // group, static_shape(w)[1]
    grouped = op.reshape(large, (-1, group, per_group, *windows.size)) if group > 1 else large
    lead = 3 if group > 1 else 2
    taps = tap_slices(op, grouped, windows, lead)  # each [N, (G,) I, *count]
    columns = taps[0] if len(taps) == 1 else op.Concat(*taps, axis=lead - 1)
    rows = [0, group] if group > 1 else [0]
    rank = len(rows)
    columns = op.Reshape(columns, op.ints([*rows, len(taps) * per_group, -1]))  # [N, (G,) TI, P]
    small = op.Reshape(small, op.ints([*rows, out, -1]))  # [N, (G,) O, P]
    return op.MatMul(small, op.Transpose(columns, perm=[*range(rank), rank + 1, rank]))
