"""Losses on their way into a bundle: settings in the manifest, a user's model admitted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, parser

import fedge
from fedge import losses
from fedge.artifacts import manifest as form
from fedge.artifacts.bundle import Bundle
from fedge.artifacts.manifest import Manifest
from fedge.engines import open_in_process
from fedge.errors import AdmissionError, ArtifactError, ConfigError
from fedge.types import Examples

SQUARE = """l (float[N,3] anything, float[N,3] labels) => (float cost) {
    d = Sub(anything, labels)
    e = Mul(d, d)
    cost = ReduceMean<keepdims=0>(e)
}"""


def loss_model(text: str = SQUARE) -> onnx.ModelProto:
    imports = [helper.make_opsetid("", 17)]
    return helper.make_model(parser.parse_graph(text), opset_imports=imports, ir_version=8)


@pytest.fixture(autouse=True)
def _no_training_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """ORT's side of every loss is tested in tests/fedge/engines/test_losses.py."""
    monkeypatch.setattr("fedge.artifacts.ort_build.find_training_python", lambda: None)


@pytest.mark.parametrize(
    ("loss", "name", "kept", "scored_as"),
    [
        ("cross_entropy", "cross_entropy", {}, "cross_entropy"),
        ("huber", "huber", {}, "mse"),
        ({"name": "huber", "delta": 2}, "huber", {"delta": 2.0}, "mse"),
        (
            losses.CrossEntropy(label_smoothing=0.1, ignore_index=-1),
            "cross_entropy",
            {"label_smoothing": 0.1, "ignore_index": -1},
            "cross_entropy",
        ),
        (
            losses.Distillation("bce_with_logits", temperature=4),
            "distillation",
            {"hard": {"name": "bce_with_logits"}, "temperature": 4.0},
            "bce_with_logits",
        ),
    ],
)
def test_settings_are_in_the_manifest(
    lr: onnx.ModelProto, loss: Any, name: str, kept: dict[str, Any], scored_as: str
) -> None:
    manifest = fedge.build(lr, loss=loss).manifest
    assert (manifest.loss, manifest.loss_settings) == (name, kept)
    assert manifest.scored_as == scored_as
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.loss_function == losses.find_loss(loss)
    assert form.UPDATE in manifest.files


def test_extras_are_in_manifest_and_reference(lr: onnx.ModelProto) -> None:
    bundle = fedge.build(lr, loss="distillation")
    (extra,) = bundle.manifest.extras
    assert (extra.name, extra.shape) == ("teacher_logits", ("N", 3))
    assert set(bundle.reference().examples.inputs) == {"x", "teacher_logits"}
    step = onnx.load_model_from_string(bundle.read("step.onnx"))
    evaluate = onnx.load_model_from_string(bundle.read("evaluate.onnx"))
    assert "teacher_logits" in {i.name for i in step.graph.input}
    assert "teacher_logits" not in {i.name for i in evaluate.graph.input}


def test_a_model_with_a_teacher_of_its_own(lr: onnx.ModelProto) -> None:
    lr.graph.input[0].name = lr.graph.node[0].input[0] = "teacher_logits"
    with pytest.raises(ArtifactError, match="'teacher_logits' of its own"):
        fedge.build(lr, loss="distillation")


@pytest.mark.parametrize("given", ["path", "text", "bytes", "proto", "object"])
def test_a_loss_of_ones_own_in_every_form(lr: onnx.ModelProto, tmp_path: Path, given: str) -> None:
    model, file = loss_model(), tmp_path / "square.onnx"
    onnx.save(model, file)
    forms: dict[str, Any] = {
        "path": file,
        "text": str(file),
        "bytes": model.SerializeToString(),
        "proto": model,
        "object": losses.Onnx(file, like="mse"),
    }
    bundle = fedge.build(lr, loss=forms[given])
    manifest = bundle.manifest
    assert manifest.loss == "onnx"
    assert len(manifest.loss_settings["sha256"]) == 64
    assert manifest.scored_as == ("mse" if given == "object" else "")
    rng = np.random.default_rng(0)
    rows = Examples(
        {"x": rng.standard_normal((6, 4)).astype(np.float32)}, rng.standard_normal((6, 3))
    )
    engine, plain = (open_in_process(b, "ort") for b in (bundle, fedge.build(lr, loss="mse")))
    for one in (engine, plain):
        one.train(rows, fedge.TrainConfig(lr=0.1, steps=5), 0)
    for name, value in engine.get_params().items():
        np.testing.assert_allclose(value, plain.get_params()[name], rtol=1e-6)


def test_a_loss_model_is_admitted_like_any_other(lr: onnx.ModelProto, tmp_path: Path) -> None:
    with pytest.raises(AdmissionError, match="RandomNormal"):
        fedge.build(lr, loss=loss_model(SQUARE.replace("d = Sub(anything, labels)",
            "r = RandomNormalLike(anything) d = Sub(r, labels)")))  # fmt: skip
    with pytest.raises(ArtifactError, match="not an ONNX model"):
        fedge.build(lr, loss=b"nonsense")
    with pytest.raises(ArtifactError, match="cannot read the model"):
        fedge.build(lr, loss=tmp_path / "missing.onnx")
    with pytest.raises(ConfigError, match="needs its model"):
        fedge.build(lr, loss="onnx")


CHANGES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda r: r.update(loss_settings={"delta": 1.0}), "has no setting delta"),
    (lambda r: r.update(loss_settings={"label_smoothing": "x"}), "wanted float"),
    (lambda r: r.update(loss_settings={"name": "huber"}), "hold a name or a model"),
    (lambda r: r.update(loss="onnx", loss_settings={"model": "/x"}), "hold a name or a model"),
    (lambda r: r.update(loss_settings=[]), "loss_settings"),
    (lambda r: r.update(extras=[{"name": "t", "dtype": "text", "shape": []}]), "dtype"),
    (lambda r: r["train"].update(schedule={"name": "x"}), "schedule 'x'"),
    (lambda r: r["train"].update(schedule=[1]), "schedule is"),
    (lambda r: r["train"].update(proximal_mu=-1.0), "proximal_mu"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=[said for _, said in CHANGES])
def test_what_a_manifest_cannot_say_of_a_loss(
    manifest_bytes: bytes, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    raw = json.loads(manifest_bytes)
    change(raw)
    data = json.dumps(raw, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    with pytest.raises(ArtifactError, match=said):
        Manifest.from_json(data)


def test_a_bundle_survives_its_folder(lr: onnx.ModelProto, tmp_path: Path) -> None:
    train = fedge.TrainConfig(
        lr=0.1, clip_norm=1.0, schedule=fedge.Schedule("cosine", warmup=2), proximal_mu=0.1
    )
    made = fedge.build(lr, loss=losses.Huber(0.5), train=train, out=tmp_path / "b")
    again = Bundle.open(tmp_path / "b").manifest
    assert again == made.manifest
    assert again.train == train
