"""From any acceptable ONNX model to the one form the other modules work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx import helper, inliner, version_converter
from onnx_ir.passes import common

from fedge.autodiff import rules  # noqa: F401 - registers the rules
from fedge.autodiff.ops import Ops, Value
from fedge.autodiff.registry import has_rule
from fedge.autodiff.shapes import Sizes, infer_shapes
from fedge.autodiff.simplify import simplify
from fedge.errors import ArtifactError, UnsupportedOperatorError

OPSETS = range(13, 25)
BASE_OPSET = 17  # older models are converted: ScatterElements with reduction needs 16
MAX_IR_VERSION = 10
RESERVED = ("labels", "loss", "lr")


@dataclass(frozen=True)
class Forward:
    """A model ready for differentiation.

    Attributes:
        model: The model; ``params`` are its last graph inputs.
        graph: Its graph; all values that shape inference understands carry type and shape.
        op: Appends to the graph.
        params: The initializers that became inputs, in the order asked for.
    """

    model: ir.Model
    graph: ir.Graph
    op: Ops
    params: dict[str, Value]

    @property
    def inputs(self) -> list[Value]:
        """The model's own inputs."""
        return [v for v in self.graph.inputs if v.name not in self.params]

    def value(self, name: str) -> Value:
        """The value called ``name``.

        Raises:
            ArtifactError: If there is none.
        """
        found = ir.convenience.create_value_mapping(self.graph).get(name)
        if found is None:
            raise ArtifactError(f"the model has no value {name!r}")
        return found


def normalize(model: onnx.ModelProto, sizes: Sizes | None = None) -> onnx.ModelProto:
    """Convert old opsets, inline functions, expand operators that have a body but no rule, fold.

    Args:
        model: As exported.
        sizes: As for :func:`~fedge.autodiff.shapes.infer_shapes`.

    Raises:
        ArtifactError: If the opset is out of range, or the shapes do not fit each other.
        UnsupportedOperatorError: If an input or output is no tensor.
    """
    opset = opset_of(model)
    if opset not in OPSETS:
        raise ArtifactError(
            f"the model uses opset {opset}; fedge reads {OPSETS[0]} to {OPSETS[-1]}: "
            "export it again with opset_version=17"
        )
    _refuse_containers(model.graph)
    if opset < BASE_OPSET:
        model = version_converter.convert_version(model, BASE_OPSET)
    model = inliner.inline_local_functions(model)
    model = simplify(_expand(model), sizes)
    del model.graph.value_info[:]
    model.ir_version = min(model.ir_version, MAX_IR_VERSION)
    return model


def _refuse_containers(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output):
        kind = str(value.type.WhichOneof("value"))
        for node in graph.node:
            if kind != "tensor_type" and value.name in (*node.input, *node.output):
                raise UnsupportedOperatorError(
                    f"node {node.name or node.output[0]!r} is a {node.op_type} on {value.name!r}, "
                    f"a {kind.removesuffix('_type')}; fedge differentiates operators on tensors"
                )


