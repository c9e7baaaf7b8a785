"""Cox's partial likelihood over the rows of a batch."""

from __future__ import annotations

from typing import Any

from fedge.artifacts.manifest import LabelSpec
from fedge.autodiff.losses.base import LABELS, Inputs, Pullback, Rule, want
from fedge.autodiff.ops import Ops, Value, shape_of
from fedge.losses import Cox

_FAR = 1e30  # below any log hazard; finite, for 0·∞ is no number


def _labels(_: Cox, output: Value) -> LabelSpec:
    shape = shape_of(output)
    fits = all(d == 1 for d in shape[1:])
    want(fits, f"cox needs one log hazard per row; {output.name!r} is {list(shape)}")
    return LabelSpec(LABELS, "float32", (shape[0], 2), 0)


def _cox(op: Ops, _: Cox, output: Value, inputs: Inputs) -> tuple[Value, Pullback]:
    """−1/D·Σ_i δ_i·(z_i − log Σ_{j: t_j ≥ t_i} e^{z_j}), D being the number of events (≥ 1).

    The gradient by z_j is −1/D·(δ_j − Σ_i δ_i·P_ij), P_ij being j's share of i's risk set: row i
    of a softmax in which those no longer at risk are as good as nothing.
    """
    z = op.Reshape(output, op.ints([1, -1]))
    time, event = (
        op.Reshape(op.Slice(inputs[LABELS], *(op.ints([i]) for i in at)), op.ints([-1, 1]))
        for at in ((0, 1, 1), (1, 2, 1))
    )
    at_risk = op.Cast(op.GreaterOrEqual(op.Reshape(time, op.ints([1, -1])), time), to=1)
    hazards = op.Add(op.Mul(at_risk, z), op.Mul(op.Sub(at_risk, 1.0), _FAR))
    log_p = op.LogSoftmax(hazards, axis=1)
    chosen = op.Mul(op.EyeLike(at_risk), event)
    count = op.Max(op.ReduceSum(event, keepdims=0), 1.0)
    loss = op.Neg(op.Div(op.ReduceSum(op.Mul(log_p, chosen), keepdims=0), count))

    def pullback(seed: Value) -> Value:
        expected = op.sum(op.Mul(op.Exp(log_p), event), [0])
        slope = op.Sub(expected, op.Reshape(event, op.ints([-1])))
        return op.reshape_like(op.Mul(slope, op.Div(seed, count)), output)

    return loss, pullback


RULES: dict[type[Any], Rule] = {Cox: Rule(_labels, _cox)}
