"""A user's loss, an ONNX model, joined to the model it judges."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import version_converter

from fedge.artifacts.manifest import BATCH, LabelSpec
from fedge.autodiff.losses.base import LABELS, want
from fedge.autodiff.ops import Value, shape_of
from fedge.autodiff.prepare import Forward, load, normalize, opset_of
from fedge.errors import ArtifactError
from fedge.losses import Onnx

_DTYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}
_FORM = "wanted inputs 'labels' and model outputs, and one output: the loss, float32 of rank 0"


def fitted(s: Onnx, outputs: list[Value], opset: int) -> onnx.ModelProto:
    """The loss model in the operator set of the model, its inputs named and shaped as the outputs.

    Raises:
        ConfigError: If it does not have the form of a loss, or does not fit the outputs.
        ArtifactError: If it cannot be brought to the model's operator set.
    """
    model = s.model if isinstance(s.model, onnx.ModelProto) else _parse(s.model)
    if opset_of(model) != opset:
        model = _converted(model, opset)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    constants = {i.name for i in copy.graph.initializer}
    kept = [i for i in copy.graph.input if i.name not in constants]
    del copy.graph.input[:]
    copy.graph.input.extend(kept)
    inputs = list(copy.graph.input)
    others = [i for i in inputs if i.name != LABELS]
    want(
        len(others) == len(inputs) - 1 >= 1 and len(copy.graph.output) == 1,
        f"the loss model takes {[i.name for i in inputs]} and gives "
        f"{[o.name for o in copy.graph.output]}; {_FORM}",
    )
    label_spec(s, copy)
    known = {v.name: v for v in outputs}
    for info in others:
        alone = len(others) == 1 and info.name not in known
        _shape_as(info, outputs[0] if alone else _named(known, info.name))
    return normalize(copy)


def label_spec(s: Onnx, model: onnx.ModelProto) -> LabelSpec:
    """What a loss model's labels look like.

    Raises:
        ConfigError: If they are neither int64 nor float32, or have a symbolic size but the first.
    """
    info = next(i for i in model.graph.input if i.name == LABELS)
    dtype = _DTYPES.get(info.type.tensor_type.elem_type)
    dims = info.type.tensor_type.shape.dim
    fixed = [d.dim_value for d in dims[1:]]
    ok = dtype is not None and len(dims) > 0 and all(d > 0 for d in fixed)
    want(ok and not dims[0].dim_value, "the loss model's labels: int64 or float32, [N, fixed …]")
    return LabelSpec(LABELS, str(dtype), (BATCH, *fixed), s.low, s.high)


def splice(forward: Forward, model: onnx.ModelProto, labels: Value) -> Value:
    """Append a fitted loss model to the forward graph; returns its output.

    Raises:
        ConfigError: If the output is no float32 of rank 0.
    """
    part = load(_renamed(model), ())
    ends = {v.name: v for v in forward.graph.outputs}
    for value in part.inputs:
        name = str(value.name).removeprefix(_PREFIX)
        source = labels if name == _LABELS else ends.get(name, forward.graph.outputs[0])
        ir.convenience.replace_all_uses_with(value, source)
    (loss,) = part.graph.outputs
    ok = loss.shape is not None and len(loss.shape) == 0 and loss.dtype == ir.DataType.FLOAT
    want(ok, f"the loss model's output has shape {loss.shape}; {_FORM}")
    for constant in list(part.graph.initializers.values()):
        part.graph.initializers.pop(str(constant.name))
        forward.graph.register_initializer(constant)
    nodes = list(part.graph)
    part.graph.outputs.clear()
    part.graph.remove(nodes)
    forward.graph.extend(nodes)
    for domain, version in part.model.opset_imports.items():
        forward.model.opset_imports.setdefault(domain, version)
    return loss


_PREFIX, _LABELS = "loss/", "answers"  # the names 'labels' and 'loss' are the training graphs'


def _renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every value under a name no model has."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph

    def new(name: str) -> str:
        return name and _PREFIX + (_LABELS if name == LABELS else name)

    for number, node in enumerate(graph.node):
        node.input[:] = [new(n) for n in node.input]
        node.output[:] = [new(n) for n in node.output]
        node.name = f"{_PREFIX}{number}"
    for named in (*graph.input, *graph.output, *graph.initializer):
        named.name = new(named.name)
    return copy


def _shape_as(info: onnx.ValueInfoProto, output: Value) -> None:
    tensor = info.type.tensor_type
    ok = tensor.elem_type == onnx.TensorProto.FLOAT
    want(ok, f"the loss model's input {info.name!r} must be float32")
    tensor.ClearField("shape")
    for dim in shape_of(output):
        added = tensor.shape.dim.add()
        if isinstance(dim, int):
            added.dim_value = dim
        else:
            added.dim_param = dim


def _named(known: dict[str, Value], name: str) -> Value:
    want(name in known, f"the loss model takes {name!r}; the model gives {', '.join(known)}")
    return known[name]


def _parse(data: bytes) -> onnx.ModelProto:
    want(isinstance(data, bytes), "the loss model is missing; give fedge.losses.Onnx its model")
    return onnx.load_model_from_string(data)


def _converted(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    try:
        return version_converter.convert_version(model, opset)
    except Exception as exc:  # the converter raises whatever its C++ side raised
        raise ArtifactError(
            f"the loss model uses opset {opset_of(model)}, the model {opset}: {exc}; "
            f"export the loss with opset {opset}"
        ) from exc
