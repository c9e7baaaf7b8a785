"""ONNX's own examples of every operator, made ready for differentiation."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, defs, helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases

from fedge.autodiff.prepare import BASE_OPSET, MAX_IR_VERSION, OPSETS, RESERVED
from fedge.types import Array

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
_TYPE_ATTRIBUTES = {"to", "dtype", "output_dtype", "stash_type", "softmax_precision"}
# Codes 0 to 255 of size 1/160 around 120 reach from −0.753125 to 0.846875.
_QUANTIZE = "s = Constant <value_float = 0.00625> () z = Constant <value = uint8 {120}> () "
_Category = defs.OpSchema.DifferentiationCategory


@dataclass(frozen=True)
class Case:
    """One example.

    Attributes:
        name: ONNX's name for it.
        operator: What it shows, with its domain unless that is ONNX's own.
        model: In float32; arrays nobody differentiates by are initializers.
        feeds: The other inputs: arrays, or lists where the model wants sequences.
        by: Those to differentiate by.
        of: The outputs to differentiate.
        discrete: Why there is nothing to differentiate; empty if there is.
        smooth: What the differences are taken of where the operator itself moves in steps, and its
            gradient passes straight through.
    """

    name: str
    operator: str
    model: ModelProto
    feeds: dict[str, Any]
    by: tuple[str, ...]
    of: tuple[str, ...]
    discrete: str
    smooth: ModelProto | None = None


@cache
def node_cases() -> tuple[Case, ...]:
    """All node cases of the installed ONNX, an operator's body (``…_expanded``) counted as it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # examples overflow on purpose
        found = collect_testcases(None)
    operators = {c.name: _operator(c.model.graph.node[0]) for c in found}
    theirs = [_case(c, operators.get(_base(c.name), operators[c.name])) for c in found]
    return (*theirs, *own_cases())


def own_cases() -> Iterator[Case]:
    """Examples of operators that ONNX has none of with floating-point numbers."""
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    bodies = {
        "own_global_lp_pool": "y = GlobalLpPool (x)",
        "own_global_lp_pool_3": "y = GlobalLpPool <p = 3> (x)",
        "own_trilu": "y = Trilu (x)",
        "own_trilu_lower": "k = Constant <value_int = 1> () y = Trilu <upper = 0> (x, k)",
        "own_quantize": _QUANTIZE + "q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z)",
    }
    for name, body in bodies.items():
        smooth = None
        if "Quantize" in body:
            smooth = _own(
                _QUANTIZE + "l = Constant <value_float = -0.753125> () "
                "h = Constant <value_float = 0.846875> () y = Clip (x, l, h)"
            )
        operator = next(n.op_type for n in _own(body).graph.node if n.op_type != "Constant")
        yield Case(name, operator, _own(body), {"x": x}, ("x",), ("y",), "", smooth)


def _own(body: str) -> ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> '
        f"own (float[2,3,4,5] x) => (float[a,b,c,d] y) {{{body}}}"
    )


def differentiable_operators() -> tuple[str, ...]:
    """The operators whose schema says that an input and an output are differentiable."""
    return tuple(
        sorted(
            s.name
            for s in defs.get_all_schemas()
            if s.domain == "" and not s.deprecated and _differentiable(s)
        )
    )


def with_initializers(case: Case) -> ModelProto:
    """The case's model with its example's arrays as initializers: every size is known."""
    model = ModelProto()
    model.CopyFrom(case.model)
    for name in case.by:
        _make_constant(model.graph, name, case.feeds[name])
    return model