def _expand(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace operators without a rule by their bodies, and what these hold without a rule."""
    while True:
        foreign = [n for n in model.graph.node if n.domain == "" and not has_rule(n.op_type)]
        expanded = _inline(model, foreign) if foreign else model
        if _operators(expanded) == _operators(model):
            return expanded
        model = expanded


def _operators(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def _inline(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """Replace these nodes by their bodies where they have one; some depend on their types."""
    for node in nodes:
        _fill_defaults(node, opset_of(model))
    named = {v.name for v in model.graph.input}
    for constant in model.graph.initializer:
        if constant.name not in named:  # the inliner asks types of inputs, not of initializers
            value = helper.make_tensor_value_info(
                constant.name, constant.data_type, list(constant.dims)
            )
            model.graph.input.append(value)
    typed = onnx.shape_inference.infer_shapes(model)
    if any("" in n.input for n in nodes):  # it asks the type even of an input that is left out
        typed.graph.value_info.append(
            helper.make_tensor_value_info("", onnx.TensorProto.FLOAT, None)
        )
    names = sorted({("", n.op_type) for n in nodes})
    return inliner.inline_selected_functions(typed, names, inline_schema_functions=True)


def _fill_defaults(node: onnx.NodeProto, opset: int) -> None:
    """Write out default attributes: the inliner does not know them."""
    given = {a.name for a in node.attribute}
    if onnx.defs.has(node.op_type):
        schema = onnx.defs.get_schema(node.op_type, opset)
        for name, attribute in schema.attributes.items():
            if name not in given and attribute.default_value.name:
                node.attribute.append(attribute.default_value)


def load(model: onnx.ModelProto, params: Sequence[str], sizes: Sizes | None = None) -> Forward:
    """Read a normalized model; ``params`` become inputs, other initializers stay constants.

    Raises:
        ArtifactError: If a param is no initializer, or a name is one fedge keeps for itself.
    """
    shapes = infer_shapes(model, sizes)
    loaded = ir.from_proto(model)
    common.RemoveInitializersFromInputsPass()(loaded)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(loaded)
    graph = loaded.graph
    for value in ir.convenience.create_value_mapping(graph).values():
        if value.name in shapes:
            dtype, shape = shapes[value.name]
            value.type = ir.TensorType(ir.DataType(dtype))
            value.shape = ir.Shape(shape)
    _check_names(graph)
    taken = {name: _to_input(graph, name) for name in params}
    return Forward(loaded, graph, Ops(graph, loaded.opset_imports[""]), taken)


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operators the model uses; 0 if none."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def finish(forward: Forward, inputs: Sequence[Value], outputs: dict[str, Value]) -> onnx.ModelProto:
    """Make these the graph's inputs and named outputs, drop what they do not need, serialize."""
    graph = forward.graph
    graph.inputs[:] = inputs
    named: list[Value] = []
    for name, value in outputs.items():
        named.append(_named(forward.op, name, value, named))
    graph.outputs[:] = named
    common.RemoveUnusedNodesPass()(forward.model)
    common.TopologicalSortPass()(forward.model)
    common.ClearMetadataAndDocStringPass()(forward.model)  # exporters note files and stack traces
    proto = ir.to_proto(forward.model)
    proto.producer_name = "fedge"
    for field in ("producer_version", "domain", "model_version", "doc_string", "metadata_props"):
        proto.ClearField(field)
    sizes = [v for v in proto.graph.value_info if "@" in v.name]  # see Ops.pieces
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(sizes)
    return proto


def _named(op: Ops, name: str, value: Value, taken: Sequence[Value]) -> Value:
    """The value under the output's name; inputs, constants and second uses need a copy."""
    if value.name == name and value.producer() is not None:
        return value
    shape, dtype = value.shape, value.dtype
    if value.producer() is None or "@" not in value.name or value in taken:
        value = op.Identity(value)
    value.name = name
    value.shape = value.shape if value.shape is not None else shape
    value.dtype = value.dtype or dtype or ir.DataType.FLOAT
    return value


def _to_input(graph: ir.Graph, name: str) -> Value:
    if name not in graph.initializers:
        known = ", ".join(list(graph.initializers)[:20])
        raise ArtifactError(f"param {name!r} is no initializer of the model; it has: {known}")
    value = graph.initializers.pop(name)
    value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
    value.const_value = None
    graph.inputs.append(value)
    return value


def _check_names(graph: ir.Graph) -> None:
    outside = {v.name for v in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    for name, value in ir.convenience.create_value_mapping(graph).items():
        if name in RESERVED or "@" in name:
            if name in outside:
                raise ArtifactError(
                    f"the model calls an input, output or param {name!r}; fedge keeps "
                    f"{', '.join(RESERVED)} and names with '@' for itself: rename it"
                )
            value.name = f"model/{name.replace('@', '_')}"
