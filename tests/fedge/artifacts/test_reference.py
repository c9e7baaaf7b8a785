from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fedge.artifacts.admission import admit_model
from fedge.artifacts.manifest import LabelSpec, TensorSpec
from fedge.artifacts.reference import ROWS, draw_examples, record
from fedge.errors import ArtifactError
from fedge.types import Examples

X = TensorSpec("x", "float32", ("N", 3))
CLASSES = LabelSpec("labels", "int64", ("N",), 0, 4)


def test_the_batch_repeats_and_fits() -> None:
    first, second = (draw_examples((X,), CLASSES) for _ in range(2))
    assert first.inputs["x"].tobytes() == second.inputs["x"].tobytes()
    assert first.inputs["x"].shape == (ROWS, 3)
    assert first.inputs["x"].dtype == np.float32
    assert first.labels.dtype == np.int64
    assert set(first.labels) <= set(range(5))


def test_labels_are_drawn_from_their_range() -> None:
    binary = LabelSpec("labels", "float32", ("N", 1), 0, 1)
    drawn = draw_examples((X,), binary).labels
    assert (drawn.shape, drawn.dtype) == ((ROWS, 1), np.float32)
    assert set(drawn.ravel()) <= {0.0, 1.0}
    real = LabelSpec("labels", "float32", ("N", 2))
    assert len(np.unique(draw_examples((X,), real).labels)) == 2 * ROWS


def test_integers_come_from_the_sample() -> None:
    ids = TensorSpec("ids", "int64", ("N", 2))
    sample = {"ids": np.array([[17, 18]])}
    assert draw_examples((ids,), CLASSES, sample).inputs["ids"].tolist() == [[17, 18]] * ROWS
    assert set(draw_examples((ids,), CLASSES).inputs["ids"].ravel()) <= {0, 1}


def _model(*nodes: onnx.NodeProto) -> bytes:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        list(nodes),
        "g",
        [info("x", TensorProto.FLOAT, ["N", 3]), info("w", TensorProto.FLOAT, [3])],
        [info("loss", TensorProto.FLOAT, []), info("w@grad", TensorProto.FLOAT, [3])],
        [helper.make_tensor("rows", TensorProto.INT64, [1], [0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return admit_model(model.SerializeToString())


def _examples() -> Examples:
    return Examples({"x": np.ones((4, 3), np.float32)}, np.zeros(4, np.int64))


SUM = helper.make_node("ReduceSum", ["x"], ["loss"], keepdims=0)


def test_loss_and_gradients_are_what_the_graph_says() -> None:
    column = helper.make_node("ReduceSum", ["x", "rows"], ["s"], keepdims=0)
    model = _model(SUM, column, helper.make_node("Mul", ["s", "w"], ["w@grad"]))
    recorded = record(model, _examples(), "labels", {"w": np.array([1, 2, 3], np.float32)})
    assert recorded.loss == 12
    np.testing.assert_array_equal(recorded.grads["w"], [4, 8, 12])


def test_a_random_graph_is_refused() -> None:
    info = helper.make_tensor("p", TensorProto.FLOAT, [], [0.5])
    on = helper.make_tensor("on", TensorProto.BOOL, [], [1])
    model = _model(
        helper.make_node("Constant", [], ["p"], value=info),
        helper.make_node("Constant", [], ["on"], value=on),
        helper.make_node("Dropout", ["x", "p", "on"], ["d"]),
        helper.make_node("ReduceSum", ["d"], ["loss"], keepdims=0),
        helper.make_node("ReduceSum", ["d", "rows"], ["w@grad"], keepdims=0),
    )
    with pytest.raises(ArtifactError, match="random in training"):
        record(model, _examples(), "labels", {"w": np.zeros(3, np.float32)})


def test_what_does_not_run_or_is_not_finite_is_refused() -> None:
    divide = _model(SUM, helper.make_node("Div", ["w", "w"], ["w@grad"]))
    with pytest.raises(ArtifactError, match="w@grad is not finite"):
        record(divide, _examples(), "labels", {"w": np.zeros(3, np.float32)})
    with pytest.raises(ArtifactError, match="does not run"):
        record(divide, _examples(), "labels", {"w": np.zeros((3, 3), np.float32)})
