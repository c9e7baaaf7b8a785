"""A real federation on loopback: server and client processes, certificates, files."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import fedge
from fedge import tensors
from fedge.artifacts.bundle import Bundle
from fedge.types import ClientData, Examples, Params

COLUMNS = 6
WAIT_S = 60.0


@dataclass
class Server:
    """A ``fedge-server start`` process and the events it printed."""

    process: subprocess.Popen[bytes]
    log: Path
    events: list[dict[str, Any]] = field(default_factory=list)
    _buffer: bytes = b""

    def wait_for(self, *kinds: str, count: int = 1, wait_s: float = WAIT_S) -> dict[str, Any]:
        """The ``count``-th event of one of these kinds."""
        deadline = time.monotonic() + wait_s
        while True:
            found = [e for e in self.events if e["event"] in kinds]
            if len(found) >= count:
                return found[count - 1]
            assert time.monotonic() < deadline, f"no {kinds}: {self.log.read_text()[-2000:]}"
            self._read()

    def _read(self) -> None:
        stream = self.process.stdout
        assert stream is not None
        ready, _, _ = select.select([stream], [], [], 0.2)
        if ready:
            data = os.read(stream.fileno(), 65536)
            assert data, f"the server ended: {self.log.read_text()[-2000:]}"
            self._buffer += data
            *lines, self._buffer = self._buffer.split(b"\n")
            self.events += [json.loads(line) for line in lines]


@dataclass
class Client:
    """A ``fedge-client`` process and its state folder."""

    name: str
    state: Path
    log: Path
    process: subprocess.Popen[bytes]

    def wait_for(self, text: str, wait_s: float = WAIT_S) -> None:
        """Until the log says something."""
        deadline = time.monotonic() + wait_s
        while text not in self.log.read_text():
            assert self.process.poll() is None, f"{self.name} ended: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {text!r}: {self.log.read_text()}"
            time.sleep(0.02)

    def wait_gone(self, wait_s: float = WAIT_S) -> int:
        """Its exit code, once it ended by itself."""
        return self.process.wait(wait_s)

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        self.process.kill()
        self.process.wait()

    def newest_params(self) -> Params:
        """The newest global model's shared params."""
        model = json.loads((self.state / "model.json").read_bytes())
        data = (self.state / "blobs" / model["params"]).read_bytes()
        return tensors.load(data)[0]

    def personal_params(self) -> Params:
        """What never left."""
        (path,) = self.state.glob("personal/*/personal.safetensors")
        return tensors.load(path.read_bytes())[0]


