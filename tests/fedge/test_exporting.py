from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import fedge
from fedge.artifacts.bundle import Bundle
from fedge.artifacts.preprocessing import SiteStandardize, Standardize
from fedge.config import TrainConfig
from fedge.engines import find_training_python, open_engine, open_in_process
from fedge.errors import ArtifactError, DataError, EngineError
from fedge.types import Examples, Params

ROWS = 7
RNG = np.random.default_rng(3)
X = RNG.normal(2, 3, size=(ROWS, 4)).astype(np.float32)
SITE = {"site_mean": X.mean(0), "site_std": X.std(0, ddof=1)}


def model(outputs: int = 3) -> onnx.ModelProto:
    """Relu(x)·w + b, with names chosen to clash with what export adds."""
    w = RNG.normal(size=(4, outputs)).astype(np.float32)
    b = np.zeros(outputs, np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["raw"], name="raw"),
            helper.make_node("Gemm", ["raw", "w", "b"], ["probability"], name="x"),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["N", outputs])],
        [onnx.numpy_helper.from_array(w, "w"), onnx.numpy_helper.from_array(b, "b")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def scaling() -> onnx.ModelProto:
    """A custom preprocessing graph from bytes named ``raw`` to ``x``."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["raw"], ["x0"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["x0", "scale"], ["ready"]),
        ],
        "pre",
        [helper.make_tensor_value_info("raw", TensorProto.UINT8, ["N", 4])],
        [helper.make_tensor_value_info("ready", TensorProto.FLOAT, ["N", 4])],
        [onnx.numpy_helper.from_array(np.float32(1 / 255), "scale")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def trained(bundle: Bundle, raw: Examples, site: Params | None) -> tuple[Params, Params]:
    """Params after a little training, and the engine's own outputs."""
    engine = open_in_process(bundle)
    ready = engine.preprocess(raw, site)
    engine.train(ready, TrainConfig(lr=0.1, batch_size=4, epochs=2), 0)
    return engine.get_params(), engine.predict(ready.inputs)


def run(path: Path, inputs: Params) -> tuple[ort.InferenceSession, Params]:
    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session, dict(
        zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True)
    )


@pytest.mark.parametrize("how", ["none", "global", "site", "custom"])
def test_raw_rows_give_what_the_engine_gives(how: str, tmp_path: Path) -> None:
    ways: dict[str, Any] = {
        "none": None,
        "global": Standardize(X.mean(0), X.std(0)),
        "site": SiteStandardize(),
        "custom": scaling(),
    }
    bundle = fedge.build(
        model(), loss="cross_entropy", optimizer="sgd", preprocessing=ways[how], name="small"
    )
    inputs = {"raw": RNG.integers(0, 255, (ROWS, 4), np.uint8)} if how == "custom" else {"x": X}
    site = SITE if how == "site" else None
    params, wanted = trained(bundle, Examples(inputs, np.arange(ROWS) % 3), site)
    path = fedge.export(bundle, params, tmp_path / "model.onnx", site=site)
    session, got = run(path, inputs)
    assert [i.name for i in session.get_inputs()] == list(inputs)
    assert np.allclose(got["probability"], wanted["probability"], rtol=1e-5, atol=1e-6)
    assert np.allclose(got["probabilities"].sum(1), 1, atol=1e-5)
    assert (got["probabilities"].argmax(1) == wanted["probability"].argmax(1)).all()
    assert onnx.load(path).ir_version <= 10


def test_a_binary_classifier_gets_a_probability(tmp_path: Path) -> None:
    bundle = fedge.build(model(1), loss="bce_with_logits", optimizer="sgd")
    path = fedge.export(bundle, bundle.initial_params(), str(tmp_path / "m.onnx"))
    _, got = run(path, {"x": X})
    assert np.allclose(got["probability_"], 1 / (1 + np.exp(-got["probability"])), atol=1e-6)


def test_a_regression_stays_as_it_is(tmp_path: Path) -> None:
    bundle = fedge.build(model(1), loss="mse", optimizer="sgd")
    session, _ = run(fedge.export(bundle, bundle.initial_params(), tmp_path / "m.onnx"), {"x": X})
    assert [o.name for o in session.get_outputs()] == ["probability"]


def test_the_same_params_give_the_same_bytes_and_both_engines_can_be_exported(
    tmp_path: Path,
) -> None:
    if find_training_python() is None:
        pytest.skip("no interpreter with onnxruntime-training-cpu is installed")
    bundle = fedge.build(model(), loss="cross_entropy", optimizer="sgd")
    engine = open_engine(bundle, "ort-training")
    engine.train_step(Examples({"x": X}, np.arange(ROWS) % 3), 0.1)
    params = engine.get_params()
    wanted = engine.predict({"x": X})
    engine.close()
    paths = [fedge.export(bundle, params, tmp_path / f"{n}.onnx") for n in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert np.allclose(run(paths[0], {"x": X})[1]["probability"], wanted["probability"], atol=1e-6)


def test_what_is_missing_or_does_not_fit_is_named(tmp_path: Path) -> None:
    bundle = fedge.build(
        model(), loss="cross_entropy", optimizer="sgd", preprocessing=SiteStandardize()
    )
    params = bundle.initial_params()
    target = tmp_path / "m.onnx"
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (DataError, "site_mean", lambda: fedge.export(bundle, params, target)),
        (
            ArtifactError,
            "lack w",
            lambda: fedge.export(bundle, {"b": params["b"]}, target, site=SITE),
        ),
        (
            ArtifactError,
            "wanted float32",
            lambda: fedge.export(bundle, {**params, "w": params["w"].T}, target, site=SITE),
        ),
        (
            ArtifactError,
            "cannot write",
            lambda: fedge.export(bundle, params, tmp_path / "no" / "m.onnx", site=SITE),
        ),
    ]
    for kind, message, attempt in cases:
        with pytest.raises(kind, match=message):
            attempt()
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_differs_from_the_engine_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedge import exporting

    bundle = fedge.build(model(), loss="cross_entropy", optimizer="sgd")
    params = bundle.initial_params()
    other = exporting.export_model(bundle, {**params, "b": params["b"] + 1})
    monkeypatch.setattr(exporting, "export_model", lambda *_: other)
    old = tmp_path / "m.onnx"
    old.write_bytes(b"the model before")
    with pytest.raises(EngineError, match="differs from the engine's"):
        exporting.export(bundle, params, old)
    assert old.read_bytes() == b"the model before"
