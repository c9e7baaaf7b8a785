"""Raspberry Pis, emulated, in a federation with a native server. ``make test-aarch64`` runs this.

``FEDGE_AARCH64`` names folders made by ``tools/aarch64/roots.py``, separated by ``:``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import fedge
from fedge import tensors
from fedge.artifacts.bundle import Bundle
from fedge.engines import open_in_process
from fedge.params import gradient_distance, relative_distance
from fedge.types import Array, ClientData, Examples, Params

ROOTS = {Path(p).name.partition("-")[0]: p for p in os.environ.get("FEDGE_AARCH64", "").split(":")}
pytestmark = pytest.mark.skipif("" in ROOTS, reason="emulated; run it with: make test-aarch64")
EMULATE = Path(__file__).parents[2] / "tools/aarch64/emulate.sh"
ROUNDS, STEPS = 2, 3
LIMIT = 1e-5  # relative L2 per tensor: emulated Arm against x86
WAIT_S = 300.0
ONE_STEP = """
import sys
from pathlib import Path
from fedge import tensors
from fedge.artifacts.bundle import Bundle
from fedge.engines import open_in_process
from fedge.engines.worker import unpack_examples
folder, rows, out = map(Path, sys.argv[1:])
engine = open_in_process(Bundle.open(folder))
batch = unpack_examples(rows.read_bytes())
loss, grads = engine.gradients(batch)
engine.train_step(batch, 0.01)
out.write_bytes(tensors.dump({**engine.get_params(), **{f"{n}@grad": g for n, g in grads.items()}}))
"""


class LeNet(nn.Module):
    """LeNet for 28×28 images."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.f1, self.f2, self.f3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.max_pool2d(torch.relu(self.c1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.c2(x)), 2)
        x = torch.relu(self.f1(torch.flatten(x, 1)))
        logits: torch.Tensor = self.f3(torch.relu(self.f2(x)))
        return logits


@pytest.fixture(scope="module")
def lenet(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(0)
    train = fedge.TrainConfig(lr=0.01, batch_size=8, steps=STEPS)
    return fedge.build(
        LeNet(),
        loss="cross_entropy",
        optimizer="adamw",
        sample=torch.zeros(1, 1, 28, 28),
        train=train,
        out=tmp_path_factory.mktemp("lenet") / "bundle",
    )


def python_in(name: str, *shown: Path) -> list[str]:
    """How the Python of a root is started; it sees the folders ``shown``."""
    folders = f"FEDGE_EMULATE_SHOW={':'.join(map(str, shown))}"
    return ["env", folders, str(EMULATE), ROOTS[name], "/usr/bin/python3"]


def images(rows: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 1, 28, 28)).astype(np.float32)
    return Examples({"x": x}, rng.integers(0, 10, rows))


def site(folder: Path, name: str, seed: int) -> ClientData:
    """A client's images, written as NPZ."""
    data = ClientData(name, images(20, seed), images(6, seed + 100))
    parts = [p for p in (data.train, data.test) if p is not None]
    np.savez(
        folder / f"{name}.npz",
        x=np.concatenate([p.inputs["x"] for p in parts]),
        y=np.concatenate([p.labels for p in parts]),
        part=np.array(["train"] * 20 + ["test"] * 6),
    )
    return data


def test_pis_train_two_rounds_as_x86_does(world: Any, lenet: Bundle, tmp_path: Path) -> None:
    boards = [n for n in ROOTS if n != "armhf"]
    sites = [site(tmp_path, name, seed) for seed, name in enumerate(boards)]
    expected = fedge.Federation(lenet, sites, seed=3, engine="ort").run(ROUNDS)

    server = world.serve(
        *(str(lenet.path), "--rounds", str(ROUNDS), "--seed", "3"),
        *("--min-clients", str(len(boards))),
    )
    clients = []
    for name in boards:
        world.pythons[name] = python_in(name, tmp_path)
        flags = ["--data", str(tmp_path / f"{name}.npz"), "--label", "y", "--split", "part"]
        clients.append(world.join(server, name, *flags))
    for client in clients:
        client.wait_for(f"model of round {ROUNDS} is here", WAIT_S)
        agree(relative_distance(client.newest_params(), expected.params), client.name)
        client.process.terminate()
        assert client.wait_gone() == 0
        exports_what_x86_exports(world, client.name, expected, tmp_path)
        status = json.loads(world.command(client.name, "status", "--json").stdout)
        assert status["engine"] == "ort"
        assert "µs/step" in status["engine_reason"]  # the engine was probed on the device


def exports_what_x86_exports(world: Any, name: str, expected: Any, folder: Path) -> None:
    """The device's exported model gives what the simulation's does, run on x86."""
    told = world.command(name, "export", str(folder / f"{name}.onnx"))
    assert told.returncode == 0, told.stderr
    expected.export(folder / "x86.onnx")
    x = images(4, 9).inputs["x"]
    ours, theirs = (run(folder / f"{n}.onnx", x) for n in (name, "x86"))
    agree(relative_distance(ours, theirs), f"{name} exported")


def agree(distance: dict[str, float], what: str) -> None:
    """Print the worst tensor's distance, and hold it against the limit."""
    print(f"{what}: relative L2 {max(distance.values()):.1e}")
    assert max(distance.values()) <= LIMIT, distance


def run(path: Path, x: Array) -> Params:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


@pytest.mark.parametrize("core", ["cortex-a53", "cortex-a57", "cortex-a72", "cortex-a76"])
def test_one_step_on_each_core(
    lenet: Bundle, tmp_path: Path, core: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedge.engines.worker import pack_examples

    batch = images(8, 1)
    (tmp_path / "rows").write_bytes(pack_examples(batch))
    (tmp_path / "step.py").write_text(ONE_STEP)
    files = [str(p) for p in (tmp_path / "step.py", lenet.path, tmp_path / "rows")]
    monkeypatch.setenv("QEMU_CPU", core)
    python = python_in("bookworm", tmp_path, lenet.path)
    subprocess.run([*python, *files, str(tmp_path / "out")], check=True, timeout=WAIT_S)
    found, _ = tensors.load((tmp_path / "out").read_bytes())

    engine = open_in_process(lenet)
    _, grads = engine.gradients(batch)
    agree(gradient_distance({n: found.pop(f"{n}@grad") for n in grads}, grads), f"{core} gradients")
    engine.train_step(batch, 0.01)
    agree(relative_distance(found, engine.get_params()), core)


@pytest.mark.skipif("armhf" not in ROOTS, reason="no 32-bit root was made")
def test_a_32_bit_system_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMU_CPU", "cortex-a7")
    told = subprocess.run(
        [*python_in("armhf"), "-m", "fedge_client", "status"],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert told.returncode == 2, told.stderr
    assert "32-bit" in told.stderr
    assert "Traceback" not in told.stderr
    assert sys.maxsize > 2**32  # control: this machine is not what was looked at
