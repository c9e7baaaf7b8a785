"""Straight through quantization, as training with quantized weights or activations needs it.

Rounding counts as the identity and codes as real numbers, so QuantizeLinear then DequantizeLinear
passes dy on to x where the code is not clipped, as torch's fake_quantize does. The scale gets
dy · (code − x / scale) inside the range and dy · code at its ends: Esser et al. 2020, "Learned
step size quantization" (arXiv 1902.08153), without its factor. A weight that is stored as codes
(QLoRA) has no gradient but by its scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attribute, attributes, shape_of
from fedge.autodiff.registry import Gradients, vjp_rule
from fedge.errors import UnsupportedOperatorError

_INTEGERS = {
    *(ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.UINT8),
    *(ir.DataType.INT16, ir.DataType.UINT16),
}


@vjp_rule("QuantizeLinear")
def quantize_linear(op: Ops, node: ir.Node, d_code: Value) -> Gradients:
    """code = clip(round(x / s) + zero), inside: by x 1 / s, by s −x / s². Clipped: nothing.

    A code was clipped where it stands for a number more than s / 2 away from x.

    Raises:
        UnsupportedOperatorError: For codes that are no integers of 4, 8 or 16 bits.
    """
    if node.outputs[0].dtype not in _INTEGERS:
        raise UnsupportedOperatorError(
            "fedge differentiates quantization to integers of 4, 8 and 16 bits; the QuantizeLinear "
            f"{node.name or node.outputs[0].name!r} has codes of type {node.outputs[0].dtype}"
        )
    scale = _scale(op, node)
    same = {n: v for n, v in attributes(node).items() if n in ("axis", "block_size")}
    value = op.DequantizeLinear(node.outputs[0], *node.inputs[1:], **same)
    x = scale.cut(node.inputs[0])
    error = op.Abs(op.Div(op.Sub(x, scale.cut(value)), scale.value))
    dx = op.Where(op.LessOrEqual(error, 0.5001), op.Div(scale.cut(d_code), scale.value), 0.0)
    by_scale = op.Neg(scale.gradient(op.Div(op.Mul(dx, x), scale.value)))
    return scale.join(dx), by_scale


@vjp_rule("DequantizeLinear")
def dequantize_linear(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = (code − zero) s: by the code s, by s y / s."""
    scale = _scale(op, node)
    by_scale = scale.gradient(scale.cut(op.Mul(dy, node.outputs[0])))
    return scale.join(op.Mul(scale.cut(dy), scale.value)), op.Div(by_scale, node.inputs[1])


@dataclass(frozen=True)
class _Scale:
    """A scale as it multiplies x: one for all, one per index of an axis, or one per block of it.

    Attributes:
        op: Where to write.
        node: The operator.
        value: Broadcasts to :meth:`cut` of a value of x's shape.
        axis: Of x; None where there is one scale for all.
        block: Elements per block; 0 where there are no blocks.
    """

    op: Ops
    node: ir.Node
    value: Value
    axis: int | None
    block: int

    def cut(self, v: Value) -> Value:
        """With the axis divided into blocks, if there are any."""
        if not self.block or self.axis is None:
            return v
        shape = list(shape_of(self.node.inputs[0]))
        shape[self.axis : self.axis + 1] = [int(shape[self.axis]) // self.block, self.block]
        return self.op.reshape(v, shape)

    def join(self, v: Value) -> Value:
        """The reverse of :meth:`cut`."""
        return self.op.reshape_like(v, self.node.inputs[0]) if self.block else v

    def gradient(self, v: Value) -> Value:
        """The sum over all that one scale multiplied; of the scale's own shape."""
        scale, rank = self.node.inputs[1], len(shape_of(self.node.inputs[0]))
        if self.axis is None:
            return self.op.reshape_like(self.op.sum(v, range(rank)), scale)
        if self.block:
            return self.op.sum(v, [self.axis + 1])
        return self.op.sum(v, [i for i in range(rank) if i != self.axis])


def _scale(op: Ops, node: ir.Node) -> _Scale:
    x, scale = (shape_of(v) for v in node.inputs[:2])
    axis, block = attribute(node, "axis", 1) % max(len(x), 1), attribute(node, "block_size", 0)
    if not block and scale in ((), (1,)):
        return _Scale(op, node, node.inputs[1], None, 0)
    if not block:
        spread = op.reshape(node.inputs[1], (-1, *[1] * (len(x) - axis - 1)))
        return _Scale(op, node, spread, axis, 0)
    if not isinstance(x[axis], int) or int(x[axis]) % block:
        raise UnsupportedOperatorError(
            f"fedge differentiates blocks that divide their axis; {node.op_type} "
            f"{node.name or node.outputs[0].name!r} has blocks of {block} along {x[axis]}"
        )
    return _Scale(op, node, op.Unsqueeze(node.inputs[1], op.ints([axis + 1])), axis, block)
