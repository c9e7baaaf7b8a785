"""Losses in standard operators: a mean over the batch, and where its gradient starts.

Built-in losses have their gradient in closed form; a user's own goes through the same reverse
pass as the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir

from fedge.artifacts.manifest import LabelSpec, TensorSpec
from fedge.autodiff.losses import classes, onnx_model, survival, values
from fedge.autodiff.losses.base import LABELS, Rule, graph_input
from fedge.autodiff.ops import Ops, Value, shape_of
from fedge.autodiff.prepare import Forward, finish
from fedge.errors import ArtifactError
from fedge.losses import TEACHER, Distillation, Loss, Onnx

_RULES: dict[type[Any], Rule] = {**classes.RULES, **survival.RULES, **values.RULES}


@dataclass(frozen=True)
class Written:
    """A loss that has been written into a graph.

    Attributes:
        inputs: Graph inputs it asks for: the labels, then what training needs beside them.
        value: The loss, rank 0.
        seeds: Cotangent of the loss -> cotangents of the values where the reverse pass starts.
    """

    inputs: list[Value]
    value: Value
    seeds: Callable[[Value], dict[Value, Value]]


def label_spec(loss: Loss, forward: Forward) -> LabelSpec:
    """What the labels of a loss of this model look like.

    Raises:
        ConfigError: If the loss does not fit the model's first output.
    """
    if isinstance(loss, Onnx):
        return onnx_model.label_spec(loss, _fitted(loss, forward))
    return _RULES[type(loss)].labels(loss, forward.graph.outputs[0])


def extra_specs(loss: Loss, forward: Forward) -> tuple[TensorSpec, ...]:
    """What training needs beside the model's inputs and the labels.

    Raises:
        ArtifactError: If the model has a value of that name.
    """
    if not isinstance(loss, Distillation):
        return ()
    taken = {v.name for v in (*forward.graph.inputs, *forward.graph.outputs)}
    if TEACHER in taken:
        raise ArtifactError(f"the model has a {TEACHER!r} of its own; rename it to distil")
    return (TensorSpec(TEACHER, "float32", shape_of(forward.graph.outputs[0])),)


def write_loss(forward: Forward, loss: Loss) -> Written:
    """Append a loss of the model's outputs to its graph.

    Raises:
        ConfigError: If the loss does not fit the model's outputs.
    """
    asked: list[LabelSpec | TensorSpec] = [label_spec(loss, forward), *extra_specs(loss, forward)]
    given = [graph_input(s.name, s.dtype, s.shape) for s in asked]
    if isinstance(loss, Onnx):
        value = onnx_model.splice(forward, _fitted(loss, forward), given[0])
        return Written(given, value, lambda seed: {value: seed})
    output = forward.graph.outputs[0]
    by_name = {str(v.name): v for v in given}
    value, pullback = _RULES[type(loss)].write(forward.op, loss, output, by_name)
    value.shape, value.dtype = ir.Shape(()), ir.DataType.FLOAT
    return Written(given, value, lambda seed: {output: pullback(seed)})


def scoring_loss(loss: Loss) -> Loss:
    """The loss rows are scored by, which asks for nothing but labels."""
    return loss.hard_loss if isinstance(loss, Distillation) else loss


def loss_model(loss: Loss, forward: Forward) -> onnx.ModelProto:
    """The loss alone: the model's outputs, labels and extras -> ``loss``.

    What ONNX Runtime's own gradient builder is given to differentiate.
    """
    if isinstance(loss, Onnx):
        return _fitted(loss, forward)
    ends = [ir.val(v.name, dtype=v.dtype, shape=v.shape) for v in forward.graph.outputs]
    graph = ir.Graph(ends, ends, nodes=[], opset_imports={"": forward.op.opset}, name="loss")
    model = ir.Model(graph, ir_version=forward.model.ir_version)
    alone = Forward(model, graph, Ops(graph, forward.op.opset), {})
    written = write_loss(alone, loss)
    return finish(alone, [ends[0], *written.inputs], {"loss": written.value})


def _fitted(loss: Onnx, forward: Forward) -> onnx.ModelProto:
    return onnx_model.fitted(loss, list(forward.graph.outputs), forward.op.opset)


__all__ = [
    "LABELS",
    "Written",
    "extra_specs",
    "label_spec",
    "loss_model",
    "scoring_loss",
    "write_loss",
]
