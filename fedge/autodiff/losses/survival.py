"""Cox's partial likelihood over the rows of a batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedge.artifacts.manifest import LabelSpec
from fedge.autodiff.losses.base import LABELS, Inputs, Pullback, Rule, want
from fedge.autodiff.ops import Ops, Value, shape_of
from fedge.losses import Cox


def _labels(_: Cox, output: Value) -> LabelSpec:
    shape = shape_of(output)
    fits = all(d == 1 for d in shape[1:])
    want(fits, f"cox needs one log hazard per row; {output.name!r} is {list(shape)}")
    return LabelSpec(LABELS, "float32", (shape[0], 2), 0)


def _cox(op: Ops, _: Cox, output: Value, inputs: Inputs) -> tuple[Value, Pullback]:
    """−1/D·Σ_i δ_i·(z_i − log Σ_{j: t_j ≥ t_i} e^{z_j}), D being the number of events (≥ 1).

    The gradient by z_j is −1/D·(δ_j − Σ_i δ_i·P_ij), P_ij being j's share of i's risk set. The
    largest z of each risk set is taken out of its sum, so nothing overflows or vanishes.
    """
    z = op.Reshape(output, op.ints([1, -1]))
    time, event = (
        op.Reshape(op.Slice(inputs[LABELS], *(op.ints([i]) for i in at)), op.ints([-1, 1]))
        for at in ((0, 1, 1), (1, 2, 1))
    )
    at_risk = op.GreaterOrEqual(op.Reshape(time, op.ints([1, -1])), time)
    hazards = op.Where(at_risk, z, op.const(np.array(-math.inf, np.float32)))
    top = _row_max(op, hazards)
    shares = op.Exp(op.Sub(hazards, top))
    total = op.sum(shares, [1], keepdims=True)
    count = op.Max(op.ReduceSum(event, keepdims=0), 1.0)
    log_risk = op.Add(top, op.Log(total))
    behind = op.Sub(log_risk, op.Reshape(z, op.ints([-1, 1])))
    loss = op.Div(op.ReduceSum(op.Mul(event, behind), keepdims=0), count)

    def pullback(seed: Value) -> Value:
        expected = op.sum(op.Mul(shares, op.Div(event, total)), [0])
        slope = op.Sub(expected, op.Reshape(event, op.ints([-1])))
        return op.reshape_like(op.Mul(slope, op.Div(seed, count)), output)

    return loss, pullback


def _row_max(op: Ops, x: Value) -> Value:
    if op.opset >= 18:
        return op.ReduceMax(x, op.ints([1]), keepdims=1)
    return op.ReduceMax(x, axes=[1], keepdims=1)


RULES: dict[type[Any], Rule] = {Cox: Rule(_labels, _cox)}
