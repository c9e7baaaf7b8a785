"""Models and files broken in every way we could think of, each by a seed.

Bytes are flipped, cut and spliced; graphs are changed through our own schema, so that most of what
comes out still parses and reaches ONNX Runtime; and tensors are hidden through ONNX's full schema
where only a reader of external data would look for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from random import Random
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto

from fedge.artifacts.onnx_v1 import onnx_pb2
from fedge.artifacts.operators import BY_KIND

SIZES = (0, 1, 2, 3, 7, 64, 4096, 1 << 16, 1 << 24, 1 << 31, 1 << 33, (1 << 40) - 1)
NUMBERS = (*SIZES, -1, -2, -7, -(1 << 31), 1 << 40, (1 << 63) - 1, -(1 << 63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e38, -1e38, 1e-45, float("nan"), float("inf"), float("-inf"))
WORDS = (b"", b"NOTSET", b"SAME_UPPER", b"VALID", b"linear", b"cubic", b"bij,bjk", b"...", b"\xff")
TYPES = tuple(range(-1, 24))

Model = onnx_pb2.ModelProto
Mutation = Callable[[Model, Random], None]


def mutated_bytes(data: bytes, r: Random) -> bytes:
    """A file with some bytes flipped, cut, doubled, dropped or replaced."""
    out = bytearray(data)
    for _ in range(r.choice((1, 1, 1, 2, 4, 16))):
        at = r.randrange(len(out) + 1)
        match r.randrange(6):
            case 0 | 1:
                out[at : at + 1] = bytes([r.randrange(256)])
            case 2:
                out[at : at + r.choice((1, 4, 8))] = b""
            case 3:
                out[at:at] = r.randbytes(r.choice((1, 4, 8, 64)))
            case 4:
                out[at:at] = out[at : at + r.choice((4, 40, 400))]
            case _:
                if r.random() < 0.3:
                    del out[at:]
    return bytes(out)


def mutated_model(data: bytes, r: Random, kind: str) -> bytes:
    """A model changed in one to four places, through our own schema."""
    model = onnx_pb2.ModelProto()
    model.ParseFromString(data)
    for _ in range(r.choice((1, 1, 2, 4))):
        mutation = r.choice(MUTATIONS)
        if mutation is _operator:
            _operator(model, r, kind)
        else:
            mutation(model, r)
    return model.SerializeToString()


def _operator(m: Model, r: Random, kind: str = "standard") -> None:
    node = _one(m.graph.node, r)
    if node is not None:
        node.domain, node.op_type = r.choice(sorted(BY_KIND[kind]))


def _attribute(m: Model, r: Random) -> None:
    node = _one([n for n in m.graph.node if n.attribute] or m.graph.node, r)
    if node is None:
        return
    found = _one(node.attribute, r)
    if found is None or r.random() < 0.1:
        found = node.attribute.add(name=r.choice(("axis", "axes", "perm", "to", "value", "size")))
    match r.randrange(7):
        case 0 | 1:
            found.i = r.choice(NUMBERS)
        case 2 | 3:
            if found.ints and r.random() < 0.7:
                found.ints[r.randrange(len(found.ints))] = r.choice(NUMBERS)
            else:
                found.ints.extend(r.choices(NUMBERS, k=r.randrange(1, 9)))
        case 4:
            found.f = r.choice(FLOATS)
        case 5:
            found.s = r.choice(WORDS)
        case _:
            found.type = r.choice((0, 1, 2, 3, 4, 6, 7, 8))


def _attribute_gone(m: Model, r: Random) -> None:
    node = _one([n for n in m.graph.node if n.attribute], r)
    if node is not None:
        del node.attribute[r.randrange(len(node.attribute))]


def _info(m: Model, r: Random) -> None:
    """Another shape or element type for a graph input, output or value."""
    info = _one([*m.graph.input, *m.graph.output, *m.graph.value_info], r)
    if info is None:
        return
    kind = info.type.tensor_type
    dim = _one(kind.shape.dim, r)
    match r.randrange(4):
        case 0:
            kind.elem_type = r.choice(TYPES)
        case 1:
            kind.shape.dim.add(dim_value=r.choice(SIZES))
        case 2 if dim is not None:
            dim.Clear()
            dim.dim_param = r.choice(("N", "M", "", "x" * 300))
        case _ if dim is not None:
            dim.dim_value = r.choice(NUMBERS)


def _tensor_of(m: Model, r: Random) -> Any:
    constants = [a.t for n in m.graph.node for a in n.attribute if a.HasField("t")]
    return _one([*m.graph.initializer, *constants], r)


def _tensor_shape(m: Model, r: Random) -> None:
    tensor = _tensor_of(m, r)
    if tensor is not None:
        tensor.dims[:] = r.choices(NUMBERS, k=r.randrange(5))


def _tensor_regrouped(m: Model, r: Random) -> None:
    """The same values in another shape."""
    tensor = _tensor_of(m, r)
    if tensor is not None:
        count = 1
        for dim in tensor.dims:
            count *= dim
        count = min(abs(count), NUMBERS[-2])
        tensor.dims[:] = r.choice(([count], [count, 1], [1, count], [1, 1, count, 1]))


def _tensor_values(m: Model, r: Random) -> None:
    """Sizes, indices and axes are tensors too: extreme ones."""
    tensors = [*m.graph.initializer]
    tensors += [a.t for n in m.graph.node for a in n.attribute if a.HasField("t")]
    tensor = _one([t for t in tensors if t.data_type == TensorProto.INT64] or tensors, r)
    if tensor is None or not tensor.raw_data:
        return
    raw = bytearray(tensor.raw_data)
    if tensor.data_type == TensorProto.INT64:
        at = 8 * r.randrange(len(raw) // 8)
        raw[at : at + 8] = r.choice(NUMBERS).to_bytes(8, "little", signed=True)
    else:
        raw[:] = r.randbytes(len(raw))
    tensor.raw_data = bytes(raw)


def _tensor_type(m: Model, r: Random) -> None:
    tensor = _tensor_of(m, r)
    if tensor is not None:
        tensor.data_type = r.choice(TYPES)


def _wire(m: Model, r: Random) -> None:
    """An input from anywhere, from later nodes too: cycles."""
    node = _one([n for n in m.graph.node if n.input], r)
    if node is not None:
        node.input[r.randrange(len(node.input))] = r.choice(_names(m))


def _more_inputs(m: Model, r: Random) -> None:
    node = _one(m.graph.node, r)
    if node is not None:
        node.input.extend(r.choices(_names(m), k=r.choice((1, 2, 300))))


def _fewer_inputs(m: Model, r: Random) -> None:
    node = _one([n for n in m.graph.node if n.input], r)
    if node is not None:
        del node.input[r.randrange(len(node.input)) :]


def _output_name(m: Model, r: Random) -> None:
    """A name given twice, or an output that nobody makes."""
    node = _one([n for n in m.graph.node if n.output], r)
    if node is not None:
        node.output[r.randrange(len(node.output))] = r.choice((*_names(m), "nobody"))


def _node_gone(m: Model, r: Random) -> None:
    if m.graph.node:
        del m.graph.node[r.randrange(len(m.graph.node))]


def _node_twice(m: Model, r: Random) -> None:
    node = _one(m.graph.node, r)
    if node is not None:
        m.graph.node.add().CopyFrom(node)


def _nodes_shuffled(m: Model, r: Random) -> None:
    nodes = list(m.graph.node)
    r.shuffle(nodes)
    del m.graph.node[:]
    m.graph.node.extend(nodes)


def _interface(m: Model, r: Random) -> None:
    """An input or output gone, twice, or under another's name."""
    infos = r.choice((m.graph.input, m.graph.output, m.graph.initializer))
    info = _one(infos, r)
    match r.randrange(3):
        case _ if info is None:
            return
        case 0:
            infos.remove(info)
        case 1:
            infos.add().CopyFrom(info)
        case _:
            info.name = r.choice(_names(m))


