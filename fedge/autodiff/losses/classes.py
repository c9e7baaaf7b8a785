"""Losses of classes: cross-entropy, binary cross-entropy of logits, and a teacher's opinion."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedge.artifacts.manifest import LabelSpec
from fedge.autodiff.losses.base import LABELS, TINY, Inputs, Pullback, Rule, want
from fedge.autodiff.ops import Ops, Value, shape_of
from fedge.losses import TEACHER, BceWithLogits, CrossEntropy, Distillation
from fedge.types import Array


def _class_labels(s: CrossEntropy, output: Value) -> LabelSpec:
    shape = shape_of(output)
    classes = shape[1] if len(shape) > 1 else None
    if not isinstance(classes, int) or classes < 2:
        want(
            False,
            f"cross_entropy needs an output [N, classes >= 2]; {output.name!r} is {list(shape)}; "
            "for one logit per row use bce_with_logits",
        )
        raise AssertionError
    want(
        len(s.class_weights) in (0, classes),
        f"class_weights are {len(s.class_weights)}; {output.name!r} has {classes} classes",
    )
    dims = (shape[0], *shape[2:])
    return LabelSpec(LABELS, "int64", dims, 0, classes - 1, s.ignore_index)


def _cross_entropy(
    op: Ops, s: CrossEntropy, logits: Value, inputs: Inputs
) -> tuple[Value, Pullback]:
    """Mean of −log softmax(logits)[label]: the settings that change it have a path of their own."""
    if s != CrossEntropy():
        return _shaped_cross_entropy(op, s, logits, inputs)
    labels = inputs[LABELS]
    classes = op.const(np.array(shape_of(logits)[1], np.int64))
    log_p = op.LogSoftmax(logits, axis=1)
    picked = op.OneHot(labels, classes, np.array([0, -1], np.float32), axis=1)
    count = op.size(labels)
    loss = op.Div(op.ReduceSum(op.Mul(log_p, picked), keepdims=0), count)
    return loss, lambda seed: op.Mul(op.Add(op.Exp(log_p), picked), op.Div(seed, count))


def _shaped_cross_entropy(
    op: Ops, s: CrossEntropy, logits: Value, inputs: Inputs
) -> tuple[Value, Pullback]:
    """−Σ T·log p / W, as torch: T[n, c] = w_c·((1 − ε)·[c = y_n] + ε/C), W = Σ w at the labels.

    Rows of the ignored label have T = 0 and add nothing to W. The gradient by the logits is
    (p·Σ_c T − T)/W.
    """
    target, total = _target(op, s, shape_of(logits), inputs[LABELS])
    log_p = op.LogSoftmax(logits, axis=1)
    loss = op.Neg(op.Div(op.ReduceSum(op.Mul(log_p, target), keepdims=0), total))

    def pullback(seed: Value) -> Value:
        mass = op.sum(target, [1], keepdims=True)
        return op.Mul(op.Sub(op.Mul(op.Exp(log_p), mass), target), op.Div(seed, total))

    return loss, pullback


def _target(
    op: Ops, s: CrossEntropy, shape: tuple[int | str, ...], labels: Value
) -> tuple[Value, Value]:
    """T, of the logits' shape, and W, rank 0."""
    count = int(shape[1])
    off = s.label_smoothing / count
    weights = np.array(s.class_weights or [1.0] * count, np.float32)
    if s.ignore_index is not None:  # a class there is none of: all off, and of weight 0
        ignored = op.Equal(labels, op.const(np.array(s.ignore_index, np.int64)))
        labels = op.Where(ignored, op.const(np.array(count, np.int64)), labels)
    at_labels = op.Gather(op.const(np.append(weights, np.float32(0))), labels)
    values = np.array([off, off + 1 - s.label_smoothing], np.float32)
    target = op.OneHot(labels, op.const(np.array(count, np.int64)), values, axis=1)
    if s.class_weights:
        target = op.Mul(target, weights.reshape(count, *[1] * (len(shape) - 2)))
    if s.ignore_index is not None and s.label_smoothing:
        counts = op.Cast(op.Not(ignored), to=1)
        target = op.Mul(target, op.Unsqueeze(counts, op.ints([1])))
    return target, op.Max(op.ReduceSum(at_labels, keepdims=0), TINY)


def _binary_labels(s: BceWithLogits, output: Value) -> LabelSpec:
    shape = shape_of(output)
    if isinstance(s.pos_weight, tuple):
        want(
            len(s.pos_weight) == shape[-1],
            f"pos_weight holds {len(s.pos_weight)}; {output.name!r} is {list(shape)}",
        )
    return LabelSpec(LABELS, "float32", shape, 0, 1)


