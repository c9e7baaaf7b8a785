"""The resident client and what it does not carry, looked at in the running process."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from fedge.artifacts.bundle import Bundle
from fedge.types import ClientData

BANNED = ("flwr", "torch", "onnx", "onnxruntime", "numpy", "pandas", "sklearn", "matplotlib")
# Runs the real command and, when it ends, writes down what it had loaded.
DUMP = """
import atexit, json, pathlib, sys
out = sys.argv.pop(1)
atexit.register(lambda: pathlib.Path(out).write_text(json.dumps(sorted(sys.modules))))
from fedge_client.cli import main
sys.exit(main())
"""


def test_the_resident_process_loads_nothing_numeric(
    world: Any,
    make_bundle: Callable[..., Bundle],
    hospitals: dict[str, ClientData],
    data_flags: Callable[[str], list[str]],
    tmp_path: Path,
) -> None:
    del hospitals
    (tmp_path / "dump.py").write_text(DUMP)
    server = world.serve(str(make_bundle("mlp").path), "--rounds", "2")
    world.join(server, "clinic-b", *data_flags("clinic-b"))
    modules = tmp_path / "modules.json"
    token = server.events[0]["token"]
    flags = ["join", token, "--name", "clinic-a", *data_flags("clinic-a")]
    client = world.script(tmp_path / "dump.py", "clinic-a", str(modules), *flags)
    client.wait_for("model of round 2 is here")
    _maps_hold_no_numeric_library(client.process.pid)
    client.process.send_signal(signal.SIGTERM)
    assert client.wait_gone() == 0
    loaded = {name.partition(".")[0] for name in json.loads(modules.read_text())}
    assert "grpc" in loaded  # control: this is the process that talked
    assert loaded.isdisjoint(BANNED), sorted(loaded & set(BANNED))


def _maps_hold_no_numeric_library(pid: int) -> None:
    if sys.platform == "linux":
        paths = [m.path for m in psutil.Process(pid).memory_maps()]
        assert not [p for p in paths if "onnxruntime" in p or "/numpy/" in p]


def test_an_idle_client_holds_no_worker(
    world: Any,
    make_bundle: Callable[..., Bundle],
    hospitals: dict[str, ClientData],
    data_flags: Callable[[str], list[str]],
) -> None:
    del hospitals
    server = world.serve(str(make_bundle("mlp").path), "--rounds", "1", "--min-clients", "2")
    state = world.root / "clinic-a"
    state.mkdir(mode=0o700)
    (state / "client.toml").write_text("[engine]\nname = 'ort'\nworker_idle_s = 0.2\n")
    client = world.join(server, "clinic-a", *data_flags("clinic-a"))
    client.wait_for("ready")
    process = psutil.Process(client.process.pid)
    gone, alive = psutil.wait_procs(process.children(), timeout=10)
    assert not alive
    del gone
    assert client.process.poll() is None