def _versions(m: Model, r: Random) -> None:
    m.opset_import[0].version = r.randrange(-1, 30)
    if r.random() < 0.3:
        m.ir_version = r.randrange(-1, 14)


def _bomb(m: Model, r: Random) -> None:
    """A few bytes that ask for much memory or time, in the way of a value that is used."""
    node = _one([n for n in m.graph.node if n.input], r)
    if node is None:
        return
    at, size = r.randrange(len(node.input)), r.choice((1 << 20, 1 << 27, 1 << 33, 1 << 39))
    shape = m.graph.initializer.add(name="bomb/shape", data_type=TensorProto.INT64, dims=[1])
    shape.raw_data = size.to_bytes(8, "little")
    made = m.graph.node.add(output=["bomb/made"])
    match r.randrange(4):
        case 0:
            made.op_type = "ConstantOfShape"
            made.input.append("bomb/shape")
        case 1:
            made.op_type = r.choice(("Expand", "Tile"))
            made.input.extend([node.input[at], "bomb/shape"])
        case 2:
            made.op_type = "OneHot"
            made.input.extend(["bomb/shape", "bomb/shape", node.input[at]])
        case _:
            made.op_type = "Range"
            made.input.extend(["bomb/shape"] * 3)
    node.input[at] = "bomb/made"
    nodes = [made, *list(m.graph.node)[:-1]]
    copies = [onnx_pb2.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del m.graph.node[:]
    m.graph.node.extend(copies)


def _names(m: Model) -> list[str]:
    made = [o for n in m.graph.node for o in n.output]
    return [*made, *(i.name for i in m.graph.input), *(i.name for i in m.graph.initializer), ""]


def _one(items: Sequence[Any], r: Random) -> Any:
    return items[r.randrange(len(items))] if len(items) else None


MUTATIONS: tuple[Any, ...] = (
    *(_operator, _attribute, _attribute, _attribute_gone, _info, _tensor_shape),
    *(_tensor_regrouped, _tensor_values, _tensor_values, _tensor_type, _wire, _wire),
    *(_more_inputs, _fewer_inputs, _output_name, _node_gone, _node_twice, _nodes_shuffled),
    *(_interface, _versions, _bomb),
)


def smuggled_model(data: bytes, r: Random, locations: Sequence[str]) -> bytes:
    """A model with a tensor kept in another file, in a place where ONNX lets one be."""
    model = onnx.ModelProto.FromString(data)
    tensor = hidden_tensor(r.choice(locations), r.random() < 0.8)
    r.choice(HIDING)(model, tensor, r)
    return model.SerializeToString()


def hidden_tensor(location: str, honest: bool) -> TensorProto:
    """A tensor whose values lie in the file ``location``; unless honest it does not say so."""
    tensor = TensorProto(name="canary", dims=[2], data_type=TensorProto.FLOAT)
    if honest:
        tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "8"}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _hide_in_initializer(m: Any, t: TensorProto, r: Random) -> None:
    if m.graph.initializer and r.random() < 0.7:
        there = m.graph.initializer[r.randrange(len(m.graph.initializer))]
        there.ClearField("raw_data")
        there.data_location = TensorProto.EXTERNAL
        there.external_data.extend(t.external_data)
    else:
        m.graph.initializer.append(t)


