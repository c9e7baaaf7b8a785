from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge import tensors
from fedge.artifacts.bundle import Bundle
from fedge.artifacts.manifest import ORT_FILES, REFERENCE
from fedge.artifacts.signing import generate_signing_key
from fedge.engines import find_training_python, open_engine, probe_engines
from fedge.engines.probe import EngineProbe, choose
from fedge.errors import EngineUnavailableError


@pytest.mark.parametrize(
    ("tried", "engine"),
    [
        ({"ort": EngineProbe("", 1.0), "ort-training": EngineProbe("", 2.0)}, "ort"),
        ({"ort": EngineProbe("", 2.0), "ort-training": EngineProbe("", 1.0)}, "ort-training"),
        ({"ort": EngineProbe("", 1.0), "ort-training": EngineProbe("", 0.95)}, "ort"),
        ({"ort": EngineProbe("wrong"), "ort-training": EngineProbe("", 9.0)}, "ort-training"),
        ({"ort": EngineProbe("", 9.0), "ort-training": EngineProbe("no wheel")}, "ort"),
    ],
)
def test_the_fastest_that_agrees_is_chosen(tried: dict[str, EngineProbe], engine: str) -> None:
    report = choose(tried)
    assert report.engine == engine
    assert all(p.problem in report.reason for p in tried.values())


def test_none_usable_says_why_for_each() -> None:
    with pytest.raises(EngineUnavailableError, match="ort: broken; ort-training: no wheel"):
        choose({"ort": EngineProbe("broken"), "ort-training": EngineProbe("no wheel")})


def test_installed_engines_agree_with_the_recorded_step(mlp: Any) -> None:
    report = probe_engines(mlp.bundle("sgd"))
    tried = report.per_engine
    assert tried["ort"].problem == ""
    assert 0 < tried["ort"].step_s < 0.1
    if find_training_python() is not None:
        assert tried["ort-training"].problem == ""
        assert tried["ort-training"].gradient_error <= 1e-5
    assert "µs/step" in report.reason


def test_auto_opens_a_working_engine(mlp: Any) -> None:
    engine = open_engine(mlp.bundle("sgd"))
    assert np.isfinite(engine.train_step(mlp.data(4), 0.01))
    engine.close()


def test_an_engine_that_disagrees_is_not_used(mlp: Any, tmp_path: Path) -> None:
    bundle = mlp.bundle("sgd")
    found, meta = tensors.load(bundle.read(REFERENCE))
    name = next(n for n in found if n.startswith("grad/"))
    lie = tensors.dump({**found, name: found[name] + np.float32(0.01)}, meta)
    files = {**{n: bundle.read(n) for n in bundle.manifest.files}, REFERENCE: lie}
    wrong = Bundle.write(bundle.manifest, files, generate_signing_key(), tmp_path / "b")
    with pytest.raises(EngineUnavailableError, match="differs from the recorded step"):
        probe_engines(wrong)


def test_an_engine_whose_files_were_not_fetched_is_left_out(mlp: Any, tmp_path: Path) -> None:
    bundle = mlp.bundle("sgd")
    folder = tmp_path / "b"
    shutil.copytree(bundle.path, folder, ignore=shutil.ignore_patterns(*ORT_FILES))
    partial = Bundle.open(folder)
    assert probe_engines(partial).per_engine["ort-training"].problem != ""
    with pytest.raises(EngineUnavailableError, match=r"ort-training cannot run|not installed"):
        open_engine(partial, "ort-training")
