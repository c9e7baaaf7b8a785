from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedge.artifacts.admission import admit_model
from fedge.artifacts.manifest import TensorSpec
from fedge.artifacts.model import normalize, read_model, specs
from fedge.errors import AdmissionError, ArtifactError

Make = Callable[..., onnx.ModelProto]


def _shape(info: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim]


def test_a_model_is_read_from_object_bytes_and_path(lr: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(lr, tmp_path / "m.onnx")
    for source in (lr, lr.SerializeToString(), tmp_path / "m.onnx", str(tmp_path / "m.onnx")):
        assert read_model(source) == lr
    assert read_model(lr) is not lr


def test_what_is_no_model_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not an ONNX model"):
        read_model(b"junk")
    with pytest.raises(ArtifactError, match="cannot read the model .*No such file"):  # noqa: RUF043
        read_model(tmp_path / "none.onnx")
    with pytest.raises(ArtifactError, match="Is a directory"):
        read_model(tmp_path)


def test_a_file_too_large_for_protobuf_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "huge.onnx").open("wb") as handle:
        handle.truncate(1 << 32)
    with pytest.raises(ArtifactError, match="4294967296 bytes; at most"):
        read_model(tmp_path / "huge.onnx")


@pytest.mark.parametrize("rows", ["N", "batch", None, 1, 7])
def test_the_first_dimension_becomes_the_batch(lr_of: Make, rows: int | str | None) -> None:
    model = normalize(lr_of(rows=rows))
    assert _shape(model.graph.input[0]) == ["N", 4]
    assert _shape(model.graph.output[0]) == ["N", 3]
    assert specs(model.graph.input) == (TensorSpec("x", "float32", ("N", 4)),)


def test_a_user_s_model_is_left_as_it_was(lr: onnx.ModelProto) -> None:
    before = lr.SerializeToString()
    normalize(read_model(lr))
    assert lr.SerializeToString() == before


def test_texts_and_unused_operator_sets_are_dropped(lr: onnx.ModelProto) -> None:
    lr.doc_string = lr.graph.doc_string = lr.graph.node[0].doc_string = "where I live"
    lr.graph.input[0].doc_string = lr.graph.initializer[0].doc_string = "secret"
    lr.metadata_props.add(key="author", value="me")
    lr.graph.node[0].metadata_props.add(key="stack", value="/home/me/train.py")
    lr.graph.initializer[0].data_location = TensorProto.DEFAULT
    lr.opset_import.add(domain="ai.onnx.ml", version=3)
    data = normalize(lr).SerializeToString()
    admit_model(data)
    for text in (b"where I live", b"secret", b"author", b"/home/me"):
        assert text not in data


@pytest.mark.parametrize("opset", [11, 13, 17, 21, 22])
def test_other_operator_sets_are_converted(lr: onnx.ModelProto, opset: int) -> None:
    lr.opset_import[0].version = opset
    version = normalize(lr).opset_import[0].version
    assert version == min(max(opset, 13), 21)


@pytest.mark.parametrize(("operator", "opset"), [("RMSNormalization", 23), ("Swish", 24)])
def test_an_operator_too_new_to_convert_keeps_its_version(operator: str, opset: int) -> None:
    inputs = "x, w" if operator == "RMSNormalization" else "x"
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}]> g (float[N,4] x) => (float[N,4] y)'
        f"<float[4] w = {{1,1,1,1}}> {{y = {operator}({inputs})}}"
    )
    found = normalize(model)
    assert found.opset_import[0].version == opset
    admit_model(found.SerializeToString())


def test_the_newest_onnx_helper_defaults_are_accepted(lr: onnx.ModelProto) -> None:
    newest = helper.make_model(lr.graph)
    model = normalize(newest)
    assert model.ir_version <= 10
    assert model.opset_import[0].version <= 21


def test_an_operator_set_that_cannot_be_converted_is_said_so(lr: onnx.ModelProto) -> None:
    lr.opset_import[0].version = 9999
    with pytest.raises(ArtifactError, match="export it with an opset from 13 to 24"):
        normalize(lr)


def test_initializers_listed_as_inputs_are_no_inputs(lr: onnx.ModelProto) -> None:
    lr.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, [4, 3]))
    assert [i.name for i in normalize(lr).graph.input] == ["x"]


def _external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")


def _scalar_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, []))


def _open_dimension(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].ClearField("dim_value")


def _text_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("t", TensorProto.STRING, ["N"]))


def _wrong_shapes(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5


def _baked_batch(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = "z"
    model.graph.node.append(helper.make_node("Reshape", ["z", "shape"], ["y"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 3]), "shape"))


def _rename(old: str, new: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for names in (n for node in model.graph.node for n in (node.input, node.output)):
            names[:] = [new if n == old else n for n in names]
        for item in (*model.graph.input, *model.graph.output, *model.graph.initializer):
            item.name = new if item.name == old else item.name

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_external, "'W' lies in another file; save the model as one file"),
        (_scalar_input, "'t' has rank 0; its first dimension must be the batch"),
        (_open_dimension, r"leaves dimension 1 open \(\?\); give it a fixed size, or a name"),
        (_text_input, "'t' is no tensor of a known dtype"),
        (_wrong_shapes, "shapes do not fit each other"),
        (_baked_batch, r"output 'y' has shape \[2, 3\]; wanted the batch first"),
        (_rename("x", "labels"), "'labels' names an input"),
        (_rename("y", "loss"), "'loss' names an input"),
        (_rename("b", "b@next"), "'b@next' names an input"),
    ],
)
def test_what_cannot_be_used_is_refused_with_advice(
    lr: onnx.ModelProto, change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    change(lr)
    with pytest.raises(ArtifactError, match=message):
        normalize(lr)


def test_operators_outside_the_list_are_refused(lr: onnx.ModelProto) -> None:
    lr.graph.node[1].op_type = "StringConcat"
    lr.opset_import[0].version = 20
    with pytest.raises(AdmissionError, match="'StringConcat' is not on the list"):
        normalize(lr)
