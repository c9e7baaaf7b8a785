"""Normalization over a layer, its root mean square, a group, an instance or the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attribute, shape_of, static_dims
from fedge.autodiff.registry import Gradients, vjp_rule

_MANY_POSITIONS = 256  # from here on a product per row and channel costs less than a pass over all


@vjp_rule("LayerNormalization")
def layer_norm(
    op: Ops,
    node: ir.Node,
    dy: Value | None,
    d_mean: Value | None = None,
    d_inverse: Value | None = None,
) -> Gradients:
    """y = x̂ w + b over the axes from ``axis`` on; the node puts out mean and 1 / σ as well."""
    x, w, *bias = node.inputs
    rank = len(shape_of(x))
    axes = range(attribute(node, "axis", -1) % rank, rank)
    mean, inverse = _layer_statistics(node)
    x_hat = op.Mul(op.Sub(x, mean), inverse)
    dx, dw, db = None, None, None
    if dy is not None:
        dx = _through(op, op.Mul(dy, w), (x_hat, inverse), axes)
        dw = op.unbroadcast(op.Mul(dy, x_hat), x, w)
        db = op.unbroadcast(dy, x, bias[0]) if bias and bias[0] is not None else None
    per_element = 1.0 / math.prod(static_dims(x, slice(axes.start, None)))
    if d_mean is not None:
        dx = _sum(op, dx, op.Expand(op.Mul(d_mean, per_element), op.Shape(x)))
    if d_inverse is not None:
        slope = op.Mul(op.Mul(inverse, inverse), -per_element)
        dx = _sum(op, dx, op.Mul(x_hat, op.Mul(d_inverse, slope)))
    return dx, dw, db


def _layer_statistics(node: ir.Node) -> tuple[Value, Value]:
    """Mean and 1 / σ, which the node is made to put out."""
    node.resize_outputs(3)
    for value, name in zip(node.outputs[1:], ("mean", "inverse"), strict=True):
        value.name = value.name or f"{node.outputs[0].name}@{name}"
    return node.outputs[1], node.outputs[2]


def _sum(op: Ops, a: Value | None, b: Value) -> Value:
    return b if a is None else op.Add(a, b)


@vjp_rule("RMSNormalization")
def rms_norm(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = x̂ w with x̂ = x / √(mean(x²) + ε) over the axes from ``axis`` on."""
    x, w = node.inputs
    rank = len(shape_of(x))
    axes = range(attribute(node, "axis", -1) % rank, rank)
    square = op.mean(op.Mul(x, x), axes)
    inverse = op.Reciprocal(op.Sqrt(op.Add(square, attribute(node, "epsilon", 1e-5))))
    x_hat = op.Mul(x, inverse)
    dw = op.Mul(dy, x_hat)
    d_hat = op.Mul(dy, w)
    shared = op.Mul(x_hat, op.mean(op.Mul(d_hat, x_hat), axes))
    return op.Mul(op.Sub(d_hat, shared), inverse), op.unbroadcast(dw, x, w)


