"""Flower adapters: fleet grids, messages, the coordinator and apps for a stock SuperLink."""

from __future__ import annotations

import importlib
from typing import Any

from fedge.platform import silence_telemetry

silence_telemetry()  # before any module of this package imports Flower

_HOME = {
    "Coordinator": "fedge.flower.coordinator",
    "FleetGrid": "fedge.flower.grid",
    "FrozenGrid": "fedge.flower.grid",
    "Journal": "fedge.flower.journal",
    "MemoryJournal": "fedge.flower.journal",
    "client_app": "fedge.flower.apps",
    "collect_statistics": "fedge.flower.statistics",
    "server_app": "fedge.flower.apps",
}

__all__ = [
    "Coordinator",
    "FleetGrid",
    "FrozenGrid",
    "Journal",
    "MemoryJournal",
    "client_app",
    "collect_statistics",
    "server_app",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute may be anything
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fedge.flower' has no attribute {name!r}")
