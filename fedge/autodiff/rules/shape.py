"""Operators that move elements without changing them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attribute, shape_of
from fedge.autodiff.registry import Gradients, vjp_rule


@vjp_rule("Flatten", "Reshape", "Squeeze", "Unsqueeze")
def reshape(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """Same elements in the same order: reshape back."""
    return op.reshape_like(dy, node.inputs[0])


@vjp_rule("Transpose")
def transpose(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """The inverse permutation (by default, the reversal)."""
    perm = attribute(node, "perm") or range(len(shape_of(node.inputs[0])))[::-1]
    return op.transpose(dy, [int(i) for i in np.argsort(perm)])


@vjp_rule("Concat")
def concat(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """The piece of dy each input filled."""
    axis = attribute(node, "axis") % len(shape_of(node.outputs[0]))
    sizes = [op.Gather(op.Shape(x), op.ints([axis])) for x in node.inputs]
    if all(isinstance(shape_of(x)[axis], int) for x in node.inputs):
        lengths = op.ints([int(shape_of(x)[axis]) for x in node.inputs])
    else:
        lengths = op.Concat(*sizes, axis=0)
    if len(node.inputs) == 1:
        return dy
    return tuple(op.Split(dy, lengths, axis=axis, outputs=len(node.inputs)))


@vjp_rule("Split")
def split(op: Ops, node: ir.Node, *dys: Value | None) -> Gradients:
    """The pieces joined; zeros for a piece nobody used."""
    parts = [op.Mul(y, 0.0) if d is None else d for d, y in zip(dys, node.outputs, strict=True)]
    return op.Concat(*parts, axis=attribute(node, "axis", 0))


@vjp_rule("Expand")
def expand(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """Sum over what was repeated."""
    return op.unbroadcast(dy, node.outputs[0], node.inputs[0])
