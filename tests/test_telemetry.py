"""Nothing phones home, whatever our dependencies would like.

Stock onnxruntime carries Microsoft's telemetry, on by default; Flower has its own. Here fedge's
processes live for some seconds in a namespace without a way out, beside an unprotected process that
must be caught, so that silence proves something.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROBE = ROOT / "tests" / "quiet_probe.py"
LEAST_S, MOST_S = 12.0, 150.0  # the control was caught after 8 to 25 s; fedge runs at least as long
UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--mount")

_WORKER = """
import time
import numpy as np
from onnx import TensorProto, helper, numpy_helper
import fedge
from fedge.engines import open_engine
from fedge.types import Examples
model = helper.make_model(helper.make_graph(
    [helper.make_node("Gemm", ["x", "w", "b"], ["y"])], "line",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])],
    [numpy_helper.from_array(np.zeros((3, 1), np.float32), "w"),
     numpy_helper.from_array(np.zeros(1, np.float32), "b")],
), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
bundle = fedge.build(model, loss="mse")
engine = open_engine(bundle, "ort")
rows = Examples({"x": np.ones((4, 3), np.float32)}, np.ones((4, 1), np.float32))
engine.train_step(rows, 0.1)
print("onnxruntime has trained", flush=True)
time.sleep(600)
"""
_SERVER = """
import sys, time
import fedge_server.cli, fedge_server.grid, fedge.flower, fedge.strategies
import flwr.serverapp
print("flwr is loaded", flush=True)
time.sleep(600)
"""
_DEMO = """
import sys
from pathlib import Path
from fedge_server.cli import main
sys.exit(main(["demo", "--out", str(Path.home().parent / "demo"), "--json"]))
"""
_CONTROL = "import onnxruntime, time; time.sleep(600)"


def _namespaces() -> str:
    """Empty where a user may make namespaces, else why not."""
    missing = [tool for tool in (UNSHARE[0], "ip", "mount") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    done = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"namespaces are not permitted: {done.stderr.strip()}"


REFUSED = _namespaces()
needs_namespaces = pytest.mark.skipif(bool(REFUSED), reason=REFUSED or "permitted")


def _start(program: str, folder: Path) -> subprocess.Popen[str]:
    home = folder / "home"
    home.mkdir(parents=True)
    least_s = LEAST_S if program is not _DEMO else MOST_S  # it ends by itself
    times = [str(least_s), str(MOST_S)]
    command = [
        *UNSHARE,
        sys.executable,
        str(PROBE),
        *times,
        str(folder.parent / "caught"),
        str(home),
    ]
    return subprocess.Popen(
        [*command, sys.executable, "-c", program],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def _seen(probe: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = probe.communicate(timeout=MOST_S + 60)
    assert probe.returncode == 0
    seen: dict[str, Any] = json.loads(out)
    return seen


@needs_namespaces
def test_nothing_phones_home_and_home_stays_empty(tmp_path: Path) -> None:
    programs = {"control": _CONTROL, "worker": _WORKER, "server": _SERVER, "demo": _DEMO}
    probes = {name: _start(text, tmp_path / name) for name, text in programs.items()}
    seen = {name: _seen(probe) for name, probe in probes.items()}

    control = seen["control"]
    assert any("microsoft" in name for name in control["names"]), f"not caught: {control}"
    assert list((tmp_path / "control" / "home").iterdir())
    for name, loaded in (("worker", "onnxruntime has trained"), ("server", "flwr is loaded")):
        assert seen[name]["exit"] is None, seen[name]["errors"]
        assert loaded in seen[name]["errors"]
    assert seen["demo"]["exit"] == 0, seen["demo"]["errors"]
    for name in ("worker", "server", "demo"):
        assert seen[name]["names"] == []
        assert seen[name]["addresses"] == []
        assert list((tmp_path / name / "home").iterdir()) == []


_IMPORTED = re.compile(r"^\s*(?:from|import) (?:flwr|onnxruntime)\b", re.MULTILINE)
DOORS = sorted(
    path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for root in (ROOT, ROOT / "server", ROOT / "client")
    for package in ("fedge", "fedge_server", "fedge_client")
    for path in (root / package).rglob("*.py")
    if _IMPORTED.search(path.read_text())
)
_WATCH = """
import importlib, os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("flwr", "onnxruntime"):
            switches = os.environ["ORT_DISABLE_TELEMETRY"], os.environ["FLWR_TELEMETRY_ENABLED"]
            assert switches == ("1", "0"), (name, switches)
sys.meta_path.insert(0, Watch())
try:
    importlib.import_module(sys.argv[1])
except Exception as exc:
    if type(exc).__name__ != "EngineUnavailableError":  # for the other interpreter
        raise
"""


@pytest.mark.parametrize("module", DOORS)
def test_every_door_switches_telemetry_off_before_the_import(module: str) -> None:
    """Also against a user's environment that switches it on."""
    environ = {**os.environ, "ORT_DISABLE_TELEMETRY": "0", "FLWR_TELEMETRY_ENABLED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _WATCH, module], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_there_are_doors_to_watch() -> None:
    assert {"fedge.engines.runtime", "fedge.flower.messages"} <= set(DOORS)
