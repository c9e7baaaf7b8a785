"""The four graphs of a bundle, made from a model, a loss and an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from fedge.artifacts.manifest import LabelSpec, Optimizer, TensorSpec
from fedge.autodiff.losses import Pullback, find_loss, label_input
from fedge.autodiff.ops import Value, shape_of
from fedge.autodiff.optimizers import Updates, apply_optimizer, settings_of
from fedge.autodiff.prepare import Forward, finish, load, normalize
from fedge.autodiff.reverse import backward
from fedge.autodiff.rewrite import inference_mode, relu_after_pooling
from fedge.errors import ArtifactError


@dataclass(frozen=True)
class TrainingGraphs:
    """What a bundle's ``ort`` engine runs; names as in :mod:`fedge.artifacts.manifest`.

    Attributes:
        step: inputs, labels, lr, params, state -> loss and ``X@next`` of all that changes.
        grad: inputs, labels, params -> loss and ``X@grad`` of the trainable params.
        evaluate: inputs, labels, params -> loss and the model's outputs, in inference mode.
        infer: inputs, params -> the model's outputs, in inference mode.
        state: Optimizer memory, zero at the start.
        inputs: The model's own inputs.
        outputs: The model's outputs; the loss looks at the first.
        labels: The label input.
    """

    step: onnx.ModelProto
    grad: onnx.ModelProto
    evaluate: onnx.ModelProto
    infer: onnx.ModelProto
    state: tuple[TensorSpec, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: LabelSpec


def training_graphs(
    model: onnx.ModelProto,
    *,
    params: Sequence[str],
    trainable: Sequence[str],
    loss: str,
    optimizer: Optimizer,
) -> TrainingGraphs:
    """Differentiate a model.

    Args:
        model: Opset 13 to 21; the first dimension of its inputs is the batch, symbolic.
        params: Initializers that become graph inputs; other initializers stay constants.
        trainable: Those of ``params`` a step changes.
        loss: ``bce_with_logits``, ``cross_entropy`` or ``mse``, of the first output.
        optimizer: ``sgd`` (momentum, nesterov, weight_decay) or ``adamw`` (beta1, beta2, eps,
            weight_decay).

    Raises:
        ArtifactError: If the model does not fit: opset, names, shapes, missing params.
        UnsupportedOperatorError: If a trainable param reaches the loss through an operator
            without a rule.
        ConfigError: If loss or optimizer are unknown or do not fit the output.
    """
    settings_of(optimizer)
    plan = _Plan(normalize(model), tuple(params), tuple(trainable), loss, optimizer)
    forward = plan.load()
    step, state = plan.step()
    return TrainingGraphs(
        step=step,
        grad=plan.grad(),
        evaluate=plan.evaluate(),
        infer=plan.infer(),
        state=state,
        inputs=tuple(_spec(v) for v in forward.inputs),
        outputs=tuple(_spec(v) for v in forward.graph.outputs),
        labels=find_loss(loss).labels(forward.graph.outputs[0]),
    )


@dataclass(frozen=True)
class _Plan:
    """The request, and one method per graph; each graph starts from a fresh copy of the model."""

    model: onnx.ModelProto
    params: tuple[str, ...]
    trainable: tuple[str, ...]
    loss: str
    optimizer: Optimizer

    def load(self) -> Forward:
        missing = sorted(set(self.trainable) - set(self.params))
        if missing or not self.trainable:
            raise ArtifactError(f"trainable {missing or '()'} must name one or more of the params")
        return load(self.model, self.params)

    def infer(self) -> onnx.ModelProto:
        forward = self.load()
        inference_mode(forward)
        return finish(forward, [*forward.inputs, *forward.params.values()], _outputs(forward))

    def evaluate(self) -> onnx.ModelProto:
        forward = self.load()
        inference_mode(forward)
        labels, loss, _ = self._loss(forward)
        outputs = {"loss": loss, **_outputs(forward)}
        return finish(forward, self._inputs(forward, labels), outputs)

    def grad(self) -> onnx.ModelProto:
        forward, labels, loss, gradients = self._training()
        found = gradients(forward.op.value(1.0))
        outputs = {"loss": loss, **{f"{n}@grad": g for n, g in found.items()}}
        return finish(forward, self._inputs(forward, labels), outputs)

    def step(self) -> tuple[onnx.ModelProto, tuple[TensorSpec, ...]]:
        forward, labels, loss, gradients = self._training()
        lr = ir.val("lr", dtype=ir.DataType.FLOAT, shape=ir.Shape(()))
        up = Updates(forward.op, {n: forward.params[n] for n in self.trainable}, lr)
        apply_optimizer(up, self.optimizer, gradients)
        for name, value in up.next.items():
            value.shape = {**up.state, **up.params}[name].shape
            value.dtype = ir.DataType.FLOAT
        outputs = {"loss": loss, **{f"{n}@next": v for n, v in up.next.items()}}
        inputs = [*forward.inputs, labels, lr, *forward.params.values(), *up.state.values()]
        return finish(forward, inputs, outputs), tuple(_spec(v) for v in up.state.values())

    def _training(self) -> tuple[Forward, Value, Value, _Gradients]:
        forward = self.load()
        relu_after_pooling(forward)
        nodes = list(forward.graph)
        labels, loss, pullback = self._loss(forward)
        return forward, labels, loss, _Gradients(forward, nodes, self.trainable, pullback)

    def _loss(self, forward: Forward) -> tuple[Value, Value, Pullback]:
        kind, output = find_loss(self.loss), forward.graph.outputs[0]
        labels = label_input(kind.labels(output))
        loss, pullback = kind.build(forward.op, output, labels)
        loss.shape, loss.dtype = ir.Shape(()), ir.DataType.FLOAT
        return labels, loss, pullback

    @staticmethod
    def _inputs(forward: Forward, labels: Value) -> list[Value]:
        return [*forward.inputs, labels, *forward.params.values()]


@dataclass(frozen=True)
class _Gradients:
    """Called with the loss's cotangent, writes the gradients of the trainable params."""

    forward: Forward
    nodes: list[ir.Node]
    trainable: tuple[str, ...]
    pullback: Pullback

    def __call__(self, seed: Value) -> Mapping[str, Value]:
        output = self.forward.graph.outputs[0]
        wrt = [self.forward.params[n] for n in self.trainable]
        found = backward(self.forward.op, self.nodes, {output: self.pullback(seed)}, wrt)
        for value, param in zip(found, wrt, strict=True):
            value.shape, value.dtype = param.shape, param.dtype
        return dict(zip(self.trainable, found, strict=True))


def _outputs(forward: Forward) -> dict[str, Value]:
    return {v.name: v for v in forward.graph.outputs}


def _spec(value: Value) -> TensorSpec:
    return TensorSpec(value.name, value.dtype.numpy().name, shape_of(value))
