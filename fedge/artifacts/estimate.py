"""Whether training fits a device, from the manifest alone: peak memory, time, and what to change.

Imports nothing large, so that a resident client, or a server that has no ONNX Runtime, can ask.
What a graph itself takes was found when the bundle was built (:mod:`fedge.artifacts.costs`); the
constants here are the rest, fitted to the zoo's measured peaks (``benchmarks/memory.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fedge.artifacts.manifest import (
    DTYPE_BYTES,
    EVALUATE,
    GRAD,
    RECOMPUTED,
    STEP,
    GraphCost,
    Manifest,
)
from fedge.errors import ArtifactError, ConfigError, EngineError

MB = 1 << 20
INTERPRETER_BYTES = 60 * MB  # Python, NumPy, ONNX Runtime, fedge
SESSION_BYTES = 9 * MB  # code and tables that the first run touches
NODE_BYTES = 7_500  # of one operator, loaded
ADDRESS_BYTES = 144 * MB  # mapped but not resident: a limit on address space must add them
ARENA = 1.15  # what ONNX Runtime's arena holds, of what is alive
SCORE_ROWS = 256  # of one evaluation call, if memory allows
SMALL_BYTES = 1 * MB  # of params and results: not worth saving
MAX_PIECES = 64
# One core of a 2020s x86 server; a device's own probe replaces them (see ``Rate.measured``).
FLOPS_PER_S, BYTES_PER_S, NODE_S = 1e11, 12e9, 1e-6


@dataclass(frozen=True)
class Frugal:
    """How an engine saves memory without changing what is computed.

    Attributes:
        recompute: Run the steps that make activations again, if the bundle has them.
        pieces: Cut a batch into at least so many, whose gradients are averaged.
        score_rows: Most rows of one evaluation call.
    """

    recompute: bool = False
    pieces: int = 1
    score_rows: int = SCORE_ROWS

    @property
    def changes(self) -> str:
        """In words, what differs from the ordinary way; "" if nothing."""
        words = ["activations made again"] if self.recompute else []
        words += [f"batches in {self.pieces} pieces"] if self.pieces > 1 else []
        return ", ".join(words)


@dataclass(frozen=True)
class Rate:
    """How fast a device computes: operations and bytes per second, seconds per node."""

    flops: float = FLOPS_PER_S
    bytes: float = BYTES_PER_S
    node_s: float = NODE_S

    def seconds(self, cost: GraphCost, rows: int) -> float:
        """Of one run over ``rows`` rows."""
        work, moved = (a * rows + b for a, b in (cost.flops, cost.moved))
        return work / self.flops + moved / self.bytes + cost.nodes * self.node_s

    @classmethod
    def measured(cls, cost: GraphCost, rows: int, step_s: float) -> Rate:
        """The default rate, scaled so that a step of ``rows`` rows takes ``step_s`` seconds."""
        ratio = step_s / cls().seconds(cost, rows)
        return cls(FLOPS_PER_S / ratio, BYTES_PER_S / ratio, NODE_S * ratio)


AS_USUAL, SERVER = Frugal(), Rate()


@dataclass(frozen=True)
class Estimate:
    """What training takes.

    Attributes:
        batch_size: Rows per step.
        frugal: How.
        peak_bytes: Resident memory of the worker at the worst moment, the rows themselves not in.
        parts: The same by cause: interpreter, graphs, params, activations.
        step_s: CPU seconds per step.
    """

    batch_size: int
    frugal: Frugal
    peak_bytes: int
    parts: dict[str, int]
    step_s: float


def estimate(
    manifest: Manifest,
    batch_size: int | None = None,
    frugal: Frugal = AS_USUAL,
    rate: Rate = SERVER,
) -> Estimate:
    """Peak memory of the worker that trains, and the time of a step.

    Args:
        manifest: The bundle's.
        batch_size: Rows per step; the bundle's own by default.
        frugal: How it trains.
        rate: Of the device.

    Raises:
        ConfigError: If the bundle has no steps that recompute, or ``batch_size`` is below 1.
        ArtifactError: If the bundle does not say what its graphs take.
    """
    size = manifest.train.batch_size if batch_size is None else batch_size
    if size < 1:
        raise ConfigError(f"batch_size is {size}; wanted 1 or more")
    cost = _step_cost(manifest, frugal.recompute)
    pieces = min(frugal.pieces, size)
    rows = math.ceil(size / pieces)
    parts = {
        "interpreter": INTERPRETER_BYTES + SESSION_BYTES,
        "graphs": _graph_bytes(manifest, cost, pieces > 1),
        "params": _params_bytes(manifest, pieces > 1),
        "activations": round(ARENA * _results(cost, rows)) + 2 * rows * row_bytes(manifest),
    }
    step_s = rate.seconds(cost, rows) * pieces
    return Estimate(size, replace(frugal, pieces=pieces), sum(parts.values()), parts, step_s)


def plan(
    manifest: Manifest,
    memory_bytes: int,
    batch_size: int | None = None,
    rate: Rate = SERVER,
    data_bytes: int = 0,
) -> Estimate:
    """The fastest way to take the same steps within a budget.

    A batch is cut in pieces only where that leaves the step what it is: not with BatchNormalization
    in training mode, nor with a loss that looks at all rows together.

    Args:
        manifest: The bundle's.
        memory_bytes: For the worker, all in all.
        batch_size: Rows per step; the bundle's own by default.
        rate: Of the device.
        data_bytes: Of the rows the worker holds.

    Raises:
        EngineError: If nothing fits; the message says what it takes and what would help.
    """
    tried = [estimate(manifest, batch_size, f, rate) for f in _ways(manifest, batch_size)]
    fitting = [e for e in tried if e.peak_bytes + data_bytes <= memory_bytes]
    if not fitting:
        raise EngineError(_refusal(manifest, tried, memory_bytes, data_bytes))
    best = min(fitting, key=lambda e: e.step_s)
    left = memory_bytes - best.peak_bytes - data_bytes
    return replace(best, frugal=replace(best.frugal, score_rows=_score_rows(manifest, left)))


def largest_batch(manifest: Manifest, memory_bytes: int, frugal: Frugal = AS_USUAL) -> int:
    """The most rows per step that fit a budget; 0 if not even one does."""
    low, high = 0, 1
    while high < 1 << 20 and estimate(manifest, high, frugal).peak_bytes <= memory_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = estimate(manifest, middle, frugal).peak_bytes <= memory_bytes
        low, high = (middle, high) if fits else (low, middle)
    return low


def advice(manifest: Manifest, memory_bytes: int, batch_size: int | None = None) -> list[str]:
    """What would make training fit a budget, as sentences; empty if nothing is known to.

    Args:
        manifest: The bundle's.
        memory_bytes: For the worker.
        batch_size: Rows per step that are wished for.
    """
    found = []
    size = manifest.train.batch_size if batch_size is None else batch_size
    most = max(largest_batch(manifest, memory_bytes, Frugal(recompute=r)) for r in forms(manifest))
    if 0 < most < size:
        found.append(f"use batch size {most} or less")
    if not most:
        least = min(estimate(manifest, 1, Frugal(r)).peak_bytes for r in forms(manifest))
        found.append(f"even batch size 1 takes about {math.ceil(least / MB)} MB")
    if RECOMPUTED[STEP] not in manifest.files:
        found.append('build the bundle with recompute="auto"')
    fixed = estimate(manifest, 1).parts
    frozen = _frozen(manifest, memory_bytes - fixed["interpreter"] - fixed["graphs"])
    if frozen:
        found.append(f"freeze the params up to {frozen} (trainable=…)")
    return found


def _ways(manifest: Manifest, batch_size: int | None) -> Iterator[Frugal]:
    size = manifest.train.batch_size if batch_size is None else batch_size
    for recompute in forms(manifest):
        pieces = 1
        while pieces <= min(size, MAX_PIECES):
            yield Frugal(recompute, pieces)
            if manifest.running or manifest.loss_function.scored_as == "cox":
                break
            pieces *= 2


def forms(manifest: Manifest) -> tuple[bool, ...]:
    """Whether steps recompute, for each form that the bundle has."""
    return (False, True) if RECOMPUTED[STEP] in manifest.files else (False,)


def _step_cost(manifest: Manifest, recompute: bool) -> GraphCost:
    name = RECOMPUTED[STEP] if recompute else STEP
    if recompute and name not in manifest.files:
        raise ConfigError('the bundle cannot recompute; build it with recompute="auto"')
    found = manifest.cost(name)
    if found is None:
        raise ArtifactError(f"the bundle does not say what {name} takes; build it again")
    return found


def is_small(manifest: Manifest) -> bool:
    """Whether a step holds so little (``SMALL_BYTES``) that speed counts and memory does not."""
    if not manifest.costs:
        return False
    results = _results(_step_cost(manifest, recompute=False), manifest.train.batch_size)
    return results + _params_bytes(manifest, cut=False) <= SMALL_BYTES


def _results(cost: GraphCost, rows: int) -> int:
    return max(a * rows + b for a, b in cost.peaks)


def _graph_bytes(manifest: Manifest, cost: GraphCost, cut: bool) -> int:
    files = [cost.file] if not cut else [GRAD]
    loaded = sum(manifest.files[f].bytes for f in files if f in manifest.files)
    return NODE_BYTES * cost.nodes + 3 * loaded


def _params_bytes(manifest: Manifest, cut: bool) -> int:
    """Two sets of what a step changes, one of the rest, the file they came from; gradients."""
    trained = sum(_nbytes(p.shape) for p in manifest.params if p.trainable or p.running)
    frozen = sum(_nbytes(p.shape) for p in manifest.params) - trained
    state = sum(_nbytes(tuple(int(d) for d in s.shape)) for s in manifest.state)
    gradients = 3 * trained if cut else 0
    return 2 * (trained + state) + frozen + gradients + trained + frozen


def row_bytes(manifest: Manifest) -> int:
    """Of one preprocessed row with its label; sizes that may vary count as 1."""
    labels = manifest.labels
    specs = [(s.shape, s.dtype) for s in (*manifest.training_inputs, *manifest.noise)]
    specs.append((labels.shape, labels.dtype))
    return sum(
        DTYPE_BYTES[dtype] * math.prod(d for d in shape[1:] if isinstance(d, int))
        for shape, dtype in specs
    )


def _score_rows(manifest: Manifest, left: int) -> int:
    """Rows of one evaluation call that fit what training leaves."""
    cost = manifest.cost(EVALUATE)
    if cost is None:
        return SCORE_ROWS
    rows = SCORE_ROWS
    while rows > 1 and ARENA * _results(cost, rows) + NODE_BYTES * cost.nodes > left:
        rows //= 2
    return rows


def _frozen(manifest: Manifest, left: int) -> str:
    """The last param that must be frozen, from the first on, for the rest to fit; "" if none."""
    trained = [p for p in manifest.params if p.trainable]
    slots = max(len(manifest.state) // max(len(trained), 1), 0)
    each = [_nbytes(p.shape) * (3 + 2 * slots) for p in trained]
    for i in range(len(trained)):
        if sum(each[i:]) + sum(_nbytes(p.shape) * 2 for p in trained[:i]) <= left:
            return trained[i - 1].name if i else ""
    return ""


def _refusal(manifest: Manifest, tried: list[Estimate], memory_bytes: int, data_bytes: int) -> str:
    least = min(tried, key=lambda e: e.peak_bytes)
    needs = math.ceil((least.peak_bytes + data_bytes) / MB)
    how = f" ({least.frugal.changes})" if least.frugal.changes else ""
    words = "; ".join(advice(manifest, memory_bytes - data_bytes, least.batch_size))
    return (
        f"training {manifest.name} with batch size {least.batch_size} takes about {needs} MB{how}; "
        f"this device gives {memory_bytes // MB} MB" + (f": {words}" if words else "")
    )


def _nbytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)
