"""Opening an engine by name, in a worker process."""

from __future__ import annotations

from pathlib import Path

from fedge.artifacts.bundle import Bundle
from fedge.engines.base import TrainingEngine
from fedge.engines.interpreters import available_engines, interpreter_for
from fedge.engines.probe import probe_engines
from fedge.engines.remote import WorkerEngine
from fedge.errors import EngineUnavailableError

_chosen: dict[tuple[str, int, str], str] = {}  # bundle digest, threads, interpreter -> engine


def open_engine(
    bundle: Bundle,
    name: str = "auto",
    threads: int = 1,
    training_python: str | Path | None = None,
) -> TrainingEngine:
    """An engine for the bundle, in a worker process with the right interpreter.

    Args:
        bundle: A verified bundle.
        name: ``ort``, ``ort-training``, or ``auto``: the fastest that agrees with the bundle's
            recorded step, probed once per bundle and process.
        threads: Of one operator; results are bitwise repeatable for a given number.
        training_python: Interpreter with the training wheel, if it is not where it is looked for.

    Raises:
        EngineUnavailableError: If the engine is not installed, or the bundle has no files for it.
    """
    if name == "auto":
        name = _choose(bundle, threads, training_python)
    python = interpreter_for(name, training_python)
    reason = available_engines(bundle, training_python)[name]
    if reason:
        raise EngineUnavailableError(f"engine {name} cannot run {bundle.manifest.name}: {reason}")
    return WorkerEngine(bundle, name, python, threads)


def _choose(bundle: Bundle, threads: int, training_python: str | Path | None) -> str:
    key = (bundle.digest, threads, str(training_python))
    if key not in _chosen:
        _chosen[key] = probe_engines(bundle, threads, training_python).engine
    return _chosen[key]
