"""Every trick in every place is refused, and nothing that is sent can hurt the parent."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper

from fedge.artifacts.admission import Limits, admit_files, admit_model, kind_of
from fedge.artifacts.manifest import FileEntry
from fedge.artifacts.operators import BY_KIND, ORT_TRAINING, STANDARD
from fedge.errors import AdmissionError, ArtifactError


def _plain() -> ModelProto:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "c"], ["y"], name="add")],
        "g",
        [info("x", TensorProto.FLOAT, ["N", 2])],
        [info("y", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor("c", TensorProto.FLOAT, [2], b"\0" * 8, raw=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _attribute(node: NodeProto, **fields: object) -> AttributeProto:
    return node.attribute.add(name="a", **fields)


# --- tricks a tensor can play ---------------------------------------------------------------


def _tensor(**changes: object) -> TensorProto:
    values = {"name": "t", "dims": [2], "data_type": TensorProto.FLOAT, "raw_data": b"\0" * 8}
    return TensorProto(**{**values, **changes})


def _outside(location: str = "../../etc/passwd", **more: str) -> TensorProto:
    tensor = _tensor(data_location=TensorProto.EXTERNAL)
    tensor.ClearField("raw_data")
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _inside_and_outside() -> TensorProto:
    tensor = _outside()
    tensor.raw_data = b"\0" * 8
    return tensor


# What a model may call the file its values are to come from; links are files of their own name.
LOCATIONS = {
    "beside": "weights.bin",
    "absolute": "/etc/passwd",
    "upwards": "../../../../etc/passwd",
    "down and up": "a/../../weights.bin",
    "a folder": ".",
    "nothing": "",
    "with a null byte": "weights.bin\0/etc/passwd",
    "a device": "/dev/zero",
    "a process's memory": "/proc/self/mem",
    "a share": "\\\\host\\share\\weights",
    "an address": "file:///etc/passwd",
    "ort's own mark for memory": "*/_ORT_MEM_ADDR_/*",
}


def _outside_without_saying_so() -> TensorProto:
    tensor = _outside()
    tensor.ClearField("data_location")
    return tensor


TENSOR_TRICKS: dict[str, Callable[[], TensorProto]] = {
    "external data": _outside,
    "external data, location unset": _outside_without_saying_so,
    "external data and values": _inside_and_outside,
    "external data, offset and length": lambda: _outside("w", offset="-8", length="1" * 30),
    "external data, no location": lambda: _tensor(
        external_data=[onnx.StringStringEntryProto(key="offset", value="0")]
    ),
    **{f"external data {how}": partial(_outside, where) for how, where in LOCATIONS.items()},
    "location alone": lambda: _tensor(data_location=TensorProto.EXTERNAL),
    "strings": lambda: _tensor(data_type=TensorProto.STRING, raw_data=b"", string_data=[b"a"] * 2),
    "segment": lambda: _tensor(segment=TensorProto.Segment(begin=0, end=1)),
    "documentation": lambda: _tensor(doc_string="hidden"),
    "metadata": lambda: _tensor(metadata_props=[onnx.StringStringEntryProto(key="k", value="v")]),
    "too few bytes": lambda: _tensor(raw_data=b"\0" * 7),
    "too many bytes": lambda: _tensor(raw_data=b"\0" * 9),
    "no bytes": lambda: _tensor(raw_data=b""),
    "bytes of a huge shape": lambda: _tensor(dims=[1 << 39, 1 << 39]),
    "negative shape": lambda: _tensor(dims=[-2]),
    "overflowing shape": lambda: _tensor(dims=[1 << 62, 4]),
    "rank 100": lambda: _tensor(dims=[1] * 100, raw_data=b"\0" * 4),
    "unknown type": lambda: _tensor(data_type=99),
    "undefined type": lambda: _tensor(data_type=0),
    "complex": lambda: _tensor(data_type=TensorProto.COMPLEX64, raw_data=b"\0" * 16),
    "values twice": lambda: _tensor(float_data=[1.0, 2.0]),
    "values of two kinds": lambda: _tensor(raw_data=b"", float_data=[1, 2], int64_data=[1, 2]),
    "values of another kind": lambda: _tensor(raw_data=b"", int64_data=[1, 2]),
    "too few values": lambda: _tensor(raw_data=b"", float_data=[1.0]),
}


# --- places a tensor can hide ---------------------------------------------------------------


def _in_initializer(model: ModelProto, tensor: TensorProto) -> None:
    model.graph.initializer.append(tensor)


def _in_constant(model: ModelProto, tensor: TensorProto) -> None:
    node = model.graph.node.add(op_type="Constant", output=["k"])
    _attribute(node, t=tensor, type=AttributeProto.TENSOR)


def _in_constant_of_another_type(model: ModelProto, tensor: TensorProto) -> None:
    node = model.graph.node.add(op_type="Constant", output=["k"])
    _attribute(node, t=tensor, i=3, type=AttributeProto.INT)


def _in_any_node(model: ModelProto, tensor: TensorProto) -> None:
    _attribute(model.graph.node[0], t=tensor, type=AttributeProto.TENSOR)


def _in_tensor_list(model: ModelProto, tensor: TensorProto) -> None:
    _attribute(model.graph.node[0], tensors=[tensor], type=AttributeProto.TENSORS)


def _in_sparse_attribute(model: ModelProto, tensor: TensorProto) -> None:
    sparse = SparseTensorProto(values=tensor, indices=tensor, dims=[2])
    _attribute(model.graph.node[0], sparse_tensor=sparse, type=AttributeProto.SPARSE_TENSOR)


def _in_sparse_list(model: ModelProto, tensor: TensorProto) -> None:
    sparse = SparseTensorProto(values=tensor, indices=tensor, dims=[2])
    _attribute(model.graph.node[0], sparse_tensors=[sparse], type=AttributeProto.SPARSE_TENSORS)


def _in_sparse_initializer(model: ModelProto, tensor: TensorProto) -> None:
    model.graph.sparse_initializer.add(values=tensor, dims=[2])


def _in_sparse_indices(model: ModelProto, tensor: TensorProto) -> None:
    model.graph.sparse_initializer.add(indices=tensor, dims=[2])


def _graph_with(tensor: TensorProto) -> onnx.GraphProto:
    return onnx.GraphProto(name="inner", initializer=[tensor])


def _in_subgraph(model: ModelProto, tensor: TensorProto) -> None:
    _attribute(model.graph.node[0], g=_graph_with(tensor), type=AttributeProto.GRAPH)


def _in_subgraph_list(model: ModelProto, tensor: TensorProto) -> None:
    _attribute(model.graph.node[0], graphs=[_graph_with(tensor)], type=AttributeProto.GRAPHS)


def _in_subgraph_of_a_subgraph(model: ModelProto, tensor: TensorProto) -> None:
    inner = onnx.GraphProto(name="middle", node=[onnx.NodeProto(op_type="If", output=["k"])])
    _attribute(inner.node[0], g=_graph_with(tensor), type=AttributeProto.GRAPH)
    node = model.graph.node.add(op_type="If", input=["x"], output=["k"])
    _attribute(node, g=inner, type=AttributeProto.GRAPH)


def _in_function(model: ModelProto, tensor: TensorProto) -> None:
    function = model.functions.add(name="f", domain="", output=["k"])
    node = function.node.add(op_type="Constant", output=["k"])
    _attribute(node, t=tensor, type=AttributeProto.TENSOR)


def _in_constant_of_a_subgraph(model: ModelProto, tensor: TensorProto) -> None:
    inner = onnx.GraphProto(name="inner", node=[onnx.NodeProto(op_type="Constant", output=["k"])])
    _attribute(inner.node[0], t=tensor, type=AttributeProto.TENSOR)
    _attribute(model.graph.node[0], g=inner, type=AttributeProto.GRAPH)


def _in_sparse_initializer_of_a_subgraph(model: ModelProto, tensor: TensorProto) -> None:
    inner = onnx.GraphProto(name="inner")
    inner.sparse_initializer.add(values=tensor, dims=[2])
    _attribute(model.graph.node[0], g=inner, type=AttributeProto.GRAPH)


def _in_subgraph_of_a_function(model: ModelProto, tensor: TensorProto) -> None:
    node = model.functions.add(name="f", domain="").node.add(op_type="If", output=["k"])
    _attribute(node, g=_graph_with(tensor), type=AttributeProto.GRAPH)


def _in_sparse_attribute_of_a_function(model: ModelProto, tensor: TensorProto) -> None:
    node = model.functions.add(name="f", domain="").node.add(op_type="Constant", output=["k"])
    sparse = SparseTensorProto(values=tensor, indices=tensor, dims=[2])
    _attribute(node, sparse_tensor=sparse, type=AttributeProto.SPARSE_TENSOR)


def _in_function_default(model: ModelProto, tensor: TensorProto) -> None:
    function = model.functions.add(name="f", domain="")
    function.attribute_proto.add(name="a", t=tensor, type=AttributeProto.TENSOR)


def _in_training_algorithm(model: ModelProto, tensor: TensorProto) -> None:
    model.training_info.add(algorithm=_graph_with(tensor))


def _in_training_initialization(model: ModelProto, tensor: TensorProto) -> None:
    model.training_info.add(initialization=_graph_with(tensor))


PLACES = [
    _in_initializer,
    _in_constant,
    _in_constant_of_another_type,
    _in_any_node,
    _in_tensor_list,
    _in_sparse_attribute,
    _in_sparse_list,
    _in_sparse_initializer,
    _in_sparse_indices,
    _in_subgraph,
    _in_subgraph_list,
    _in_subgraph_of_a_subgraph,
    _in_constant_of_a_subgraph,
    _in_sparse_initializer_of_a_subgraph,
    _in_function,
    _in_subgraph_of_a_function,
    _in_sparse_attribute_of_a_function,
    _in_function_default,
    _in_training_algorithm,
    _in_training_initialization,
]


@pytest.mark.parametrize("place", PLACES, ids=lambda p: p.__name__[1:])
@pytest.mark.parametrize("trick", TENSOR_TRICKS)
def test_every_trick_is_refused_in_every_place(
    trick: str, place: Callable[[ModelProto, TensorProto], None]
) -> None:
    model = _plain()
    place(model, TENSOR_TRICKS[trick]())
    for kind in BY_KIND:
        with pytest.raises(AdmissionError, match="model refused"):
            admit_model(model.SerializeToString(), kind)


@pytest.mark.parametrize("place", PLACES[:4], ids=lambda p: p.__name__[1:])
def test_an_honest_tensor_is_admitted_in_the_places_that_exist(
    place: Callable[[ModelProto, TensorProto], None],
) -> None:
    for tensor in (
        _tensor(),
        _tensor(raw_data=b"", float_data=[1, 2]),
        _tensor(dims=[0], raw_data=b""),
        _tensor(dims=[], raw_data=b"\0" * 4),
        _tensor(data_type=TensorProto.INT64, raw_data=b"\0" * 16),
        _tensor(data_type=TensorProto.BOOL, raw_data=b"", int32_data=[0, 1]),
        _tensor(data_type=TensorProto.FLOAT16, raw_data=b"\0" * 4),
    ):
        model = _plain()
        place(model, tensor)
        admit_model(model.SerializeToString())


# --- the model around the tensors -----------------------------------------------------------


def _node(**fields: object) -> Callable[[ModelProto], object]:
    return lambda m: m.graph.node.add(**{"output": ["k"], **fields})


MODEL_TRICKS: dict[str, tuple[Callable[[ModelProto], object], str]] = {
    "operator not listed": (_node(op_type="ImageDecoder"), "'ImageDecoder' is not on the list"),
    "loop": (_node(op_type="Loop"), "'Loop' is not on the list"),
    "strings": (_node(op_type="StringNormalizer"), "not on the list"),
    "random numbers": (_node(op_type="RandomNormal"), "not on the list"),
    "other domain": (_node(op_type="Add", domain="evil.ops"), "'evil.ops:Add' is not on"),
    "python operator": (_node(op_type="PythonOp", domain="com.microsoft"), "not on the list"),
    "no operator": (_node(), "operator '' is not on the list"),
    "set not imported": (_node(op_type="FusedMatMul", domain="com.microsoft"), "does not import"),
    "overload": (_node(op_type="Add", overload="o"), "overload in a NodeProto"),
    "node text": (_node(op_type="Add", doc_string="d"), "doc_string in a NodeProto"),
    "foreign set": (
        lambda m: m.opset_import.add(domain="org.pytorch.aten", version=1),
        "operator set 'org.pytorch.aten'",
    ),
    "future opset": (lambda m: m.opset_import.add(domain="", version=99), "opset 99"),
    "negative opset": (lambda m: m.opset_import.add(domain="", version=-1), "opset -1"),
    "future IR": (lambda m: setattr(m, "ir_version", 11), "IR version 11"),
    "no IR": (lambda m: m.ClearField("ir_version"), "IR version 0"),
    "function": (lambda m: m.functions.add(name="f"), "functions in a ModelProto"),
    "training info": (lambda m: m.training_info.add(), "training_info in a ModelProto"),
    "devices": (lambda m: m.configuration.add(name="c"), "in a ModelProto"),
    "graph text": (lambda m: setattr(m.graph, "doc_string", "d"), "doc_string in a GraphProto"),
    "quantization": (
        lambda m: m.graph.quantization_annotation.add(tensor_name="x"),
        "in a GraphProto",
    ),
    "map input": (
        lambda m: m.graph.input.add(name="m").type.map_type.value_type.tensor_type.SetInParent(),
        "in a TypeProto",
    ),
    "sparse input": (
        lambda m: setattr(m.graph.input.add(name="m").type.sparse_tensor_type, "elem_type", 1),
        "in a TypeProto",
    ),
    "negative dimension": (
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", -5),
        "has shape",
    ),
    "rank 40": (
        lambda m: m.graph.value_info.append(
            helper.make_tensor_value_info("v", TensorProto.FLOAT, [1] * 40)
        ),
        "rank 40",
    ),
    "referenced attribute": (
        lambda m: _attribute(m.graph.node[0], ref_attr_name="r"),
        "ref_attr_name",
    ),
}


@pytest.mark.parametrize("trick", MODEL_TRICKS)
def test_what_a_model_may_not_hold_is_named(trick: str) -> None:
    change, message = MODEL_TRICKS[trick]
    model = _plain()
    change(model)
    with pytest.raises(AdmissionError, match=message):
        admit_model(model.SerializeToString())


def _field(number: int, payload: bytes) -> bytes:
    """One length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@pytest.mark.parametrize("number", [29, 99, 1000, 536870911])
