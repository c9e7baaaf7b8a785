"""Gradients with recomputation are those without; what is kept crosses few cuts."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedge.artifacts.manifest import Optimizer
from fedge.autodiff import TrainingGraphs, training_graphs
from fedge.types import Params

ROWS, CHANNELS, SIZE, BLOCKS = 6, 4, 6, 5


def blocks() -> tuple[onnx.ModelProto, Params]:
    """Convolution, batch normalization in training mode, dropout and a shortcut, five times."""
    rng = np.random.default_rng(0)
    params: Params = {}
    nodes, last = [], "x"
    for i in range(BLOCKS):
        params[f"w{i}"] = rng.normal(0, 0.3, (CHANNELS, CHANNELS, 3, 3)).astype(np.float32)
        for name, start in (("scale", 1), ("bias", 0), ("mean", 0), ("var", 1)):
            params[f"{name}{i}"] = np.full(CHANNELS, start, np.float32)
        norm = [f"c{i}", f"scale{i}", f"bias{i}", f"mean{i}", f"var{i}"]
        nodes += [
            helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]),
            helper.make_node(
                "BatchNormalization", norm, [f"n{i}", f"m{i}", f"v{i}"], training_mode=1
            ),
            helper.make_node("Relu", [f"n{i}"], [f"r{i}"]),
            helper.make_node("Dropout", [f"r{i}", "ratio", "training"], [f"d{i}"]),
            helper.make_node("Add", [f"d{i}", last], [f"y{i}"]),
        ]
        last = f"y{i}"
    nodes.append(helper.make_node("ReduceMean", [last], ["y"], axes=[2, 3], keepdims=0))
    constants = {"ratio": np.float32(0.25), "training": np.array(True)}
    weights = {**params, **constants}
    graph = helper.make_graph(
        nodes,
        "blocks",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", CHANNELS, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CHANNELS])],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), params


def graphs(recompute: bool | int) -> TrainingGraphs:
    model, params = blocks()
    return training_graphs(
        model,
        params=list(params),
        trainable=[n for n in params if not n.startswith(("mean", "var"))],
        loss="cross_entropy",
        optimizer=Optimizer("adamw"),
        recompute=recompute,
    )


def feeds(made: TrainingGraphs) -> Params:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(ROWS, CHANNELS, SIZE, SIZE)).astype(np.float32)
    noise = {s.name: rng.random((ROWS, *s.shape[1:]), np.float32) for s in made.noise}
    state = {s.name: np.zeros(s.shape, s.dtype) for s in made.state}
    labels = {made.labels.name: rng.integers(0, CHANNELS, ROWS)}
    return {**blocks()[1], **noise, **state, **labels, "x": x, "lr": np.array(0.1, np.float32)}


def run(model: onnx.ModelProto, given: Params) -> tuple[Params, list[str]]:
    """Outputs, and the operators that are left after ONNX Runtime's own optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [o.name for o in session.get_outputs()]
    values = session.run(names, {i.name: given[i.name] for i in session.get_inputs()})
    return dict(zip(names, values, strict=True)), names


@pytest.mark.parametrize("recompute", [True, 2, 4])
@pytest.mark.parametrize("file", ["step", "grad"])
def test_every_output_is_the_same(recompute: bool | int, file: str) -> None:
    plain, lean = graphs(False), graphs(recompute)
    expected, _ = run(getattr(plain, file), feeds(plain))
    found, _ = run(getattr(lean, file), feeds(lean))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_copies_survive_onnx_runtimes_optimizers(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    counts = {}
    for recompute in (False, 3):
        path = tmp_path_factory.mktemp("optimized") / "model.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(graphs(recompute).step.SerializeToString(), options)
        nodes = onnx.load(path).graph.node
        counts[recompute] = sum(n.op_type == "BatchNormalization" for n in nodes)
    assert counts[3] > counts[False] > 0
