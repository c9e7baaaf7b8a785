"""What the recurrent operators share: one direction of one of them, and arrays over its steps.

Shapes: T steps, N rows, H units, G gates. Arrays over all steps are [TN, ·], step after step in
the order the direction visits them; split into T pieces they are [N, ·].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from fedge.autodiff.ops import Dim, Ops, Value, attribute


@dataclass(frozen=True)
class Direction:
    """One direction of the operator, as it ran.

    Attributes:
        node: The operator.
        steps: T.
        rows: N.
        units: H.
        x: [TN, features].
        w: [GH, features].
        r: [GH, H].
        bias: [GH] of ``w`` and [GH] of ``r``, or None.
        y: [TN, H], the state after each step.
        before: [TN, H], the state before it.
        c0: [N, H], the first cell, or None for zeros.
    """

    node: ir.Node
    steps: int
    rows: Dim
    units: int
    x: Value
    w: Value
    r: Value
    bias: tuple[Value, ...] | None
    y: Value
    before: Value
    c0: Value | None


@dataclass(frozen=True)
class Cotangents:
    """Of one direction's outputs: per step (None where there is none), last state, last cell."""

    steps: Sequence[Value | None]
    h: Value | None
    c: Value | None


@dataclass(frozen=True)
class Found:
    """What one direction's recurrence yields: gradients by the gates before activation.

    Attributes:
        by_w: [TN, GH], by what W and its bias added to the gates.
        by_r: [TN, GH], by what R and its bias did.
        h0: [N, H].
        c0: [N, H], LSTM only.
        dr: [GH, H], where it is not by_rᵀ · before.
    """

    by_w: Value
    by_r: Value
    h0: Value
    c0: Value | None = None
    dr: Value | None = None


def activations(node: ir.Node, default: list[str]) -> list[str]:
    """The names of the activation functions."""
    return list(attribute(node, "activations") or default)


def products(op: Ops, d: Direction) -> tuple[Value, Value]:
    """What W and R, with their biases, add to the gates."""
    b_w, b_r = ([b] for b in d.bias) if d.bias is not None else ([], [])
    return op.Gemm(d.x, d.w, *b_w, transB=1), op.Gemm(d.before, d.r, *b_r, transB=1)


def preactivation(op: Ops, d: Direction) -> Value:
    """The gates before activation, [TN, GH]."""
    bias = [op.Add(*d.bias)] if d.bias is not None else []
    both = op.Concat(d.w, d.r, axis=1)
    return op.Gemm(seen(op, d), both, *bias, transB=1)


def seen(op: Ops, d: Direction) -> Value:
    """What W and R multiply, [TN, features + H]: one product instead of two."""
    return op.Concat(d.x, d.before, axis=1)


def back(op: Ops, by_gates: Value, r: Value, dy: Value | None = None) -> Value:
    """The gradient by the state before a step, plus that step's own cotangent."""
    return op.Gemm(by_gates, r) if dy is None else op.Gemm(by_gates, r, dy)


def steps_of(op: Ops, d: Direction, v: Value, blocks: int = 1) -> tuple[Value, ...]:
    """[TN, blocks · H] -> T times [N, blocks · H]."""
    return op.pieces(v, d.steps, shape=(d.rows, blocks * d.units))


def plus(op: Ops, a: Value | None, b: Value | None) -> Value:
    """The sum of those that there are."""
    found = [v for v in (a, b) if v is not None]
    return found[0] if len(found) == 1 else op.Add(*found)


def delayed(op: Ops, states: Value, first: Value | None) -> Value:
    """States before each step: [T, N, H] moved by one step, ``first`` (or zeros) in front."""
    if first is None:
        return op.Pad(states, op.ints([1, 0, 0, -1, 0, 0]))
    moved = op.Slice(states, op.ints([0]), op.ints([-1]), op.ints([0]))
    return op.Concat(op.Unsqueeze(first, op.ints([0])), moved, axis=0)
