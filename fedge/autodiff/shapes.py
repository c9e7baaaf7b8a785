"""Shape inference in which the batch, and other named sizes, may grow.

ONNX's own inference loses a symbolic size at the first Reshape. So it runs here node by node with
concrete sizes, twice: what is equal in both runs is fixed, what is k times a product of symbols in
both is ``"k*N"``, ``"N*T"`` …. Whatever follows from sizes and constants alone is computed on the
way, so that a shape behind a chain of Shape, Gather and Concat is found too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fedge.artifacts.manifest import BATCH
from fedge.errors import ArtifactError
from fedge.types import Array

Shape = tuple[int | str, ...]
Sizes = Mapping[str, int]  # symbol -> a size the model accepts

ROWS = (7919, 7927)  # primes no layer has as its size
GUESS = 16  # a symbol's size where nobody says one
MAX_ELEMENTS = 1 << 18  # of a value worth computing
_OTHERS: tuple[Callable[[int], int], ...] = (lambda n: n - 1, lambda n: n // 2, lambda n: 2 * n)
_MAX_SHAPE_ELEMENTS = 1 << 10  # of a value that shape inference may ask for
_RANDOM = ("Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomUniform")
# The output is of the first input's type: com.microsoft, and where ONNX's inference says nothing.
_SAME_SHAPE = ("BiasGelu", "FastGelu", "Gelu", "GroupNormalization", "QuickGelu")


@dataclass
class Known:
    """What a model's values are at one choice of sizes.

    Attributes:
        types: Name -> element type and shape.
        values: Name -> content, of what does not depend on inputs or params.
    """

    types: dict[str, onnx.TypeProto] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape, if all of it is known."""
        if name not in self.types or not self.types[name].tensor_type.HasField("shape"):
            return None
        dims = self.types[name].tensor_type.shape.dim
        return tuple(d.dim_value for d in dims) if all(map(_fixed, dims)) else None


def infer_shapes(
    model: onnx.ModelProto, sizes: Sizes | None = None
) -> dict[str, tuple[int, Shape]]:
    """Element type and shape of every value; what cannot be inferred is left out.

    Args:
        model: Without local functions. The first dimension of every input is the batch, whatever
            it is called; other symbols keep their names.
        sizes: For symbols other than the batch, a size that the model accepts.

    Raises:
        ArtifactError: If an input's first dimension is fixed or another one has no name, or the
            operators do not fit each other.
    """
    few, many, symbols = trace_twice(model, sizes)
    shapes: dict[str, tuple[int, Shape]] = {}
    for name in few.types.keys() & many.types.keys():
        small, large = few.shape(name), many.shape(name)
        if small is not None and large is not None and len(small) == len(large):
            dims = tuple(_dim(a, b, symbols) for a, b in zip(small, large, strict=True))
            shapes[name] = (few.types[name].tensor_type.elem_type, dims)
    return shapes


def trace_twice(
    model: onnx.ModelProto, sizes: Sizes | None = None
) -> tuple[Known, Known, dict[str, tuple[int, int]]]:
    """What is known at two choices of sizes, and the two sizes of each symbol.

    Raises:
        ArtifactError: As :func:`infer_shapes`.
    """
    named = symbols_of(model)
    first: ArtifactError | None = None
    for pairs in _pairs(named, sizes or {}):
        try:
            few, many = (trace(model, {s: p[i] for s, p in pairs.items()}) for i in (0, 1))
        except ArtifactError as exc:
            first = first or exc
        else:
            return few, many, pairs
    raise first or ArtifactError("the model has no inputs")


def symbols_of(model: onnx.ModelProto) -> tuple[str, ...]:
    """The names of sizes that may vary, the batch (always ``N``) first.

    Raises:
        ArtifactError: If an input's first dimension is fixed or another one has no name.
    """
    found = {BATCH: None}
    for value in _inputs(model):
        dims = value.type.tensor_type.shape.dim
        shape = [d.dim_value if _fixed(d) else (d.dim_param or "?") for d in dims]
        if not dims or _fixed(dims[0]):
            raise ArtifactError(
                f"input {value.name!r} has shape {shape}; its first dimension must be the batch "
                "and symbolic: export the model with a dynamic batch size"
            )
        if "?" in shape[1:] or shape[0] in shape[1:] or BATCH in shape[1:]:
            raise ArtifactError(
                f"input {value.name!r} has shape {shape}; dimensions other than the batch must "
                f"be fixed or have a name of their own: export the model so"
            )
        found |= dict.fromkeys(str(d) for d in shape[1:] if isinstance(d, str))
    return tuple(found)


def trace(model: onnx.ModelProto, sizes: Sizes) -> Known:
    """Go through the graph once with a concrete size for every symbol.

    Raises:
        ArtifactError: If the operators do not fit each other at these sizes.
    """
    known = Known()
    for value in _inputs(model):
        known.types[value.name] = _concrete(value.type, sizes)
    scales = {n for node in model.graph.node if node.op_type == "Resize" for n in node.input[1:3]}
    for tensor in model.graph.initializer:
        known.types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        trained = tensor.dims and tensor.data_type in (1, 10, 11) and tensor.name not in scales
        if not trained:
            known.values[tensor.name] = numpy_helper.to_array(tensor)
    opsets = {o.domain.removeprefix("ai.onnx"): o.version for o in model.opset_import}
    imports = [helper.make_opsetid(d, v) for d, v in opsets.items()]
    for node in model.graph.node:
        _types(known, node, opsets, imports)
        _values(known, node, opsets)
    return known


