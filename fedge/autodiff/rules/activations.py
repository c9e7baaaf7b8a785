"""Activations that ONNX defines by cases."""

from __future__ import annotations

import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attribute
from fedge.autodiff.registry import Gradients, vjp_rule


@vjp_rule("PRelu")
def prelu(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = x where x ≥ 0, else slope · x."""
    x, slope = node.inputs
    negative = op.Less(x, 0.0)
    by_slope = op.Where(negative, op.Mul(dy, x), 0.0)
    return (
        op.Where(negative, op.Mul(dy, slope), dy),
        op.unbroadcast(by_slope, node.outputs[0], slope),
    )


@vjp_rule("Selu")
def selu(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = γx where x > 0, else γα(eˣ − 1); the slope there is y + γα."""
    alpha, gamma = attribute(node, "alpha", 1.67326324), attribute(node, "gamma", 1.05070102)
    slope = op.Add(node.outputs[0], gamma * alpha)
    return op.Mul(dy, op.Where(op.Greater(node.inputs[0], 0.0), gamma, slope))


@vjp_rule("Celu")
def celu(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = x where x > 0, else α(e^(x/α) − 1); the slope there is 1 + y / α."""
    slope = op.Add(op.Div(node.outputs[0], attribute(node, "alpha", 1.0)), 1.0)
    return op.Mul(dy, op.Where(op.Greater(node.inputs[0], 0.0), 1.0, slope))


@vjp_rule("Softsign")
def softsign(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = x / (1 + |x|); the slope is (1 − |y|)²."""
    rest = op.Sub(1.0, op.Abs(node.outputs[0]))
    return op.Mul(dy, op.Mul(rest, rest))


@vjp_rule("ThresholdedRelu")
def thresholded_relu(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = x where x > α, else 0."""
    return op.Where(op.Greater(node.inputs[0], attribute(node, "alpha", 1.0)), dy, 0.0)


@vjp_rule("Shrink")
def shrink(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = x ± bias where |x| > λ, else 0."""
    return op.Where(op.Greater(op.Abs(node.inputs[0]), attribute(node, "lambd", 0.5)), dy, 0.0)
