"""fedge: train on the devices that hold the data.

The names below are the public surface; everything else is internal. Importing this
package is cheap: a name's module is loaded when the name is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Bundle": "fedge.artifacts.bundle",
    "ClientData": "fedge.types",
    "Examples": "fedge.types",
    "Federation": "fedge.simulation",
    "FedgeError": "fedge.errors",
    "RunConfig": "fedge.config",
    "Schedule": "fedge.config",
    "SiteStandardize": "fedge.artifacts.preprocessing",
    "Standardize": "fedge.artifacts.preprocessing",
    "TrainConfig": "fedge.config",
    "build": "fedge.artifacts.build",
    "estimate": "fedge.artifacts.estimate",
    "export": "fedge.exporting",
}
_MODULES = ("data", "errors", "losses", "metrics", "strategies")

__all__ = [
    "Bundle",
    "ClientData",
    "Examples",
    "Federation",
    "FedgeError",
    "RunConfig",
    "Schedule",
    "SiteStandardize",
    "Standardize",
    "TrainConfig",
    "__version__",
    "build",
    "data",
    "errors",
    "estimate",
    "export",
    "losses",
    "metrics",
    "strategies",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute may be anything
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fedge.{name}")
    raise AttributeError(f"module 'fedge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
