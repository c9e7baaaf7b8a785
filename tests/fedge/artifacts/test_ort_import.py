from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedge.artifacts import ort_import
from fedge.artifacts.ort_import import find_training_python, import_training, installed_engine
from fedge.errors import EngineUnavailableError


def test_this_interpreter_holds_stock_onnxruntime() -> None:
    assert installed_engine() == "ort"
    with pytest.raises(EngineUnavailableError, match="which cannot train; name the interpreter"):
        import_training()


def test_two_wheels_in_one_environment_are_refused_with_the_fix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        ort_import, "_has", lambda w: w in ("onnxruntime", "onnxruntime-training-cpu")
    )
    with pytest.raises(
        EngineUnavailableError, match=r"overwrite each other; run: pip uninstall -y"
    ):
        installed_engine()


def test_no_wheel_at_all_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_import, "_has", lambda _: False)
    with pytest.raises(EngineUnavailableError, match="run: pip install onnxruntime"):
        installed_engine()


def test_the_environment_names_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDGE_ORT_TRAINING_PYTHON", sys.executable)
    assert find_training_python() == Path(sys.executable)
    monkeypatch.setenv("FEDGE_ORT_TRAINING_PYTHON", str(tmp_path / "gone"))
    with pytest.raises(EngineUnavailableError, match="does not exist or cannot be run; correct"):
        find_training_python()


def test_a_folder_beside_this_environment_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FEDGE_ORT_TRAINING_PYTHON", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert find_training_python() is None
    python = tmp_path / ".venv-ort-training" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    assert find_training_python() == python


def test_the_training_api_loads_without_torch_and_onnx() -> None:
    python = find_training_python()
    if python is None:
        pytest.skip("no interpreter with onnxruntime-training is installed")
    program = (
        "import sys; from fedge.artifacts.ort_import import *; "
        "api = import_training('api'); print(installed_engine(), api.Module.__name__, "
        "[m for m in ('torch', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([python, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["ort-training", "Module", "[]"], done.stderr
