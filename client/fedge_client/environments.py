"""The training interpreter: an environment of its own for ONNX Runtime's training wheel."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import fedge
from fedge.engines.interpreters import find_training_python, installed_engine
from fedge.errors import EngineUnavailableError
from fedge_client.config import EngineConfig
from fedge_client.state import State

WHEEL = "onnxruntime-training-cpu==1.19.2"  # the last release; see ARCHITECTURE.md
NEEDS = ("numpy>=1.26,<3", "onnx>=1.18,<2", "flatbuffers", "protobuf>=6.31.1,<7")
PYTHONS = ("python3.12", "python3.11")  # what both the wheel and fedge run on
_TIMEOUT_S = 900.0


def describe(config: EngineConfig) -> dict[str, Any]:
    """Which engines this device has, and where."""
    try:
        stock = sys.executable if installed_engine() == "ort" else ""
    except EngineUnavailableError as exc:
        stock = f"not available: {exc}"
    training = find_training_python(config.training_python or None)
    hint = "not installed; run: fedge-client engines install ort-training"
    return {
        "configured": config.name,
        "ort": stock or "not installed; run: pip install onnxruntime",
        "ort-training": str(training) if training else hint,
    }


def install(
    state: State, python: str | None, find_links: str | None, report: Callable[[str], None]
) -> Path:
    """Make an environment with the training wheel under the state folder.

    The wheel and stock onnxruntime own the same folder, so neither is ever installed beside the
    other: the wheel comes without its dependencies, and fedge without its own.

    Args:
        state: The client's folder; the environment goes to ``engines/ort-training``.
        python: Interpreter to make it with; None takes the newest that has a wheel.
        find_links: A folder of wheels for machines without a registry.
        report: Takes one line of progress.

    Returns:
        The new interpreter.

    Raises:
        EngineUnavailableError: If there is no fitting Python, or pip fails.
    """
    base = python or next((p for p in PYTHONS if shutil.which(p)), None)
    if base is None or shutil.which(base) is None:
        raise EngineUnavailableError(
            f"no Python the training wheel exists for ({', '.join(PYTHONS)}); give --python"
        )
    folder = state.folder("engines") / "ort-training"
    report(f"making {folder}")
    _run([base, "-m", "venv", "--clear", str(folder)])
    made = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    links = ["--find-links", find_links] if find_links else []
    pip = [str(made), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *links]
    for packages in (["--no-deps", WHEEL], [*NEEDS], ["--no-deps", *_fedge()]):
        report(f"installing {' '.join(p for p in packages if not p.startswith('-'))}")
        _run([*pip, *packages])
    code = "from fedge.artifacts.ort_import import import_training; import_training()"
    _run([str(made), "-c", code])
    return made


def _fedge() -> list[str]:
    """How pip gets the same fedge: from its source tree if it was installed from one."""
    origin = importlib.metadata.distribution("fedge").read_text("direct_url.json")
    found = json.loads(origin) if origin else {}
    if str(found.get("url", "")).startswith("file:"):
        path = url2pathname(urlparse(found["url"]).path)
        editable = bool(found.get("dir_info", {}).get("editable"))
        return ["--editable", path] if editable else [path]
    return [f"fedge=={fedge.__version__}"]


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise EngineUnavailableError(f"{command[0]} cannot be run: {exc}") from exc
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise EngineUnavailableError(f"{' '.join(command[:4])} … failed: {lines[-1]}")
