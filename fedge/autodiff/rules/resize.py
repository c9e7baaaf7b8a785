"""Resize: along each axis a constant matrix, so the gradient is its transpose.

Where every element is merely repeated (nearest, by a whole factor) that is a sum over windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attribute, constant, shape_of
from fedge.autodiff.registry import Gradients, vjp_rule
from fedge.errors import UnsupportedOperatorError
from fedge.types import Array

# (output index, input size, output size, scale) -> position in the input.
_POSITIONS: dict[str, Callable[[Array, int, int, float], Array]] = {
    "half_pixel": lambda i, _n, _m, s: (i + 0.5) / s - 0.5,
    "half_pixel_symmetric": lambda i, n, m, s: n / 2 * (1 - m / (n * s)) + (i + 0.5) / s - 0.5,
    "pytorch_half_pixel": lambda i, _n, m, s: (i + 0.5) / s - 0.5 if m > 1 else 0 * i,
    "align_corners": lambda i, n, m, _s: i * (n - 1) / max(m - 1, 1),
    "asymmetric": lambda i, _n, _m, s: i / s,
}
_ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda p: np.ceil(p - 0.5),
    "round_prefer_ceil": lambda p: np.floor(p + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


@vjp_rule("Resize")
def resize(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dX = dY times the matrix of each resized axis.

    Raises:
        UnsupportedOperatorError: For antialiasing, cropping, or sizes that are not fixed.
    """
    x = node.inputs[0]
    rank = len(shape_of(x))
    matrices = {axis: _matrix(node, axis, scale) for axis, scale in _scales(node).items()}
    factors = [_factor(matrices[a]) if a in matrices else 1 for a in range(rank)]
    if all(factors) and factors[:2] == [1, 1] and rank > 2:
        means = op.AveragePool(dy, kernel_shape=factors[2:], strides=factors[2:])
        return op.Mul(means, float(math.prod(factors)))
    for axis, matrix in matrices.items():
        dy = _along(op, dy, matrix, (axis, rank))
    return dy


def _along(op: Ops, dy: Value, matrix: Array, place: tuple[int, int]) -> Value:
    """dY [… out …] times ``matrix`` [out, in], at an axis of so many."""
    axis, rank = place
    if axis == rank - 2:
        return op.MatMul(np.ascontiguousarray(matrix.T), dy)
    order = [i for i in range(rank) if i != axis] + [axis]
    moved = op.MatMul(op.transpose(dy, order), matrix)
    return op.transpose(moved, [int(i) for i in np.argsort(order)])


def _factor(matrix: Array) -> int:
    """How often each element is repeated, in its place; 0 if it is more than that."""
    out, size = matrix.shape
    times = out // size
    plain = times * size == out and np.array_equal(matrix, np.repeat(np.eye(size), times, axis=0))
    return times if plain else 0


def _scales(node: ir.Node) -> dict[int, float]:
    """Axis -> output size / input size as the node means it, of the axes it changes."""
    x, y = (shape_of(v) for v in (node.inputs[0], node.outputs[0]))
    axes = [a % len(x) for a in attribute(node, "axes") or range(len(x))]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        given = dict(zip(axes, constant(node, 2).tolist(), strict=True))
        return {a: s for a, s in given.items() if s != 1}
    changed = [a for a in axes if x[a] != y[a]]
    found = {a: _ratio(node, x[a], y[a]) for a in changed}
    policy = attribute(node, "keep_aspect_ratio_policy", "stretch")
    if policy != "stretch":
        raise _refusal(node, f"keep_aspect_ratio_policy {policy}")
    return found


def _ratio(node: ir.Node, size: int | str, out: int | str) -> float:
    if not isinstance(size, int) or not isinstance(out, int):
        raise _refusal(node, f"sizes {size} and {out} that are not fixed")
    return out / size


def _matrix(node: ir.Node, axis: int, scale: float) -> Array:
    """[out, in]: the weight of each input element in each output element."""
    size, out = (shape_of(v)[axis] for v in (node.inputs[0], node.outputs[0]))
    _ratio(node, size, out)
    size, out = int(size), int(out)
    where = attribute(node, "coordinate_transformation_mode", "half_pixel")
    if where not in _POSITIONS or attribute(node, "antialias", 0):
        raise _refusal(node, "antialiasing" if where in _POSITIONS else where)
    positions = _POSITIONS[where](np.arange(out, dtype=np.float64), size, out, scale)
    mode = attribute(node, "mode", "nearest")
    if mode == "nearest":
        rounding = _ROUNDINGS[attribute(node, "nearest_mode", "round_prefer_floor")]
        taps, weights = rounding(positions)[:, None], np.ones((out, 1))
    elif mode == "linear":
        taps = np.floor(positions)[:, None] + np.arange(2)
        weights = 1 - np.abs(positions[:, None] - taps)
    else:
        taps, weights = _cubic(node, positions, size)
    matrix = np.zeros((out, size))
    inside = np.clip(taps, 0, size - 1).astype(int)
    np.add.at(matrix, (np.arange(out)[:, None], inside), weights)
    return matrix.astype(np.float32)


def _cubic(node: ir.Node, positions: Array, size: int) -> tuple[Array, Array]:
    """Keys 1981: four taps, with the coefficient ``cubic_coeff_a``."""
    a = attribute(node, "cubic_coeff_a", -0.75)
    taps = np.floor(positions)[:, None] + np.arange(-1, 3)
    d = np.abs(positions[:, None] - taps)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    weights = np.where(d <= 1, near, far)
    if attribute(node, "exclude_outside", 0):
        weights = np.where((taps < 0) | (taps >= size), 0, weights)
        weights /= weights.sum(1, keepdims=True)
    return taps, weights


def _refusal(node: ir.Node, what: str) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(
        f"fedge does not differentiate the Resize {node.name or node.outputs[0].name!r}: it has "
        f"{what}"
    )
