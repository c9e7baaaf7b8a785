"""A user's ONNX model brought into the one form the builder works on (build side only).

One file without external data, default operator set 13 to 24, IR version at most 10, no texts, no
functions; the first dimension of every input and output is the symbolic ``N``, others may be
symbolic under names of their own. What follows from constants and sizes alone is folded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto, helper, inliner, version_converter

from fedge.artifacts.admission import MAX_IR_VERSION, MAX_OPSETS, admit_model
from fedge.artifacts.bundle import MAX_FILE_BYTES
from fedge.artifacts.manifest import BATCH, SYMBOL, TensorSpec
from fedge.artifacts.strip import strip
from fedge.autodiff.shapes import Sizes, infer_shapes
from fedge.autodiff.simplify import simplify
from fedge.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterable

MIN_OPSET = 13
COMMON_OPSET = 21  # the newest that onnxruntime-training 1.19 reads
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
    what = f"{len(data)} bytes" if isinstance(source, bytes) else str(source)
    try:
        model = onnx.load_model_from_string(data)
    except Exception as exc:  # protobuf's DecodeError, by more than one name
        raise ArtifactError(f"{what}: not an ONNX model: {exc}") from exc
    if not model.HasField("graph"):
        raise ArtifactError(f"{what}: not an ONNX model: it has no graph")
    return model


def normalize(model: onnx.ModelProto, sizes: Sizes | None = None) -> onnx.ModelProto:
    """A checked copy in the builder's form.

    Args:
        model: As exported.
        sizes: For symbolic dimensions other than the batch, a size that the model accepts.

    Raises:
        ArtifactError: Naming what cannot be used, and how to export the model instead.
    """
    _refuse_external(model)
    model = inliner.inline_local_functions(model) if model.functions else model
    model = _convert_opset(model)
    strip(model)
    model.ir_version = min(max(model.ir_version, 8), MAX_IR_VERSION)
    inputs = graph_inputs(model)
    initializers = {i.name for i in model.graph.initializer}
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    _check_names([*(i.name for i in inputs), *(o.name for o in model.graph.output), *initializers])
    admit_model(model.SerializeToString())
    for info in model.graph.input:
        _fix_input(info)
    return _infer_shapes(simplify(model, sizes), sizes)


def keep_output(model: onnx.ModelProto, name: str) -> None:
    """Make one value the model's only output, in place, and drop what it does not need.

    Raises:
        ArtifactError: If no node computes it.
    """
    graph = model.graph
    if not any(name in n.output for n in graph.node):
        last = [o for n in graph.node for o in n.output][-8:]
        raise ArtifactError(f"no node of the model gives {name!r}; the last give {', '.join(last)}")
    needed, nodes = {name}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    tensors = [t for t in graph.initializer if t.name in needed]
    inputs = [i for i in graph.input if i.name in needed]
    del graph.node[:], graph.initializer[:], graph.input[:], graph.output[:]
    graph.node.extend(reversed(nodes))
    graph.initializer.extend(tensors)
    graph.input.extend(inputs)
    graph.output.add(name=name)


def graph_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that are no initializers."""
    constants = {i.name for i in model.graph.initializer}
    return [i for i in model.graph.input if i.name not in constants]


def specs(infos: Iterable[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """Graph inputs or outputs as manifest entries."""
    return tuple(
        TensorSpec(i.name, _DTYPES[i.type.tensor_type.elem_type], _shape(i)) for i in infos
    )


def _refuse_external(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.external_data or tensor.data_location == TensorProto.EXTERNAL:
            raise ArtifactError(
                f"tensor {tensor.name!r} lies in another file; save the model as one file: "
                f"onnx.save(onnx.load(path), path, save_as_external_data=False)"
            )


def _convert_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """To a version both engines read; a newer operator's own is kept, for stock ONNX Runtime."""
    version = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    wanted = min(max(version, MIN_OPSET), COMMON_OPSET)
    if version == wanted:
        return model
    try:
        return version_converter.convert_version(model, wanted)
    except Exception as exc:  # the converter raises whatever its C++ side raised
        if wanted < version <= MAX_OPSETS[""]:
            return model
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
        elif dim.dim_value < 1 and (not SYMBOL.fullmatch(dim.dim_param) or dim.dim_param == BATCH):
            raise ArtifactError(
                f"input {info.name!r} leaves dimension {axis} open ({dim.dim_param or '?'}); give "
                f"it a fixed size, or a name of its own of letters and digits, such as T"
            )


def _infer_shapes(model: onnx.ModelProto, sizes: Sizes | None) -> onnx.ModelProto:
    """Write down the type of every value; sizes that are no symbol alone are left open."""
    found = infer_shapes(model, sizes)
    outputs = [o.name for o in model.graph.output]
    for name in outputs:
        shape = found[name][1] if name in found else ()
        if not shape or shape[0] != BATCH or not all(_is_size(d) for d in shape):
            raise ArtifactError(
                f"output {name!r} has shape {list(shape)}; wanted the batch first and fixed or "
                f"named sizes after it; export the model with a symbolic batch dimension"
            )
    infos = {
        n: helper.make_tensor_value_info(n, t, [d if _is_size(d) else None for d in shape])
        for n, (t, shape) in found.items()
    }
    outside = {*outputs, *(i.name for i in (*model.graph.input, *model.graph.initializer))}
    del model.graph.output[:], model.graph.value_info[:]
    model.graph.output.extend(infos[n] for n in outputs)
    model.graph.value_info.extend(i for n, i in infos.items() if n not in outside)
    return model


def _is_size(dim: int | str) -> bool:
    return isinstance(dim, int) or SYMBOL.fullmatch(dim) is not None


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