def test_a_field_no_schema_knows_is_refused_at_any_depth(number: int) -> None:
    secret = _field(number, b"hidden")
    model = _plain().SerializeToString()
    for wrapped in (secret, _field(7, secret), _field(7, _field(1, _field(5, _field(5, secret))))):
        with pytest.raises(AdmissionError, match=f"field {number} in a"):
            admit_model(model + wrapped)


def test_deep_nesting_is_refused() -> None:
    data = b""
    for _ in range(5000):
        data = _field(6, _field(1, _field(5, data)))
    with pytest.raises(AdmissionError, match="model refused"):
        admit_model(_plain().SerializeToString() + _field(7, _field(1, _field(5, data))))


@pytest.mark.parametrize("data", [b"\xff", b"GIF89a", b"\x08", b"\x0a\xff\xff\xff\xff\x7f"])
def test_what_is_no_protobuf_is_refused(data: bytes) -> None:
    with pytest.raises(AdmissionError, match="model refused"):
        admit_model(data)


def test_nothing_is_refused() -> None:
    with pytest.raises(AdmissionError, match="IR version 0"):
        admit_model(b"")


def test_text_that_is_not_utf8_never_escapes_as_another_error() -> None:
    data = _plain().SerializeToString() + _field(7, _field(1, _field(4, b"\xff\xfe")))
    with pytest.raises(AdmissionError):
        admit_model(data)


