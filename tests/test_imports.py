"""What an import costs and brings along, measured in fresh processes."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedge
import fedge_client
import fedge_server

HEAVY = {"numpy", "onnx", "onnx_ir", "onnxruntime", "flwr", "torch", "sqlalchemy", "pandas"}
WORKER_SIDE = {"fedge_client.jobs", "fedge_client.sources", "fedge_client.worker"}
BASE = (
    *("fedge", "fedge.errors", "fedge.types", "fedge.seeds", "fedge.config", "fedge.platform"),
    *("fedge.pipe", "fedge.artifacts.manifest", "fedge.artifacts.signing"),
    *("fedge.artifacts.bundle", "fedge.engines", "fedge.wire.serde", "fedge.wire.token"),
)


def _modules(package: object) -> list[str]:
    path, name = package.__path__, package.__name__  # type: ignore[attr-defined]
    found = [name, *(m.name for m in pkgutil.walk_packages(path, f"{name}."))]
    return [m for m in found if not m.endswith("__main__")]


RESIDENT = sorted({*BASE, *_modules(fedge_client)} - WORKER_SIDE)


def _bring_along(modules: list[str]) -> dict[str, set[str]]:
    """Module -> heavy libraries loaded once it is imported, one after the other in one process."""
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        f"    print(name, *sorted({HEAVY} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", program, *modules]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {words[0]: set(words[1:]) for words in map(str.split, done.stdout.splitlines())}


def test_what_the_resident_client_imports_is_light() -> None:
    assert _bring_along(RESIDENT) == {module: set() for module in RESIDENT}


def test_no_module_of_the_client_imports_what_a_device_lacks() -> None:
    everything = _modules(fedge_client)
    assert all(heavy <= {"numpy"} for heavy in _bring_along(everything).values())


@pytest.mark.parametrize(
    "module", [m for p in (fedge, fedge_client, fedge_server) for m in _modules(p)]
)
def test_every_module_says_what_it_is(module: str) -> None:
    if "_pb2" in module:
        pytest.skip("generated")
    source = _source(module)
    empty_package = source.name == "__init__.py" and not source.read_text().strip()
    assert empty_package or ast.get_docstring(ast.parse(source.read_text()))


def _source(module: str) -> Path:
    root = Path(__file__).parent.parent
    folders = {"fedge": root, "fedge_server": root / "server", "fedge_client": root / "client"}
    path = folders[module.partition(".")[0]].joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_the_command_line_starts_quickly() -> None:
    """Half a second of CPU at most, so that `fedge-client status` suits a Pi's cron."""
    program = (
        "import fedge_client.cli, resource\n"
        "print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.5
