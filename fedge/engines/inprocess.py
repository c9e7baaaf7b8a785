"""Engines in this very process, for processes that are workers already."""

from __future__ import annotations

from fedge.artifacts.bundle import Bundle
from fedge.artifacts.estimate import AS_USUAL, Frugal
from fedge.engines.base import TrainingEngine
from fedge.engines.interpreters import installed_engine
from fedge.engines.providers import split
from fedge.errors import EngineUnavailableError


def open_in_process(
    bundle: Bundle, name: str = "auto", threads: int = 1, frugal: Frugal = AS_USUAL
) -> TrainingEngine:
    """The engine of this interpreter's ONNX Runtime, without a worker process around it.

    Args:
        bundle: A verified bundle.
        name: ``ort``, ``ort-training``, ``ort:cuda`` for a provider (which nobody has probed
            here), or ``auto`` for whichever is installed here.
        threads: Of one operator.
        frugal: How memory is saved.

    Raises:
        EngineUnavailableError: If this interpreter holds the other engine, or both, or none.
    """
    here = installed_engine()
    base, provider = split(name)
    if base not in ("auto", here):
        raise EngineUnavailableError(
            f"engine {name!r} was asked for in an interpreter that has {here!r}; open it with "
            "fedge.engines.open_engine, which finds the right interpreter"
        )
    if here == "ort":
        from fedge.engines.ort import OrtEngine

        return OrtEngine(bundle, threads, provider, frugal)
    from fedge.engines.ort_training import OrtTrainingEngine

    return OrtTrainingEngine(bundle, threads, frugal)
