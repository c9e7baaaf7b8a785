"""p-norms and what is divided by them."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attribute, static_dims
from fedge.autodiff.registry import Gradients, vjp_rule
from fedge.autodiff.rules.pooling import spread
from fedge.autodiff.rules.windows import windows_of
from fedge.types import Array


@vjp_rule("GlobalLpPool")
def global_lp_pool(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = (Σ |x|ᵖ)^(1/p) over the positions."""
    return _by_norm(op, node, _per_norm(op, node, dy))


@vjp_rule("LpPool")
def lp_pool(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = (Σ |x|ᵖ)^(1/p) over each window."""
    windows = windows_of(node, attribute(node, "kernel_shape"))
    return _by_norm(op, node, spread(op, node.inputs[0], _per_norm(op, node, dy), windows))


@vjp_rule("LpNormalization")
def lp_normalization(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = x / n along an axis; dx = (dy − ∂n/∂x Σ dy y) / n, and 0 where n is."""
    x, y = node.inputs[0], node.outputs[0]
    axis = [attribute(node, "axis", -1)]
    if attribute(node, "p", 2) == 1:
        slope, norm = op.Sign(x), op.sum(op.Abs(x), axis, keepdims=True)
    else:
        slope, norm = y, op.Sqrt(op.sum(op.Mul(x, x), axis, keepdims=True))
    shared = op.Mul(slope, op.sum(op.Mul(dy, y), axis, keepdims=True))
    return op.Div(
        op.Sub(dy, shared), op.Where(op.Greater(norm, 0.0), norm, np.array(np.inf, np.float32))
    )


@vjp_rule("LRN")
def lrn(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """y = x d^−β, d = bias + α/size Σ x² over ``size`` channels around; Σ as a band matrix."""
    x, y = node.inputs[0], node.outputs[0]
    size, beta = attribute(node, "size"), attribute(node, "beta", 0.75)
    alpha = attribute(node, "alpha", 1e-4) / size
    band = _band(static_dims(x, slice(1, 2))[0], size)
    nearby = op.Mul(_over_channels(op, op.Mul(x, x), band), alpha)
    base = op.Add(nearby, attribute(node, "bias", 1.0))
    back = _over_channels(op, op.Div(op.Mul(dy, y), base), np.ascontiguousarray(band.T))
    direct = op.Mul(dy, op.Pow(base, -beta))
    return op.Sub(direct, op.Mul(op.Mul(x, back), 2 * alpha * beta))


def _band(channels: int, size: int) -> Array:
    """1 where the channel of the column lies in the window around the row's."""
    offset = np.arange(channels)[None, :] - np.arange(channels)[:, None]
    return ((-((size - 1) // 2) <= offset) & (offset <= size // 2)).astype(np.float32)


def _over_channels(op: Ops, x: Value, matrix: Array) -> Value:
    flat = op.Reshape(x, op.ints([0, len(matrix), -1]))
    return op.Reshape(op.MatMul(matrix, flat), op.Shape(x))


def _per_norm(op: Ops, node: ir.Node, dy: Value) -> Value:
    """dy / nᵖ⁻¹ of a norm n, 0 where n is 0."""
    p, norm = attribute(node, "p", 2), node.outputs[0]
    if p == 1:
        return dy
    safe = _or_infinity(op, norm)
    return op.Div(dy, safe if p == 2 else op.Pow(safe, float(p - 1)))


def _or_infinity(op: Ops, norm: Value) -> Value:
    """Infinity for 0, so that what is divided by it becomes 0."""
    return op.Where(op.Greater(norm, 0.0), norm, math.inf)


def _by_norm(op: Ops, node: ir.Node, dy: Value) -> Value:
    """sign(x) |x|ᵖ⁻¹ dy."""
    p, x = attribute(node, "p", 2), node.inputs[0]
    if p == 2:
        return op.Mul(x, dy)
    sign = op.Mul(op.Sign(x), dy)
    return sign if p == 1 else op.Mul(sign, op.Pow(op.Abs(x), float(p - 1)))