def _bce_with_logits(op: Ops, s: BceWithLogits, z: Value, inputs: Inputs) -> tuple[Value, Pullback]:
    """Mean of max(z, 0) − zy + log(1 + e^−|z|): no overflow, no cancellation at any logit."""
    y = inputs[LABELS]
    if s != BceWithLogits():
        return _weighted_bce(op, np.array(s.pos_weight, np.float32), z, y)
    tail = op.Softplus(op.Neg(op.Abs(z)))
    loss = op.mean(op.Add(op.Sub(op.Relu(z), op.Mul(z, y)), tail))
    return loss, lambda seed: op.Mul(op.Sub(op.Sigmoid(z), y), op.Div(seed, op.size(z)))


def _weighted_bce(op: Ops, p: Array, z: Value, y: Value) -> tuple[Value, Pullback]:
    """Mean of (1 − y)·z + k·(log(1 + e^−|z|) + max(−z, 0)) with k = 1 + (p − 1)·y.

    max(−z, 0) is (|z| − z)/2, whose slope at 0 is −1/2 for every differentiator.
    """
    size = op.Abs(z)
    factor = op.Add(op.Mul(y, p - 1), 1.0)
    below = op.Mul(op.Sub(size, z), 0.5)
    cost = op.Mul(factor, op.Add(below, op.Softplus(op.Neg(size))))
    loss = op.mean(op.Add(op.Mul(op.Sub(1.0, y), z), cost))

    def pullback(seed: Value) -> Value:
        wrong = op.Mul(op.Sub(1.0, y), op.Sigmoid(z))
        right = op.Mul(op.Mul(y, p), op.Sigmoid(op.Neg(z)))
        return op.Mul(op.Sub(wrong, right), op.Div(seed, op.size(z)))

    return loss, pullback


def _distilled_labels(s: Distillation, output: Value) -> LabelSpec:
    return RULES[type(s.hard_loss)].labels(s.hard_loss, output)


def _distillation(op: Ops, s: Distillation, z: Value, inputs: Inputs) -> tuple[Value, Pullback]:
    """α·T²·KL + (1 − α)·hard; the KL's gradient is T·(p − q)/n, q being the teacher's opinion."""
    hard, pull_hard = RULES[type(s.hard_loss)].write(op, s.hard_loss, z, inputs)
    softened = op.Div(z, s.temperature), op.Div(inputs[TEACHER], s.temperature)
    soft = _kl_of_classes if isinstance(s.hard_loss, CrossEntropy) else _kl_of_coins
    distance, gap, count = soft(op, *softened)
    weight = s.alpha * s.temperature**2
    loss = op.Add(op.Mul(distance, weight), op.Mul(hard, 1 - s.alpha))

    def pullback(seed: Value) -> Value:
        pull = op.Mul(gap, op.Div(op.Mul(seed, s.alpha * s.temperature), count))
        return op.Add(pull, pull_hard(op.Mul(seed, 1 - s.alpha)))

    return loss, pullback


def _kl_of_classes(op: Ops, z: Value, t: Value) -> tuple[Value, Value, Value]:
    """Mean over rows and positions of Σ q·(log q − log p), p − q, and their number."""
    log_p, log_q = op.LogSoftmax(z, axis=1), op.LogSoftmax(t, axis=1)
    q = op.Exp(log_q)
    rows = op.sum(op.Mul(q, op.Sub(log_q, log_p)), [1])
    return op.mean(rows), op.Sub(op.Exp(log_p), q), op.size(rows)


def _kl_of_coins(op: Ops, z: Value, t: Value) -> tuple[Value, Value, Value]:
    """Mean over elements of q·log(q/p) + (1 − q)·log((1 − q)/(1 − p)), p − q, and their number."""
    q = op.Sigmoid(t)
    heads = op.Sub(_log_sigmoid(op, t), _log_sigmoid(op, z))
    tails = op.Sub(_log_sigmoid(op, op.Neg(t)), _log_sigmoid(op, op.Neg(z)))
    distance = op.Add(op.Mul(q, heads), op.Mul(op.Sub(1.0, q), tails))
    return op.mean(distance), op.Sub(op.Sigmoid(z), q), op.size(z)


def _log_sigmoid(op: Ops, z: Value) -> Value:
    """min(z, 0) − log(1 + e^−|z|), which does not overflow."""
    size = op.Abs(z)
    return op.Sub(op.Mul(op.Sub(z, size), 0.5), op.Softplus(op.Neg(size)))


RULES: dict[type[Any], Rule] = {
    CrossEntropy: Rule(_class_labels, _cross_entropy),
    BceWithLogits: Rule(_binary_labels, _bce_with_logits),
    Distillation: Rule(_distilled_labels, _distillation),
}
