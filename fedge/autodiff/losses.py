"""Losses in standard operators: the mean over the batch, and its gradient in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from fedge.artifacts.manifest import LabelSpec
from fedge.autodiff.ops import Ops, Value, shape_of
from fedge.errors import ConfigError

Pullback: TypeAlias = Callable[[Value], Value]  # cotangent of the loss -> of the model's output


@dataclass(frozen=True)
class Loss:
    """One loss.

    Attributes:
        labels: Model output -> what its label input looks like.
        build: Writes the loss of (model output, labels): the value, rank 0, and its pullback.
    """

    labels: Callable[[Value], LabelSpec]
    build: Callable[[Ops, Value, Value], tuple[Value, Pullback]]


def _cross_entropy(op: Ops, logits: Value, labels: Value) -> tuple[Value, Pullback]:
    """Mean of −log softmax(logits)[label] over rows (and positions); classes are axis 1."""
    classes = op.const(np.array(shape_of(logits)[1], np.int64))
    log_p = op.LogSoftmax(logits, axis=1)
    picked = op.OneHot(labels, classes, np.array([0, -1], np.float32), axis=1)
    count = op.size(labels)
    loss = op.Div(op.ReduceSum(op.Mul(log_p, picked), keepdims=0), count)
    return loss, lambda seed: op.Mul(op.Add(op.Exp(log_p), picked), op.Div(seed, count))


def _bce_with_logits(op: Ops, z: Value, y: Value) -> tuple[Value, Pullback]:
    """Mean of max(z, 0) − zy + log(1 + e^−|z|): no overflow, no cancellation at any logit."""
    tail = op.Softplus(op.Neg(op.Abs(z)))
    loss = op.mean(op.Add(op.Sub(op.Relu(z), op.Mul(z, y)), tail))
    return loss, lambda seed: op.Mul(op.Sub(op.Sigmoid(z), y), op.Div(seed, op.size(z)))


def _mse(op: Ops, z: Value, y: Value) -> tuple[Value, Pullback]:
    """Mean of (z − y)² over all elements."""
    error = op.Sub(z, y)
    loss = op.mean(op.Mul(error, error))
    return loss, lambda seed: op.Mul(error, op.Div(op.Mul(seed, 2.0), op.size(z)))


def _classes(output: Value) -> LabelSpec:
    shape = shape_of(output)
    if len(shape) < 2 or not isinstance(shape[1], int) or shape[1] < 2:
        raise ConfigError(
            f"cross_entropy needs an output [N, classes >= 2]; {output.name!r} is {list(shape)}; "
            "for one logit per row use bce_with_logits"
        )
    return LabelSpec("labels", "int64", (shape[0], *shape[2:]), 0, shape[1] - 1)


def _binary(output: Value) -> LabelSpec:
    return LabelSpec("labels", "float32", shape_of(output), 0, 1)


def _real(output: Value) -> LabelSpec:
    return LabelSpec("labels", "float32", shape_of(output))


LOSSES = {
    "bce_with_logits": Loss(_binary, _bce_with_logits),
    "cross_entropy": Loss(_classes, _cross_entropy),
    "mse": Loss(_real, _mse),
}


def find_loss(name: str) -> Loss:
    """The loss called ``name``.

    Raises:
        ConfigError: If there is none.
    """
    if name not in LOSSES:
        raise ConfigError(f"loss {name!r} is unknown; known: {', '.join(LOSSES)}")
    return LOSSES[name]


def label_input(spec: LabelSpec) -> Value:
    """The graph input the labels arrive in."""
    dtype = {"int64": ir.DataType.INT64, "float32": ir.DataType.FLOAT}[spec.dtype]
    return ir.val(spec.name, dtype=dtype, shape=ir.Shape(spec.shape))
