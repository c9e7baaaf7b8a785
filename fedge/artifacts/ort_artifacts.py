"""ONNX Runtime's own training artifacts, made in the interpreter that holds its training wheel.

``python -m fedge.artifacts.ort_artifacts`` is the worker: ``build`` turns a model into the four
files, ``step`` takes one training step with them. It needs numpy, onnx and the training wheel,
nothing else. The parent's side is :mod:`fedge.artifacts.ort_build`.

The wheel is onnxruntime-training-cpu 1.19.2. What it gets wrong is put right in
:mod:`fedge.artifacts.ort_repairs`, but for its BCE-with-logits block, which overflows from a
logit of 17 on, so losses are written here, and its optimizer model, which carries an IR version
it cannot read.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fedge import tensors
from fedge.artifacts.manifest import ORT_FILES, LabelSpec, Optimizer
from fedge.artifacts.ort_import import import_training
from fedge.artifacts.ort_repairs import repair_files, repair_model
from fedge.artifacts.strip import strip
from fedge.errors import EngineError
from fedge.losses import TEACHER
from fedge.pipe import Frame, serve
from fedge.types import Params

TRAINING, EVALUATION, OPTIMIZER, CHECKPOINT = ORT_FILES
_MAX_IR_VERSION = 10
_GIVEN = ("labels", TEACHER)  # inputs of a loss model that are inputs of training


def build_files(
    model: onnx.ModelProto,
    loss: str | onnx.ModelProto,
    labels: LabelSpec,
    optimizer: Optimizer,
    params: tuple[Sequence[str], Sequence[str]],
) -> dict[str, bytes]:
    """The four files, by name.

    Args:
        model: Forward model in the builder's form; params are initializers.
        loss: The name of a loss written here, of the first output, or any loss as a model.
        labels: The label input to add.
        optimizer: With all settings filled in.
        params: Names of those trained, and of the others.

    Raises:
        EngineError: If ONNX Runtime cannot differentiate the model, in its words.
    """
    artifacts = import_training("artifacts")
    outputs = [o.name for o in model.graph.output]
    repair_model(model)
    if isinstance(loss, str):
        _append_loss(model, loss, labels)
    else:
        _join_loss(model, loss)
    trainable, frozen = params
    kind = {"adamw": artifacts.OptimType.AdamW, "sgd": artifacts.OptimType.SGD}[optimizer.name]
    with tempfile.TemporaryDirectory(prefix="fedge-ort-") as folder:
        try:
            artifacts.generate_artifacts(
                model,
                requires_grad=list(trainable),
                frozen_params=list(frozen),
                loss=None,
                optimizer=kind,
                artifact_directory=folder,
                additional_output_names=outputs,
                nominal_checkpoint=True,
            )
        except Exception as exc:  # no common base class
            raise EngineError(_first_line(exc)) from exc
        made = {n: onnx.load(Path(folder, n)) for n in (TRAINING, EVALUATION, OPTIMIZER)}
        checkpoint = Path(folder, "nominal_checkpoint").read_bytes()
    repair_files(made[TRAINING], made[EVALUATION], made[OPTIMIZER], optimizer)
    for part in made.values():
        strip(part)
        part.ir_version = min(part.ir_version, _MAX_IR_VERSION)
    return {**{n: m.SerializeToString() for n, m in made.items()}, CHECKPOINT: checkpoint}


def take_step(
    files: dict[str, bytes], inputs: Params, params: Params, trained: Sequence[str]
) -> tuple[float, Params]:
    """Loss and gradients at ``params`` by ONNX Runtime's training API, then an optimizer step.

    Args:
        files: The four files.
        inputs: What the training model takes beside params, by name.
        params: All of them.
        trained: Names of those with gradients.

    Raises:
        EngineError: If ONNX Runtime refuses.
    """
    api = import_training("api")
    with tempfile.TemporaryDirectory(prefix="fedge-ort-") as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        try:
            state = api.CheckpointState.load_checkpoint(f"{folder}/{CHECKPOINT}")
            module = api.Module(f"{folder}/{TRAINING}", state, f"{folder}/{EVALUATION}")
            fill_parameters(module, files[TRAINING], params)
            optimizer = api.Optimizer(f"{folder}/{OPTIMIZER}", module)
            module.train()
            order = [inputs[n] for n in module.input_names()]
            loss = float(np.asarray(module(*order)[0]))
            grads = {n: np.array(state.parameters[n].grad) for n in trained}
            optimizer.step()
        except Exception as exc:  # no common base class
            raise EngineError(_first_line(exc)) from exc
    return loss, grads


def fill_parameters(module: Any, training_model: bytes, params: Params) -> None:  # noqa: ANN401
    """Give a module loaded from a nominal checkpoint its values: one buffer, in graph order."""
    from onnxruntime import OrtValue

    graph = onnx.load_model_from_string(training_model).graph
    order = [i.name for i in graph.input if i.name in params]
    flat = np.concatenate([np.asarray(params[n], np.float32).ravel() for n in order])
    value = OrtValue.ortvalue_from_numpy(flat)
    module.copy_buffer_to_parameters(value._ortvalue, trainable_only=False)


def _append_loss(model: onnx.ModelProto, loss: str, labels: LabelSpec) -> None:
    """Make ``loss`` (rank 0) the only output; the others are kept by name."""
    graph = model.graph
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(labels.dtype))
    z = graph.output[0].name
    graph.input.append(helper.make_tensor_value_info(labels.name, dtype, labels.shape))
    graph.value_info.extend(graph.output)
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("loss", TensorProto.FLOAT, []))
    graph.node.extend(_LOSSES[loss](z, labels.name))


def _join_loss(model: onnx.ModelProto, loss: onnx.ModelProto) -> None:
    """Append a loss model: its inputs are outputs of the model (a single other one the first).

    Every other name of it is put under ``loss/``.
    """
    graph, part = model.graph, loss.graph
    outputs = [o.name for o in graph.output]
    asked = [i for i in part.input if i.name not in outputs and i.name not in _GIVEN]
    kept: dict[str, str] = {n: n for n in (*outputs, *_GIVEN, "")}
    kept |= {i.name: outputs[0] for i in asked}
    kept[part.output[0].name] = "loss"

    def name(old: str) -> str:
        return kept.get(old, f"loss/{old}")

    for number, node in enumerate(part.node):
        node.input[:] = [name(n) for n in node.input]
        node.output[:] = [name(n) for n in node.output]
        node.name = f"loss/{number}"
    for constant in part.initializer:
        constant.name = name(constant.name)
    graph.input.extend(i for i in part.input if i.name in _GIVEN)
    graph.value_info.extend(graph.output)
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("loss", TensorProto.FLOAT, []))
    for node in part.node:
        graph.node.extend(_softplus(node) if node.op_type == "Softplus" else [node])
    graph.initializer.extend(part.initializer)


def _softplus(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """−log σ(−x), which has a gradient here; fedge's losses ask for x ≤ 0 alone."""
    (x,), (y,) = node.input, node.output
    return [
        helper.make_node("Neg", [x], [f"{y}/below"]),
        helper.make_node("Sigmoid", [f"{y}/below"], [f"{y}/share"]),
        helper.make_node("Log", [f"{y}/share"], [f"{y}/log"]),
        helper.make_node("Neg", [f"{y}/log"], [y]),
    ]


