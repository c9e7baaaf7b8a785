"""Gathering and scattering by indices that are data."""

from __future__ import annotations

from typing import TypeAlias

import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attribute, attributes
from fedge.autodiff.registry import Gradients, vjp_rule
from fedge.autodiff.rules.positions import add_at, picked_from
from fedge.errors import UnsupportedOperatorError

Pair: TypeAlias = tuple[str, str, dict[str, int]]  # scatter, its gather, the axis they share


@vjp_rule("GatherElements")
def gather_elements(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy added up per index along the axis."""
    x, indices = node.inputs
    return _add_along(op, x, (indices, dy), attribute(node, "axis", 0))


@vjp_rule("TopK")
def top_k(op: Ops, node: ir.Node, dy: Value | None, _indices: Value | None = None) -> Gradients:
    """dy at the places the values came from."""
    indices = node.outputs[1]
    indices.name = indices.name or f"{node.outputs[0].name}@indices"
    if dy is None:
        return None
    return _add_along(op, node.inputs[0], (indices, dy), attribute(node, "axis", -1))


@vjp_rule("GatherND")
def gather_nd(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy added up per index."""
    if attribute(node, "batch_dims", 0):
        return picked_from(op, node, dy)
    x, indices = node.inputs
    return op.ScatterND(op.Expand(0.0, op.Shape(x)), indices, dy, reduction="add")


@vjp_rule("Compress")
def compress(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy where the condition held, 0 elsewhere."""
    return picked_from(op, node, dy)


@vjp_rule("MaxUnpool")
def max_unpool(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy from the places that the indices, flat in the output, name.

    Raises:
        UnsupportedOperatorError: With an output shape of its own: what indices then mean, ONNX and
            ONNX Runtime do not agree on.
    """
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        raise UnsupportedOperatorError(
            f"node {node.name or node.outputs[0].name!r} is a MaxUnpool with output_shape, which "
            "fedge does not differentiate; leave it out, or pad the output"
        )
    return op.Gather(op.reshape(dy, [-1]), node.inputs[1], axis=0)


@vjp_rule("ScatterElements")
def scatter_elements(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """Data keeps dy where nothing was written; updates get it from where they were."""
    axis = {"axis": attribute(node, "axis", 0)}
    return _scattered(op, node, dy, ("ScatterElements", "GatherElements", axis))


@vjp_rule("ScatterND")
def scatter_nd(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """As ScatterElements, for slices."""
    return _scattered(op, node, dy, ("ScatterND", "GatherND", {}))


@vjp_rule("TensorScatter")
def tensor_scatter(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """The cache keeps dy where nothing was written; the update gets it from where it is."""
    cache, update, *start = node.inputs
    settings = attributes(node)
    # Who wrote: flat positions in the update, its size where nobody did; as float32, all there is.
    numbers = op.Reshape(op.Range(op.scalar(0), op.Size(update), op.scalar(1)), op.Shape(update))
    nobody = op.Expand(op.Unsqueeze(op.Size(update), op.ints([0])), op.Shape(cache))
    writer = op.TensorScatter(nobody, numbers, *start, **settings)
    d_cache = op.TensorScatter(dy, op.Mul(update, 0.0), *start, **settings)
    written = op.Less(writer, op.Size(update))
    places = op.Where(written, writer, op.scalar(0))
    return d_cache, add_at(op, update, places, op.Where(written, dy, 0.0))


def _add_along(op: Ops, x: Value, what: tuple[Value, Value], axis: int) -> Value:
    zeros = op.Expand(0.0, op.Shape(x))
    return op.ScatterElements(zeros, *what, axis=axis, reduction="add")


def _scattered(op: Ops, node: ir.Node, dy: Value, pair: Pair) -> Gradients:
    scatter, gather, axis = pair
    indices, updates = node.inputs[1:]
    reduction = attribute(node, "reduction", "none")
    if reduction == "add":
        return dy, None, op.call(gather, dy, indices, **axis)
    if reduction == "mul":
        return _multiplied(op, node, dy, pair)
    if reduction in ("max", "min"):
        return _extreme(op, node, dy, pair)
    kept = op.call(scatter, dy, indices, op.Mul(updates, 0.0), **axis)
    return kept, None, op.call(gather, dy, indices, **axis)


def _multiplied(op: Ops, node: ir.Node, dy: Value, pair: Pair) -> Gradients:
    """dy times the product of all other factors, right where factors are 0."""
    scatter, gather, axis = pair
    data, indices, updates = node.inputs
    (data_zero, data_one), (zero, one) = (_without_zeros(op, v) for v in (data, updates))
    product = op.call(scatter, data_one, indices, one, reduction="mul", **axis)
    zeros = op.call(scatter, data_zero, indices, zero, reduction="add", **axis)
    whole = op.Mul(dy, product)
    d_data = op.Where(op.Equal(op.Sub(zeros, data_zero), 0.0), op.Div(whole, data_one), 0.0)
    there, others = (op.call(gather, v, indices, **axis) for v in (whole, zeros))
    return d_data, None, op.Where(op.Equal(op.Sub(others, zero), 0.0), op.Div(there, one), 0.0)


def _without_zeros(op: Ops, x: Value) -> tuple[Value, Value]:
    """1 where x is 0, else 0; and x with 1 for every 0."""
    zero = op.Cast(op.Equal(x, 0.0), to=int(ir.DataType.FLOAT))
    return zero, op.Add(x, zero)


def _extreme(op: Ops, node: ir.Node, dy: Value, pair: Pair) -> Gradients:
    """dy is shared by all that reach the extreme."""
    scatter, gather, axis = pair
    data, indices, updates = node.inputs
    y = node.outputs[0]
    hit_data = op.Cast(op.Equal(data, y), to=int(ir.DataType.FLOAT))
    best = op.call(gather, y, indices, **axis)
    hit = op.Cast(op.Equal(updates, best), to=int(ir.DataType.FLOAT))
    count = op.call(scatter, hit_data, indices, hit, reduction="add", **axis)
    share = op.Div(dy, count)
    return op.Mul(hit_data, share), None, op.Mul(hit, op.call(gather, share, indices, **axis))
