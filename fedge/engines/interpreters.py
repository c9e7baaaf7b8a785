"""Which interpreter runs which engine. Imports nothing large."""

from __future__ import annotations

import sys
from pathlib import Path

from fedge.artifacts.bundle import Bundle
from fedge.artifacts.manifest import ENGINE_FILES
from fedge.artifacts.ort_import import (
    TRAINING_PYTHON,
    TRAINING_VENV,
    find_training_python,
    installed_engine,
    stock_versions,
)
from fedge.engines.providers import split
from fedge.errors import EngineUnavailableError

__all__ = [
    "TRAINING_PYTHON",
    "TRAINING_VENV",
    "available_engines",
    "find_training_python",
    "installed_engine",
    "interpreter_for",
    "stock_versions",
]


def interpreter_for(name: str, training_python: str | Path | None = None) -> Path:
    """The interpreter in which an engine's worker must run.

    Args:
        name: ``ort``, with a provider or without, or ``ort-training``.
        training_python: Where the training wheel is, if it is not where it is looked for.

    Raises:
        EngineUnavailableError: If there is none.
    """
    name, _ = split(name)
    if name not in ENGINE_FILES:
        raise EngineUnavailableError(f"engine {name!r}; known: {', '.join(ENGINE_FILES)}")
    if name == "ort-training":
        found = find_training_python(training_python)
        if found is not None:
            return found
    if installed_engine() == name:
        return Path(sys.executable)
    raise EngineUnavailableError(
        "the training wheel is not installed; run: fedge-client engines install ort-training"
        if name == "ort-training"
        else f"stock onnxruntime is not installed in {sys.prefix}; run: pip install onnxruntime"
    )


def available_engines(bundle: Bundle, training_python: str | Path | None = None) -> dict[str, str]:
    """Every engine fedge knows -> "" where it can run this bundle here, else the reason."""
    return {name: _obstacle(bundle, name, training_python) for name in ENGINE_FILES}


def _obstacle(bundle: Bundle, name: str, training_python: str | Path | None) -> str:
    reason = bundle.manifest.engines.get(name, "the bundle was built without it")
    if reason:
        return reason
    if name not in bundle.engines:
        return "its files were not fetched"
    try:
        interpreter_for(name, training_python)
    except EngineUnavailableError as exc:
        return str(exc)
    return ""
