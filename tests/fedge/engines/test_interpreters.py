from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fedge.engines import available_engines, find_training_python, installed_engine
from fedge.engines.inprocess import open_in_process
from fedge.engines.interpreters import interpreter_for
from fedge.errors import EngineUnavailableError


def wheel(folder: Path, name: str) -> None:
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")


def test_both_wheels_in_one_environment_are_found_and_the_fix_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlp: Any
) -> None:
    bundle = mlp.bundle("sgd")
    assert installed_engine() == "ort"
    wheel(tmp_path, "onnxruntime-training-cpu")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(EngineUnavailableError, match=r"both installed.*pip uninstall -y"):
        installed_engine()
    with pytest.raises(EngineUnavailableError, match="both installed"):
        open_in_process(bundle)


def test_one_wheel_alone_is_that_engine_and_none_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(EngineUnavailableError, match="pip install onnxruntime"):
        installed_engine()
    wheel(tmp_path, "onnxruntime-training-cpu")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed_engine() == "ort-training"


def test_the_training_interpreter_is_found_by_setting_environment_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDGE_ORT_TRAINING_PYTHON", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert find_training_python() is None
    beside = tmp_path / ".venv-ort-training" / "bin" / "python"
    beside.parent.mkdir(parents=True)
    beside.symlink_to(sys.executable)
    assert find_training_python() == beside
    named = tmp_path / "python"
    named.symlink_to(sys.executable)
    monkeypatch.setenv("FEDGE_ORT_TRAINING_PYTHON", str(named))
    assert find_training_python() == named
    assert find_training_python(beside) == beside
    with pytest.raises(EngineUnavailableError, match="does not exist"):
        find_training_python(tmp_path / "nothing")


def test_engines_that_cannot_run_say_why(mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDGE_ORT_TRAINING_PYTHON", raising=False)
    monkeypatch.setattr(sys, "prefix", "/nowhere/.venv")
    found = available_engines(mlp.bundle("sgd"))
    assert found["ort"] == ""
    assert found["ort-training"] != ""
    with pytest.raises(EngineUnavailableError, match="engines install ort-training"):
        interpreter_for("ort-training")
    with pytest.raises(EngineUnavailableError, match="known: ort, ort-training"):
        interpreter_for("tensorflow")
