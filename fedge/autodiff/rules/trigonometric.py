"""Trigonometric and hyperbolic functions."""

from __future__ import annotations

import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value
from fedge.autodiff.registry import Gradients, vjp_rule


@vjp_rule("Sin")
def sin(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = sin x."""
    return op.Mul(dy, op.Cos(node.inputs[0]))


@vjp_rule("Cos")
def cos(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = cos x."""
    return op.Neg(op.Mul(dy, op.Sin(node.inputs[0])))


@vjp_rule("Tan")
def tan(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = tan x; the slope is 1 + y²."""
    return op.Mul(dy, op.Add(_square(op, node.outputs[0]), 1.0))


@vjp_rule("Asin")
def asin(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = arcsin x."""
    return op.Div(dy, op.Sqrt(_one_minus_square(op, node.inputs[0])))


@vjp_rule("Acos")
def acos(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = arccos x = π/2 − arcsin x."""
    return op.Neg(op.Div(dy, op.Sqrt(_one_minus_square(op, node.inputs[0]))))


@vjp_rule("Atan")
def atan(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = arctan x."""
    return op.Div(dy, op.Add(_square(op, node.inputs[0]), 1.0))


@vjp_rule("Sinh")
def sinh(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = sinh x."""
    return op.Mul(dy, op.Cosh(node.inputs[0]))


@vjp_rule("Cosh")
def cosh(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = cosh x."""
    return op.Mul(dy, op.Sinh(node.inputs[0]))


@vjp_rule("Asinh")
def asinh(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = arsinh x."""
    return op.Div(dy, op.Sqrt(op.Add(_square(op, node.inputs[0]), 1.0)))


@vjp_rule("Acosh")
def acosh(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = arcosh x, x ≥ 1; the slope is 1 / √((x − 1)(x + 1))."""
    x = node.inputs[0]
    return op.Div(dy, op.Sqrt(op.Mul(op.Sub(x, 1.0), op.Add(x, 1.0))))


@vjp_rule("Atanh")
def atanh(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = artanh x."""
    return op.Div(dy, _one_minus_square(op, node.inputs[0]))


def _square(op: Ops, x: Value) -> Value:
    return op.Mul(x, x)


def _one_minus_square(op: Ops, x: Value) -> Value:
    """(1 − x)(1 + x): exact near ±1, where 1 − x² loses its digits."""
    return op.Mul(op.Sub(1.0, x), op.Add(x, 1.0))
