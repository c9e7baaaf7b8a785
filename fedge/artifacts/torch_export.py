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
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fedge.artifacts.manifest import BATCH, SYMBOL
from fedge.errors import ArtifactError, ConfigError
from fedge.types import Params

OPSET, DYNAMO_OPSET = 17, 18


@dataclass(frozen=True)
class Exported:
    """An exported module.

    Attributes:
        model: As exported.
        params: Parameters and float buffers, in the module's order.
        trainable: Those that require gradients.
        sample: The rows it was traced with, by input name.
        torch_version: Of the exporter.
        exporter: Which one it was.
    """

    model: onnx.ModelProto
    params: tuple[str, ...]
    trainable: tuple[str, ...]
    sample: Params
    torch_version: str
    exporter: str


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        exporter: ``torchscript``, ``dynamo``, or ``auto``: the second where the first cannot, and
            where sizes may vary, which the first may take for constants.
        dynamic: Input name -> axis -> name of a size that may vary there, beside the batch.
    """

    exporter: str = "auto"
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Call:
    """A module and how it is called: arguments of ``forward``, and names in the model."""

    module: Any
    arguments: list[str]
    names: list[str]
    rows: list[Any]
    outputs: list[str]
    dynamic: Mapping[str, Mapping[int, str]]

    def axes(self, name: str) -> dict[int, str]:
        """Axis -> symbol of an input."""
        return {0: BATCH, **self.dynamic.get(name, {})}


def export_module(module: Any, sample: Any, options: ExportOptions | None = None) -> Exported:  # noqa: ANN401 - torch types stay here
    """Trace a module.

    Args:
        module: A ``torch.nn.Module``; it is copied, not changed, and taken in the mode it is in:
            after ``.eval()``, whole or in part, Dropout is off and BatchNorm is frozen.
        sample: At least one row of each input: a tensor or array, a sequence of them in
            ``forward``'s order, or a mapping by ``forward``'s argument names.
        options: See there.

    Returns:
        The model; a single input is called ``x``, several as in ``forward``; outputs are
        ``output`` or ``output_0``, ``output_1`` ….

    Raises:
        ConfigError: If torch is missing, ``module`` is no module or ``sample`` does not fit it.
        ArtifactError: If it cannot be exported faithfully.
    """
    torch, options = _torch(), options or ExportOptions()
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(
            f"cannot build from a {type(module).__name__}; give an nn.Module, an onnx.ModelProto, "
            f"the bytes of one, or a path to an .onnx file"
        )
    automatic = ("dynamo",) if options.dynamic else ("torchscript", "dynamo")
    kinds = automatic if options.exporter == "auto" else (options.exporter,)
    if not set(kinds) <= _EXPORTERS.keys():
        raise ConfigError(
            f"exporter {options.exporter!r} is unknown; known: auto, {', '.join(_EXPORTERS)}"
        )
    module = copy.deepcopy(module).cpu().float()
    arguments, names, rows = _arguments(torch, module, sample)
    _check_dynamic(options.dynamic, dict(zip(names, rows, strict=True)))
    outputs = _output_names(torch, module, rows)
    call = _Call(module, arguments, names, rows, outputs, options.dynamic)
    failures: list[str] = []
    for kind in kinds:
        try:
            model, params, trainable = _export(torch, kind, call)
        except ArtifactError as exc:
            failures.append(str(exc))
        else:
            arrays = {n: r.numpy() for n, r in zip(names, rows, strict=True)}
            return Exported(model, params, trainable, arrays, str(torch.__version__), kind)
    raise ArtifactError("; ".join(dict.fromkeys(failures)))


def _export(
    torch: Any,  # noqa: ANN401
    kind: str,
    call: _Call,
) -> tuple[onnx.ModelProto, tuple[str, ...], tuple[str, ...]]:
    with _quiet(), _export_errors(kind):
        model = _EXPORTERS[kind](torch, replace(call, module=copy.deepcopy(call.module)))
    _initializers_once(call.module, model.graph)
    _drop_in_attention(model.graph)
    _train_batch_norm(torch, call.module, model.graph)
    params, trainable = _check_params(call.module, model)
    _reset(call.module, model)
    return model, params, trainable


def _torchscript(torch: Any, call: _Call) -> onnx.ModelProto:  # noqa: ANN401
    target = io.BytesIO()
    torch.onnx.export(
        call.module,
        tuple(call.rows),
        target,
        dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        keep_initializers_as_inputs=True,  # else it merges params of equal value in eval mode
        opset_version=OPSET,
        input_names=call.names,
        output_names=call.outputs,
        dynamic_axes={n: call.axes(n) for n in call.names} | {o: {0: BATCH} for o in call.outputs},
    )
    return onnx.load_model_from_string(target.getvalue())


def _dynamo(torch: Any, call: _Call) -> onnx.ModelProto:  # noqa: ANN401
    symbols = {s for n in call.names for s in call.axes(n).values()}
    dims = {s: torch.export.Dim(s) for s in symbols}
    shapes = {
        a: {axis: dims[s] for axis, s in call.axes(n).items()}
        for a, n in zip(call.arguments, call.names, strict=True)
    }
    program = torch.onnx.export(
        call.module,
        tuple(call.rows),
        dynamo=True,
        optimize=False,
        verbose=False,
        opset_version=DYNAMO_OPSET,
        input_names=call.names,
        output_names=call.outputs,
        dynamic_shapes=shapes,
    )
    return _plain_copy(program.model_proto)


def _plain_copy(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.load_model_from_string(model.SerializeToString())


_EXPORTERS: dict[str, Callable[[Any, _Call], onnx.ModelProto]] = {
    "torchscript": _torchscript,
    "dynamo": _dynamo,
}


def _check_dynamic(dynamic: Mapping[str, Mapping[int, str]], rows: Mapping[str, Any]) -> None:
    for name, axes in dynamic.items():
        if name not in rows:
            raise ConfigError(f"dynamic names {name!r}; the model takes {', '.join(rows)}")
        for axis, symbol in axes.items():
            if not 0 < axis < rows[name].ndim:
                raise ConfigError(
                    f"dynamic: {name} has axis 1 to {rows[name].ndim - 1} but the batch, not {axis}"
                )
            if not SYMBOL.fullmatch(symbol) or symbol == BATCH:
                raise ConfigError(
                    f"dynamic: {symbol!r} cannot name a size; use letters and digits, such as T"
                )


def _torch() -> Any:  # noqa: ANN401
    try:
        import torch
    except ImportError as exc:
        raise ConfigError(
            "building from an nn.Module needs torch (pip install 'fedge[torch]'); "
            "without it, give an ONNX model"
        ) from exc
    return torch


def _arguments(
    torch: Any,  # noqa: ANN401
    module: Any,  # noqa: ANN401
    sample: Any,  # noqa: ANN401
) -> tuple[list[str], list[str], list[Any]]:
    """Arguments of ``forward``, their names in the model, and rows for them."""
    if sample is None:
        raise ConfigError("an nn.Module needs sample=…: at least one row of its input")
    accepted = list(inspect.signature(module.forward).parameters)
    if isinstance(sample, Mapping):
        if len(sample) == 1 and "x" in sample:  # what the model will call it
            sample = {accepted[0]: sample["x"]}
        unknown = sorted(set(sample) - set(accepted))
        if unknown:
            raise ConfigError(f"sample names {unknown[0]!r}; forward takes {', '.join(accepted)}")
        arguments = [n for n in accepted if n in sample]
        values = [sample[n] for n in arguments]
    else:
        one = not isinstance(sample, Sequence) or not hasattr(sample[0], "shape")
        values = [sample] if one else list(sample)
        arguments = accepted[: len(values)]
    if len(arguments) != len(values):
        raise ConfigError(f"sample has {len(values)} inputs; forward takes {', '.join(accepted)}")
    names = ["x"] if len(values) == 1 else arguments
    return arguments, names, [_two_rows(torch, v) for v in values]


def _two_rows(torch: Any, value: Any) -> Any:  # noqa: ANN401
    """At least two rows: with one, a traced squeeze would bake the batch in."""
    try:
        tensor = torch.as_tensor(value if hasattr(value, "detach") else np.asarray(value))
    except (TypeError, ValueError) as exc:
        raise ConfigError(
            f"sample holds a {type(value).__name__}; wanted arrays of numbers, rows × features"
        ) from exc
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


def _drop_in_attention(graph: onnx.GraphProto) -> None:
    """Both exporters write the dropout inside scaled_dot_product_attention as if it were off."""
    silent = [n for n in graph.node if n.op_type == "Dropout" and not n.domain]
    silent = [n for n in silent if len(n.input) == 2]
    if not silent:
        return
    on = onnx.numpy_helper.from_array(np.array(True))
    name = "training_mode/on"
    graph.node.insert(0, onnx.helper.make_node("Constant", [], [name], name=name, value=on))
    for node in silent:
        node.input.append(name)


def _train_batch_norm(torch: Any, module: Any, graph: onnx.GraphProto) -> None:  # noqa: ANN401
    """Dynamo writes every BatchNorm as frozen; those in training mode are set to train again."""
    nodes = [n for n in graph.node if n.op_type == "BatchNormalization"]
    for name, part in module.named_modules():
        batch_norm = isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
        if not batch_norm or not part.training or part.running_mean is None:
            continue
        prefix = f"{name}." if name else ""
        mine = [n for n in nodes if n.input[3] == f"{prefix}running_mean"]
        if not mine or part.momentum is None:
            raise ArtifactError(
                f"BatchNorm {name!r} keeps its statistics in a way that is lost in export "
                f"(momentum {part.momentum}); give it a momentum, or freeze it with .eval()"
            )
        for node in mine:
            kept = [a for a in node.attribute if a.name not in ("training_mode", "momentum")]
            del node.attribute[:]
            node.attribute.extend(kept)
            node.attribute.append(onnx.helper.make_attribute("training_mode", 1))
            node.attribute.append(onnx.helper.make_attribute("momentum", 1 - part.momentum))
            node.output[1:] = [f"{node.output[0]}/{n}" for n in ("mean", "variance")]


def _check_params(module: Any, model: onnx.ModelProto) -> tuple[tuple[str, ...], tuple[str, ...]]:  # noqa: ANN401
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    trainable: list[str] = []
    frozen: list[str] = []
    for name, tensor in module.named_parameters():
        if name not in shapes and not tensor.requires_grad:
            continue
        if shapes.get(name) != tuple(tensor.shape):
            raise ArtifactError(
                f"parameter {name!r} {tuple(tensor.shape)} is {shapes.get(name, 'missing')} in "
                f"the exported model: forward does not use it, or the exporter rewrote it; "
                f"remove it, freeze it if it is unused (requires_grad_(False)), or export to ONNX "
                f"yourself and build from that"
            )
        (trainable if tensor.requires_grad else frozen).append(name)
    buffers = {n for n, b in module.named_buffers() if b.is_floating_point() and b.ndim}
    used = [n for n, _ in module.named_parameters() if n in shapes]
    return (*used, *sorted(buffers & shapes.keys())), tuple(trainable)


def _reset(module: Any, model: onnx.ModelProto) -> None:  # noqa: ANN401
    """Give params and buffers the module's own values: tracing runs it, which moves statistics."""
    values = {n: v.detach().cpu() for n, v in module.state_dict(keep_vars=True).items()}
    for tensor in model.graph.initializer:
        if tensor.name in values and values[tensor.name].is_floating_point():
            array = np.ascontiguousarray(values[tensor.name].numpy(), np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


@contextlib.contextmanager
def _export_errors(kind: str) -> Iterator[None]:
    try:
        yield
    except Exception as exc:  # torch.onnx raises many kinds
        text = " ".join(str(exc).split())[:500]
        raise ArtifactError(f"torch cannot export this module ({kind}): {text}") from exc


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters announce deprecations, missing packages, and a whole graph where they fail.

    That graph is printed from C++, whatever torch is told, so file descriptor 1 is put aside.
    """
    log = logging.getLogger("torch.onnx")
    level, kept = log.level, os.dup(1)
    log.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            Path(os.devnull).open("w") as nowhere,
        ):
            os.dup2(nowhere.fileno(), 1)
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        log.setLevel(level)