def retyped(model: ModelProto, dtype: int) -> ModelProto:
    """The model with all its floating-point types replaced by one."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for graph in _graphs(copy.graph):
        del graph.value_info[:]
        for tensor in graph.initializer:
            _retype_tensor(tensor, dtype)
        for value in (*graph.input, *graph.output):
            if value.type.tensor_type.elem_type in FLOATS:
                value.type.tensor_type.elem_type = dtype
        for node in graph.node:
            for attribute in node.attribute:
                _retype_attribute(attribute, dtype)
    return copy


def _differentiable(schema: defs.OpSchema) -> bool:
    return all(
        any(v.differentiation_category == _Category.Differentiable for v in values)
        for values in (schema.inputs, schema.outputs)
    )


def _case(found: Any, operator: str) -> Case:  # noqa: ANN401 - onnx's TestCase
    model = retyped(found.model, TensorProto.FLOAT)
    model.ir_version = min(model.ir_version, MAX_IR_VERSION)
    _rename_reserved(model.graph)
    _set_opset(model)
    given = found.data_sets[0][0] if found.data_sets else []
    feeds = {i.name: _array(a) for i, a in zip(model.graph.input, given, strict=False)}
    excluded = _excluded(model)
    tensors = {i.name for i in model.graph.input if i.type.HasField("tensor_type")}
    floats = {i.name for i in model.graph.input if i.type.tensor_type.elem_type in FLOATS}
    by = [n for n, a in feeds.items() if n in floats - excluded and a.size]
    of = [o.name for o in model.graph.output if o.type.tensor_type.elem_type in FLOATS]
    of = [n for n in of if n not in excluded]
    for name in list(feeds):
        if name not in by and name in tensors:
            _make_constant(model.graph, name, feeds.pop(name))
    return Case(found.name, operator, model, feeds, tuple(by), tuple(of), _discrete(by, of, model))


def _discrete(by: list[str], of: list[str], model: ModelProto) -> str:
    """Why nothing is differentiated; sequences are left for their operators to be refused."""
    if not by and all(v.type.HasField("tensor_type") for v in model.graph.input):
        return "no floating-point input"
    if not of and all(v.type.HasField("tensor_type") for v in model.graph.output):
        return "no floating-point output"
    return ""


def _rename_reserved(graph: GraphProto) -> None:
    for value in (*graph.input, *graph.output):
        value.name = f"{value.name}_" if value.name in RESERVED else value.name
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{n}_" if n in RESERVED else n for n in names]


def _base(name: str) -> str:
    return name.split("_expanded")[0]


def _operator(node: NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _set_opset(model: ModelProto) -> None:
    """The newest accepted version in which the nodes mean the same, where there is one."""
    if all(entry.domain for entry in model.opset_import):
        model.opset_import.add(domain="", version=BASE_OPSET)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            wanted = min(max(entry.version, BASE_OPSET), OPSETS[-1])
            if entry.version != wanted and _valid(model, wanted):
                entry.version = wanted


def _valid(model: ModelProto, version: int) -> bool:
    copy = ModelProto()
    copy.CopyFrom(model)
    for entry in copy.opset_import:
        entry.version = entry.version if entry.domain else version
    try:
        onnx.checker.check_model(copy)
        onnx.shape_inference.infer_shapes(copy, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


def _array(value: Any) -> Any:  # noqa: ANN401 - whatever an example holds
    if isinstance(value, TensorProto):
        with contextlib.suppress(ValueError, TypeError):
            value = numpy_helper.to_array(value)
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        return _finite(array.astype(np.float32)) if _is_float(array) else array
    return value


def _finite(x: Array) -> Array:
    """Infinities (masks have them) and numbers too large for differences become ±1000."""
    return np.asarray(np.clip(np.nan_to_num(x, nan=0.5), -1000, 1000), np.float32)


def _is_float(value: Any) -> bool:  # noqa: ANN401 - whatever an example holds
    if not isinstance(value, np.ndarray):
        return False
    return value.dtype.kind == "f" or value.dtype.name == "bfloat16"


def _excluded(model: ModelProto) -> set[str]:
    """Values of a lone node whose schema says that they are not differentiable."""
    if len(model.graph.node) != 1 or model.graph.node[0].domain:
        return set()
    node = model.graph.node[0]
    schema = defs.get_schema(node.op_type)
    pairs = [*_formal(node.input, schema.inputs), *_formal(node.output, schema.outputs)]
    return {n for n, f in pairs if f.differentiation_category == _Category.NonDifferentiable}


def _formal(names: Sequence[str], formal: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Each name with what the schema says of it; the last formal one may take any number."""
    return zip(names, [*formal, *formal[-1:] * len(names)], strict=False)


def _make_constant(graph: GraphProto, name: str, value: Array) -> None:
    """Turn an input into an initializer."""
    position = next(i for i, v in enumerate(graph.input) if v.name == name)
    dtype = graph.input[position].type.tensor_type.elem_type
    del graph.input[position]
    if value.dtype == object:
        value = value.astype(str)
    tensor = numpy_helper.from_array(value, name)
    if tensor.data_type != dtype:
        tensor = helper.make_tensor(name, dtype, value.shape, value.flatten())
    graph.initializer.append(tensor)


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _retype_attribute(attribute: onnx.AttributeProto, dtype: int) -> None:
    if attribute.name in _TYPE_ATTRIBUTES and attribute.i in FLOATS:
        attribute.i = dtype
    if attribute.HasField("t"):
        _retype_tensor(attribute.t, dtype)
    if attribute.name == "value_float":  # of a Constant: only a tensor can be of any type
        attribute.CopyFrom(_tensor_attribute(np.array(attribute.f), dtype))
    elif attribute.name == "value_floats":
        attribute.CopyFrom(_tensor_attribute(np.array(list(attribute.floats)), dtype))


def _tensor_attribute(value: Array, dtype: int) -> onnx.AttributeProto:
    array = value.astype(helper.tensor_dtype_to_np_dtype(dtype))
    return helper.make_attribute("value", numpy_helper.from_array(array))


def _retype_tensor(tensor: TensorProto, dtype: int) -> None:
    if tensor.data_type in FLOATS:
        array = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(dtype))
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
