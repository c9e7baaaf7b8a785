"""What a device pays: memory while it waits and while it trains, CPU until the first step.

    python benchmarks/footprint.py

A real server and a real client on loopback: mutual TLS, an MLP 64-64-10 (4,810 params), batch 8,
plain SGD. Memory is PSS over the client's process tree (shared pages divided by their users).

======  =============================================  ====================================
row     ours                                           peer, measured in the same run
======  =============================================  ====================================
idle    joined client, worker closed                   Flower SuperNode, connected and idle
train   largest PSS seen while it trains round 1       torch training the same MLP
start   CPU s of ``fedge-client run`` until its first  CPU s of Python, import torch and one
        round of one step is trained (TLS connection   step, no network and no data file
        and reading the data included)
======  =============================================  ====================================

The last lines are JSON objects, one a line: name, ours, peer, ratio = peer / ours, unit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper

import fedge

WIDTH, HIDDEN, CLASSES, BATCH, ROWS = 64, 64, 10, 8, 1024
MB = 1e6
SETTLE_S, WATCH_S, WAIT_S = 3.0, 6.0, 90.0
STARTS = 3  # the least of these counts: other work on the machine only adds
_TORCH = f"""
import torch
torch.set_num_threads(1)
model = torch.nn.Sequential(
    torch.nn.Linear({WIDTH}, {HIDDEN}), torch.nn.ReLU(), torch.nn.Linear({HIDDEN}, {CLASSES}))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn({ROWS}, {WIDTH}), torch.randint({CLASSES}, ({ROWS},))
