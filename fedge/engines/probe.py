"""Which engine to use: the fastest that agrees with the bundle's recorded step.

Imports nothing large, so that a resident client can choose an engine; the work is in workers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedge.artifacts.bundle import Bundle, Reference
from fedge.config import TrainConfig
from fedge.engines.files import worker_header
from fedge.engines.interpreters import available_engines, interpreter_for
from fedge.errors import EngineUnavailableError, FedgeError
from fedge.pipe import Child

if TYPE_CHECKING:
    from fedge.engines.base import TrainingEngine
    from fedge.types import Examples

TOLERANCE = 1e-5  # relative L2 per tensor: what "agrees" means everywhere
ADVANTAGE = 1.1  # how much faster ort-training must be: it gets no security fixes
SLICES, SLICE_S = 4, 0.03  # timed slices of training: how many, and how long
REPEATS = 64  # of the recorded batch, for rows enough to train on
PROBE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class EngineProbe:
    """What one engine did with the recorded step.

    Attributes:
        problem: Why it cannot be used; "" where it can.
        step_s: CPU seconds of one training step; 0 where it could not be timed.
        loss_error: Relative error of the loss.
        gradient_error: Largest relative L2 error of a gradient.
    """

    problem: str = ""
    step_s: float = 0.0
    loss_error: float = 0.0
    gradient_error: float = 0.0


@dataclass(frozen=True)
class ProbeReport:
    """The choice, why, and what each engine did."""

    engine: str
    reason: str
    per_engine: dict[str, EngineProbe]


def probe_engines(
    bundle: Bundle, threads: int = 1, training_python: str | Path | None = None
) -> ProbeReport:
    """Try every engine that is installed on the bundle's recorded step and choose one.

    Raises:
        EngineUnavailableError: If none can be used, saying why for each.
    """
    reasons = available_engines(bundle, training_python)
    tried = {
        name: EngineProbe(reason) if reason else _try(bundle, name, threads, training_python)
        for name, reason in reasons.items()
    }
    return choose(tried)


def choose(tried: dict[str, EngineProbe]) -> ProbeReport:
    """The fastest usable engine; ``ort`` unless another is clearly faster.

    Raises:
        EngineUnavailableError: If none is usable.
    """
    usable = {n: p.step_s for n, p in tried.items() if not p.problem}
    if not usable:
        each = "; ".join(f"{n}: {p.problem}" for n, p in tried.items())
        raise EngineUnavailableError(f"no engine can run this bundle ({each})")
    times = {n: t * (ADVANTAGE if n == "ort-training" else 1.0) for n, t in usable.items()}
    engine = min(times, key=lambda n: times[n])
    notes = [f"{n} {usable[n] * 1e6:.0f} µs/step" for n in sorted(usable, key=lambda n: usable[n])]
    notes += [f"{n} not: {p.problem}" for n, p in tried.items() if p.problem]
    return ProbeReport(engine, "; ".join(notes), tried)


def measure(engine: TrainingEngine, bundle: Bundle) -> EngineProbe:
    """Compare one engine with the recorded step, then time it; changes the engine's params."""
    reference = bundle.reference()
    loss_error, gradient_error = _errors(engine, reference)
    worst = max(loss_error, gradient_error)
    if not worst <= TOLERANCE:
        problem = f"differs from the recorded step by {worst:.1e}; allowed {TOLERANCE:.0e}"
        return EngineProbe(problem, 0.0, loss_error, gradient_error)
    return EngineProbe("", _step_s(engine, reference), loss_error, gradient_error)


def _try(
    bundle: Bundle, name: str, threads: int, training_python: str | Path | None
) -> EngineProbe:
    header = worker_header(bundle, name, threads)
    try:
        with Child("fedge.engines.worker", interpreter_for(name, training_python)) as child:
            child.call("open", header, timeout_s=PROBE_TIMEOUT_S)
            answer, _ = child.call("probe", header, timeout_s=PROBE_TIMEOUT_S)
    except FedgeError as exc:
        return EngineProbe(str(exc))
    return EngineProbe(**answer)


def _errors(engine: TrainingEngine, reference: Reference) -> tuple[float, float]:
    from fedge.params import gradient_distance

    loss, grads = engine.gradients(reference.examples)
    loss_error = abs(loss - reference.loss) / max(abs(reference.loss), 1e-30)
    return loss_error, max(gradient_distance(grads, reference.grads).values())


def _step_s(engine: TrainingEngine, reference: Reference) -> float:
    """Least CPU time per step over a few slices; a tiny lr keeps the params where they are."""
    rows = len(reference.examples)
    data = _repeated(reference.examples, REPEATS)
    steps, best = 10, float("inf")
    for number in range(SLICES + 1):  # the first slice warms up and says how long others may be
        config = TrainConfig(lr=1e-12, batch_size=rows, steps=steps)
        began = time.process_time()
        engine.train(data, config, seed=0)
        took = (time.process_time() - began) / steps
        best = min(best, took) if number else best
        steps = max(2, int(SLICE_S / took))
    return best


def _repeated(data: Examples, times: int) -> Examples:
    import numpy as np

    return data.take(np.tile(np.arange(len(data)), times))
