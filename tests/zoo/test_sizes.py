"""Token ids, and sequences whose length differs from site to site, the whole way."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper, parser
from zoo import SMALL
from zoo.judge import Judge

import fedge
from fedge import TrainConfig
from fedge.artifacts.bundle import Bundle
from fedge.engines import available_engines, open_engine, open_in_process
from fedge.errors import ArtifactError, ConfigError, DataError
from fedge.params import gradient_distance
from fedge.types import ClientData, Examples, Params

WORDS, WIDTH, CLASSES = 11, 8, 5
NODES = """
e = Gather(table, x) k = Transpose<perm=[0,2,1]>(e) s = MatMul(e, k) p = Softmax<axis=-1>(s)
h = MatMul(p, e) d = Dropout(h, ratio, on) l = MatMul(d, w) y = Transpose<perm=[0,2,1]>(l)
"""


def attention(ratio: float = 0.0) -> onnx.ModelProto:
    """Ids [N, T] -> logits [N, classes, T]."""
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>'
        f"g (int64[N,T] x) => (float[N,{CLASSES},T] y) <float ratio = {{{ratio}}}, bool on = {{1}}>"
        f"{{{NODES}}}"
    )
    rng = np.random.default_rng(0)
    for name, shape in (("table", (WORDS, WIDTH)), ("w", (WIDTH, CLASSES))):
        drawn = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(drawn, name))
    return model


def texts(count: int, length: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, WORDS, (count, length))
    return Examples({"x": ids}, rng.integers(0, CLASSES, (count, length)))


def judged(params: Params, data: Examples) -> tuple[float, Params]:
    table, w = (
        torch.tensor(params[n], dtype=torch.float64, requires_grad=True) for n in ("table", "w")
    )
    e = table[torch.from_numpy(data.inputs["x"])]
    logits = (e @ e.transpose(1, 2)).softmax(-1) @ e @ w
    labels = torch.from_numpy(data.labels)
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), {"table": table.grad.numpy(), "w": w.grad.numpy()}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    sample = texts(2, 6, 0).inputs
    train = TrainConfig(lr=0.5, batch_size=4, epochs=1)
    return fedge.build(attention(), loss="cross_entropy", sample=sample, train=train)


@pytest.fixture(params=["ort", "ort-training"])
def engine_name(request: pytest.FixtureRequest, bundle: Bundle) -> str:
    name: str = request.param
    reason = available_engines(bundle)[name]
    if "no interpreter" in reason or "not installed" in reason:
        pytest.skip(reason)
    return name


def test_symbols_are_in_the_manifest(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.inputs[0].shape == manifest.raw_inputs[0].shape == ("N", "T")
    assert manifest.inputs[0].dtype == "int64"
    assert manifest.outputs[0].shape == ("N", CLASSES, "T")
    assert manifest.labels.shape == ("N", "T")
    assert bundle.reference().examples.inputs["x"].shape == (4, 6)


def test_one_engine_takes_one_length_after_another(bundle: Bundle, engine_name: str) -> None:
    engine = open_engine(bundle, engine_name)
    try:
        for length in (6, 3, 17, 6):
            data = texts(5, length, length)
            loss, wanted = judged(engine.get_params(), data)
            found_loss, found = engine.gradients(data)
            assert found_loss == pytest.approx(loss, rel=1e-5)
            assert max(gradient_distance(found, wanted).values()) < 1e-5
            engine.train(data, TrainConfig(lr=0.1, batch_size=2, epochs=1), seed=0)
            assert engine.evaluate(data).outputs["y"].shape == (5, CLASSES, length)
    finally:
        engine.close()


def test_sites_with_texts_of_other_lengths_learn_together(bundle: Bundle, tmp_path: Path) -> None:
    clients = [ClientData(f"site-{n}", texts(12, n, n), texts(4, n, n + 100)) for n in (4, 6, 9)]
    run = fedge.Federation(bundle, clients, seed=0).run(rounds=2)
    assert len(run.table) == 6
    path = run.export(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    engine = open_in_process(bundle, "ort")
    engine.set_params(run.params)
    for length in (1, 6, 13):
        ids = texts(3, length, 7).inputs
        y, odds = session.run(["y", "probabilities"], ids)
        np.testing.assert_allclose(y, engine.predict(ids)["y"], atol=1e-5)
        np.testing.assert_allclose(odds.sum(1), np.ones((3, length)), rtol=1e-5)


def test_texts_are_partitioned_as_ids() -> None:
    data = texts(40, 6, 1)
    parts = fedge.data.partition(data.inputs["x"], data.labels, by="iid", clients=4)
    assert all(p.train.inputs["x"].dtype == np.int64 for p in parts)
    assert sum(len(p.train) + len(p.test) for p in parts if p.test) == 40


def test_dropout_s_numbers_follow_the_length() -> None:
    sample = texts(2, 6, 0).inputs
    bundle = fedge.build(attention(0.5), loss="cross_entropy", sample=sample)
    assert bundle.manifest.noise[0].shape == ("N", "T", WIDTH)
    engine = open_in_process(bundle, "ort")
    for length in (6, 10):
        engine.train(texts(6, length, 3), TrainConfig(lr=0.1, batch_size=3, epochs=1), seed=0)


def test_lengths_that_do_not_fit_each_other_are_refused(bundle: Bundle) -> None:
    engine = open_in_process(bundle, "ort")
    data = Examples(texts(4, 6, 0).inputs, texts(4, 5, 0).labels)
    with pytest.raises(DataError, match="labels has T = 5; others have 6"):
        engine.train(data, TrainConfig(lr=0.1), seed=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [(0.5, "whole numbers"), (np.nan, "NaN"), (np.inf, "NaN or infinity")],
)
def test_ids_must_be_whole_numbers(bundle: Bundle, values: float, message: str) -> None:
    engine = open_in_process(bundle, "ort")
    data = Examples({"x": np.full((2, 6), values)}, np.zeros((2, 6)))
    with pytest.raises(DataError, match=message):
        engine.train(data, TrainConfig(lr=0.1), seed=0)


def test_an_operator_that_needs_a_fixed_size_says_so() -> None:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,1,T] x) => (float[N,2] y)'
        "{c = Conv(x, k) m = GlobalAveragePool(c) y = Flatten(m)}"
    )
    kernel = np.ones((2, 1, 3), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(kernel, "k"))
    with pytest.raises(ArtifactError, match="only the first may vary"):
        fedge.build(model, loss="cross_entropy", sample=np.zeros((1, 1, 8), np.float32))


def test_options_for_modules_are_refused_for_models() -> None:
    with pytest.raises(ConfigError, match="say how to export a module"):
        fedge.build(attention(), loss="cross_entropy", dynamic={"x": {1: "T"}})


@pytest.mark.skipif("FEDGE_SOAK" not in os.environ, reason="half a minute per model: make soak")
@pytest.mark.parametrize("name", ["gpt", "llama", "encoder"])
def test_modules_whose_length_may_vary(name: str) -> None:
    model = SMALL[name]
    bundle = fedge.build(
        model.build(), loss=model.loss, sample=model.inputs(2), dynamic={"x": {1: "T"}}
    )
    engine = open_in_process(bundle, "ort")
    for length in (12, 7, 2):
        (shape,) = model.shapes.values()
        short = replace(
            model, shapes={"x": (length, *shape[1:])}, labels=(length,) * bool(model.labels)
        )
        rows = Examples(short.inputs(4, 1), short.targets(4, 1))
        _, wanted = Judge(model).gradients(rows)
        assert max(gradient_distance(engine.gradients(rows)[1], wanted).values()) < 1e-4
