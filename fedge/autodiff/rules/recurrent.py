"""LSTM, GRU and RNN: forwards, backwards and both; initial states; all outputs.

Forward stays one kernel, which keeps neither gates nor cells. Backward computes the gates again,
in one matrix product over all steps, then goes through the steps in reverse, unrolled, with six
small nodes each. Everything that is no recurrence is done for all steps at once.

Shapes: T steps, N rows, H units, G gates. Arrays over all steps are [TN, ·], step after step in
the order the direction visits them; split into T pieces they are [N, ·].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from fedge.autodiff.ops import Dim, Ops, Value, attribute, shape_of
from fedge.autodiff.registry import Gradients, vjp_rule
from fedge.errors import UnsupportedOperatorError

_ACTIVATIONS = {
    "LSTM": [["Sigmoid", "Tanh", "Tanh"]],
    "GRU": [["Sigmoid", "Tanh"]],
    "RNN": [["Tanh"], ["Relu"]],
}


@dataclass(frozen=True)
class _Direction:
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
class _Cotangents:
    """Of one direction's outputs: per step (None where there is none), last state, last cell."""

    steps: Sequence[Value | None]
    h: Value | None
    c: Value | None


@dataclass(frozen=True)
class _Found:
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


@vjp_rule("LSTM", "GRU", "RNN")
def recurrent(op: Ops, node: ir.Node, *dys: Value | None) -> Gradients:
    """Through all steps of all directions.

    Raises:
        UnsupportedOperatorError: For peepholes, sequence_lens, clip, batchwise layout, other
            activations, or a number of steps that is not fixed.
    """
    steps = _check(node)
    cell = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}[node.op_type]
    kind, found = attribute(node, "direction", "forward"), []
    for index in range(2 if kind == "bidirectional" else 1):
        backwards = kind == "reverse" or index == 1
        direction = _direction(op, node, steps, (index, backwards))
        cotangents = _cotangents(op, direction, [*dys, None, None][:3], (index, backwards))
        gradients = cell(op, direction, cotangents)
        found.append(_by_inputs(op, direction, gradients, backwards))
    dx = found[0][0] if len(found) == 1 else op.Add(found[0][0], found[1][0])
    rest = [_stack(op, [f[i] for f in found]) for i in range(1, 6)]
    return dx, *rest[:3], None, *rest[3:]


