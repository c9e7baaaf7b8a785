"""Losses of real values: means over all elements."""

from __future__ import annotations

from typing import Any

from fedge.artifacts.manifest import LabelSpec
from fedge.autodiff.losses.base import LABELS, Inputs, Pullback, Rule
from fedge.autodiff.ops import Ops, Value, shape_of
from fedge.losses import L1, Huber, Mse


def _labels(_: object, output: Value) -> LabelSpec:
    return LabelSpec(LABELS, "float32", shape_of(output))


def _mse(op: Ops, _: Mse, z: Value, inputs: Inputs) -> tuple[Value, Pullback]:
    """Mean of (z − y)²."""
    error = op.Sub(z, inputs[LABELS])
    loss = op.mean(op.Mul(error, error))
    return loss, lambda seed: op.Mul(error, op.Div(op.Mul(seed, 2.0), op.size(z)))


def _l1(op: Ops, _: L1, z: Value, inputs: Inputs) -> tuple[Value, Pullback]:
    """Mean of |z − y|; the slope at 0 is 0."""
    error = op.Sub(z, inputs[LABELS])
    loss = op.mean(op.Abs(error))
    return loss, lambda seed: op.Mul(op.Sign(error), op.Div(seed, op.size(z)))


def _huber(op: Ops, s: Huber, z: Value, inputs: Inputs) -> tuple[Value, Pullback]:
    """Mean of c·(|e| − c/2) with c = min(|e|, δ): e²/2 inside, δ·(|e| − δ/2) outside."""
    error = op.Sub(z, inputs[LABELS])
    size = op.Abs(error)
    capped = op.Min(size, s.delta)
    loss = op.mean(op.Mul(capped, op.Sub(size, op.Mul(capped, 0.5))))

    def pullback(seed: Value) -> Value:
        return op.Mul(op.Clip(error, -s.delta, s.delta), op.Div(seed, op.size(z)))

    return loss, pullback


RULES: dict[type[Any], Rule] = {
    Mse: Rule(_labels, _mse),
    L1: Rule(_labels, _l1),
    Huber: Rule(_labels, _huber),
}
