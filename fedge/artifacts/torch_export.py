"""From ``torch.nn.Module`` to an ONNX model with its parameters under their own names.

The one place that imports torch. Only the TorchScript exporter (``dynamo=False``), told to keep the
module's mode and to fold no constants, keeps every parameter as an initializer; the newer one folds
weights into constants and merges equal ones, silently. So the result is compared with the module.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from fedge.artifacts.manifest import BATCH
from fedge.errors import ArtifactError, ConfigError
from fedge.types import Params

OPSET = 17


@dataclass(frozen=True)
class Exported:
    """An exported module.

    Attributes:
        model: As exported.
        params: Parameters and float buffers, in the module's order.
        trainable: Those that require gradients.
        sample: The rows it was traced with, by input name.
        torch_version: Of the exporter.
    """

    model: onnx.ModelProto
    params: tuple[str, ...]
    trainable: tuple[str, ...]
    sample: Params
    torch_version: str


def export_module(module: Any, sample: Any) -> Exported:  # noqa: ANN401 - torch types stay here
    """Trace a module.

    Args:
        module: A ``torch.nn.Module``; it is copied, not changed, and taken in the mode it is in:
            after ``.eval()``, whole or in part, Dropout is off and BatchNorm is frozen.
        sample: At least one row of each input: a tensor or array, a sequence of them in
            ``forward``'s order, or a mapping by ``forward``'s argument names.

    Returns:
        The model; a single input is called ``x``, several as in ``forward``; outputs are
        ``output`` or ``output_0``, ``output_1`` ….

    Raises:
        ConfigError: If torch is missing, ``module`` is no module or ``sample`` does not fit it.
        ArtifactError: If it cannot be exported faithfully.
    """
    torch = _torch()
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(
            f"cannot build from a {type(module).__name__}; give an nn.Module, an onnx.ModelProto, "
            f"the bytes of one, or a path to an .onnx file"
        )
    module = copy.deepcopy(module).cpu().float()
    names, rows = _arguments(torch, module, sample)
    outputs = _output_names(torch, module, rows)
    target = io.BytesIO()
    with _quiet(), _export_errors():
        torch.onnx.export(
            module,
            tuple(rows),
            target,
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            keep_initializers_as_inputs=True,  # else it merges params of equal value in eval mode
            opset_version=OPSET,
            input_names=names,
            output_names=outputs,
            dynamic_axes={n: {0: BATCH} for n in [*names, *outputs]},
        )
    model = onnx.load_model_from_string(target.getvalue())
    _initializers_once(module, model.graph)
    params, trainable = _check_params(module, model)
    arrays = {n: r.numpy() for n, r in zip(names, rows, strict=True)}
    return Exported(model, params, trainable, arrays, str(torch.__version__))


def _torch() -> Any:  # noqa: ANN401
    try:
        import torch
    except ImportError as exc:
        raise ConfigError(
            "building from an nn.Module needs torch (pip install 'fedge[torch]'); "
            "without it, give an ONNX model"
        ) from exc
    return torch


def _arguments(torch: Any, module: Any, sample: Any) -> tuple[list[str], list[Any]]:  # noqa: ANN401
    if sample is None:
        raise ConfigError("an nn.Module needs sample=…: at least one row of its input")
    accepted = list(inspect.signature(module.forward).parameters)
    if isinstance(sample, Mapping):
        unknown = sorted(set(sample) - set(accepted))
        if unknown:
            raise ConfigError(f"sample names {unknown[0]!r}; forward takes {', '.join(accepted)}")
        names = [n for n in accepted if n in sample]
        values = [sample[n] for n in names]
    else:
        one = not isinstance(sample, Sequence) or not hasattr(sample[0], "shape")
        values = [sample] if one else list(sample)
        names = accepted[: len(values)]
    if len(names) != len(values):
        raise ConfigError(f"sample has {len(values)} inputs; forward takes {', '.join(accepted)}")
    return ["x"] if len(values) == 1 else names, [_two_rows(torch, v) for v in values]


def _two_rows(torch: Any, value: Any) -> Any:  # noqa: ANN401
    """At least two rows: with one, a traced squeeze would bake the batch in."""
    tensor = torch.as_tensor(np.asarray(value) if not hasattr(value, "detach") else value)
    tensor = tensor.detach().cpu()
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    if tensor.ndim < 1 or not tensor.shape[0]:
        raise ConfigError(f"sample has shape {tuple(tensor.shape)}; wanted rows × features")
    return torch.cat([tensor, tensor]) if tensor.shape[0] == 1 else tensor


def _output_names(torch: Any, module: Any, rows: Sequence[Any]) -> list[str]:  # noqa: ANN401
    try:
        with torch.no_grad():
            found = copy.deepcopy(module)(*rows)
    except Exception as exc:  # whatever the user's forward raises
        raise ConfigError(f"forward(sample) failed: {type(exc).__name__}: {exc}") from exc
    if isinstance(found, torch.Tensor):
        return ["output"]
    return [f"output_{i}" for i in range(len(found))]


def _initializers_once(module: Any, graph: onnx.GraphProto) -> None:  # noqa: ANN401
    """Initializers are no inputs; a parameter with several names goes by its first one."""
    first: dict[int, str] = {}
    names = {
        n: first.setdefault(id(p), n) for n, p in module.named_parameters(remove_duplicate=False)
    }
    for node in graph.node:
        node.input[:] = [names.get(n, n) for n in node.input]
    stored = {t.name: t for t in graph.initializer}
    kept = {n: names.get(n, n) for n in stored}
    inputs = [i for i in graph.input if i.name not in stored]
    del graph.input[:], graph.initializer[:]
    graph.input.extend(inputs)
    for old, new in kept.items():
        if new not in {t.name for t in graph.initializer}:
            stored[old].name = new
            graph.initializer.append(stored[old])


def _check_params(module: Any, model: onnx.ModelProto) -> tuple[tuple[str, ...], tuple[str, ...]]:  # noqa: ANN401
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    trainable: list[str] = []
    frozen: list[str] = []
    for name, tensor in module.named_parameters():
        if shapes.get(name) != tuple(tensor.shape):
            raise ArtifactError(
                f"parameter {name!r} {tuple(tensor.shape)} is {shapes.get(name, 'missing')} in "
                f"the exported model: forward does not use it, or the exporter rewrote it; "
                f"remove it, or export to ONNX yourself and build from that"
            )
        (trainable if tensor.requires_grad else frozen).append(name)
    buffers = {n for n, b in module.named_buffers() if b.is_floating_point() and b.ndim}
    known = [*(n for n, _ in module.named_parameters()), *sorted(buffers & shapes.keys())]
    return tuple(known), tuple(trainable)


@contextlib.contextmanager
def _export_errors() -> Iterator[None]:
    try:
        yield
    except Exception as exc:  # torch.onnx raises many kinds
        text = " ".join(str(exc).split())[:500]
        raise ArtifactError(f"torch cannot export this module: {text}") from exc


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter announces its own deprecation and warns about every traced shape."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