def _cross_entropy(z: str, y: str) -> list[onnx.NodeProto]:
    outputs = ["loss", "loss/log_prob"]
    return [helper.make_node("SoftmaxCrossEntropyLoss", [z, y], outputs, reduction="mean")]


def _mse(z: str, y: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Sub", [z, y], ["loss/error"]),
        helper.make_node("Mul", ["loss/error", "loss/error"], ["loss/square"]),
        helper.make_node("ReduceMean", ["loss/square"], ["loss"], keepdims=0),
    ]


def _bce_with_logits(z: str, y: str) -> list[onnx.NodeProto]:
    """Mean of (z + |z|)/2 − zy + log(1 + e^−|z|).

    (z + |z|)/2 and not max(z, 0): with |z|' = 0 at 0 it has the slope 1/2 there, which zero
    initial params hit in their first step.
    """
    half, one = (numpy_helper.from_array(np.float32(v)) for v in (0.5, 1.0))
    make = helper.make_node
    return [
        make("Constant", [], ["loss/half"], value=half),
        make("Constant", [], ["loss/one"], value=one),
        make("Abs", [z], ["loss/abs"]),
        make("Add", [z, "loss/abs"], ["loss/twice"]),
        make("Mul", ["loss/twice", "loss/half"], ["loss/positive"]),
        make("Mul", [z, y], ["loss/hit"]),
        make("Sub", ["loss/positive", "loss/hit"], ["loss/linear"]),
        make("Neg", ["loss/abs"], ["loss/negative"]),
        make("Exp", ["loss/negative"], ["loss/exp"]),
        make("Add", ["loss/exp", "loss/one"], ["loss/sum"]),
        make("Log", ["loss/sum"], ["loss/tail"]),
        make("Add", ["loss/linear", "loss/tail"], ["loss/rows"]),
        make("ReduceMean", ["loss/rows"], ["loss"], keepdims=0),
    ]


_LOSSES = {"bce_with_logits": _bce_with_logits, "cross_entropy": _cross_entropy, "mse": _mse}


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _first_line(exc: Exception) -> str:
    text = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {text}"


def _handle_build(header: dict[str, Any], blobs: list[bytes]) -> Frame:
    labels = LabelSpec(**{**header["labels"], "shape": tuple(header["labels"]["shape"])})
    optimizer = Optimizer(**header["optimizer"])
    model = onnx.load_model_from_string(blobs[0])
    params = (header["trainable"], header["frozen"])
    name = header["loss"]
    loss = name if name in _LOSSES else onnx.load_model_from_string(blobs[1])
    files = build_files(model, loss, labels, optimizer, params)
    return {"version": _version()}, [files[n] for n in ORT_FILES]


def _handle_step(header: dict[str, Any], blobs: list[bytes]) -> Frame:
    fed, params = (tensors.load(b)[0] for b in blobs[-2:])
    files = dict(zip(header["files"], blobs, strict=False))
    loss, grads = take_step(files, fed, params, header["trainable"])
    return {"loss": loss}, [tensors.dump(grads)]


def main() -> int:
    """The worker: answer until the parent closes the pipe.

    Standard error goes nowhere: the gradient builder logs every graph pass to it, whatever the
    severity set. Failures travel as answers.
    """
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    return serve({"build": _handle_build, "step": _handle_step})


if __name__ == "__main__":
    sys.exit(main())