def test_sizes_are_limited() -> None:
    data = _plain().SerializeToString()
    for limits, message in (
        (Limits(file_bytes=10), "bytes; at most 10"),
        (Limits(nodes=0), "1 nodes; at most 0"),
        (Limits(tensors=2), "3 tensors; at most 2"),
        (Limits(rank=1), "rank 2; at most 1"),
    ):
        with pytest.raises(AdmissionError, match=message):
            admit_model(data, limits=limits)


# --- what is admitted -----------------------------------------------------------------------


def test_what_is_admitted_means_the_same_and_loads() -> None:
    model = _plain()
    admitted = admit_model(model.SerializeToString())
    assert onnx.load_model_from_string(admitted) == model
    assert admit_model(admitted) == admitted
    onnxruntime.InferenceSession(admitted, providers=["CPUExecutionProvider"])


def test_two_graphs_in_one_file_become_the_one_that_was_checked() -> None:
    """Parsers may differ in what they do with a field given twice; ours decides for both."""
    evil = _plain()
    evil.graph.node[0].op_type = "Mul"
    both = _plain().SerializeToString() + evil.SerializeToString()
    assert len(onnx.load_model_from_string(admit_model(both)).graph.node) == 2


def test_every_listed_operator_is_admitted_in_its_kind_only() -> None:
    for domain, name in ORT_TRAINING:
        model = _plain()
        if domain:
            model.opset_import.add(domain=domain, version=1)
        model.graph.node.add(op_type=name, domain=domain, output=["k"])
        data = model.SerializeToString()
        admit_model(data, "ort-training")
        if (domain, name) in STANDARD:
            admit_model(data)
        else:
            with pytest.raises(AdmissionError, match="not on the list"):
                admit_model(data)


