"""Opening an engine by name, in a worker process."""

from __future__ import annotations

from pathlib import Path

from fedge.artifacts.bundle import Bundle
from fedge.engines.base import TrainingEngine
from fedge.engines.interpreters import available_engines, interpreter_for
from fedge.engines.probe import ProbeReport, probe_engines
from fedge.engines.providers import CPU, split
from fedge.engines.remote import WorkerEngine
from fedge.errors import EngineUnavailableError

_chosen: dict[tuple[str, int, str, str], ProbeReport] = {}  # digest, threads, Python, provider


def open_engine(
    bundle: Bundle,
    name: str = "auto",
    threads: int = 1,
    training_python: str | Path | None = None,
) -> TrainingEngine:
    """An engine for the bundle, in a worker process with the right interpreter.

    Args:
        bundle: A verified bundle.
        name: ``ort``, ``ort-training``, ``ort:cuda`` for an execution provider, or ``auto``: the
            fastest that agrees with the bundle's recorded step. A provider and ``auto`` are
            probed, once per bundle and process.
        threads: Of one operator; results are bitwise repeatable for a given number.
        training_python: Interpreter with the training wheel, if it is not where it is looked for.

    Raises:
        EngineUnavailableError: If the engine is not installed, the bundle has no files for it, or
            the provider does not compute what the CPU does.
    """
    base, provider = split(name)
    if base == "auto":
        name = _choose(bundle, threads, training_python).engine
    python = interpreter_for(name, training_python)
    reason = available_engines(bundle, training_python)[split(name)[0]]
    if provider != CPU and not reason:
        report = _choose(bundle, threads, training_python, provider)
        reason = report.per_engine[name].problem
    if reason:
        raise EngineUnavailableError(f"engine {name} cannot run {bundle.manifest.name}: {reason}")
    return WorkerEngine(bundle, name, python, threads)


def _choose(
    bundle: Bundle, threads: int, training_python: str | Path | None, provider: str = ""
) -> ProbeReport:
    key = (bundle.digest, threads, str(training_python), provider)
    if key not in _chosen:
        how = ("ort", (provider,)) if provider else ("auto", ())
        _chosen[key] = probe_engines(bundle, threads, training_python, *how)
    return _chosen[key]
