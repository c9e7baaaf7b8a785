"""How much memory this device gives, and what training takes: adapt or refuse before it starts."""

from __future__ import annotations

from pathlib import Path

from fedge.artifacts.estimate import (
    ADDRESS_BYTES,
    AS_USUAL,
    MB,
    SERVER,
    Estimate,
    Frugal,
    Rate,
    plan,
    row_bytes,
)
from fedge.artifacts.manifest import STEP, Manifest
from fedge.errors import EngineError, StateError
from fedge.platform import available_memory
from fedge_client.config import EngineConfig
from fedge_client.state import State

_THREAD_BYTES = 80 * MB  # of address space: a stack and an arena of its own
_LEAST_ROWS = 16
REFERENCE_ROWS = 4  # of a bundle's recorded step, which is what is timed


def budget(config: EngineConfig) -> int | None:
    """Bytes the worker may take: as configured, else what is free now; None if nobody knows."""
    return config.memory_mb * MB if config.memory_mb else available_memory()


def address_limit(config: EngineConfig) -> int | None:
    """The limit on the worker's address space that goes with the budget."""
    limit = budget(config)
    if limit is None:
        return None
    return limit + ADDRESS_BYTES + (config.threads - 1) * _THREAD_BYTES


def describe(config: EngineConfig) -> str:
    """The budget in words."""
    limit = budget(config)
    return "no limit is known" if limit is None else f"the worker may take {limit // MB} MB"


def newest_bundle(state: State | None) -> Path:
    """The folder of the newest global model's bundle.

    Raises:
        StateError: If there is none yet.
    """
    found = None if state is None else state.read_json("model.json")
    if state is None or found is None:
        raise StateError("no bundle is here yet; name a bundle's folder")
    return state.bundle(str(found["bundle"]))


def rate(state: State | None, manifest: Manifest) -> Rate:
    """How fast this device is, from the step that was timed when its engine was chosen."""
    known = None if state is None else state.read_json("engines.json")
    cost = manifest.cost(STEP)
    for key, (_, _, *timed) in (known or {}).items():
        if key.startswith(manifest.digest) and cost is not None and timed and timed[0] > 0:
            return Rate.measured(cost, REFERENCE_ROWS, float(timed[0]))
    return SERVER


class Budget:
    """The plans of one client: the same steps for the same bundle as long as it runs.

    Args:
        config: Engine settings of the site.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._bytes = budget(config)
        self._plans: dict[tuple[str, int], Estimate] = {}

    def plan(self, manifest: Manifest, batch_size: int, rows: int) -> Frugal:
        """How to train within the budget.

        Args:
            manifest: The bundle's.
            batch_size: Rows per step.
            rows: That the site has.

        Raises:
            EngineError: If it cannot be; in one line, what it takes and what would help.
        """
        if self._bytes is None or not manifest.costs:
            return AS_USUAL
        key = (manifest.digest, batch_size)
        if key not in self._plans:
            held = 2 * rows * row_bytes(manifest)  # as read, and preprocessed
            size = min(batch_size, rows) if rows else batch_size
            self._plans[key] = plan(manifest, self._bytes, size, data_bytes=held)
        return self._plans[key].frugal

    def scoring(self, manifest: Manifest, batch_size: int, rows: int) -> Frugal:
        """How to score; with little memory, few rows at a time, but never refused."""
        try:
            return self.plan(manifest, batch_size, rows)
        except EngineError:
            return Frugal(score_rows=_LEAST_ROWS)
