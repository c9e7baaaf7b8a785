"""The client in other Python versions, with a device's packages and no others.

``make test-pythons`` runs this; ``FEDGE_PYTHONS`` names their interpreters, separated by ``:``.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedge
from fedge import tensors
from fedge.artifacts.bundle import Bundle
from fedge.engines import open_in_process
from fedge.engines.worker import pack_examples
from fedge.params import relative_distance
from fedge.types import ClientData

PYTHONS = [p for p in os.environ.get("FEDGE_PYTHONS", "").split(":") if p]
pytestmark = pytest.mark.skipif(not PYTHONS, reason="run it with: make test-pythons")
ABSENT = ("flwr", "torch", "onnx", "sqlalchemy", "pandas")
CLOSURE = f"""
import importlib.util, json, sys
import fedge_client.commands
resident = sorted({{n.partition(".")[0] for n in sys.modules}})
import fedge_client.worker, fedge.engines.ort, fedge.exporting
there = [n for n in {ABSENT} if importlib.util.find_spec(n)]
print(json.dumps([resident, there, list(sys.version_info[:2])]))
"""
ONE_STEP = """
import sys
from pathlib import Path
from fedge import tensors
from fedge.artifacts.bundle import Bundle
from fedge.engines import open_in_process
from fedge.engines.worker import unpack_examples
folder, rows, out = map(Path, sys.argv[1:])
engine = open_in_process(Bundle.open(folder))
engine.train_step(unpack_examples(rows.read_bytes()), 0.1)
out.write_bytes(tensors.dump(engine.get_params()))
"""


def version(python: str) -> str:
    return Path(python).parents[1].name


@pytest.mark.parametrize("python", PYTHONS, ids=version)
def test_the_client_imports_only_what_a_device_has(python: str) -> None:
    told = subprocess.run([python, "-c", CLOSURE], capture_output=True, text=True, check=True)
    resident, there, found = json.loads(told.stdout)
    assert ".".join(map(str, found)) == version(python)
    assert there == []  # control: a light environment
    assert "grpc" in resident
    assert {"numpy", "onnxruntime", *ABSENT}.isdisjoint(resident)


@pytest.mark.parametrize("python", PYTHONS, ids=version)
def test_one_step_gives_the_same_params(
    python: str,
    make_bundle: Callable[..., Bundle],
    hospitals: dict[str, ClientData],
    tmp_path: Path,
) -> None:
    bundle, batch = make_bundle("mlp"), hospitals["clinic-a"].train
    (tmp_path / "rows").write_bytes(pack_examples(batch))
    files = [str(p) for p in (bundle.path, tmp_path / "rows", tmp_path / "out")]
    subprocess.run([python, "-c", ONE_STEP, *files], check=True)
    engine = open_in_process(bundle)
    engine.train_step(batch, 0.1)
    found, _ = tensors.load((tmp_path / "out").read_bytes())
    assert max(relative_distance(found, engine.get_params()).values()) <= 1e-6


def test_clients_of_all_versions_train_together(
    world: Any,
    make_bundle: Callable[..., Bundle],
    hospitals: dict[str, ClientData],
    data_flags: Callable[[str], list[str]],
    tmp_path: Path,
) -> None:
    bundle = make_bundle("mlp")
    names = [f"{place}-{version(p)}" for p in PYTHONS for place in hospitals]
    sites = []
    for name in names:
        place = name.rpartition("-")[0]
        (tmp_path / f"{name}.csv").symlink_to(tmp_path / f"{place}.csv")
        sites.append(ClientData(name, hospitals[place].train, hospitals[place].test))
    expected = fedge.Federation(bundle, sites, seed=2, engine="ort").run(2)

    options = ["--rounds", "2", "--seed", "2", "--min-clients", str(len(names))]
    server = world.serve(str(bundle.path), *options)
    world.pythons = {f"{h}-{version(p)}": [p] for p in PYTHONS for h in hospitals}
    clients = [world.join(server, name, *data_flags(name)) for name in names]
    for client in clients:
        client.wait_for("model of round 2 is here")
        for name, values in client.newest_params().items():
            np.testing.assert_allclose(values, expected.params[name], rtol=1e-6, atol=1e-7)
    told = world.command(names[0], "export", str(tmp_path / "model.onnx"))
    assert told.returncode == 0, told.stderr
