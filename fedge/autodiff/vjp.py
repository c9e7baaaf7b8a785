"""The general vector-Jacobian product of an ONNX model, as an ONNX model."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from fedge.autodiff.ops import Value
from fedge.autodiff.prepare import finish, load, normalize
from fedge.autodiff.reverse import backward


def vjp(
    model: onnx.ModelProto,
    *,
    outputs: Sequence[str],
    wrt: Sequence[str],
    params: Sequence[str] = (),
) -> onnx.ModelProto:
    """A model that computes Σ ⟨cotangent, ∂output/∂x⟩ for each x of ``wrt``.

    Args:
        model: As for :func:`~fedge.autodiff.training_graphs`.
        outputs: Values to differentiate (outputs or intermediate values).
        wrt: Values to differentiate by: inputs, initializers or intermediate values.
        params: Initializers that become inputs.

    Returns:
        A model with the inputs of ``model``, ``params`` and one ``<output>@cotangent`` per output
        (of its shape), whose outputs are the given ``outputs`` and one ``<x>@grad`` per x.

    Raises:
        ArtifactError: If a name is unknown or the model does not fit.
        UnsupportedOperatorError: If a node on the way has no rule.
    """
    forward = load(normalize(model), params)
    chosen = [forward.value(name) for name in outputs]
    by = [forward.value(name) for name in wrt]
    seeds = {value: _cotangent(value) for value in chosen}
    grads = backward(forward.op, list(forward.graph), seeds, by)
    for value, grad in zip(by, grads, strict=True):
        grad.shape, grad.dtype = value.shape, value.dtype
    inputs = [*forward.inputs, *forward.params.values(), *seeds.values()]
    named = dict(zip((f"{name}@grad" for name in wrt), grads, strict=True))
    return finish(forward, inputs, {**dict(zip(outputs, chosen, strict=True)), **named})


def _cotangent(value: Value) -> Value:
    return ir.val(f"{value.name}@cotangent", dtype=value.dtype, shape=value.shape)