def _hide_in_attribute(m: Any, t: TensorProto, r: Random) -> None:
    _carrier(m, r).attribute.add(name="value", t=t, type=AttributeProto.TENSOR)


def _hide_in_tensors(m: Any, t: TensorProto, r: Random) -> None:
    _carrier(m, r).attribute.add(name="values", tensors=[t], type=AttributeProto.TENSORS)


def _hide_in_sparse(m: Any, t: TensorProto, r: Random) -> None:
    sparse = onnx.SparseTensorProto(values=t, indices=t, dims=[2])
    if r.random() < 0.5:
        m.graph.sparse_initializer.append(sparse)
    else:
        node = _carrier(m, r)
        node.attribute.add(name="v", sparse_tensor=sparse, type=AttributeProto.SPARSE_TENSOR)


def _hide_in_subgraph(m: Any, t: TensorProto, r: Random) -> None:
    inner = onnx.GraphProto(name="inner", initializer=[t])
    for _ in range(r.randrange(4)):
        outer = onnx.GraphProto(name="outer")
        outer.node.add(op_type="If").attribute.add(
            name="then_branch", g=inner, type=AttributeProto.GRAPH
        )
        inner = outer
    if r.random() < 0.5:
        _carrier(m, r).attribute.add(name="body", g=inner, type=AttributeProto.GRAPH)
    else:
        _carrier(m, r).attribute.add(name="all", graphs=[inner], type=AttributeProto.GRAPHS)


