"""Flower strategies of fedge's own, and what makes Flower's survive a crash.

Any Flower strategy works with fedge; the ones here stream. Loaded when first used, because Flower
takes a second to import.
"""

from __future__ import annotations

import importlib
from typing import Any

from fedge.platform import silence_telemetry

silence_telemetry()  # before any module of this package imports Flower

_HOME = {
    "FedAvg": "fedge.strategies.fedavg",
    "StrategyState": "fedge.strategies.state",
    "state_of": "fedge.strategies.state",
}

__all__ = ["FedAvg", "StrategyState", "state_of"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute may be anything
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fedge.strategies' has no attribute {name!r}")
