"""ONNX Runtime's own training artifacts, made in the interpreter that holds its training wheel.

``python -m fedge.artifacts.ort_artifacts`` is the worker: ``build`` turns a model into the four
files, ``step`` takes one training step with them. It needs numpy, onnx and the training wheel,
nothing else. The parent's side is :mod:`fedge.artifacts.ort_build`.

The wheel is onnxruntime-training-cpu 1.19.2; what is repaired here is what it gets wrong:

- LayerNormalization, SimplifiedLayerNormalization and Dropout need their optional outputs named;
- BatchNormalization in inference mode is differentiated as if in training mode, so it is
  rewritten as a scale and a shift; its optional outputs break the eval model and are cut there;
- HardSigmoid, HardSwish and InstanceNormalization have no gradient and are spelled out;
- BatchNormalization in training mode keeps the batch's variance as it is, torch n/(n − 1) of it;
- its BCE-with-logits block overflows from a logit of 17 on, so losses are written here;
- its AdamW is Hugging Face's variant unless ``adam_mode`` is 0;
- its optimizer model carries an IR version it cannot read.
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
from fedge.artifacts.strip import strip
from fedge.errors import EngineError
from fedge.losses import TEACHER
from fedge.pipe import Frame, serve
from fedge.types import Params

TRAINING, EVALUATION, OPTIMIZER, CHECKPOINT = ORT_FILES
_MAX_IR_VERSION = 10
_GIVEN = ("labels", TEACHER)  # inputs of a loss model that are inputs of training
_HIDDEN_OUTPUTS = {
    "LayerNormalization": ("mean", "inv_std"),
    "SimplifiedLayerNormalization": ("mean", "inv_std"),
    "Dropout": ("mask",),
}


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
    _repair(model)
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
    _unroll_relu_grad(made[TRAINING])
    _unbias_variance(made[TRAINING])
    _trim_batch_norm(made[EVALUATION])
    _set_optimizer(made[OPTIMIZER], optimizer)
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


def _repair(model: onnx.ModelProto) -> None:
    nodes = []
    for node in model.graph.node:
        if node.op_type == "BatchNormalization" and not _attribute(node, "training_mode", 0):
            nodes += _scale_and_shift(node, _rank(model, node.input[0]))
            continue
        if node.op_type in _SPELLED_OUT:
            nodes += _SPELLED_OUT[node.op_type](node, _rank(model, node.input[0]))
            continue
        hidden = _HIDDEN_OUTPUTS.get(node.op_type, ())[len(node.output) - 1 :]
        node.output.extend(f"{node.output[0]}/{name}" for name in hidden)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _scale_and_shift(node: onnx.NodeProto, rank: int) -> list[onnx.NodeProto]:
    """(x − mean) / √(var + ε) · scale + bias, per channel (axis 1)."""
    x, scale, bias, mean, var = node.input
    at, y = f"{node.output[0]}/bn", node.output[0]
    shape = numpy_helper.from_array(np.array([-1] + [1] * (rank - 2), np.int64))
    half = numpy_helper.from_array(np.float32(0.5))
    eps = numpy_helper.from_array(np.float32(_attribute(node, "epsilon", 1e-5)))
    make = helper.make_node
    steps = [
        make("Constant", [], [f"{at}/shape"], value=shape),
        make("Constant", [], [f"{at}/half"], value=half),
        make("Constant", [], [f"{at}/eps"], value=eps),
        make("Add", [var, f"{at}/eps"], [f"{at}/var"]),
        make("Pow", [f"{at}/var", f"{at}/half"], [f"{at}/std"]),
        make("Div", [scale, f"{at}/std"], [f"{at}/factor"]),
        make("Mul", [mean, f"{at}/factor"], [f"{at}/moved"]),
        make("Sub", [bias, f"{at}/moved"], [f"{at}/offset"]),
    ]
    shaped = [
        make("Reshape", [f"{at}/{name}", f"{at}/shape"], [f"{at}/{name}_c"])
        for name in ("factor", "offset")
    ]
    return [
        *steps,
        *shaped,
        make("Mul", [x, f"{at}/factor_c"], [f"{at}/scaled"]),
        make("Add", [f"{at}/scaled", f"{at}/offset_c"], [y]),
    ]


def _instance_norm(node: onnx.NodeProto, rank: int) -> list[onnx.NodeProto]:
    """(x − mean) / √(variance + ε) · scale + bias, over the positions of each row and channel."""
    x, scale, bias = node.input
    at, y = f"{node.output[0]}/in", node.output[0]
    shape = numpy_helper.from_array(np.array([-1] + [1] * (rank - 2), np.int64))
    eps = numpy_helper.from_array(np.float32(_attribute(node, "epsilon", 1e-5)))
    make, space = helper.make_node, list(range(2, rank))
    return [
        make("Constant", [], [f"{at}/shape"], value=shape),
        make("Constant", [], [f"{at}/eps"], value=eps),
        make("ReduceMean", [x], [f"{at}/mean"], axes=space),
        make("Sub", [x, f"{at}/mean"], [f"{at}/centered"]),
        make("Mul", [f"{at}/centered", f"{at}/centered"], [f"{at}/square"]),
        make("ReduceMean", [f"{at}/square"], [f"{at}/variance"], axes=space),
        make("Add", [f"{at}/variance", f"{at}/eps"], [f"{at}/above"]),
        make("Sqrt", [f"{at}/above"], [f"{at}/std"]),
        make("Div", [f"{at}/centered", f"{at}/std"], [f"{at}/unit"]),
        make("Reshape", [scale, f"{at}/shape"], [f"{at}/scale"]),
        make("Reshape", [bias, f"{at}/shape"], [f"{at}/bias"]),
        make("Mul", [f"{at}/unit", f"{at}/scale"], [f"{at}/scaled"]),
        make("Add", [f"{at}/scaled", f"{at}/bias"], [y]),
    ]


def _hard_sigmoid(node: onnx.NodeProto, _rank: int) -> list[onnx.NodeProto]:
    """min(1, max(0, αx + β))."""
    alpha, beta = _attribute(node, "alpha", 0.2), _attribute(node, "beta", 0.5)
    return _ramp(node.input[0], node.output[0], (alpha, beta))


def _hard_swish(node: onnx.NodeProto, _rank: int) -> list[onnx.NodeProto]:
    """x · min(1, max(0, x/6 + 1/2))."""
    x, y = node.input[0], node.output[0]
    ramp = f"{y}/ramp"
    return [*_ramp(x, ramp, (1 / 6, 0.5)), helper.make_node("Mul", [x, ramp], [y])]


def _ramp(x: str, y: str, line: tuple[float, float]) -> list[onnx.NodeProto]:
    make = helper.make_node
    values = dict(zip(("alpha", "beta", "low", "high"), (*line, 0.0, 1.0), strict=True))
    constants = [
        make("Constant", [], [f"{y}/{n}"], value=numpy_helper.from_array(np.float32(v)))
        for n, v in values.items()
    ]
    return [
        *constants,
        make("Mul", [x, f"{y}/alpha"], [f"{y}/steep"]),
        make("Add", [f"{y}/steep", f"{y}/beta"], [f"{y}/line"]),
        make("Clip", [f"{y}/line", f"{y}/low", f"{y}/high"], [y]),
    ]


_SPELLED_OUT = {
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "InstanceNormalization": _instance_norm,
}


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


def _trim_batch_norm(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            del node.output[1:]


def _unbias_variance(model: onnx.ModelProto) -> None:
    """Running variances take n/(n − 1) of the batch's, as torch's do; the kernel takes n/n.

    The kernel has written v ← m·v + (1 − m)·b over the param; (1 − m)·b/(n − 1) is added there.
    """
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type == "BatchNormInternal":
            nodes += _missing_variance(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _missing_variance(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    x, scale, running, inverse = node.input[0], node.input[1], node.output[2], node.output[4]
    at, make = f"{running}/unbiased", helper.make_node
    values = {
        "eps": _attribute(node, "epsilon", 1e-5),
        "share": 1 - _attribute(node, "momentum", 0.9),
        "one": 1.0,
    }
    return [
        *(
            make("Constant", [], [f"{at}/{n}"], value=numpy_helper.from_array(np.float32(v)))
            for n, v in values.items()
        ),
        make("Constant", [], [f"{at}/no"], value=numpy_helper.from_array(np.zeros(1, bool))),
        make("Size", [x], [f"{at}/all"]),
        make("Size", [scale], [f"{at}/channels"]),
        make("Div", [f"{at}/all", f"{at}/channels"], [f"{at}/count"]),
        make("Cast", [f"{at}/count"], [f"{at}/n"], to=int(TensorProto.FLOAT)),
        make("Sub", [f"{at}/n", f"{at}/one"], [f"{at}/n_less"]),
        make("Max", [f"{at}/n_less", f"{at}/one"], [f"{at}/free"]),
        make("Div", [f"{at}/share", f"{at}/free"], [f"{at}/factor"]),
        make("Mul", [inverse, inverse], [f"{at}/precision"]),
        make("Div", [f"{at}/one", f"{at}/precision"], [f"{at}/above"]),
        make("Sub", [f"{at}/above", f"{at}/eps"], [f"{at}/variance"]),
        make("Mul", [f"{at}/variance", f"{at}/factor"], [f"{at}/missing"]),
        make(
            "InPlaceAccumulatorV2",
            [running, f"{at}/missing", f"{at}/no"],
            [f"{at}/done"],
            domain="com.microsoft",
        ),
    ]


def _unroll_relu_grad(model: onnx.ModelProto) -> None:
    """ReluGrad(dY, X or Y) as dY·sign(Y), Y being what Relu gave.

    The kernel of 1.19.2 branches per element: 1.7 µs for 512 of them, a tenth of a small step.
    """
    relus = [n for n in model.graph.node if n.op_type == "Relu"]
    given = {name: n.output[0] for n in relus for name in (n.input[0], n.output[0])}
    nodes = []
    for node in model.graph.node:
        if node.op_type != "ReluGrad" or node.input[1] not in given:
            nodes.append(node)
            continue
        mask = f"{node.output[0]}/mask"
        nodes.append(onnx.helper.make_node("Sign", [given[node.input[1]]], [mask]))
        nodes.append(onnx.helper.make_node("Mul", [node.input[0], mask], list(node.output)))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _set_optimizer(model: onnx.ModelProto, optimizer: Optimizer) -> None:
    if optimizer.name != "adamw":
        return
    s = optimizer.settings
    wanted: dict[str, Any] = {
        "adam_mode": 0,
        "alpha": s["beta1"],
        "beta": s["beta2"],
        "epsilon": s["eps"],
        "weight_decay": s["weight_decay"],
    }
    for node in model.graph.node:
        if node.op_type == "AdamWOptimizer":
            kept = [a for a in node.attribute if a.name not in wanted]
            del node.attribute[:]
            node.attribute.extend(kept)
            node.attribute.extend(helper.make_attribute(n, v) for n, v in wanted.items())


def _attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    found = [helper.get_attribute_value(a) for a in node.attribute if a.name == name]
    return found[0] if found else default


def _rank(model: onnx.ModelProto, name: str) -> int:
    infos = [*model.graph.value_info, *model.graph.input]
    return next(len(i.type.tensor_type.shape.dim) for i in infos if i.name == name)


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
