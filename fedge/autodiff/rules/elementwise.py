"""Operators that work element by element, with NumPy's broadcasting."""

from __future__ import annotations

import math

import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attribute
from fedge.autodiff.registry import Gradients, vjp_rule
from fedge.errors import UnsupportedOperatorError

# HardSigmoid(αy) with this α is 1 where y > 0 and 0 elsewhere, in one pass: half the time of
# Greater and Where (measured: 24 against 45 µs on 110,592 elements).
_STEEP = 3e38


@vjp_rule("Identity")
def identity(_op: Ops, _node: ir.Node, dy: Value) -> Gradients:
    """y = x."""
    return dy


@vjp_rule("Cast", "CastLike")
def cast(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = x in another dtype; no gradient flows to integers (nor to CastLike's example)."""
    x = node.inputs[0]
    if x.dtype is None:  # what has no rule has no types either
        maker = x.producer()
        raise UnsupportedOperatorError(
            f"the type of {x.name!r} is unknown; fedge cannot differentiate the "
            f"{maker.op_type if maker else 'input'} that it comes from"
        )
    return op.Cast(dy, to=int(x.dtype)) if x.dtype.is_floating_point() else None


@vjp_rule("Add")
def add(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = a + b."""
    return tuple(op.unbroadcast(dy, node.outputs[0], x) for x in node.inputs)


@vjp_rule("Sum")
def sum_(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = a + b + ..."""
    return add(op, node, dy)


@vjp_rule("Mean")
def mean(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = (a + b + ...) / how many."""
    return add(op, node, op.Mul(dy, 1 / len(node.inputs)))


@vjp_rule("Sub")
def sub(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = a − b."""
    a, b = (op.unbroadcast(dy, node.outputs[0], x) for x in node.inputs)
    return a, op.Neg(b)


@vjp_rule("Mul")
def mul(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = ab."""
    a, b = node.inputs
    out = node.outputs[0]
    return op.unbroadcast(op.Mul(dy, b), out, a), op.unbroadcast(op.Mul(dy, a), out, b)


@vjp_rule("Div")
def div(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = a / b; ∂y/∂b = −y / b."""
    a, b = node.inputs
    out = node.outputs[0]
    by_a = op.Div(dy, b)
    return op.unbroadcast(by_a, out, a), op.unbroadcast(op.Neg(op.Mul(by_a, out)), out, b)


@vjp_rule("Pow")
def pow_(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = aᵇ; ∂y/∂b = y ln a, taken as 0 where a ≤ 0."""
    a, exponent = node.inputs
    known = ir.convenience.get_const_tensor(exponent)
    if known is not None and known.size == 1 and known.numpy().item() == 2:
        double = op.unbroadcast(op.Mul(dy, op.Add(a, a)), node.outputs[0], a)
        return double, None  # Pow by a tensor takes ten times as long
    b = op.Cast(exponent, to=int(ir.DataType.FLOAT)) if _integers(exponent) else exponent
    out = node.outputs[0]
    da = op.Mul(op.Mul(dy, b), op.Pow(a, op.Sub(b, 1.0)))
    log = op.Where(op.Greater(a, 0.0), op.Log(op.Max(a, 1e-45)), 0.0)
    return op.unbroadcast(da, out, a), op.unbroadcast(op.Mul(op.Mul(dy, out), log), out, exponent)


def _integers(x: Value) -> bool:
    return x.dtype is not None and not x.dtype.is_floating_point()


@vjp_rule("Mod")
def mod(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = a − qb with a whole number q."""
    a, b = node.inputs
    out = node.outputs[0]
    q = op.Round(op.Div(op.Sub(a, out), b))
    return op.unbroadcast(dy, out, a), op.unbroadcast(op.Neg(op.Mul(dy, q)), out, b)


@vjp_rule("Neg")
def neg(op: Ops, _node: ir.Node, dy: Value) -> Gradients:
    """y = −x."""
    return op.Neg(dy)


@vjp_rule("Abs")
def abs_(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = |x|, slope 0 at 0."""
    return op.Mul(dy, op.Sign(node.inputs[0]))


@vjp_rule("Exp")
def exp(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = eˣ."""
    return op.Mul(dy, node.outputs[0])


@vjp_rule("Log")
def log(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = ln x."""
    return op.Div(dy, node.inputs[0])


@vjp_rule("Sqrt")
def sqrt(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = √x."""
    return op.Div(op.Mul(dy, 0.5), node.outputs[0])


@vjp_rule("Reciprocal")
def reciprocal(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = 1/x."""
    y = node.outputs[0]
    return op.Neg(op.Mul(dy, op.Mul(y, y)))


@vjp_rule("Erf")
def erf(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = erf x."""
    x = node.inputs[0]
    return op.Mul(dy, op.Mul(op.Exp(op.Neg(op.Mul(x, x))), 2 / math.sqrt(math.pi)))


@vjp_rule("Relu")
def relu(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = max(x, 0). Asks the output, so that x need not be kept and Conv+Relu can fuse."""
    return op.Mul(dy, op.HardSigmoid(node.outputs[0], alpha=_STEEP, beta=0.0))


@vjp_rule("LeakyRelu")
def leaky_relu(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = x where x > 0, else αx."""
    slope = attribute(node, "alpha", 0.01)
    return op.Where(op.Greater(node.inputs[0], 0.0), dy, op.Mul(dy, slope))


@vjp_rule("Elu")
def elu(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = x where x > 0, else α(eˣ − 1); the slope there is y + α."""
    slope = op.Add(node.outputs[0], attribute(node, "alpha", 1.0))
    return op.Where(op.Greater(node.inputs[0], 0.0), dy, op.Mul(dy, slope))


@vjp_rule("Sigmoid")
def sigmoid(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = 1 / (1 + e⁻ˣ)."""
    y = node.outputs[0]
    return op.Mul(dy, op.Mul(y, op.Sub(1.0, y)))


@vjp_rule("Tanh")
def tanh(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = tanh x."""
    y = node.outputs[0]
    return op.Mul(dy, op.Sub(1.0, op.Mul(y, y)))


@vjp_rule("Softplus")
def softplus(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = ln(1 + eˣ)."""
    return op.Mul(dy, op.Sigmoid(node.inputs[0]))


@vjp_rule("HardSigmoid")
def hard_sigmoid(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = min(1, max(0, αx + β))."""
    y = node.outputs[0]
    inside = op.And(op.Greater(y, 0.0), op.Less(y, 1.0))
    return op.Where(inside, op.Mul(dy, attribute(node, "alpha", 0.2)), 0.0)


@vjp_rule("Clip")
def clip(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = min(max(x, low), high): dy where y is x, so bounds belong to the inside, as in torch."""
    same = op.Equal(node.inputs[0], node.outputs[0])
    return op.Mul(dy, op.Cast(same, to=int(ir.DataType.FLOAT)))


@vjp_rule("Where")
def where(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = a where the condition holds, else b."""
    condition, a, b = node.inputs
    out = node.outputs[0]
    return (
        None,
        op.unbroadcast(op.Where(condition, dy, 0.0), out, a),
        op.unbroadcast(op.Where(condition, 0.0, dy), out, b),
    )


@vjp_rule("Dropout")
def dropout(op: Ops, node: ir.Node, dy: Value, _mask: Value | None = None) -> Gradients:
    """y = x · mask / (1 − ratio) in training mode, else x."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return dy
    node.resize_outputs(2)
    node.outputs[1].name = f"{node.outputs[0].name}@mask"
    ratio = node.inputs[1] if node.inputs[1] is not None else op.value(0.5)
    return op.Where(node.outputs[1], op.Div(dy, op.Sub(1.0, ratio)), 0.0)