def _types(
    known: Known,
    node: onnx.NodeProto,
    opsets: Mapping[str, int],
    imports: Sequence[onnx.OperatorSetIdProto],
) -> None:
    inputs = [n for n in node.input if n]
    if any(n not in known.types for n in inputs) or _carries_graph(node):
        return
    domain = node.domain.removeprefix("ai.onnx")
    if node.op_type in _SAME_SHAPE:
        known.types[node.output[0]] = known.types[inputs[0]]
        return
    if not onnx.defs.has(node.op_type, domain):
        return
    schema = onnx.defs.get_schema(node.op_type, opsets.get(domain, 1), domain)
    data = {
        n: numpy_helper.from_array(known.values[n])
        for n in inputs
        if n in known.values and known.values[n].size <= _MAX_SHAPE_ELEMENTS
    }
    types = {n: known.types[n] for n in inputs}
    try:
        found = onnx.shape_inference.infer_node_outputs(
            schema, node, types, data, opset_imports=imports, ir_version=8
        )
    except (onnx.shape_inference.InferenceError, RuntimeError) as exc:
        raise ArtifactError(
            f"the model's shapes do not fit each other at node {node.name or node.output[0]!r} "
            f"({node.op_type}): {exc}"
        ) from exc
    known.types.update(found)


def _values(known: Known, node: onnx.NodeProto, opsets: Mapping[str, int]) -> None:
    if node.op_type in ("Shape", "Size") and not node.domain:
        shape = known.shape(node.input[0])
        if shape is not None:
            ends = {a.name: a.i for a in node.attribute}
            dims = np.asarray(shape[ends.get("start", 0) : ends.get("end", len(shape))], np.int64)
            whole = np.asarray(math.prod(shape), np.int64)
            known.values[node.output[0]] = dims if node.op_type == "Shape" else whole
        return
    if not _computable(known, node):
        return
    try:
        evaluator = ReferenceEvaluator(node, opsets=dict(opsets))
        values = evaluator.run(None, {n: known.values[n] for n in node.input if n})
    except Exception:  # noqa: BLE001 - of any kind: then it stays unknown
        return
    for name, value in zip((o for o in node.output if o), values, strict=False):
        known.values[name] = np.asarray(value)
        dtype = helper.np_dtype_to_tensor_dtype(known.values[name].dtype)
        known.types[name] = helper.make_tensor_type_proto(dtype, known.values[name].shape)


def _computable(known: Known, node: onnx.NodeProto) -> bool:
    if (
        node.domain not in ("", "ai.onnx")
        or node.op_type.startswith(_RANDOM)
        or _carries_graph(node)
    ):
        return False
    if any(n and n not in known.values for n in node.input):
        return False
    if any(a.type == onnx.AttributeProto.STRING for a in node.attribute if "value" in a.name):
        return False
    shapes = [known.shape(n) for n in node.output if n]
    return node.op_type == "Constant" or all(
        s is not None and math.prod(s) <= MAX_ELEMENTS for s in shapes
    )


def _carries_graph(node: onnx.NodeProto) -> bool:
    return any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute)


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    constants = {i.name for i in model.graph.initializer}
    return [v for v in model.graph.input if v.name not in constants]


def _concrete(typed: onnx.TypeProto, sizes: Sizes) -> onnx.TypeProto:
    dims = typed.tensor_type.shape.dim
    shape = [d.dim_value if _fixed(d) else sizes[d.dim_param] for d in dims[1:]]
    return helper.make_tensor_type_proto(typed.tensor_type.elem_type, [sizes[BATCH], *shape])


def _fixed(dim: onnx.TensorShapeProto.Dimension) -> bool:
    return bool(dim.HasField("dim_value"))


def _pairs(symbols: Sequence[str], sizes: Sizes) -> Iterator[dict[str, tuple[int, int]]]:
    """Two sizes per symbol. A model may have an upper bound for one, or want it even."""
    if symbols == (BATCH,):
        yield {BATCH: ROWS}
        return
    for other in _OTHERS:
        pairs = {BATCH: ROWS}
        for place, symbol in enumerate(symbols[1:]):
            size = sizes.get(symbol, GUESS + 4 * place)
            pairs[symbol] = (size, other(size))
        yield pairs


def _dim(few: int, many: int, symbols: Mapping[str, tuple[int, int]]) -> int | str:
    if few == many:
        return few
    for names in _products(tuple(symbols)):
        sizes = [math.prod(symbols[n][i] for n in names) for i in (0, 1)]
        times, rest = divmod(few, sizes[0])
        if not rest and times and many == times * sizes[1]:
            return "*".join([*([str(times)] if times > 1 else []), *names])
    return f"{BATCH}?{few}/{many}"  # grows otherwise; equal only to itself


def _products(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Each symbol alone, then products of two (T*T too) and of three."""
    yield from ((n,) for n in names)
    for place, name in enumerate(names):
        yield from ((name, other) for other in names[place:])
    for place, name in enumerate(names[1:], 1):
        yield from ((names[0], name, other) for other in names[place:])
