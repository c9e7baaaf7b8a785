"""Reverse mode over an ONNX graph: the pass itself, knowing no operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, shape_of, static_shape
from fedge.autodiff.recompute import Again, Recompute, depending, segments
from fedge.autodiff.registry import CONSTANT, apply_rule


def backward(
    op: Ops,
    nodes: Sequence[ir.Node],
    seeds: Mapping[Value, Value],
    wrt: Sequence[Value],
    recompute: Recompute | None = None,
) -> list[Value]:
    """Append the vector-Jacobian product of ``nodes`` to the graph.

    Args:
        op: Where to write; holds ``nodes`` already.
        nodes: The forward computation in topological order.
        seeds: Forward value -> its cotangent, of the same shape.
        wrt: Forward values (inputs, initializers or intermediate ones) to differentiate by.
        recompute: Make activations again rather than keep them all.

    Returns:
        One gradient per value of ``wrt``, in order; zeros where none flows.

    Raises:
        UnsupportedOperatorError: If a node on the way has no rule.
    """
    active = _reached(nodes, wrt)
    grads: dict[Value, Value] = dict(seeds)
    for part, again in _parts(op, nodes, seeds, recompute):
        copies = again(part, grads)
        for node in reversed(part):
            outputs = [grads.get(v) for v in node.outputs]
            if any(g is not None for g in outputs) and active.intersection(_reads(node)):
                found = apply_rule(op, copies.get(node, node), outputs)
                for value, grad in zip(node.inputs, found, strict=False):
                    if grad is not None and value in active:
                        grads[value] = op.Add(grads[value], grad) if value in grads else grad
    return [grads[v] if v in grads else _zeros(op, v) for v in wrt]


def _parts(
    op: Ops,
    nodes: Sequence[ir.Node],
    seeds: Mapping[Value, Value],
    recompute: Recompute | None,
) -> Iterator[tuple[Sequence[ir.Node], Callable[..., dict[ir.Node, ir.Node]]]]:
    """The nodes from the last part to the first, and what writes a part's nodes again."""
    parts = [nodes] if recompute is None else segments(nodes, seeds, recompute)
    yield parts[-1], lambda *_: {}  # its activations have just been made
    if recompute is not None:
        again = Again(op, depending(nodes, recompute.data))
        yield from ((part, again) for part in reversed(parts[:-1]))


def _reached(nodes: Sequence[ir.Node], sources: Sequence[Value]) -> set[Value]:
    """The values that depend on ``sources``."""
    reached = set(sources)
    for node in nodes:
        if node.op_type not in CONSTANT and reached.intersection(_reads(node)):
            reached.update(node.outputs)
    return reached


def _reads(node: ir.Node) -> Iterator[Value | None]:
    """The node's inputs, and what the graphs it carries take from outside."""
    yield from node.inputs
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in ir.traversal.RecursiveGraphIterator(attribute.value):
                yield from inner.inputs


def _zeros(op: Ops, like: Value) -> Value:
    if all(isinstance(d, int) for d in shape_of(like)):
        return op.const(np.zeros(static_shape(like), np.float32))
    return op.Mul(like, 0.0)
