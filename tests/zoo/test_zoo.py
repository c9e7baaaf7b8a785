"""Every model of the zoo trains, scores and exports as torch does, with both engines.

The short form takes one model per kind; ``FEDGE_SOAK=1`` takes all, from both exporters.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest
from zoo import SMALL

import fedge
from fedge.engines import find_training_python, open_engine, open_in_process
from fedge.params import gradient_distance, relative_distance
from fedge.types import Array, Examples, Params

if TYPE_CHECKING:
    from conftest import Case

    from fedge.artifacts.bundle import Bundle
    from fedge.engines import TrainingEngine

TOLERANCE = 1e-4  # ‖ours − torch's in float64‖₂ relative to torch's, per tensor

# What ONNX Runtime's own training cannot do, in the words of the manifest.
REFUSED = {
    "lstm-2-both": "ONNX Runtime has no gradient for LSTM in direction bidirectional",
    "gru-2-both": "ONNX Runtime has no gradient for GRU in direction bidirectional",
    "rnn": "ONNX Runtime has no gradient for RNN",
    "unet": "ONNX Runtime has no gradient for ConvTranspose",
    "unet-nearest": "ONNX Runtime has no gradient for Resize",
    "unet-bilinear": "ONNX Runtime has no gradient for Resize",
}
SHORT = ("resnet8", "mobilenetv3", "ecg", "lstm-2-both", "gru", "gpt-dropout", "gpt-tied")
SHORT += ("llama", "translator", "lora", "unet-bilinear", "encoder", "groupnorm")
NAMES = tuple(SMALL) if os.environ.get("FEDGE_SOAK") else SHORT
EXPORTERS = ("auto", "dynamo") if os.environ.get("FEDGE_SOAK") else ("auto",)
ROWS = (6, 4, 1)  # the batch is symbolic


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_trains_scores_and_exports_as_torch_s(
    case: Case, exporter: str, tmp_path: Path
) -> None:
    bundle = case.bundle(exporter)
    _check_params(case, bundle)
    _check_gradients(case, bundle)
    _check_training(case, bundle, tmp_path / "model.onnx")
    if find_training_python() is not None:
        _check_ort_training(case, bundle)


def _check_params(case: Case, bundle: Bundle) -> None:
    """Names, shapes and fates are the module's."""
    module, specs = case.model.build(), {p.name: p for p in bundle.manifest.params}
    named = dict(module.named_parameters())
    assert {n: tuple(p.shape) for n, p in named.items()} == {n: specs[n].shape for n in named}
    trained = {n for n, p in named.items() if p.requires_grad}
    ends = ("running_mean", "running_var")
    statistics = {n for n, _ in module.named_buffers() if n.endswith(ends)}
    assert set(bundle.manifest.trainable) == trained
    assert set(bundle.manifest.running) == statistics
    assert set(bundle.manifest.shared) == trained | statistics


def _check_gradients(case: Case, bundle: Bundle) -> None:
    engine = open_in_process(bundle, "ort")
    for seed, count in enumerate(ROWS[:2]):
        rows = case.rows(bundle, count, seed)
        loss, grads = engine.gradients(rows)
        true_loss, true = case.judge().gradients(rows)
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert max(gradient_distance(grads, true).values()) < TOLERANCE


def _check_training(case: Case, bundle: Bundle, path: Path) -> None:
    """Params and statistics after some steps, outputs, and the exported file."""
    steps = [case.rows(bundle, count, 10 + i) for i, count in enumerate((6, 4, 6, 4))]
    judge = case.judge()
    for rows in steps:
        judge.step(rows)
    true = judge.params()
    engine = open_in_process(bundle, "ort")
    trained = _trained(engine, steps)
    wanted = {n: true[n] for n in trained}
    assert max(relative_distance(trained, wanted, floor=1e-2).values()) < TOLERANCE
    rows = case.rows(bundle, 6, 20)
    inputs = {s.name: rows.inputs[s.name] for s in bundle.manifest.inputs}
    output = engine.predict(inputs)["output"]
    assert _error(output, judge.outputs(rows)) < TOLERANCE
    fedge.export(bundle, trained, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in ROWS:
        got = session.run(["output"], {n: a[:count] for n, a in inputs.items()})[0]
        assert _error(got, output[:count]) < 1e-5


def _check_ort_training(case: Case, bundle: Bundle) -> None:
    """The same with the other engine, or it is refused by operator."""
    spelled_out = case.name == "rnn" and bundle.manifest.provenance["exporter"] == "dynamo"
    reason = "" if spelled_out else REFUSED.get(case.name, "")
    assert bundle.manifest.engines["ort-training"] == reason
    if reason:
        return
    steps = [case.rows(bundle, count, 10 + i) for i, count in enumerate((6, 4, 6))]
    ours, theirs = open_in_process(bundle, "ort"), open_engine(bundle, "ort-training")
    try:
        before = theirs.get_params()
        wanted = ours.gradients(steps[0])[1]
        assert max(gradient_distance(theirs.gradients(steps[0])[1], wanted).values()) < 1e-5
        assert all(np.array_equal(a, before[n]) for n, a in theirs.get_params().items())
        found, trained = _trained(theirs, steps), _trained(ours, steps)
    finally:
        theirs.close()
    assert max(relative_distance(found, trained, floor=1e-2).values()) < TOLERANCE


def _trained(engine: TrainingEngine, steps: list[Examples]) -> Params:
    for rows in steps:
        engine.train_step(rows, 0.05)
    return engine.get_params()


def _error(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