class World:
    """Starts servers and clients under one folder, and ends them all.

    Attributes:
        pythons: How the Python of a named client is started, where it is not this one.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pythons: dict[str, list[str]] = {}
        self.home = root / "home"
        self.home.mkdir()
        self._environ = {**os.environ, "HOME": str(self.home)}
        for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "FLWR_HOME"):
            self._environ.pop(name, None)
        self._running: list[subprocess.Popen[bytes]] = []
        self._starts = 0

    def serve(self, *args: str, state: str = "server", port: int = 0) -> Server:
        """Start (or start again) a server."""
        self._starts += 1
        log = self.root / f"{state}-{self._starts}.log"
        command = [sys.executable, "-m", "fedge_server", "start", *args]
        command += ["--host", "127.0.0.1", "--port", str(port), "--json"]
        command += ["--state", str(self.root / state)]
        process = self._start(command, log, stdout=subprocess.PIPE)
        server = Server(process, log)
        server.wait_for("ready")
        return server

    def join(self, server: Server, name: str, *args: str) -> Client:
        """Start a client that joins."""
        ready = server.events[0]
        where = ["join", ready["address"], "--token", ready["token"], "--name", name]
        return self.client(name, *where, *args)

    def client(self, name: str, *args: str) -> Client:
        """Start a client command on the state folder of ``name``."""
        state, log = self.root / name, self.root / f"{name}.log"
        process = self._start([*self._client(name), *args, "--state", str(state)], log)
        return Client(name, state, log, process)

    def script(self, path: Path, name: str, *args: str) -> Client:
        """Start a Python file that runs a client command on the state folder of ``name``."""
        state, log = self.root / name, self.root / f"{name}.log"
        process = self._start([sys.executable, str(path), *args, "--state", str(state)], log)
        return Client(name, state, log, process)

    def command(self, name: str, *args: str) -> subprocess.CompletedProcess[str]:
        """Run a client command to its end."""
        return subprocess.run(
            [*self._client(name), *args, "--state", str(self.root / name)],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
            env=self._environ,
        )

    def close(self) -> None:
        """End everything that still runs."""
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def _client(self, name: str) -> list[str]:
        return [*self.pythons.get(name, [sys.executable]), "-m", "fedge_client"]

    def _start(
        self, command: list[str], log: Path, stdout: int | None = None
    ) -> subprocess.Popen[bytes]:
        with log.open("ab") as handle:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=handle if stdout is None else stdout,
                stderr=handle,
                env=self._environ,
                start_new_session=True,
            )
        self._running.append(process)
        return process


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Processes that are gone when the test ends."""
    made = World(tmp_path)
    yield made
    made.close()
    written = [p for p in made.home.rglob("*") if not p.is_dir()]
    assert written == [], "a fedge process wrote outside its state folder"


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """Builds a small two-layer classifier: x [N, 6] -> logit [N, 1]; ``head`` is its last layer."""

    def make(name: str, *, train: fedge.TrainConfig | None = None, **options: Any) -> Bundle:
        rng = np.random.default_rng(7)
        shapes = {"body.w": (COLUMNS, 8), "body.b": (8,), "head.w": (8, 1), "head.b": (1,)}
        weights = [
            numpy_helper.from_array(rng.normal(0, 0.5, shape).astype(np.float32), key)
            for key, shape in shapes.items()
        ]
        nodes = [
            helper.make_node("Gemm", ["x", "body.w", "body.b"], ["hidden"]),
            helper.make_node("Relu", ["hidden"], ["active"]),
            helper.make_node("Gemm", ["active", "head.w", "head.b"], ["logit"]),
        ]
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", COLUMNS])],
            [helper.make_tensor_value_info("logit", TensorProto.FLOAT, ["N", 1])],
            weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        train = train or fedge.TrainConfig(lr=0.1, batch_size=8, epochs=2)
        out = tmp_path_factory.mktemp("bundles") / name
        return fedge.build(
            model, loss="bce_with_logits", train=train, name=name, out=out, **options
        )

    return make


@pytest.fixture
def hospitals(tmp_path: Path) -> dict[str, ClientData]:
    """Two hospitals' rows; also written as CSV beside the state folders."""
    made = {}
    for seed, (name, rows) in enumerate((("clinic-a", 60), ("clinic-b", 41))):
        rng = np.random.default_rng(seed)
        x = rng.normal(seed, 1, (rows, COLUMNS)).astype(np.float32)
        y = (x[:, 0] + x[:, 1] * x[:, 2] > seed).astype(np.int64)
        data = ClientData(
            name, Examples({"x": x[:-12]}, y[:-12]), Examples({"x": x[-12:]}, y[-12:])
        )
        write_csv(tmp_path / f"{name}.csv", data)
        made[name] = data
    return made


def write_csv(path: Path, data: ClientData) -> None:
    """A client's rows as a site would have them; float32 survives the round trip."""
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow([*(f"c{i}" for i in range(COLUMNS)), "sick", "part"])
        for part, examples in (("train", data.train), ("test", data.test)):
            if examples is not None:
                for row, label in zip(examples.inputs["x"], examples.labels, strict=True):
                    writer.writerow([*(repr(float(v)) for v in row), int(label), part])


@pytest.fixture
def data_flags(tmp_path: Path) -> Callable[[str], list[str]]:
    """The flags that name a hospital's CSV."""

    def flags(name: str) -> list[str]:
        return ["--data", str(tmp_path / f"{name}.csv"), "--label", "sick", "--split", "part"]

    return flags
