"""Which engine to use: the fastest that agrees with the bundle's recorded step.

Imports nothing large, so that a resident client can choose an engine; the work is in workers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedge.artifacts.bundle import Bundle, Reference
from fedge.config import TrainConfig
from fedge.engines.files import worker_header
from fedge.engines.interpreters import available_engines, interpreter_for
from fedge.engines.providers import CPU, candidates, split
from fedge.errors import EngineUnavailableError, FedgeError
from fedge.pipe import Child

if TYPE_CHECKING:
    from fedge.engines.base import TrainingEngine
    from fedge.types import Examples

TOLERANCE = 1e-5  # relative L2 per tensor: what "agrees" means everywhere
PROVIDER_TOLERANCE = 1e-4  # other kernels add in another order; TF32 is at 1e-3, 16 bits at 1e-2
ADVANTAGE = 1.1  # how much faster than ort another must be: it gets no fixes, or warms a GPU
SLICES, SLICE_S = 4, 0.03  # timed slices of training: how many, and how long
REPEATS = 64  # of the recorded batch, for rows enough to train on
PROBE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class EngineProbe:
    """What one engine did with the recorded step.

    Attributes:
        problem: Why it cannot be used; "" where it can.
        step_s: CPU seconds of one training step, wall seconds where a provider computes it; 0
            where it could not be timed.
        loss_error: Relative error of the loss.
        gradient_error: Largest relative L2 error of a gradient.
        offered: Execution providers of the onnxruntime that was asked, by its own names.
    """

    problem: str = ""
    step_s: float = 0.0
    loss_error: float = 0.0
    gradient_error: float = 0.0
    offered: Sequence[str] = ()


@dataclass(frozen=True)
class ProbeReport:
    """The choice, why, and what each engine did."""

    engine: str
    reason: str
    per_engine: dict[str, EngineProbe]


def probe_engines(
    bundle: Bundle,
    threads: int = 1,
    training_python: str | Path | None = None,
    engine: str = "auto",
    providers: Sequence[str] = (),
) -> ProbeReport:
    """Try what is installed on the bundle's recorded step and choose.

    Args:
        bundle: A verified bundle.
        threads: Of one operator.
        training_python: Interpreter with the training wheel, if it is not where it is looked for.
        engine: ``auto`` tries both engines, a name that one.
        providers: Execution providers for ``ort`` by their short names, in order of preference;
            the first that agrees with the CPU is chosen. Empty tries those that are found, and
            takes one if it is faster. ``("cpu",)`` tries none.

    Raises:
        EngineUnavailableError: If nothing can be used, saying why for each.
    """
    reasons = available_engines(bundle, training_python)
    tried = {
        name: EngineProbe(reason) if reason else _try(bundle, name, threads, training_python)
        for name, reason in reasons.items()
        if engine in ("auto", name)
    }
    if "ort" in tried and not tried["ort"].problem:
        for name, reason in candidates(providers, tried["ort"].offered).items():
            tried[name] = EngineProbe(reason) if reason else _try(bundle, name, threads, None)
    return choose(tried, [f"ort:{p}" for p in providers])


def choose(tried: dict[str, EngineProbe], preferred: Sequence[str] = ()) -> ProbeReport:
    """The first preferred engine that is usable, or the fastest; ``ort`` if it is about as fast.

    Raises:
        EngineUnavailableError: If none is usable.
    """
    usable = {n: p.step_s for n, p in tried.items() if not p.problem}
    if not usable:
        each = "; ".join(f"{n}: {p.problem}" for n, p in tried.items())
        raise EngineUnavailableError(f"no engine can run this bundle ({each})")
    times = {n: t * (1.0 if n == "ort" else ADVANTAGE) for n, t in usable.items()}
    fastest = min(times, key=lambda n: times[n])
    engine = next((n for n in preferred if n in usable), fastest)
    notes = [f"{n} {usable[n] * 1e6:.0f} µs/step" for n in sorted(usable, key=lambda n: usable[n])]
    notes += [f"{n} not: {p.problem}" for n, p in tried.items() if p.problem]
    return ProbeReport(engine, "; ".join(notes), tried)


def measure(engine: TrainingEngine, bundle: Bundle) -> EngineProbe:
    """Compare one engine with the recorded step, then time it; changes the engine's params."""
    reference = bundle.reference()
    loss_error, gradient_error = _errors(engine, reference)
    worst = max(loss_error, gradient_error)
    on_cpu = split(engine.name)[1] == CPU
    allowed = TOLERANCE if on_cpu else PROVIDER_TOLERANCE
    problem = ""
    if not worst <= allowed:
        problem = f"differs from the recorded step by {worst:.1e}; allowed {allowed:.0e}"
    elif not on_cpu:
        problem = _disagreement(engine, bundle, reference)
    step_s = 0.0 if problem else _step_s(engine, reference, on_cpu)
    return EngineProbe(problem, step_s, loss_error, gradient_error)


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


def _disagreement(engine: TrainingEngine, bundle: Bundle, reference: Reference) -> str:
    """How a training step, of the recorded rows and of one, differs from the CPU's; "" if not."""
    from fedge.engines.inprocess import open_in_process
    from fedge.params import relative_distance

    cpu = open_in_process(bundle, "ort")
    for rows in {len(reference.examples), 1}:
        batch = reference.examples.take(slice(rows))
        for each in (engine, cpu):
            each.set_params(bundle.initial_params())
            each.train_step(batch, bundle.manifest.train.lr)
        worst = max(relative_distance(engine.get_params(), cpu.get_params()).values())
        if not worst <= PROVIDER_TOLERANCE:
            return f"its step over {rows} rows differs from the CPU's by {worst:.1e}"
    return ""


def _step_s(engine: TrainingEngine, reference: Reference, on_cpu: bool) -> float:
    """Least time per step over a few slices; a tiny lr keeps the params where they are."""
    clock = time.process_time if on_cpu else time.perf_counter
    rows = len(reference.examples)
    data = _repeated(reference.examples, REPEATS)
    steps, best = 10, float("inf")
    for number in range(SLICES + 1):  # the first slice warms up and says how long others may be
        config = TrainConfig(lr=1e-12, batch_size=rows, steps=steps)
        began = clock()
        engine.train(data, config, seed=0)
        took = (clock() - began) / steps
        best = min(best, took) if number else best
        steps = max(2, int(SLICE_S / took))
    return best


def _repeated(data: Examples, times: int) -> Examples:
    import numpy as np

    return data.take(np.tile(np.arange(len(data)), times))