def _hide_in_function(m: Any, t: TensorProto, r: Random) -> None:
    function = m.functions.add(name=m.graph.node[0].op_type, domain=r.choice(("", "f")))
    if r.random() < 0.5:
        function.attribute_proto.add(name="value", t=t, type=AttributeProto.TENSOR)
    else:
        node = function.node.add(op_type="Constant", output=["c"])
        node.attribute.add(name="value", t=t, type=AttributeProto.TENSOR)


def _hide_in_training_info(m: Any, t: TensorProto, r: Random) -> None:
    graph = onnx.GraphProto(name="t", initializer=[t])
    m.training_info.add(**{r.choice(("algorithm", "initialization")): graph})


def _carrier(m: Any, r: Random) -> Any:
    return m.graph.node[r.randrange(len(m.graph.node))]


HIDING: tuple[Callable[[Any, TensorProto, Random], None], ...] = (
    _hide_in_initializer,
    _hide_in_attribute,
    _hide_in_tensors,
    _hide_in_sparse,
    _hide_in_subgraph,
    _hide_in_function,
    _hide_in_training_info,
)

VALUES: tuple[Any, ...] = (
    *(None, True, "", "x", [], {}, 0, 1, -1, 2.5, 1 << 39, 1 << 62, 10**30, 1e300),
    *("../canary", "/etc/passwd", "N", "float32", "int64", "float16", [1, 2], {"a": 1}),
)


def mutated_json(data: bytes, r: Random) -> bytes:
    """Canonical JSON with one to three values anywhere replaced, moved, dropped or added."""
    root = json.loads(data)
    for _ in range(r.choice((1, 1, 2, 3))):
        holder, key = _place(root, r)
        match r.randrange(6):
            case 0:
                del holder[key]
            case 1:
                other, name = _place(root, r)
                holder[key] = deepcopy(other[name])
            case 2 if isinstance(holder, list):
                holder.insert(r.randrange(len(holder) + 1), deepcopy(holder[key]))
            case 3 if isinstance(holder[key], int):
                holder[key] = r.choice(NUMBERS)
            case _:
                holder[key] = deepcopy(r.choice(VALUES))
        if not root:
            break
    return _canonical(root)


def _place(root: dict[str, Any], r: Random) -> tuple[Any, Any]:
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [root]
    while waiting:
        holder = waiting.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            places.append((holder, key))
            if isinstance(holder[key], (dict, list)):
                waiting.append(holder[key])
    return r.choice(places)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def mutated_tensors(data: bytes, r: Random) -> bytes:
    """A tensor file with a changed header, or changed bytes."""
    if r.random() < 0.4:
        return mutated_bytes(data, r)
    size = int.from_bytes(data[:8], "little")
    head = mutated_json(data[8 : 8 + size], r)
    said = len(head) if r.random() < 0.8 else r.choice(SIZES)
    return said.to_bytes(8, "little") + head + data[8 + size :]