def test_every_standard_operator_exists_in_onnx() -> None:
    known = {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""}
    assert {n for d, n in STANDARD if not d} - known == {"SimplifiedLayerNormalization"}


def test_the_default_domain_has_two_names() -> None:
    model = _plain()
    model.graph.node[0].domain = "ai.onnx"
    admit_model(model.SerializeToString())


def test_files_of_the_training_api_have_their_own_list() -> None:
    assert kind_of("training_model.onnx") == "ort-training"
    assert kind_of("step.onnx") == "standard"


# --- hostile bytes --------------------------------------------------------------------------


@st.composite
def _mutations(draw: st.DrawFn) -> bytes:
    data = bytearray(_plain().SerializeToString())
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["set", "insert", "delete", "repeat", "cut"])):
            case "set":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "insert":
                data[at:at] = draw(st.binary(max_size=8))
            case "delete":
                del data[at : at + draw(st.integers(1, 8))]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 40))]
            case _:
                del data[at:]
    return bytes(data)


@settings(max_examples=800)
@given(_mutations())
def test_mutated_bytes_are_admitted_or_refused_and_nothing_else(data: bytes) -> None:
    with contextlib.suppress(AdmissionError):
        admitted = admit_model(data)
        assert admit_model(admitted) == admitted


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(AdmissionError):
        admit_model(data)


