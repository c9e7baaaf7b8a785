"""The four graphs of a bundle, made from a model, a loss and an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from fedge.artifacts.manifest import LabelSpec, Optimizer, TensorSpec
from fedge.autodiff.dropout import explicit_dropout
from fedge.autodiff.losses import (
    Written,
    extra_specs,
    label_spec,
    loss_model,
    scoring_loss,
    write_loss,
)
from fedge.autodiff.ops import Value, shape_of
from fedge.autodiff.optimizers import GivenGradients, Updates, apply_optimizer, settings_of
from fedge.autodiff.prepare import Forward, finish, load, normalize
from fedge.autodiff.recompute import Recompute
from fedge.autodiff.reverse import backward
from fedge.autodiff.rewrite import batch_statistics, inference_mode, relu_after_pooling
from fedge.autodiff.shapes import Sizes
from fedge.errors import ArtifactError
from fedge.losses import Loss, LossLike, find_loss


@dataclass(frozen=True)
class TrainingGraphs:
    """What a bundle's ``ort`` engine runs; names as in :mod:`fedge.artifacts.manifest`.

    Attributes:
        step: inputs, labels, lr, params, state -> loss and ``X@next`` of all that changes.
        grad: inputs, labels, params -> loss, ``X@grad`` of the trainable params and ``X@next`` of
            running statistics.
        evaluate: inputs, labels, params -> loss and the model's outputs, in inference mode.
        infer: inputs, params -> the model's outputs, in inference mode.
        state: Optimizer memory, zero at the start.
        inputs: The model's own inputs.
        outputs: The model's outputs; the loss looks at the first.
        labels: The label input.
        extras: What ``step`` and ``grad`` ask of rows beside inputs and labels.
        noise: What ``step`` and ``grad`` ask for too: uniform random numbers of [0, 1), fresh for
            every batch.
        running: Params a step changes without a gradient: BatchNormalization's statistics.
        update: lr, ``X@grad``, params, state (and what clipping and a proximal term need) ->
            ``X@next``: the optimizer alone, for steps that do more to a gradient.
        loss: The loss alone, of the model's outputs.
    """

    step: onnx.ModelProto
    grad: onnx.ModelProto
    evaluate: onnx.ModelProto
    infer: onnx.ModelProto
    state: tuple[TensorSpec, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: LabelSpec
    extras: tuple[TensorSpec, ...]
    noise: tuple[TensorSpec, ...]
    running: tuple[str, ...]
    update: onnx.ModelProto
    loss: onnx.ModelProto


def training_graphs(
    model: onnx.ModelProto,
    *,
    params: Sequence[str],
    trainable: Sequence[str],
    loss: LossLike,
    optimizer: Optimizer,
    proximal: Sequence[str] = (),
    sizes: Sizes | None = None,
    recompute: bool | int = False,
) -> TrainingGraphs:
    """Differentiate a model.

    Args:
        model: Opset 13 to 24; the first dimension of its inputs is the batch, symbolic.
        params: Initializers that become graph inputs; other initializers stay constants.
        trainable: Those of ``params`` a step changes.
        loss: One of :mod:`fedge.losses`, of the first output.
        optimizer: ``sgd`` (momentum, nesterov, weight_decay) or ``adamw`` (beta1, beta2, eps,
            weight_decay).
        proximal: Those of ``trainable`` that a proximal term may hold back.
        sizes: For symbolic dimensions other than the batch, a size that the model accepts.
        recompute: Whether ``step`` and ``grad`` make activations again rather than keep them all
            (True), in how many segments (a number); see :mod:`fedge.autodiff.recompute`.

    Raises:
        ArtifactError: If the model does not fit: opset, names, shapes, missing params.
        UnsupportedOperatorError: If a trainable param reaches the loss through an operator
            without a rule.
        ConfigError: If loss or optimizer are unknown or do not fit the output.
    """
    settings_of(optimizer)
    model, kind = normalize(model, sizes), find_loss(loss)
    training, noise = explicit_dropout(model, sizes)
    names = (tuple(params), tuple(trainable))
    plan = _Plan(model, training, *names, kind, optimizer, dict(sizes or {}), recompute)
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
        labels=label_spec(kind, forward),
        extras=extra_specs(kind, forward),
        noise=noise,
        running=plan.running(),
        update=plan.update(proximal),
        loss=loss_model(kind, forward),
    )


@dataclass(frozen=True)
class _Plan:
    """The request, and one method per graph; each graph starts from a fresh copy of the model."""

    model: onnx.ModelProto
    training: onnx.ModelProto
    params: tuple[str, ...]
    trainable: tuple[str, ...]
    loss: Loss
    optimizer: Optimizer
    sizes: Sizes
    recompute: bool | int

    def load(self, model: onnx.ModelProto | None = None) -> Forward:
        missing = sorted(set(self.trainable) - set(self.params))
        if missing or not self.trainable:
            raise ArtifactError(f"trainable {missing or '()'} must name one or more of the params")
        return load(model or self.model, self.params, self.sizes)

    def running(self) -> tuple[str, ...]:
        found = batch_statistics(self.load())
        return tuple(n for n in self.params if n in found)

    def infer(self) -> onnx.ModelProto:
        forward = self.load()
        inference_mode(forward)
        return finish(forward, [*forward.inputs, *forward.params.values()], _outputs(forward))

    def evaluate(self) -> onnx.ModelProto:
        forward = self.load()
        inference_mode(forward)
        outputs = _outputs(forward)
        written = write_loss(forward, scoring_loss(self.loss))
        inputs = self._inputs(forward, written)
        return finish(forward, inputs, {"loss": written.value, **outputs})

    def grad(self) -> onnx.ModelProto:
        forward, written, gradients, running = self._training()
        found = gradients(forward.op.value(1.0))
        named = {f"{n}@grad": g for n, g in found.items()}
        outputs = {"loss": written.value, **named, **running}
        return finish(forward, self._inputs(forward, written), outputs)

    def step(self) -> tuple[onnx.ModelProto, tuple[TensorSpec, ...]]:
        forward, written, gradients, running = self._training()
        up = self._updates(forward)
        apply_optimizer(up, self.optimizer, gradients)
        outputs = {"loss": written.value, **up.outputs(), **running}
        inputs = [*forward.inputs, *written.inputs, up.lr, *forward.params.values()]
        model = finish(forward, [*inputs, *up.state.values()], outputs)
        return model, tuple(_spec(v) for v in up.state.values())

    def update(self, proximal: Sequence[str]) -> onnx.ModelProto:
        forward = self.load()
        up = self._updates(forward)
        given = GivenGradients(up, proximal)
        apply_optimizer(up, self.optimizer, given)
        inputs = [up.lr, *given.inputs, *up.params.values(), *up.state.values()]
        return finish(forward, inputs, up.outputs())

    def _updates(self, forward: Forward) -> Updates:
        lr = ir.val("lr", dtype=ir.DataType.FLOAT, shape=ir.Shape(()))
        return Updates(forward.op, {n: forward.params[n] for n in self.trainable}, lr)

    def _training(self) -> tuple[Forward, Written, _Gradients, dict[str, Value]]:
        forward = self.load(self.training)
        relu_after_pooling(forward)
        after = batch_statistics(forward)
        running = {f"{n}@next": v for n, v in after.items() if n in self.params}
        written = write_loss(forward, self.loss)
        gradients = _Gradients(
            forward, list(forward.graph), self.trainable, written, self._recompute(forward, written)
        )
        return forward, written, gradients, running

    def _recompute(self, forward: Forward, written: Written) -> Recompute | None:
        if self.recompute is False:
            return None
        data = (*forward.inputs, *written.inputs)
        return Recompute(data, None if self.recompute is True else int(self.recompute))

    @staticmethod
    def _inputs(forward: Forward, written: Written) -> list[Value]:
        return [*forward.inputs, *written.inputs, *forward.params.values()]


@dataclass(frozen=True)
class _Gradients:
    """Called with the loss's cotangent, writes the gradients of the trainable params."""

    forward: Forward
    nodes: list[ir.Node]
    trainable: tuple[str, ...]
    written: Written
    recompute: Recompute | None

    def __call__(self, seed: Value) -> Mapping[str, Value]:
        wrt = [self.forward.params[n] for n in self.trainable]
        found = backward(self.forward.op, self.nodes, self.written.seeds(seed), wrt, self.recompute)
        for value, param in zip(found, wrt, strict=True):
            value.shape, value.dtype = param.shape, param.dtype
        return dict(zip(self.trainable, found, strict=True))


def _outputs(forward: Forward) -> dict[str, Value]:
    return {v.name: v for v in forward.graph.outputs}


def _spec(value: Value) -> TensorSpec:
    return TensorSpec(value.name, value.dtype.numpy().name, shape_of(value))
