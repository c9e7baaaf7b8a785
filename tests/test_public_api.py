"""The public surface is this list; changing it is a decision, not an accident."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import fedge

PUBLIC = [
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
MODULES = ["data", "errors", "losses", "metrics", "strategies"]


def test_the_public_names_are_these_and_sorted() -> None:
    assert fedge.__all__ == PUBLIC == sorted(PUBLIC)
    assert dir(fedge) == sorted(PUBLIC)


@pytest.mark.parametrize("name", [n for n in PUBLIC if n != "__version__"])
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(fedge, name)
    assert inspect.getdoc(value), f"fedge.{name} has no docstring"


def test_importing_a_submodule_does_not_change_what_a_public_name_means() -> None:
    """Python sets a submodule as an attribute of its package: no function may share its name."""
    program = (
        "import importlib, fedge\n"
        f"for name in {PUBLIC}:\n"
        "    first = getattr(fedge, name)\n"
        "    assert getattr(fedge, name) is first, name\n"
        "    home = importlib.import_module(fedge._HOME.get(name, 'fedge'))\n"
        "    assert getattr(fedge, name) is first, name\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fedge' has no attribute 'pickle'"):
        _ = fedge.pickle


def test_star_import_gives_the_public_names() -> None:
    program = "from fedge import *; print(sorted(n for n in dir() if n[:2] != '__'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == str([n for n in PUBLIC if n != "__version__"]), done.stderr


def _exports(module: ModuleType) -> dict[str, object]:
    names = getattr(module, "__all__", None) or [
        n
        for n, v in vars(module).items()
        if not n.startswith("_") and getattr(v, "__module__", None) == module.__name__
    ]
    return {n: getattr(module, n) for n in names}


@pytest.mark.parametrize("name", MODULES)
def test_what_public_modules_export_is_documented(name: str) -> None:
    exported = _exports(importlib.import_module(f"fedge.{name}"))
    assert exported
    for member, value in exported.items():
        if inspect.isclass(value) or inspect.isroutine(value):
            assert inspect.getdoc(value), f"fedge.{name}.{member} has no docstring"


@pytest.mark.parametrize("name", ["Bundle", "ClientData", "Examples", "Federation", "RunConfig"])
def test_public_methods_are_documented_and_annotated(name: str) -> None:
    cls = getattr(fedge, name)
    for member, value in vars(cls).items():
        function = (
            value.fget
            if isinstance(value, property)
            else inspect.unwrap(getattr(value, "__func__", value))
        )
        if member.startswith("_") or not inspect.isfunction(function):
            continue
        assert inspect.getdoc(function), f"{name}.{member} has no docstring"
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, f"{name}.{member}"
