"""Gemm, MatMul and Det."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attribute, shape_of, static_dims
from fedge.autodiff.registry import Gradients, vjp_rule


@vjp_rule("Gemm")
def gemm(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """Y = α A′B′ + β C, where ′ is an optional transposition."""
    a, b, *rest = node.inputs
    ta, tb = attribute(node, "transA", 0), attribute(node, "transB", 0)
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    if ta:
        da = op.Gemm(b, dy, alpha=alpha, transA=tb, transB=1)
    else:
        da = op.Gemm(dy, b, alpha=alpha, transB=1 - tb)
    if tb:
        db = op.Gemm(dy, a, alpha=alpha, transA=1, transB=ta)
    else:
        db = op.Gemm(a, dy, alpha=alpha, transA=1 - ta)
    if not rest or rest[0] is None:
        return da, db
    dc = op.unbroadcast(dy, node.outputs[0], rest[0])
    return da, db, dc if beta == 1.0 else op.Mul(dc, beta)


@vjp_rule("MatMul")
def matmul(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """Y = AB over the last two axes, the others broadcast; vectors as in ``numpy.matmul``."""
    a, b = node.inputs
    shape_a, shape_b = shape_of(a), shape_of(b)
    if len(shape_a) == len(shape_b) == 2:
        return op.Gemm(dy, b, transB=1), op.Gemm(a, dy, transA=1)
    if len(shape_a) > 2 and len(shape_b) == 2:
        rows_a, rows_dy = (op.reshape(v, (-1, d)) for v, d in ((a, shape_a[-1]), (dy, shape_b[1])))
        return op.MatMul(dy, op.transpose(b, (1, 0))), op.Gemm(rows_a, rows_dy, transA=1)
    if len(shape_a) == 1 or len(shape_b) == 1:
        return _with_vector(op, node, dy)
    da = op.MatMul(dy, _swap(op, b, len(shape_b)))
    db = op.MatMul(_swap(op, a, len(shape_a)), dy)
    stack = shape_of(node.outputs[0])[:-2]
    return (
        op.sum_to(da, (*stack, *shape_a[-2:]), shape_a),
        op.sum_to(db, (*stack, *shape_b[-2:]), shape_b),
    )


def _with_vector(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """One side (or both) is a vector: the gradients are outer products and sums."""
    a, b = node.inputs
    shape_a, shape_b = shape_of(a), shape_of(b)
    if len(shape_a) == len(shape_b) == 1:
        return op.Mul(dy, b), op.Mul(dy, a)
    if len(shape_b) == 1:  # [..., m, k] x [k] -> [..., m]
        column = op.Unsqueeze(dy, op.ints([-1]))
        db = op.sum(op.Mul(column, a), range(len(shape_a) - 1))
        return op.Mul(column, b), db
    row = op.Unsqueeze(dy, op.ints([-2]))  # [k] x [..., k, n] -> [..., n]
    da = op.sum(op.Mul(row, b), [i for i in range(len(shape_b)) if i != len(shape_b) - 2])
    return da, op.Mul(op.Unsqueeze(a, op.ints([-1])), row)


@vjp_rule("Det")
def det(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy times the cofactors, i.e. determinants without a row and a column, with signs."""
    x = node.inputs[0]
    rank, size = len(shape_of(x)), static_dims(x, slice(-1, None))[0]
    whole = op.Unsqueeze(dy, op.ints([-2, -1]))
    if size == 1:
        return whole
    others = np.array([[j for j in range(size) if j != i] for i in range(size)], np.int64)
    rows = op.Gather(x, others, axis=rank - 2)  # [..., n, n − 1, n]
    minors = op.Gather(rows, others, axis=rank)  # [..., n, n − 1, n, n − 1]
    lead = list(range(rank - 2))
    minors = op.transpose(minors, [*lead, rank - 2, rank, rank - 1, rank + 1])
    signs = (-1.0) ** np.add.outer(np.arange(size), np.arange(size))
    return op.Mul(whole, op.Mul(op.Det(minors), signs.astype(np.float32)))


def _swap(op: Ops, x: Value, rank: int) -> Value:
    return op.transpose(x, [*range(rank - 2), rank - 1, rank - 2])