for step in range(10**9):
    rows = slice({BATCH} * (step % {ROWS // BATCH}), {BATCH} * (step % {ROWS // BATCH} + 1))
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
    optimizer.step()
    if step == 0:
        print("stepped", flush=True)
"""


class Processes:
    """Children in sessions of their own, ended with everything below them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, command: list[str], **environ: str) -> subprocess.Popen[bytes]:
        """Start a command; its output goes to ``NAME.log``."""
        with (self.root / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environ},
                start_new_session=True,
                cwd=self.root,
            )
        self._running.append(process)
        return process

    def python(self, name: str, *args: str, **environ: str) -> subprocess.Popen[bytes]:
        """Start this interpreter."""
        return self.start(name, [sys.executable, *args], **environ)

    def log(self, name: str) -> str:
        """What a process has said so far."""
        return (self.root / f"{name}.log").read_text(errors="replace")

    def wait_for(self, name: str, text: str, count: int = 1) -> None:
        """Until its log holds ``text`` so many times."""
        deadline = time.monotonic() + WAIT_S
        while self.log(name).count(text) < count:
            if time.monotonic() > deadline:
                raise SystemExit(f"{name} never said {text!r}:\n{self.log(name)}")
            time.sleep(0.005)

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """End a process and its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        """End all of them."""
        for process in self._running:
            self.stop(process)


def main() -> None:
    """Measure the three rows and print them."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=("ort", "ort-training"), default="ort")
    engine = parser.parse_args().engine
    with tempfile.TemporaryDirectory(prefix="fedge-footprint-") as folder, world(Path(folder)) as p:
        rows = [
            ("idle", client_idle(p, engine) / MB, supernode_idle(p) / MB, "MB"),
            ("train", client_training(p, engine) / MB, torch_training(p) / MB, "MB"),
            ("start", client_start(p, engine), torch_start(p), "s"),
        ]
    for name, ours, peer, unit in rows:
        figures = {"ours": round(ours, 3), "peer": round(peer, 3), "ratio": round(peer / ours, 2)}
        print(json.dumps({"name": name, **figures, "unit": unit}))


@contextlib.contextmanager
def world(root: Path) -> Iterator[Processes]:
    """A folder with rows, and processes that are gone afterwards."""
    rng = np.random.default_rng(0)
    np.savez(
        root / "rows.npz",
        x=rng.normal(size=(ROWS, WIDTH)).astype(np.float32),
        y=rng.integers(0, CLASSES, ROWS),
    )
    processes = Processes(root)
    try:
        yield processes
    finally:
        processes.close()


def client_idle(p: Processes, engine: str) -> float:
    """PSS of a joined client that waits for a quorum that is not there."""
    token = serve(p, "idle", fedge.TrainConfig(lr=0.1, batch_size=BATCH), "--min-clients", "2")
    client = join(p, "idle", token, engine)
    p.wait_for("client-idle", "ready")
    wait_until(lambda: not psutil.Process(client.pid).children())
    time.sleep(SETTLE_S)
    return median_pss(client.pid)


def client_training(p: Processes, engine: str) -> float:
    """Largest PSS of a client during some seconds of one long round."""
    endless = fedge.TrainConfig(lr=1e-6, batch_size=BATCH, epochs=10_000_000)
    token = serve(p, "train", endless, "--min-clients", "1")
    client = join(p, "train", token, engine)
    return peak_pss(client.pid)


def client_start(p: Processes, engine: str) -> float:
    """Least CPU seconds of ``run`` until the first step of the first round is behind it."""
    config = fedge.TrainConfig(lr=0.1, batch_size=BATCH, steps=1)
    rounds = ("--min-clients", "1", "--rounds", "1000000", "--no-evaluate")
    token = serve(p, "start", config, *rounds)
    client = join(p, "start", token, engine)
    p.wait_for("client-start", "trained on")
    took = []
    for _ in range(STARTS):
        p.stop(client)
        seen = p.log("client-start").count("connected to")
        client = p.python("client-start", "-m", "fedge_client", "run", "--state", "client-start")
        p.wait_for("client-start", "connected to", seen + 1)
        trained = p.log("client-start").count("trained on")
        p.wait_for("client-start", "trained on", trained + 1)
        took.append(cpu_s(client.pid))
    p.stop(client)
    return min(took)


def supernode_idle(p: Processes) -> float:
    """PSS of Flower's SuperNode, connected to its SuperLink and idle."""
    bin_dir = Path(sys.executable).parent
    quiet = {
        "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(p.root / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    link, node = free_port(), free_port()
    where = ["--insecure", "--host", "127.0.0.1", "--port"]
    command = [str(bin_dir / "flower-superlink"), *where, str(link)]
    p.start("superlink", [*command, "--disable-runtime-dependency-installation"], **quiet)
    wait_until(lambda: listening(link))
    command = [str(bin_dir / "flower-supernode"), *where, str(node)]
    process = p.start("supernode", [*command, "--superlink", f"127.0.0.1:{link}"], **quiet)
    wait_until(lambda: listening(node))
    time.sleep(2 * SETTLE_S)
    return median_pss(process.pid)


def torch_training(p: Processes) -> float:
    """Largest PSS of a process that trains the same MLP with torch."""
    process = p.python("torch", "-c", _TORCH)
    found = peak_pss(process.pid)
    p.stop(process)
    return found


def torch_start(p: Processes) -> float:
    """Least CPU seconds of Python until torch has done one step."""
    took = []
    for i in range(STARTS):
        process = p.python(f"torch-{i}", "-c", _TORCH)
        p.wait_for(f"torch-{i}", "stepped")
        took.append(cpu_s(process.pid))
        p.stop(process)
    return min(took)


def serve(p: Processes, name: str, train: fedge.TrainConfig, *flags: str) -> str:
    """Start a server with the MLP; returns its join token."""
    out = p.root / f"bundle-{name}"
    fedge.build(mlp(), loss="cross_entropy", train=train, name="mlp", out=out)
    where = ["--host", "127.0.0.1", "--port", "0", "--json", "--state", f"server-{name}"]
    p.python(f"server-{name}", "-m", "fedge_server", "start", str(out), *where, *flags)
    p.wait_for(f"server-{name}", '"ready"')
    lines = (json.loads(s) for s in p.log(f"server-{name}").splitlines() if s.startswith("{"))
    return str(next(e["token"] for e in lines if e["event"] == "ready"))


def join(p: Processes, name: str, token: str, engine: str) -> subprocess.Popen[bytes]:
    """Start a client that joins with the rows of this benchmark."""
    data = ["--data", str(p.root / "rows.npz"), "--label", "y", "--engine", engine]
    where = ["--state", f"client-{name}"]
    return p.python(f"client-{name}", "-m", "fedge_client", "join", token, *data, *where)


def mlp() -> onnx.ModelProto:
    """x [N, 64] -> relu(x·W1 + b1)·W2 + b2, [N, 10]."""
    rng = np.random.default_rng(1)
    shapes = {"w1": (WIDTH, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, CLASSES), "b2": (CLASSES,)}
    weights = [
        numpy_helper.from_array((0.1 * rng.normal(size=s)).astype(np.float32), n)
        for n, s in shapes.items()
    ]
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["a"]),
        helper.make_node("Gemm", ["a", "w2", "b2"], ["logits"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", WIDTH])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])
    graph = helper.make_graph(nodes, "mlp", [x], [logits], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def tree(pid: int) -> list[psutil.Process]:
    """A process and everything below it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def pss(pid: int) -> float:
    """Bytes of a process tree, shared pages divided."""
    total = 0.0
    for process in tree(pid):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def median_pss(pid: int) -> float:
    """The usual size over two seconds."""
    seen = []
    for _ in range(10):
        seen.append(pss(pid))
        time.sleep(0.2)
    return float(np.median(seen))


def peak_pss(pid: int) -> float:
    """The largest size over the first seconds, looked at about every 20 ms."""
    deadline = time.monotonic() + WATCH_S
    largest = 0.0
    while time.monotonic() < deadline:
        largest = max(largest, pss(pid))
        time.sleep(0.02)
    return largest


def cpu_s(pid: int) -> float:
    """User and system CPU seconds of a process tree, ended children included."""
    total = 0.0
    for process in tree(pid):
        t = process.cpu_times()
        total += t.user + t.system + t.children_user + t.children_system
    return total


def free_port() -> int:
    """A TCP port nobody listens on just now."""
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def listening(port: int) -> bool:
    """Whether somebody listens there."""
    import socket

    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def wait_until(ready: Callable[[], bool]) -> None:
    """Until it is."""
    deadline = time.monotonic() + WAIT_S
    while not ready():
        if time.monotonic() > deadline:
            raise SystemExit("waited too long")
        time.sleep(0.05)


if __name__ == "__main__":
    if sys.platform != "linux":
        raise SystemExit("PSS is read from Linux's /proc")
    main()
