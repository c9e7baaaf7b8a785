"""Whole federations with losses that score, label or feed differently."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

import fedge
from fedge import losses
from fedge.types import ClientData, Examples


def linear(outputs: int) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    graph = parser.parse_graph(f"g (float[N,4] x) => (float[N,{outputs}] y) {{y = MatMul(x, w)}}")
    graph.node[0].name = "multiply"
    weights = (0.1 * rng.standard_normal((4, outputs))).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(weights, "w"))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(autouse=True)
def _no_training_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedge.artifacts.ort_build.find_training_python", lambda: None)


def clients(labels: Any, teacher: int = 0) -> list[ClientData]:
    """Three of 30 rows, ten held out; ``labels`` of (rng, x)."""
    found = []
    for k in range(3):
        rng = np.random.default_rng(k)
        x = rng.standard_normal((30, 4)).astype(np.float32)
        inputs = {"x": x}
        if teacher:
            inputs["teacher_logits"] = np.float32(4) * x[:, :teacher]
        data = Examples(inputs, labels(rng, x))
        found.append(ClientData(f"c{k}", data.take(slice(20)), data.take(slice(20, None))))
    return found


def test_survival() -> None:
    def times(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
        return np.stack([rng.exponential(np.exp(-2 * x[:, 0])), rng.random(30) < 0.8], 1)

    train = fedge.TrainConfig(lr=0.3, batch_size=20, epochs=5)
    bundle = fedge.build(linear(1), loss="cox", train=train)
    run = fedge.Federation(bundle, clients(times), engine="ort").run(4)
    assert {"loss", "concordance"} <= set(run.table.columns)
    assert "accuracy" not in run.table.columns
    assert run.metrics["concordance"].iloc[-1] > 0.7
    run.plot()


def test_a_teacher() -> None:
    """The labels say nothing: what is learnt is the teacher's."""
    train = fedge.TrainConfig(lr=0.5, batch_size=10, epochs=5)
    loss = losses.Distillation(temperature=2, alpha=1)
    bundle = fedge.build(linear(3), loss=loss, preprocessing="site", train=train)
    found = clients(lambda rng, x: np.argmax(x[:, :3], axis=1), teacher=3)
    silent = [
        ClientData(c.client_id, Examples(c.train.inputs, np.zeros(20, int)), c.test) for c in found
    ]
    run = fedge.Federation(bundle, silent, engine="ort").run(4)
    assert run.metrics["accuracy"].iloc[-1] > 0.8


def test_a_loss_of_ones_own_and_schedules() -> None:
    square = parser.parse_graph("""l (float[N,1] y, float[N,1] labels) => (float loss) {
        d = Sub(y, labels) e = Mul(d, d) loss = ReduceMean<keepdims=0>(e)
    }""")
    imports = [helper.make_opsetid("", 17)]
    own = helper.make_model(square, opset_imports=imports, ir_version=8)
    schedule = fedge.Schedule("cosine", length=4, floor=0.1)
    train = fedge.TrainConfig(lr=0.2, round_schedule=schedule, clip_norm=5.0, accumulate=2)
    labels = lambda rng, x: x[:, :1] - x[:, 1:2]  # noqa: E731
    runs = [
        fedge.Federation(
            fedge.build(linear(1), loss=loss, train=train), clients(labels), engine="ort"
        ).run(4)
        for loss in (own, "mse")
    ]
    np.testing.assert_allclose(runs[0].params["w"], runs[1].params["w"], rtol=1e-5)
    assert "rmse" not in runs[0].table.columns
    assert runs[0].metrics["loss"].iloc[-1] < 0.5 * runs[0].metrics["loss"].iloc[0]
    runs[0].plot()
