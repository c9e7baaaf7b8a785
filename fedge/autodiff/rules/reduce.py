"""Sums, means, products, norms and softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from fedge.autodiff.ops import Dim, Ops, Value, attribute, attributes, constant, shape_of
from fedge.autodiff.registry import Gradients, vjp_rule


@vjp_rule("ReduceSum")
def reduce_sum(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy repeated along the summed axes."""
    return _spread(op, node, dy)


@vjp_rule("ReduceMean")
def reduce_mean(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy / count repeated along the averaged axes."""
    sizes = [shape_of(node.inputs[0])[i] for i in _axes(node)]
    static = [d for d in sizes if isinstance(d, int)]
    if len(static) == len(sizes):
        return _spread(op, node, op.Mul(dy, 1.0 / math.prod(static)))
    count = op.Div(op.size(node.inputs[0]), op.size(node.outputs[0]))
    return _spread(op, node, op.Div(dy, count))


@vjp_rule("ReduceMax", "ReduceMin")
def reduce_extreme(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy is shared by the elements that reach the extreme, as torch.amax does."""
    x, axes = node.inputs[0], _axes(node)
    best = _spread(op, node, node.outputs[0])
    hits = op.Cast(op.Equal(x, best), to=int(ir.DataType.FLOAT))
    return op.Mul(hits, op.Div(_spread(op, node, dy), op.sum(hits, axes, keepdims=True)))


@vjp_rule("ReduceL1")
def reduce_l1(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = Σ |x|."""
    return op.Mul(op.Sign(node.inputs[0]), _spread(op, node, dy))


@vjp_rule("ReduceL2")
def reduce_l2(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = √Σ x², slope 0 where that is 0."""
    y = node.outputs[0]
    safe = op.Where(op.Greater(y, 0.0), y, math.inf)
    return op.Mul(node.inputs[0], _spread(op, node, op.Div(dy, safe)))


@vjp_rule("ReduceSumSquare")
def reduce_sum_square(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = Σ x²."""
    return op.Mul(node.inputs[0], _spread(op, node, op.Mul(dy, 2.0)))


@vjp_rule("ReduceLogSum")
def reduce_log_sum(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = ln Σ x."""
    return _spread(op, node, op.Div(dy, op.Exp(node.outputs[0])))


@vjp_rule("ReduceLogSumExp")
def reduce_log_sum_exp(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = ln Σ eˣ: dy times the softmax."""
    share = op.Exp(op.Sub(node.inputs[0], _spread(op, node, node.outputs[0])))
    return op.Mul(share, _spread(op, node, dy))


@vjp_rule("ReduceProd")
def reduce_prod(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy times the product of the other factors, right where factors are 0."""
    x = node.inputs[0]
    zero = op.Cast(op.Equal(x, 0.0), to=int(ir.DataType.FLOAT))
    factors = op.Add(x, zero)
    product = op.call("ReduceProd", factors, *node.inputs[1:], **attributes(node))
    zeros = op.sum(zero, _axes(node), keepdims=True)
    whole = op.Div(_spread(op, node, op.Mul(dy, product)), factors)
    return op.Where(op.Equal(op.Sub(zeros, zero), 0.0), whole, 0.0)


@vjp_rule("CumSum")
def cum_sum(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """Each element is in the sums after it: a cumulative sum the other way."""
    settings = {"exclusive": 0, "reverse": 0, **attributes(node)}
    settings["reverse"] = 1 - settings["reverse"]
    return op.CumSum(dy, node.inputs[1], **settings)


@vjp_rule("GlobalMaxPool")
def global_max_pool(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """Like ReduceMax over the positions."""
    x, y = node.inputs[0], node.outputs[0]
    hits = op.Cast(op.Equal(x, y), to=int(ir.DataType.FLOAT))
    count = op.sum(hits, range(2, len(shape_of(x))), keepdims=True)
    return op.Mul(hits, op.Div(dy, count))


@vjp_rule("Softmax")
def softmax(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """s (dy − Σ dy s).

    Where all of a row is masked by −∞, s is NaN; models that let this happen replace it by a Where
    (attention does), behind which no gradient comes back.
    """
    s, axis = node.outputs[0], attribute(node, "axis", -1)
    if any(use.node.op_type in ("Cast", "IsNaN", "Where") for use in s.uses()):
        s = op.Where(op.IsNaN(s), 0.0, s)
    return op.Mul(s, op.Sub(dy, op.sum(op.Mul(dy, s), [axis], keepdims=True)))


@vjp_rule("LogSoftmax")
def log_softmax(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy − eʸ Σ dy."""
    y, axis = node.outputs[0], attribute(node, "axis", -1)
    return op.Sub(dy, op.Mul(op.Exp(y), op.sum(dy, [axis], keepdims=True)))


def _spread(op: Ops, node: ir.Node, dy: Value) -> Value:
    """Repeat a reduced gradient along the reduced axes."""
    x = node.inputs[0]
    axes = _axes(node)
    if axes and not attribute(node, "keepdims", 1):
        dy = op.Unsqueeze(dy, op.ints(axes))
    return op.Expand(dy, _shape(op, x, shape_of(x))) if axes else dy


def _shape(op: Ops, x: Value, shape: Sequence[Dim]) -> Value:
    static = [d for d in shape if isinstance(d, int)]
    return op.ints(static) if len(static) == len(shape) else op.Shape(x)


def _axes(node: ir.Node) -> list[int]:
    """The reduced axes, non-negative and sorted; given as attribute or as constant input."""
    rank = len(shape_of(node.inputs[0]))
    axes = attribute(node, "axes")
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is not None:
        axes = constant(node, 1).tolist()
    if not axes:
        return [] if attribute(node, "noop_with_empty_axes", 0) else list(range(rank))
    return sorted(a % rank for a in axes)
