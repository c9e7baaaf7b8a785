"""fedge's Flower app on a real SuperLink and two SuperNodes gives the local grid's numbers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

import fedge
from fedge import tensors
from fedge.artifacts.preprocessing import SiteStandardize
from fedge.data import breast_cancer_hospitals
from fedge.params import relative_distance

APP = Path(__file__).parents[2] / "simulations" / "flower_app"
BIN = Path(sys.executable).parent
TIMEOUT_S = 400  # takes 25 s on a quiet machine
ROUNDS = 2


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def logistic_regression() -> bytes:
    """A model of 30 inputs and one logit, as ONNX, without torch."""
    weight = np.zeros((1, 30), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "weight", "bias"], ["logit"], transB=1)],
        "logistic",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 30])],
        [helper.make_tensor_value_info("logit", TensorProto.FLOAT, ["N", 1])],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.zeros(1, np.float32), "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


@contextlib.contextmanager
def processes(log: Path) -> Iterator[tuple[list[subprocess.Popen[bytes]], dict[str, str]]]:
    """Started processes end with the block, and everything they started with them."""
    environ = {
        **os.environ,
        "FLWR_HOME": str(log.parent / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield started, environ
    finally:
        family = [p for s in started for p in _family(s.pid)]
        for process in started:
            process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=8)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in started:
            process.wait(10)
        _, alive = psutil.wait_procs(alive, timeout=5)
        assert not alive, f"still there: {alive}"


def _family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def wait_for_port(port: int, log: Path) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    pytest.fail(f"nothing listens on port {port}:\n{log.read_text()[-4000:]}")


def test_two_rounds_on_a_real_superlink_equal_the_local_grid(tmp_path: Path) -> None:
    bundle = fedge.build(
        logistic_regression(),
        loss="bce_with_logits",
        preprocessing=SiteStandardize(),
        train=fedge.TrainConfig(lr=0.1, batch_size=16, epochs=1),
        out=tmp_path / "bundle",
    )
    clients = breast_cancer_hospitals(seed=0)[:2]
    expected = fedge.Federation(bundle, clients, engine="ort").run(rounds=ROUNDS).params
    got = on_superlink(bundle.path, tmp_path)
    assert got.keys() == expected.keys()
    assert all(d <= 1e-6 for d in relative_distance(got, expected).values())
    assert any(np.abs(v).max() > 1e-3 for v in got.values())


def on_superlink(bundle: Path, folder: Path) -> fedge.types.Params:
    """The final shared params of the app on one SuperLink and two SuperNodes."""
    log, out = folder / "flower.log", folder / "params.safetensors"
    server, *nodes = free_ports(3)
    (folder / "flwr").mkdir()
    (folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n'
        f'[superlink.test]\naddress = "127.0.0.1:{server}"\ninsecure = true\n'
    )
    with processes(log) as (started, environ), log.open("wb") as sink:

        def start(*command: str) -> None:
            started.append(
                subprocess.Popen(
                    [str(BIN / command[0]), *command[1:]],
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    env=environ,
                    cwd=folder,
                )
            )

        start(
            *("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(server)),
            "--disable-runtime-dependency-installation",
        )
        wait_for_port(server, log)
        for number, port in enumerate(nodes):
            start(
                *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{server}"),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--node-config", f"partition-id={number}"),
            )
        start(
            *("flwr", "run", str(APP), "test", "--format", "json"),
            *("-c", f'bundle="{bundle}" out="{out}" num-rounds={ROUNDS}'),
        )
        end = time.monotonic() + TIMEOUT_S
        while not out.exists():
            assert time.monotonic() < end, log.read_text()[-6000:]
            time.sleep(0.2)
        return tensors.load(out.read_bytes())[0]
