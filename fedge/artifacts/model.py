"""A user's ONNX model brought into the one form the builder works on (build side only).

One file without external data, default operator set 13 to 21, IR version at most 10, no texts, no
functions; every input and output has the symbolic first dimension ``N`` and fixed other ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto, shape_inference, version_converter

from fedge.artifacts.admission import MAX_IR_VERSION, MAX_OPSETS, admit_model
from fedge.artifacts.bundle import MAX_FILE_BYTES
from fedge.artifacts.manifest import BATCH, TensorSpec
from fedge.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterable

MIN_OPSET = 13
_RESERVED = ("labels", "loss", "lr")
_DTYPES = {
    TensorProto.FLOAT: "float32",
    TensorProto.DOUBLE: "float64",
    TensorProto.FLOAT16: "float16",
    TensorProto.INT64: "int64",
    TensorProto.INT32: "int32",
    TensorProto.INT16: "int16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "uint8",
    TensorProto.BOOL: "bool",
}


def read_model(source: onnx.ModelProto | bytes | str | Path) -> onnx.ModelProto:
    """Parse a model; external files are never followed.

    Raises:
        ArtifactError: If it is missing, too large or no ONNX model.
    """
    if isinstance(source, onnx.ModelProto):
        copy = onnx.ModelProto()
        copy.CopyFrom(source)
        return copy
    data = source if isinstance(source, bytes) else _read(Path(source))
    try:
        return onnx.load_model_from_string(data)
    except Exception as exc:  # protobuf's DecodeError, by more than one name
        raise ArtifactError(f"not an ONNX model: {exc}") from exc


def normalize(model: onnx.ModelProto) -> onnx.ModelProto:
    """A checked copy in the builder's form.

    Raises:
        ArtifactError: Naming what cannot be used, and how to export the model instead.
    """
    _refuse_external(model)
    model = _convert_opset(model)
    strip(model)
    model.ir_version = min(max(model.ir_version, 8), MAX_IR_VERSION)
    initializers = {i.name for i in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in initializers]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    _check_names([*(i.name for i in inputs), *(o.name for o in model.graph.output), *initializers])
    admit_model(model.SerializeToString())
    for info in model.graph.input:
        _fix_input(info)
    return _infer_shapes(model)


def specs(infos: Iterable[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """Graph inputs or outputs as manifest entries."""
    return tuple(
        TensorSpec(i.name, _DTYPES[i.type.tensor_type.elem_type], _shape(i)) for i in infos
    )


def strip(model: onnx.ModelProto) -> None:
    """Remove, in place, what nothing reads: texts, metadata, unused operator sets."""
    graph = model.graph
    for holder in [model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output]:
        holder.doc_string = ""
        holder.ClearField("doc_string")
        holder.ClearField("metadata_props")
    for node in graph.node:
        node.ClearField("overload")
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            if attribute.HasField("t"):
                _strip_tensor(attribute.t)
    for tensor in graph.initializer:
        _strip_tensor(tensor)
    for info in graph.value_info:
        info.ClearField("doc_string")
        info.ClearField("metadata_props")
    for info in [*graph.input, *graph.output, *graph.value_info]:
        info.type.ClearField("denotation")
        for dim in info.type.tensor_type.shape.dim:
            dim.ClearField("denotation")
    graph.ClearField("quantization_annotation")
    _keep_used_opsets(model)


def _strip_tensor(tensor: TensorProto) -> None:
    tensor.ClearField("doc_string")
    tensor.ClearField("metadata_props")
    if tensor.data_location == TensorProto.DEFAULT:
        tensor.ClearField("data_location")


def _keep_used_opsets(model: onnx.ModelProto) -> None:
    used = {"", *("" if n.domain == "ai.onnx" else n.domain for n in model.graph.node)}
    kept = [o for o in model.opset_import if o.domain in used or o.domain == "ai.onnx"]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _refuse_external(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.external_data or tensor.data_location == TensorProto.EXTERNAL:
            raise ArtifactError(
                f"tensor {tensor.name!r} lies in another file; save the model as one file: "
                f"onnx.save(onnx.load(path), path, save_as_external_data=False)"
            )
    if model.functions:
        raise ArtifactError("the model holds functions; inline them first (onnx.inliner)")


def _convert_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    version = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    wanted = min(max(version, MIN_OPSET), MAX_OPSETS[""])
    if version == wanted:
        return model
    try:
        return version_converter.convert_version(model, wanted)
    except Exception as exc:  # the converter raises whatever its C++ side raised
        raise ArtifactError(
            f"the model uses opset {version}, which cannot be converted to {wanted}: {exc}; "
            f"export it with an opset from {MIN_OPSET} to {MAX_OPSETS['']}"
        ) from exc


def _check_names(names: list[str]) -> None:
    for name in names:
        if name in _RESERVED or "@" in name or not name:
            raise ArtifactError(
                f"{name!r} names an input, output or tensor; training graphs need that name "
                f"themselves (reserved: {', '.join(_RESERVED)} and names with @); rename it"
            )


def _fix_input(info: onnx.ValueInfoProto) -> None:
    tensor = info.type.tensor_type
    if tensor.elem_type not in _DTYPES:
        raise ArtifactError(f"input {info.name!r} is no tensor of a known dtype")
    if not tensor.shape.dim:
        raise ArtifactError(
            f"input {info.name!r} has rank 0; its first dimension must be the batch"
        )
    for axis, dim in enumerate(tensor.shape.dim):
        if axis == 0:
            dim.dim_param = BATCH
        elif dim.dim_value < 1:
            raise ArtifactError(
                f"input {info.name!r} leaves dimension {axis} open ({dim.dim_param or '?'}); only "
                f"the batch, dimension 0, may be symbolic; export it with fixed sizes"
            )


def _infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.ClearField("value_info")
    for info in model.graph.output:
        info.type.tensor_type.ClearField("shape")
    try:
        model = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except Exception as exc:  # InferenceError, or ValueError from below it
        raise ArtifactError(f"the model's shapes do not fit together: {exc}") from exc
    for info in model.graph.output:
        dims = info.type.tensor_type.shape.dim
        if not dims or dims[0].dim_value or any(d.dim_value < 1 for d in dims[1:]):
            raise ArtifactError(
                f"output {info.name!r} has shape {list(_shape(info))}; wanted the batch first and "
                f"fixed sizes after it; export the model with a symbolic batch dimension"
            )
        dims[0].dim_param = BATCH
    return model


def _shape(info: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    dims = info.type.tensor_type.shape.dim
    return tuple(
        d.dim_param or ("?" if d.WhichOneof("value") is None else d.dim_value) for d in dims
    )


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ArtifactError(f"{path} has {size} bytes; at most {MAX_FILE_BYTES}")
        return path.read_bytes()
    except OSError as exc:
        raise ArtifactError(f"cannot read the model {path}: {exc.strerror}") from exc
