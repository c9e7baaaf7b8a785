from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from fedge.artifacts.bundle import Bundle
from fedge.artifacts.manifest import STEP
from fedge.artifacts.signing import generate_signing_key
from fedge.engines import open_engine
from fedge.engines.files import read_model, reopen_bundle
from fedge.errors import AdmissionError, ArtifactError


def test_a_worker_insists_on_the_bundle_its_parent_verified(mlp: Any) -> None:
    bundle = mlp.bundle("sgd")
    assert reopen_bundle(bundle.path, bundle.digest).manifest == bundle.manifest
    with pytest.raises(ArtifactError, match="wanted 000000000000"):
        reopen_bundle(bundle.path, "0" * 64)
    with pytest.raises(ArtifactError, match="cannot read"):
        reopen_bundle(bundle.path / "nothing", bundle.digest)


def test_a_file_changed_after_opening_does_not_reach_onnxruntime(mlp: Any, tmp_path: Path) -> None:
    shutil.copytree(mlp.bundle("sgd").path, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    step = tmp_path / "b" / STEP
    step.write_bytes(step.read_bytes()[:-1] + b"\0")
    with pytest.raises(ArtifactError, match="damaged"):
        read_model(bundle, STEP)
    engine = open_engine(bundle, "ort")
    with pytest.raises(ArtifactError, match="damaged"):
        engine.train_step(mlp.data(4), 0.1)
    engine.close()


def test_a_model_that_admission_refuses_does_not_reach_onnxruntime(
    mlp: Any, tmp_path: Path
) -> None:
    good = mlp.bundle("sgd")
    files = {n: good.read(n) for n in good.manifest.files}
    model = onnx.load_model_from_string(files[STEP])
    tensor = model.graph.initializer.add(name="leak", data_type=1, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    files[STEP] = model.SerializeToString()
    bundle = Bundle.write(good.manifest, files, generate_signing_key(), tmp_path / "b")
    engine = open_engine(bundle, "ort")
    with pytest.raises(AdmissionError, match="external_data"):
        engine.train_step(mlp.data(4), 0.1)
    engine.close()