def _check(node: ir.Node) -> int:
    """The number of steps.

    Raises:
        UnsupportedOperatorError: If the operator is of a form that is not differentiated.
    """
    directions = 2 if attribute(node, "direction", "forward") == "bidirectional" else 1
    forms = [form * directions for form in _ACTIVATIONS[node.op_type]]
    steps = shape_of(node.inputs[0])[0]
    reasons = {
        "sequence_lens": _given(node, 4) is not None,
        "peepholes": node.op_type == "LSTM" and _given(node, 7) is not None,
        "clip": "clip" in node.attributes,
        "layout 1": attribute(node, "layout", 0) == 1,
        "input_forget": attribute(node, "input_forget", 0) == 1,
        f"{steps} steps; export it with a fixed length": not isinstance(steps, int),
        "other activations than usual": _activations(node, forms[0]) not in forms,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedOperatorError(
                f"fedge does not differentiate the {node.op_type} "
                f"{node.name or node.outputs[0].name!r}: it has {reason}"
            )
    return int(steps)


def _activations(node: ir.Node, default: list[str]) -> list[str]:
    return list(attribute(node, "activations") or default)


def _given(node: ir.Node, index: int) -> Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _direction(op: Ops, node: ir.Node, steps: int, which: tuple[int, bool]) -> _Direction:
    index, backwards = which
    x, w, r, b, h0, c0 = (_given(node, i) for i in (0, 1, 2, 3, 5, 6))
    features, units = (int(shape_of(v)[-1]) for v in (w, r))
    if node.outputs[0].name in (None, ""):
        node.outputs[0].name = f"{node.outputs[-1].name}@all"
    y = _pick(op, node.outputs[0], index, 1)
    if backwards:
        x, y = _flip(op, x), _flip(op, y)
    before = _delayed(op, y, _pick(op, h0, index))
    return _Direction(
        node=node,
        steps=steps,
        rows=shape_of(node.inputs[0])[1],
        units=units,
        x=op.reshape(x, (-1, features)),
        w=_pick(op, w, index),
        r=_pick(op, r, index),
        bias=None if b is None else op.pieces(_pick(op, b, index), 2),
        y=op.reshape(y, (-1, units)),
        before=op.reshape(before, (-1, units)),
        c0=_pick(op, c0, index),
    )


def _cotangents(
    op: Ops, d: _Direction, dys: Sequence[Value | None], which: tuple[int, bool]
) -> _Cotangents:
    index, backwards = which
    dy, dh, dc = (_pick(op, v, index, axis) for v, axis in zip(dys, (1, 0, 0), strict=True))
    if dy is not None:
        rows = op.reshape(_flip(op, dy) if backwards else dy, (-1, d.units))
        return _Cotangents(_steps(op, d, rows), dh, dc)
    return _Cotangents([None] * d.steps, op.Mul(dc, 0.0) if dh is None else dh, dc)


def _by_inputs(op: Ops, d: _Direction, found: _Found, backwards: bool) -> list[Value | None]:
    """By X, and for this direction by W, R, B, initial_h and initial_c."""
    dx = op.MatMul(found.by_w, d.w)
    dx = op.reshape(dx, (d.steps, -1, int(shape_of(d.node.inputs[0])[2])))
    dr = found.dr or op.Gemm(found.by_r, d.before, transA=1)
    db = None
    if d.bias is not None:
        bw = op.sum(found.by_w, [0])
        same = found.by_w is found.by_r
        db = op.Concat(bw, bw if same else op.sum(found.by_r, [0]), axis=0)
    dw = op.Gemm(found.by_w, d.x, transA=1)
    return [_flip(op, dx) if backwards else dx, dw, dr, db, found.h0, found.c0]


def _lstm(op: Ops, d: _Direction, dy: _Cotangents) -> _Found:
    """c = f c₋ + i g, h = o tanh c; gates in the order i, o, f, g.

    dc = dh · o(1 − tanh² c) + f₊ dc₊; by the gates before activation: dc · g i(1 − i),
    dh · tanh c · o(1 − o), dc · c₋ f(1 − f), dc · i(1 − g²).
    """
    sizes = op.ints([3 * d.units, d.units])
    sigmoids, g = op.Split(_preactivation(op, d), sizes, axis=1, outputs=2)
    i, o, f = op.pieces(op.Sigmoid(sigmoids), 3, axis=1)
    g = op.Tanh(g)
    new = op.Mul(i, g)
    c = _cells(op, d, f, new)
    tanh_c, cells = op.Tanh(c), op.reshape(c, (d.steps, -1, d.units))
    before = op.reshape(_delayed(op, cells, d.c0), (-1, d.units))
    slopes = (
        op.Sub(new, op.Mul(new, i)),
        op.Sub(d.y, op.Mul(d.y, o)),
        op.Mul(before, op.Sub(f, op.Mul(f, f))),
        op.Sub(i, op.Mul(new, g)),
    )
    from_h = op.Sub(o, op.Mul(d.y, tanh_c))
    factors = (op.Concat(*slopes, axis=1), from_h, f)
    return _lstm_steps(
        op, d, dy, [_steps(op, d, v, width) for v, width in zip(factors, (4, 1, 1), strict=True)]
    )


def _lstm_steps(
    op: Ops, d: _Direction, dy: _Cotangents, factors: Sequence[Sequence[Value]]
) -> _Found:
    """Back through the steps; ``factors`` per step: by the gates, of dh in dc, f."""
    by_gates: list[Value] = []
    dh, dc = dy.h, dy.c
    for t in reversed(range(d.steps)):
        slope, from_h, f = (v[t] for v in factors)
        dh = (
            _plus(op, dh, dy.steps[t]) if not by_gates else _back(op, by_gates[0], d.r, dy.steps[t])
        )
        dc = _plus(op, op.Mul(dh, from_h), dc)
        by_gates.insert(0, op.Mul(op.Concat(dc, dh, dc, dc, axis=1), slope))
        dc = op.Mul(dc, f)
    whole = op.Concat(*by_gates, axis=0)
    return _Found(whole, whole, _back(op, by_gates[0], d.r), dc)


def _cells(op: Ops, d: _Direction, f: Value, new: Value) -> Value:
    """All cells, c = f c₋ + new."""
    cells: list[Value] = []
    c = d.c0
    for keep, add in zip(_steps(op, d, f), _steps(op, d, new), strict=True):
        c = add if c is None else op.Add(op.Mul(keep, c), add)
        cells.append(c)
    return op.Concat(*cells, axis=0)


def _rnn(op: Ops, d: _Direction, dy: _Cotangents) -> _Found:
    """h = tanh(Wx + Rh₋ + b), or relu of it; the slope can be read off h."""
    if _activations(d.node, ["Tanh"])[0] == "Relu":
        slope = op.Sign(d.y)
    else:
        slope = op.Sub(1.0, op.Mul(d.y, d.y))
    slopes = _steps(op, d, slope)
    by_gates: list[Value] = []
    for t in reversed(range(d.steps)):
        last = not by_gates
        dh = _plus(op, dy.h, dy.steps[t]) if last else _back(op, by_gates[0], d.r, dy.steps[t])
        by_gates.insert(0, op.Mul(dh, slopes[t]))
    whole = op.Concat(*by_gates, axis=0)
    return _Found(whole, whole, _back(op, by_gates[0], d.r))


def _gru(op: Ops, d: _Direction, dy: _Cotangents) -> _Found:
    """h = (1 − z) n + z h₋; gates in the order z, r, n.

    With linear_before_reset (torch) n = tanh(Wx + b + r (R h₋ + b′)), else
    n = tanh(Wx + b + R(r h₋) + b′).
    """
    if not attribute(d.node, "linear_before_reset", 0):
        raise UnsupportedOperatorError(
            f"fedge does not differentiate the GRU {d.node.name or d.node.outputs[0].name!r}: it "
            "has linear_before_reset = 0; torch's and Keras' have 1"
        )
    sizes, h = op.ints([2 * d.units, d.units]), d.units
    of_x, of_h = _products(op, d)
    x_gates, x_n = op.Split(of_x, sizes, axis=1, outputs=2)
    h_gates, h_n = op.Split(of_h, sizes, axis=1, outputs=2)
    z, r = op.pieces(op.Sigmoid(op.Add(x_gates, h_gates)), 2, axis=1)
    n = op.Tanh(op.Add(x_n, op.Mul(r, h_n)))
    rest = op.Sub(1.0, z)
    by_n = op.Mul(rest, op.Sub(1.0, op.Mul(n, n)))
    by_z = op.Mul(op.Sub(d.before, n), op.Mul(z, rest))
    by_r = op.Mul(op.Mul(by_n, h_n), op.Sub(r, op.Mul(r, r)))
    slopes = _steps(op, d, op.Concat(by_z, by_r, op.Mul(by_n, r), axis=1), 3)
    grads: list[Value] = []
    by_gates: list[Value] = []
    dh = dy.h
    keep = _steps(op, d, z)
    for t in reversed(range(d.steps)):
        dh = _plus(op, dh, dy.steps[t])
        grads.insert(0, dh)
        by_gates.insert(0, op.Mul(op.Concat(dh, dh, dh, axis=1), slopes[t]))
        dh = op.Gemm(by_gates[0], d.r, op.Mul(dh, keep[t]))
    by_h = op.Concat(*by_gates, axis=0)
    gates = op.Slice(by_h, op.ints([0]), op.ints([2 * h]), op.ints([1]))
    by_x = op.Concat(gates, op.Mul(op.Concat(*grads, axis=0), by_n), axis=1)
    return _Found(by_x, by_h, dh)


def _products(op: Ops, d: _Direction) -> tuple[Value, Value]:
    """What W and R, with their biases, add to the gates."""
    b_w, b_r = ([b] for b in d.bias) if d.bias is not None else ([], [])
    return op.Gemm(d.x, d.w, *b_w, transB=1), op.Gemm(d.before, d.r, *b_r, transB=1)


def _preactivation(op: Ops, d: _Direction) -> Value:
    """The gates before activation, [TN, GH]."""
    bias = [op.Add(*d.bias)] if d.bias is not None else []
    return op.Gemm(d.before, d.r, op.Gemm(d.x, d.w, *bias, transB=1), transB=1)


def _back(op: Ops, by_gates: Value, r: Value, dy: Value | None = None) -> Value:
    """The gradient by the state before a step, plus that step's own cotangent."""
    return op.Gemm(by_gates, r) if dy is None else op.Gemm(by_gates, r, dy)


def _steps(op: Ops, d: _Direction, v: Value, blocks: int = 1) -> tuple[Value, ...]:
    """[TN, blocks · H] -> T times [N, blocks · H]."""
    return op.pieces(v, d.steps, shape=(d.rows, blocks * d.units))


def _plus(op: Ops, a: Value | None, b: Value | None) -> Value:
    found = [v for v in (a, b) if v is not None]
    return found[0] if len(found) == 1 else op.Add(*found)


def _delayed(op: Ops, states: Value, first: Value | None) -> Value:
    """States before each step: [T, N, H] moved by one step, ``first`` (or zeros) in front."""
    if first is None:
        return op.Pad(states, op.ints([1, 0, 0, -1, 0, 0]))
    moved = op.Slice(states, op.ints([0]), op.ints([-1]), op.ints([0]))
    return op.Concat(op.Unsqueeze(first, op.ints([0])), moved, axis=0)


def _flip(op: Ops, x: Value) -> Value:
    """The steps in reverse order."""
    stop = op.ints([np.iinfo(np.int64).min])
    return op.Slice(x, op.ints([-1]), stop, op.ints([0]), op.ints([-1]))


def _pick(op: Ops, x: Value | None, index: int, axis: int = 0) -> Any:  # noqa: ANN401 - or None
    """One direction's part of a value."""
    return None if x is None else op.Gather(x, np.array(index, np.int64), axis=axis)


def _stack(op: Ops, parts: Sequence[Value | None]) -> Value | None:
    """One value per direction -> the operator's own layout."""
    if parts[0] is None:
        return None
    rows = [op.Unsqueeze(p, op.ints([0])) for p in parts]
    return rows[0] if len(rows) == 1 else op.Concat(*rows, axis=0)
