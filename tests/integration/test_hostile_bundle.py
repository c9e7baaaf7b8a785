"""A bundle that kills its engine: the client goes on, says so and keeps its connection."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import fedge
from fedge.artifacts import ort_build
from fedge.artifacts.bundle import Bundle
from fedge.engines import find_training_python
from fedge.types import ClientData

# The gradient of AveragePool with a symbolic batch divides by zero in ONNX Runtime 1.19.2.
TEXT = """<ir_version: 8, opset_import: ["" : 17]>
deadly (float[N,6] x) => (float[N,1] logit)
<int64[4] shape = {-1, 1, 2, 3}, float[3,1,3,3] w, float[3,1] v>
{i = Reshape(x, shape) c = Conv<pads=[1,1,1,1]>(i, w) p = AveragePool<kernel_shape=[2,2]>(c)
 f = ReduceMean<axes=[2,3], keepdims=0>(p) logit = MatMul(f, v)}"""


@pytest.fixture
def deadly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """Built by somebody who leaves out the checks that refuse it."""
    if find_training_python() is None:
        pytest.skip("no interpreter with onnxruntime-training-cpu is installed")
    model = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(3)
    for name, shape in (("w", (3, 1, 3, 3)), ("v", (3, 1))):
        values = rng.normal(0, 0.5, shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    monkeypatch.setattr(ort_build, "_without_a_kernel", lambda _: "")
    monkeypatch.setattr(ort_build, "_step", lambda _, __, good, ___: (good.loss, good.grads))
    train = fedge.TrainConfig(lr=0.1, batch_size=8, epochs=2)
    bundle = fedge.build(
        onnx.shape_inference.infer_shapes(model),
        loss="bce_with_logits",
        train=train,
        out=tmp_path / "deadly",
    )
    assert bundle.engines == ("ort", "ort-training")
    return bundle


def test_a_client_outlives_its_engine(
    world: Any,
    deadly: Bundle,
    hospitals: dict[str, ClientData],
    data_flags: Callable[[str], list[str]],
) -> None:
    first, second = hospitals
    server = world.serve(str(deadly.path), "--rounds", "2", "--min-clients", "2")
    stubborn = world.join(server, first, *data_flags(first), "--engine", "ort-training")
    careful = world.join(server, second, *data_flags(second))
    careful.wait_for("ready: engine ort (")
    assert "killed by SIGFPE" in careful.log.read_text(), "the probe met it"
    server.wait_for("retry")
    careful.wait_for("update of")
    said = stubborn.log.read_text()
    assert said.count("round 1: failed: fedge_client.worker died during train") >= 1
    assert said.count("connected to") == 1
    status = json.loads(world.command(first, "status", "--json").stdout)
    assert (status["running"], status["connection"]) == (True, "online")
    assert "killed by SIGFPE" in status["last_error"]
    stubborn.process.send_signal(signal.SIGTERM)
    assert stubborn.wait_gone() == 0