@vjp_rule("GroupNormalization")
def group_norm(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = x̂ w + b, x̂ normalized over the channels and positions of each row and group.

    Before opset 21 there is one w and b per group, since then one per channel.
    """
    x, w, _ = node.inputs
    groups = op.ints([0, attribute(node, "num_groups"), -1])
    rank = len(shape_of(x))
    unit, inverse = _normalized(op, op.Reshape(x, groups), [2], attribute(node, "epsilon", 1e-5))
    if op.opset < 21:
        d_unit = op.Mul(op.Reshape(dy, groups), _per_channel(op, w, 3))
        weighted = op.Mul(op.Reshape(dy, groups), unit)
        dw, db = op.sum(weighted, [0, 2]), op.sum(op.Reshape(dy, groups), [0, 2])
    else:
        d_unit = op.Reshape(op.Mul(dy, _per_channel(op, w, rank)), groups)
        weighted = op.Mul(dy, op.reshape_like(unit, x))
        dw, db = (op.sum(v, [0, *range(2, rank)]) for v in (weighted, dy))
    return op.reshape_like(_through(op, d_unit, (unit, inverse), [2]), x), dw, db


@vjp_rule("InstanceNormalization")
def instance_norm(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = x̂ w + b, x̂ of mean 0 and variance 1 over the positions of each row and channel."""
    x, w, _ = node.inputs
    rank = len(shape_of(x))
    space = range(2, rank)
    unit, inverse = _normalized(op, x, space, attribute(node, "epsilon", 1e-5))
    dx = _through(op, op.Mul(dy, _per_channel(op, w, rank)), (unit, inverse), space)
    return dx, op.sum(op.Mul(dy, unit), [0, *space]), op.sum(dy, [0, *space])


def _normalized(op: Ops, x: Value, axes: Sequence[int], epsilon: float) -> tuple[Value, Value]:
    """x̂ = (x − mean) / σ over ``axes``, and 1 / σ."""
    centered = op.Sub(x, op.mean(x, axes))
    variance = op.mean(op.Mul(centered, centered), axes)
    inverse = op.Reciprocal(op.Sqrt(op.Add(variance, epsilon)))
    return op.Mul(centered, inverse), inverse


def _through(op: Ops, d_unit: Value, unit: tuple[Value, Value], axes: Sequence[int]) -> Value:
    """dx = (dx̂ − mean(dx̂) − x̂ mean(dx̂ x̂)) / σ; ``unit`` is (x̂, 1 / σ)."""
    x_hat, inverse = unit
    shared = op.Mul(x_hat, op.mean(op.Mul(d_unit, x_hat), axes))
    return op.Mul(op.Sub(op.Sub(d_unit, op.mean(d_unit, axes)), shared), inverse)


@vjp_rule("BatchNormalization")
def batch_norm(op: Ops, node: ir.Node, dy: Value | None, *_stats: Value | None) -> Gradients:
    """y = (x − m) / √(v + ε) · w + b with stored m and v, or with the batch's in training mode.

    No gradient flows through the running statistics that training mode puts out.
    """
    if dy is None:
        return None
    if attribute(node, "training_mode", 0):
        return _batch_norm_training(op, node, dy)
    x, w, _, mean, variance = node.inputs
    rank = len(shape_of(x))
    rest = [0, *range(2, rank)]
    inverse = op.Reciprocal(op.Sqrt(op.Add(variance, attribute(node, "epsilon", 1e-5))))
    scale = op.Mul(w, inverse)
    weighted = op.sum(op.Mul(dy, op.Sub(x, _per_channel(op, mean, rank))), rest)
    total = op.sum(dy, rest)
    d_variance = op.Mul(op.Mul(weighted, scale), op.Mul(op.Mul(inverse, inverse), -0.5))
    return (
        op.Mul(dy, _per_channel(op, scale, rank)),
        op.Mul(weighted, inverse),
        total,
        op.Neg(op.Mul(total, scale)),
        d_variance,
    )


def _batch_norm_training(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dx = s (dy − x̂ dw/n − db/n), s = w / √(v + ε), n elements per channel.

    The part that depends on x is a BatchNormalization in inference mode, one pass over x.
    """
    x, w = node.inputs[:2]
    rank = len(shape_of(x))
    rest = [0, *range(2, rank)]
    epsilon = attribute(node, "epsilon", 1e-5)
    mean, variance = _batch_statistics(op, node, rest)
    inverse = op.Reciprocal(op.Sqrt(op.Add(variance, epsilon)))
    db = op.sum(dy, rest)
    dw = op.Mul(op.Sub(_product_per_channel(op, dy, x), op.Mul(mean, db)), inverse)
    scale = op.Mul(w, inverse)
    per_element = op.Neg(op.Div(scale, op.Div(op.size(x), op.size(w))))
    weights = (op.Mul(per_element, dw), op.Mul(per_element, db))
    shared = op.BatchNormalization(x, *weights, mean, variance, epsilon=epsilon)
    return op.Add(op.Mul(dy, _per_channel(op, scale, rank)), shared), dw, db


def _product_per_channel(op: Ops, a: Value, x: Value) -> Value:
    """Σ a·x over rows and positions. Over many positions inner products do it, in one pass."""
    shape = shape_of(x)
    fixed = [d for d in shape[2:] if isinstance(d, int)]
    if len(fixed) == len(shape) - 2 and math.prod(fixed) >= _MANY_POSITIONS:
        a, x = (op.Reshape(v, op.ints([0, 0, 1, -1])) for v in (a, x))
        return op.sum(op.MatMul(a, op.Transpose(x, perm=[0, 1, 3, 2])), [0, 2, 3])
    return op.sum(op.Mul(a, x), [0, *range(2, len(shape))])


def _batch_statistics(op: Ops, node: ir.Node, rest: Sequence[int]) -> tuple[Value, Value]:
    """Mean and variance over rows and positions; with momentum 0 the node puts them out."""
    if len(node.outputs) == 3 and attribute(node, "momentum", 0.9) == 0:
        return node.outputs[1], node.outputs[2]
    x = node.inputs[0]
    mean = op.mean(x, rest)
    centered = op.Sub(x, mean)
    variance = op.mean(op.Mul(centered, centered), rest)
    return op.reshape(mean, [-1]), op.reshape(variance, [-1])


def _per_channel(op: Ops, x: Value, rank: int) -> Value:
    """A vector over channels, shaped to broadcast over positions."""
    return op.reshape(x, (-1, *[1] * (rank - 2))) if rank > 2 else x
