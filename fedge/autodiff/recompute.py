"""Recomputation: the backward pass makes activations again instead of keeping them.

The forward pass is cut into segments; only what crosses a cut is kept, and before a segment's
gradient its nodes are written once more, from there (T. Chen et al., "Training deep nets with
sublinear memory cost", 2016, arXiv 1604.06174). The last segment's are still at hand.

ONNX Runtime would merge equal nodes with equal inputs and so undo this. So the second copy reads
what crosses the cut through a Reshape to its own shape, written as zeros ("as it is") to which
0·(a size of the gradient that flows into the segment) is added: nothing is copied or computed on
the data, but no optimizer can tell the copies equal, nor run them before that gradient is there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attributes

Segment = Sequence[ir.Node]
_GUESS = 8  # rows, and any other size that may vary, when sizes are compared
_STEPS = 24  # segment sizes tried


@dataclass(frozen=True)
class Recompute:
    """The wish for it.

    Attributes:
        data: Inputs that differ from batch to batch.
        count: Number of segments; None takes what needs the least memory.
    """

    data: tuple[Value, ...]
    count: int | None = None


def segments(nodes: Segment, ends: Iterable[Value], how: Recompute) -> list[Segment]:
    """Cut the forward pass where little crosses.

    Args:
        nodes: In topological order.
        ends: Where gradients start; what they do not depend on is of no interest.
        how: What depends on params alone is not counted.

    Returns:
        All nodes, in order, in one or more segments.
    """
    sizes = _sizes(nodes, depending(nodes, how.data) & _ancestors(nodes, ends))
    tried = [_greedy(nodes, sizes, limit) for limit in _limits(sum(sizes.values()))]
    wanted = how.count

    def worth(cuts: Sequence[int]) -> tuple[float, ...]:
        return (abs(len(cuts) + 1 - wanted) if wanted else 0, _held(nodes, sizes, cuts), len(cuts))

    cuts = min(tried, key=worth)
    edges = [0, *cuts, len(nodes)]
    return [nodes[a:b] for a, b in itertools.pairwise(edges)]


def depending(nodes: Segment, sources: Iterable[Value]) -> set[Value]:
    """The values that depend on ``sources``, these included."""
    found = set(sources)
    for node in nodes:
        if found.intersection(node.inputs):
            found.update(node.outputs)
    return found


@dataclass(frozen=True)
class Again:
    """Writes segments a second time.

    Attributes:
        op: Where to.
        moving: Values that differ from batch to batch; others are used as they are.
    """

    op: Ops
    moving: set[Value]

    def __call__(self, segment: Segment, grads: Mapping[Value, Value]) -> dict[ir.Node, ir.Node]:
        """Each node that depends on the data -> its copy, which runs when ``grads`` are known."""
        ready = [grads[v] for n in segment for v in n.outputs if v in grads and v.shape]
        latest = self._latest(ready)
        if latest is None or any(map(_carries_graph, segment)):
            return {}
        zero = self.op.Mul(self.op.Shape(latest, start=0, end=1), self.op.ints([0]))
        copies: dict[Value, Value] = {}
        again: dict[ir.Node, ir.Node] = {}
        for node in segment:
            if self.moving.intersection(node.inputs):
                inputs = [self._copy(v, copies, zero) for v in node.inputs]
                again[node] = self._write(node, inputs)
                copies.update(zip(node.outputs, again[node].outputs, strict=True))
        return again

    def _copy(self, value: Value | None, copies: dict[Value, Value], zero: Value) -> Value | None:
        if value is None or value not in self.moving:
            return value
        if value not in copies:
            copies[value] = self._held(value, zero)
        return copies[value]

    def _held(self, value: Value, zero: Value) -> Value:
        """A value from before the cut, as the second copy may read it."""
        if not value.shape:
            return value
        target = self.op.Add(self.op.ints([0] * len(value.shape)), zero)
        held: Value = self.op.Reshape(value, target)
        held.shape, held.type = value.shape, value.type
        return held

    def _write(self, node: ir.Node, inputs: Sequence[Value | None]) -> ir.Node:
        made = self.op.call(node.op_type, *inputs, outputs=len(node.outputs), **attributes(node))
        written = made if isinstance(made, tuple) else (made,)
        for value, like in zip(written, node.outputs, strict=True):
            value.shape, value.type = like.shape, like.type
        copy: ir.Node = written[0].producer()
        copy.domain = node.domain
        return copy

    def _latest(self, values: Sequence[Value]) -> Value | None:
        """The one that is written last."""
        order = {node: i for i, node in enumerate(self.op.graph)}
        made = [v for v in values if v.producer() in order]
        return max(made, key=lambda v: order[v.producer()], default=None)


def _carries_graph(node: ir.Node) -> bool:
    return any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values())


def _ancestors(nodes: Segment, ends: Iterable[Value]) -> set[Value]:
    found = set(ends)
    for node in reversed(nodes):
        if found.intersection(node.outputs):
            found.update(v for v in node.inputs if v is not None)
    return found


def _sizes(nodes: Segment, counted: set[Value]) -> dict[Value, int]:
    """Elements of every value that a node makes and that counts."""
    return {v: _elements(v) for n in nodes for v in n.outputs if v in counted}


def _elements(value: Value) -> int:
    if value.shape is None:
        return 0
    return math.prod(d if isinstance(d, int) else _GUESS for d in value.shape)


def _limits(total: int) -> list[float]:
    """Sizes of a segment to try: the whole, and fractions of it down to little."""
    return [total * 0.8**i + 1 for i in range(_STEPS)]


def _greedy(nodes: Segment, sizes: Mapping[Value, int], limit: float) -> list[int]:
    """Cut each time ``limit`` elements have come together, a little earlier if less crosses there.

    Returns:
        Positions; a cut lies before the node there.
    """
    crossing = [sum(sizes[v] for v in c) for c in _crossing(nodes, sizes)]
    cuts: list[int] = []
    start, held = 0, 0.0
    sums = [0.0]
    for node in nodes:
        sums.append(sums[-1] + sum(sizes.get(v, 0) for v in node.outputs))
    for position in range(1, len(nodes)):
        held = sums[position] - sums[start]
        if held >= limit:
            half = [p for p in range(start + 1, position + 1) if sums[p] - sums[start] > limit / 2]
            start = min(half, key=lambda p: (crossing[p], -p))
            cuts.append(start)
    return cuts


def _held(nodes: Segment, sizes: Mapping[Value, int], cuts: Sequence[int]) -> float:
    """About the elements alive at worst: what crosses cuts, one segment and its gradients."""
    across = _crossing(nodes, sizes)
    kept = set().union(*(across[c] for c in cuts))
    edges = [0, *cuts, len(nodes)]
    inner = [
        sum(sizes.get(v, 0) for n in nodes[a:b] for v in n.outputs if v not in kept)
        for a, b in itertools.pairwise(edges)
    ]
    return sum(sizes[v] for v in kept) + 2 * max(inner)


def _crossing(nodes: Segment, sizes: Mapping[Value, int]) -> list[set[Value]]:
    """Position -> the values made before it and read from there on."""
    last = {v: i for i, n in enumerate(nodes) for v in n.inputs if v in sizes}
    found: list[set[Value]] = [set()]
    for i, node in enumerate(nodes):
        alive = {v for v in found[-1] if last.get(v, -1) > i}
        alive.update(v for v in node.outputs if last.get(v, -1) > i)
        found.append(alive)
    return found[:-1]
