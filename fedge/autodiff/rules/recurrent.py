"""LSTM, GRU and RNN: forwards, backwards and both; initial states; all outputs.

Forward stays one kernel, which keeps neither gates nor cells. Backward computes the gates again,
in one matrix product over all steps, then goes through the steps in reverse, unrolled, with six
small nodes each. Everything that is no recurrence is done for all steps at once.

Shapes: T steps, N rows, H units, G gates. Arrays over all steps are [TN, ·], step after step in
the order the direction visits them; split into T pieces they are [N, ·].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attribute, shape_of
from fedge.autodiff.registry import Gradients, vjp_rule
from fedge.autodiff.rules.cells import gru, lstm, rnn
from fedge.autodiff.rules.direction import (
    Cotangents,
    Direction,
    Found,
    activations,
    delayed,
    seen,
    steps_of,
)
from fedge.errors import UnsupportedOperatorError

_ACTIVATIONS = {
    "LSTM": [["Sigmoid", "Tanh", "Tanh"]],
    "GRU": [["Sigmoid", "Tanh"]],
    "RNN": [["Tanh"], ["Relu"]],
}


@vjp_rule("LSTM", "GRU", "RNN")
def recurrent(op: Ops, node: ir.Node, *dys: Value | None) -> Gradients:
    """Through all steps of all directions.

    Raises:
        UnsupportedOperatorError: For peepholes, sequence_lens, clip, batchwise layout, other
            activations, or a number of steps that is not fixed.
    """
    steps = _check(node)
    cell = {"LSTM": lstm, "GRU": gru, "RNN": rnn}[node.op_type]
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
        "other activations than usual": activations(node, forms[0]) not in forms,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedOperatorError(
                f"fedge does not differentiate the {node.op_type} "
                f"{node.name or node.outputs[0].name!r}: it has {reason}"
            )
    return int(steps)


def _given(node: ir.Node, index: int) -> Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _direction(op: Ops, node: ir.Node, steps: int, which: tuple[int, bool]) -> Direction:
    index, backwards = which
    x, w, r, b, h0, c0 = (_given(node, i) for i in (0, 1, 2, 3, 5, 6))
    features, units = (int(shape_of(v)[-1]) for v in (w, r))
    if node.outputs[0].name in (None, ""):
        node.outputs[0].name = f"{node.outputs[-1].name}@all"
    y = _pick(op, node.outputs[0], index, 1)
    if backwards:
        x, y = _flip(op, x), _flip(op, y)
    before = delayed(op, y, _pick(op, h0, index))
    return Direction(
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
    op: Ops, d: Direction, dys: Sequence[Value | None], which: tuple[int, bool]
) -> Cotangents:
    index, backwards = which
    dy, dh, dc = (_pick(op, v, index, axis) for v, axis in zip(dys, (1, 0, 0), strict=True))
    if dy is not None:
        rows = op.reshape(_flip(op, dy) if backwards else dy, (-1, d.units))
        return Cotangents(steps_of(op, d, rows), dh, dc)
    return Cotangents([None] * d.steps, op.Mul(dc, 0.0) if dh is None else dh, dc)


def _by_inputs(op: Ops, d: Direction, found: Found, backwards: bool) -> list[Value | None]:
    """By X, and for this direction by W, R, B, initial_h and initial_c."""
    dx = op.MatMul(found.by_w, d.w)
    dx = op.reshape(dx, (d.steps, -1, int(shape_of(d.node.inputs[0])[2])))
    db = None
    if d.bias is not None:
        bw = op.sum(found.by_w, [0])
        same = found.by_w is found.by_r
        db = op.Concat(bw, bw if same else op.sum(found.by_r, [0]), axis=0)
    dw, dr = _weights(op, d, found)
    return [_flip(op, dx) if backwards else dx, dw, dr, db, found.h0, found.c0]


def _weights(op: Ops, d: Direction, found: Found) -> tuple[Value, Value]:
    """By W and R."""
    if found.by_w is found.by_r and found.dr is None:
        both = op.Gemm(found.by_w, seen(op, d), transA=1)
        features = int(shape_of(d.node.inputs[1])[2])
        dw, dr = op.Split(both, op.ints([features, d.units]), axis=1, outputs=2)
        return dw, dr
    dr = found.dr or op.Gemm(found.by_r, d.before, transA=1)
    return op.Gemm(found.by_w, d.x, transA=1), dr


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
