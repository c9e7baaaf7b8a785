"""Which ONNX Runtime lives in which interpreter. Imports nothing large."""

from __future__ import annotations

from fedge.artifacts.ort_import import (
    TRAINING_PYTHON,
    TRAINING_VENV,
    find_training_python,
    import_training,
    installed_engine,
)

__all__ = [
    "TRAINING_PYTHON",
    "TRAINING_VENV",
    "find_training_python",
    "import_training",
    "installed_engine",
]
