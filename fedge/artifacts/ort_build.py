"""The builder's side of ONNX Runtime's training artifacts: start the worker, judge its result."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import onnx

from fedge import tensors
from fedge.artifacts.admission import admit_model
from fedge.artifacts.bundle import Reference
from fedge.artifacts.manifest import ORT_FILES, Optimizer, ParamSpec
from fedge.artifacts.ort_import import TRAINING_PYTHON, find_training_python
from fedge.autodiff import TrainingGraphs
from fedge.autodiff.dropout import explicit_dropout
from fedge.errors import AdmissionError, EngineError, FedgeError
from fedge.losses import Loss, settings_of
from fedge.params import gradient_distance
from fedge.pipe import Child
from fedge.types import Params

AGREEMENT = 1e-5  # ‖Δ‖₂/‖reference‖₂ per tensor: what "to 1e-5" means everywhere
_TIMEOUT_S = 600.0
_NO_GRADIENT = re.compile(r"gradient builder has not been registered: (\w+)", re.IGNORECASE)
_NO_KERNEL = re.compile(r"operator 'com.microsoft:(\w+)Grad' is not on the list")


@dataclass(frozen=True)
class OrtRequest:
    """What to build: the forward model, its loss, the optimizer, sizes of further symbols."""

    model: onnx.ModelProto
    loss: Loss
    params: tuple[ParamSpec, ...]
    optimizer: Optimizer
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class OrtFiles:
    """The four files, or the reason why there are none."""

    files: dict[str, bytes] = field(default_factory=dict)
    reason: str = ""
    provenance: dict[str, str] = field(default_factory=dict)


def build_ort_files(
    request: OrtRequest, graphs: TrainingGraphs, recorded: Reference, values: Params
) -> OrtFiles:
    """Make the artifacts, take one step with them and compare it with the recorded one.

    Args:
        request: What to build.
        graphs: fedge's own; labels and the loss are as there.
        recorded: The reference step, from ``grad.onnx``.
        values: Every param at which it was recorded.

    Returns:
        The files, or why ONNX Runtime cannot make or use them: an operator it lacks, or a loss or
        gradient that differs from the recorded one.
    """
    reason = _without_a_kernel(request.model)
    if reason:
        return OrtFiles(reason=reason)
    settings = {k: v for k, v in request.optimizer.settings.items() if v}
    if request.optimizer.name == "sgd" and settings:
        return OrtFiles(reason=f"ONNX Runtime's SGD has no {', '.join(sorted(settings))}")
    python = find_training_python()
    if python is None:
        return OrtFiles(
            reason=f"the builder's host has no training interpreter ({TRAINING_PYTHON})"
        )
    try:
        with Child("fedge.artifacts.ort_artifacts", python, hush=True) as child:
            files, version = _build(child, request, graphs)
            loss, grads = _step(child, files, recorded, values)
    except (AdmissionError, EngineError) as exc:
        return OrtFiles(reason=_reason(exc))
    reason = _difference(loss, grads, recorded)
    if reason:
        return OrtFiles(reason=reason)
    return OrtFiles(files, provenance={"onnxruntime-training": version})


def _build(
    child: Child, request: OrtRequest, graphs: TrainingGraphs
) -> tuple[dict[str, bytes], str]:
    header = {
        "loss": "" if settings_of(request.loss) else request.loss.name,
        "labels": asdict(graphs.labels),
        "optimizer": asdict(request.optimizer),
        "trainable": [p.name for p in request.params if p.trainable],
        "frozen": [p.name for p in request.params if not p.trainable],
    }
    model, _ = explicit_dropout(request.model, request.sizes)
    sent = [m.SerializeToString() for m in (model, graphs.loss)]
    answer, blobs = child.call("build", header, sent, _TIMEOUT_S)
    files = dict(zip(ORT_FILES, blobs, strict=True))
    for name in files:
        if name.endswith(".onnx"):
            files[name] = admit_model(files[name], "ort-training")
    return files, str(answer["version"])


def _step(
    child: Child, files: Mapping[str, bytes], recorded: Reference, values: Params
) -> tuple[float, Params]:
    fed = {**recorded.examples.inputs, "labels": recorded.examples.labels}
    header = {"files": list(files), "trainable": list(recorded.grads)}
    blobs = [*files.values(), tensors.dump(fed), tensors.dump(values)]
    answer, found = child.call("step", header, blobs, _TIMEOUT_S)
    return float(answer["loss"]), tensors.load(found[0])[0]


def _difference(loss: float, grads: Params, recorded: Reference) -> str:
    if not abs(loss - recorded.loss) <= AGREEMENT * max(abs(recorded.loss), 1e-12):
        return (
            f"the engines disagree: loss {loss!r} by ONNX Runtime's training API, "
            f"{recorded.loss!r} by grad.onnx; please report this model"
        )
    for name, distance in gradient_distance(grads, recorded.grads).items():
        if not distance <= AGREEMENT:
            return (
                f"the engines disagree: the gradient of {name!r} by ONNX Runtime's training API "
                f"is {distance:.1e} off that of grad.onnx; please report this model"
            )
    return ""


def _without_a_kernel(model: onnx.ModelProto) -> str:
    """What ONNX Runtime 1.19.2 accepts and then cannot run, or dies of."""
    infos = [*model.graph.value_info, *model.graph.input]
    shapes = {i.name: i.type.tensor_type.shape.dim for i in infos}
    for node in model.graph.node:
        attributes = {a.name: a for a in node.attribute}
        if node.op_type in ("LSTM", "GRU") and "direction" in attributes:
            direction = attributes["direction"].s.decode()
            if direction != "forward":
                return f"ONNX Runtime has no gradient for {node.op_type} in direction {direction}"
        if node.op_type == "AveragePool":
            return "ONNX Runtime has no gradient for AveragePool with a symbolic batch"
        dims = list(shapes.get(node.input[0], ())) if node.op_type == "MaxPool" else []
        if not all(d.HasField("dim_value") for d in dims[2:]):
            return "ONNX Runtime has no gradient for MaxPool of sizes that may vary"
    return ""


def _reason(exc: FedgeError) -> str:
    found = _NO_GRADIENT.search(str(exc)) or _NO_KERNEL.search(str(exc))
    if found:
        return f"ONNX Runtime has no gradient for {found[1]}"
    text = str(exc)
    return (
        f"ONNX Runtime cannot train this model: {text if len(text) <= 300 else '…' + text[-300:]}"
    )
