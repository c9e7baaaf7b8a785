"""Engines train and evaluate a bundle's params on local rows.

Importing this package imports nothing large; what needs numpy is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedge.engines.base import EvalResult, TrainingEngine, TrainResult
from fedge.engines.interpreters import available_engines, find_training_python, installed_engine

if TYPE_CHECKING:
    from fedge.engines.inprocess import open_in_process
    from fedge.engines.open import open_engine
    from fedge.engines.probe import ProbeReport, probe_engines
    from fedge.engines.remote import WorkerEngine

_HOME = {
    "ProbeReport": "fedge.engines.probe",
    "WorkerEngine": "fedge.engines.remote",
    "open_engine": "fedge.engines.open",
    "open_in_process": "fedge.engines.inprocess",
    "probe_engines": "fedge.engines.probe",
}

__all__ = [
    "EvalResult",
    "ProbeReport",
    "TrainResult",
    "TrainingEngine",
    "WorkerEngine",
    "available_engines",
    "find_training_python",
    "installed_engine",
    "open_engine",
    "open_in_process",
    "probe_engines",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute may be anything
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fedge.engines' has no attribute {name!r}")