# --- in the worker --------------------------------------------------------------------------


def _entries(folder: Path, **files: bytes) -> dict[str, FileEntry]:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {n: FileEntry(len(d), hashlib.sha256(d).hexdigest()) for n, d in files.items()}


def test_the_worker_says_which_file_and_why(tmp_path: Path) -> None:
    bad = _plain()
    bad.functions.add(name="f")
    good = _plain().SerializeToString()
    admit_files(tmp_path, _entries(tmp_path, good=good))
    with pytest.raises(AdmissionError, match="bad: model refused: it holds functions"):
        admit_files(tmp_path, _entries(tmp_path, good=good, bad=bad.SerializeToString()))


def test_a_file_swapped_after_its_digest_was_taken_is_found(tmp_path: Path) -> None:
    entries = _entries(tmp_path, model=_plain().SerializeToString())
    data = bytearray((tmp_path / "model").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model").write_bytes(data)
    with pytest.raises(ArtifactError, match="model is damaged"):
        admit_files(tmp_path, entries)


def test_a_parser_out_of_memory_is_a_refusal_not_our_death(tmp_path: Path) -> None:
    # Many tiny nodes: a message grows far beyond its file.
    model = _plain()
    model.graph.node.extend([onnx.NodeProto(op_type="Add", output=["k"])] * 400_000)
    entries = _entries(tmp_path, model=model.SerializeToString())
    tight = Limits(nodes=1 << 30, memory_bytes=96 << 20)
    with pytest.raises(AdmissionError, match="refused"):
        admit_files(tmp_path, entries, tight)


def test_a_parser_that_takes_for_ever_is_ended(tmp_path: Path) -> None:
    model = _plain()
    model.graph.node.extend([onnx.NodeProto(op_type="Add", output=["k"])] * 400_000)
    entries = _entries(tmp_path, model=model.SerializeToString())
    began = time.monotonic()
    with pytest.raises(AdmissionError, match="parsing it failed"):
        admit_files(tmp_path, entries, Limits(nodes=1 << 30, timeout_s=0.05))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("seed", range(12))
def test_mutated_files_leave_the_parent_alive(tmp_path: Path, seed: int) -> None:
    data = bytearray(_plain().SerializeToString())
    for i in range(1 + seed % 4):
        data[(seed * 31 + i * 17) % len(data)] ^= 1 << (seed + i) % 8
    with contextlib.suppress(AdmissionError):
        admit_files(tmp_path, _entries(tmp_path, model=bytes(data)))
