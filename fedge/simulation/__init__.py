"""Federations in one process: virtual clients, the server's own round loop, tables and pictures."""

from __future__ import annotations

import importlib
from typing import Any

from fedge.platform import silence_telemetry

silence_telemetry()  # before any module of this package imports Flower

_HOME = {
    "Federation": "fedge.simulation.federation",
    "LocalGrid": "fedge.simulation.grid",
    "Run": "fedge.simulation.run",
}

__all__ = ["Federation", "LocalGrid", "Run"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute may be anything
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fedge.simulation' has no attribute {name!r}")
