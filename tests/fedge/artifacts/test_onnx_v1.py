"""Our subset of ONNX's schema against ONNX's own: same numbers, same wire types."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from fedge.artifacts.onnx_v1 import onnx_pb2

ROOT = Path(__file__).parents[3]
MESSAGES = [d.full_name for d in onnx_pb2.DESCRIPTOR.message_types_by_name.values()]


def _fields(ours: Descriptor, theirs: Descriptor) -> list[tuple[FieldDescriptor, FieldDescriptor]]:
    by_number = theirs.fields_by_number
    pairs = [(f, by_number[f.number]) for f in ours.fields]
    for nested in ours.nested_types:
        if nested.name in theirs.nested_types_by_name:
            pairs += _fields(nested, theirs.nested_types_by_name[nested.name])
    return pairs


@pytest.mark.parametrize("name", MESSAGES)
def test_every_field_is_onnx_s_own(name: str) -> None:
    short = name.rsplit(".", 1)[-1]
    theirs = onnx.ModelProto.DESCRIPTOR.file.message_types_by_name[short]
    for ours, other in _fields(onnx_pb2.DESCRIPTOR.message_types_by_name[short], theirs):
        assert (ours.name, ours.number, ours.type, ours.is_repeated, ours.is_packed) == (
            other.name,
            other.number,
            other.type,
            other.is_repeated,
            other.is_packed,
        )


def test_a_type_cannot_nest_deeper_than_a_sequence_of_tensors() -> None:
    type_proto = onnx_pb2.TypeProto.DESCRIPTOR
    element = type_proto.nested_types_by_name["Element"]
    assert [(f.name, f.number) for f in element.fields] == [("tensor_type", 1)]


def test_no_message_of_ours_contains_itself() -> None:
    def below(message: Descriptor, path: tuple[str, ...]) -> None:
        assert message.full_name not in path, path
        for field in message.fields:
            if field.message_type is not None:
                below(field.message_type, (*path, message.full_name))

    below(onnx_pb2.ModelProto.DESCRIPTOR, ())


def test_attribute_types_are_onnx_s_without_graphs_and_sparse_tensors() -> None:
    ours = dict(onnx_pb2.AttributeProto.AttributeType.items())
    theirs = dict(onnx.AttributeProto.AttributeType.items())
    assert ours.items() < theirs.items()
    assert not {"GRAPH", "GRAPHS", "SPARSE_TENSOR", "TENSORS"} & ours.keys()
