"""Shape inference in which the batch may grow.

ONNX's own inference loses a symbolic size at the first Reshape. So it runs twice with two large
prime numbers of rows: what is equal in both is fixed, what is p times the number of rows is
``"p*N"`` (``"N"`` for p = 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from fedge.artifacts.manifest import BATCH
from fedge.errors import ArtifactError

_ROWS = (7919, 7927)  # primes no layer has as its size

Shape = tuple[int | str, ...]


def infer_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, Shape]]:
    """Element type and shape of every value; what cannot be inferred is left out.

    Raises:
        ArtifactError: If an input's first dimension is fixed or a later one is not, or the
            operators do not fit each other.
    """
    few, many = (_infer(model, rows) for rows in _ROWS)
    shapes: dict[str, tuple[int, Shape]] = {}
    for name in few.keys() & many.keys():
        (dtype, small), (_, large) = few[name], many[name]
        shapes[name] = (dtype, tuple(_dim(a, b) for a, b in zip(small, large, strict=True)))
    return shapes


def _dim(few: int, many: int) -> int | str:
    if few == many:
        return few
    times, rest = divmod(few, _ROWS[0])
    if rest or many != times * _ROWS[1]:
        return f"{BATCH}?{few}"  # grows otherwise; equal only to itself
    return BATCH if times == 1 else f"{times}*{BATCH}"


def _infer(model: onnx.ModelProto, rows: int) -> dict[str, tuple[int, Sequence[int]]]:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    del graph.value_info[:]
    constants = {i.name for i in graph.initializer}
    for value in graph.input:
        if value.name not in constants:
            _set_rows(value, rows)
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as exc:
        raise ArtifactError(f"the model's shapes do not fit each other: {exc}") from exc
    found: dict[str, tuple[int, Sequence[int]]] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            found[value.name] = (tensor.elem_type, [d.dim_value for d in tensor.shape.dim])
    return found


def _set_rows(value: onnx.ValueInfoProto, rows: int) -> None:
    dims = value.type.tensor_type.shape.dim
    shape = [d.dim_value if d.HasField("dim_value") else (d.dim_param or "?") for d in dims]
    if not dims or dims[0].HasField("dim_value"):
        raise ArtifactError(
            f"input {value.name!r} has shape {shape}; its first dimension must be the batch and "
            "symbolic: export the model with a dynamic batch size"
        )
    if any(not d.HasField("dim_value") for d in dims[1:]):
        raise ArtifactError(
            f"input {value.name!r} has shape {shape}; only the first dimension may be symbolic: "
            "export the model with the other sizes fixed"
        )
    dims[0].dim_value = rows
