"""Running statistics and Dropout over the link: the same bits as on the local grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper, parser

import fedge
from fedge.types import ClientData

ROUNDS = 2


def network() -> onnx.ModelProto:
    """Gemm, BatchNormalization and Dropout in training mode, Gemm; x [N, 6] -> logit [N, 1]."""
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,6] x) => (float[N,1] logit)'
        " <float ratio = {0.25}, bool on = {1}> {"
        " h = Gemm(x, body_w, body_b)"
        " n, m, v = BatchNormalization<training_mode=1>(h, norm_w, norm_b, norm_mean, norm_var)"
        " a = Relu(n) d = Dropout(a, ratio, on) logit = Gemm(d, head_w, head_b) }"
    )
    rng = np.random.default_rng(7)
    shapes = {"body_w": (6, 8), "body_b": (8,), "head_w": (8, 1), "head_b": (1,)}
    values = {n: rng.normal(0, 0.5, s) for n, s in shapes.items()}
    values |= {"norm_w": np.ones(8), "norm_b": np.zeros(8)}
    values |= {"norm_mean": np.zeros(8), "norm_var": np.ones(8)}
    model.graph.initializer.extend(
        numpy_helper.from_array(v.astype(np.float32), n) for n, v in values.items()
    )
    return model


def test_a_mean_that_travels_and_a_variance_that_stays(
    world: Any,
    hospitals: dict[str, ClientData],
    data_flags: Callable[[str], list[str]],
    tmp_path: Path,
) -> None:
    train = fedge.TrainConfig(lr=0.1, batch_size=8, epochs=1)
    bundle = fedge.build(
        network(), loss="bce_with_logits", train=train, personal="norm_var", out=tmp_path / "b"
    )
    assert bundle.manifest.running == ("norm_mean", "norm_var")
    assert "norm_mean" in bundle.manifest.shared
    assert bundle.manifest.personal == ("norm_var",)
    local = fedge.Federation(bundle, list(hospitals.values()), seed=5, engine="ort").run(ROUNDS)

    server = world.serve(str(bundle.path), "--rounds", str(ROUNDS), "--seed", "5")
    joined = [world.join(server, n, *data_flags(n), "--engine", "ort") for n in hospitals]
    server.wait_for("finished")
    for client in joined:
        client.wait_for(f"model of round {ROUNDS} is here")
        params, kept = client.newest_params(), client.personal_params()
        for name, values in params.items():
            np.testing.assert_array_equal(values, local.params[name])
        np.testing.assert_array_equal(kept["norm_var"], local.personal[client.name]["norm_var"])
        assert not np.array_equal(kept["norm_var"], np.ones(8))
        assert not np.array_equal(params["norm_mean"], np.zeros(8))
    path = local.export(tmp_path / "model.onnx", client_id="clinic-a")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.run(["logit"], {"x": np.ones((1, 6), np.float32)})[0].shape == (1, 1)
