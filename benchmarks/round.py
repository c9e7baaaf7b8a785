"""One round with two clients that only echo and a 1 MB model, beside bare Flower.

Ours: ``fedge-server start`` and two processes with the real client's session, outbox and link
over mutual TLS on loopback; only the training is replaced by an update of zeros. Everything is
as durable as always. Flower's: one SuperLink (in-memory database, no TLS) and two SuperNodes with
its own FedAvg and one tensor, its best case. A round's time is the wall clock between the ends of
consecutive rounds, training phase only, on both sides; the figure is the median.

Run: python benchmarks/round.py [--rounds 20] [--peer-rounds 5] [--skip-peer]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedge.platform import silence_telemetry

silence_telemetry()

import numpy as np  # noqa: E402
import psutil  # noqa: E402

import fedge  # noqa: E402
from fedge import tensors  # noqa: E402
from fedge.artifacts.bundle import Bundle  # noqa: E402
from fedge.artifacts.onnx_v1 import onnx_pb2  # noqa: E402
from fedge.update import Update  # noqa: E402
from fedge.wire.token import Token  # noqa: E402
from fedge_client import enroll  # noqa: E402
from fedge_client.config import ClientConfig  # noqa: E402
from fedge_client.outbox import Outbox  # noqa: E402
from fedge_client.session import Session  # noqa: E402
from fedge_client.state import State  # noqa: E402
from fedge_client.tasks import Desk, Readiness  # noqa: E402

SIDE = 512  # 512 · 512 float32 = 1.05 MB in one tensor
TIMEOUT_S = 180.0
BIN = Path(sys.executable).parent
APP = Path(__file__).parent / "flower_echo"


class EchoDesk(Desk):
    """The client's desk with the training left out: every update is zero."""

    @property
    def has_data(self) -> bool:
        """Eligible for every cohort."""
        return True

    async def prepare(self, digest: str) -> Readiness:
        """Fetch the bundle; no engine is needed."""
        await self._bundle(digest)
        self.ready = Readiness(digest, "echo", "a benchmark", 1, 0)
        return self.ready

    async def call(
        self,
        name: str,
        digest: str,  # noqa: ARG002 - the desk's own signature
        job: dict[str, Any],
    ) -> tuple[str, dict[str, Any], list[bytes]]:
        """Write a zero update for the params that came."""
        assert name == "train"
        params, _ = tensors.load(await asyncio.to_thread(Path(job["params"]).read_bytes))
        delta = {n: np.zeros_like(v) for n, v in params.items()}
        metrics = {"train_loss": 0.0}
        update = Update(self._identity.client_id, job["round_num"], delta, 1, metrics)
        (Path(job["out"]) / "update.fedge").write_bytes(update.to_bytes())
        return "echo", {"num_examples": 1, "metrics": metrics}, []

    def _require_data(self) -> None:
        pass


async def echo_client(root: Path, token: str, name: str) -> None:
    """Join and take part until killed."""
    state = State(root, create=True)
    identity = await enroll.enroll(state, Token.decode(token), "federated", name)
    desk = EchoDesk(state, identity, ClientConfig(), Outbox(state, identity))
    await Session(state, identity, desk, _quiet).run()


def one_tensor_model() -> bytes:
    """y = x · weight, 512 × 512."""
    graph = onnx_pb2.GraphProto(name="echo")
    for values, name in ((graph.input, "x"), (graph.output, "y")):
        tensor = values.add(name=name).type.tensor_type
        tensor.elem_type = 1
        tensor.shape.dim.add(dim_param="N")
        tensor.shape.dim.add(dim_value=SIDE)
    raw = bytes(4 * SIDE * SIDE)
    graph.initializer.add(name="weight", dims=[SIDE, SIDE], data_type=1, raw_data=raw)
    graph.node.add(op_type="MatMul", input=["x", "weight"], output=["y"], name="linear")
    model = onnx_pb2.ModelProto(ir_version=8, graph=graph)
    model.opset_import.add(domain="", version=17)
    return model.SerializeToString()


class Processes:
    """Started processes and everything they start; all gone at the end."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:  # noqa: ANN401
        """Start one; it logs to the common file."""
        with self._log.open("ab") as sink:
            options = {"stdout": sink, "stderr": sink, **options}
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
        self._started.append(process)
        return process

    def tail(self) -> str:
        """The end of the log, for an error."""
        return self._log.read_text(errors="replace")[-3000:]

    def close(self) -> None:
        """End them, and what they started."""
        family = []
        for process in self._started:
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(process.pid)
                family += [root, *root.children(recursive=True)]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=8)
        for one in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        for process in self._started:
            process.wait(10)
            if process.stdout is not None:
                process.stdout.close()


@contextlib.contextmanager
def processes(log: Path) -> Iterator[Processes]:
    """Processes that end with the block."""
    made = Processes(log)
    try:
        yield made
    finally:
        made.close()


def ours(folder: Path, bundle: Bundle, rounds: int) -> list[float]:
    """Seconds of each round over fedge's link."""
    with processes(folder / "fedge.log") as started:
        options = ["--host", "127.0.0.1", "--port", "0", "--json", "--no-evaluate"]
        options += ["--state", str(folder / "server"), "--rounds", str(rounds + 1)]
        command = [sys.executable, "-m", "fedge_server", "start", str(bundle.path), *options]
        server = started.start(*command, stdout=subprocess.PIPE)
        assert server.stdout is not None
        ends: list[float] = []
        for line in server.stdout:
            event = json.loads(line)
            if event["event"] == "ready":
                for name in ("echo-a", "echo-b"):
                    started.start(
                        *(sys.executable, __file__, "--echo", str(folder / name)),
                        *("--token", event["token"], "--name", name),
                    )
            elif event["event"] == "round":
                assert len(event["clients"]) == 2
                ends.append(time.monotonic())
            elif event["event"] == "finished":
                return _gaps(ends)
        raise SystemExit(f"the server ended early:\n{started.tail()}")


def peer(folder: Path, rounds: int) -> list[float]:
    """Seconds of each round over Flower's SuperLink and SuperNodes."""
    link, *nodes = _free_ports(3)
    home, out = folder / "flwr", folder / "ends.json"
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "bench"\n'
        f'[superlink.bench]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    environ = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    with processes(folder / "flower.log") as started:

        def start(name: str, *args: str) -> None:
            started.start(str(BIN / name), *args, env=environ, cwd=folder)

        here = ("--host", "127.0.0.1", "--port")
        quiet = "--disable-runtime-dependency-installation"
        start("flower-superlink", "--insecure", *here, str(link), quiet)
        _wait_for_port(link)
        for port in nodes:
            superlink = ("--superlink", f"127.0.0.1:{link}")
            start("flower-supernode", "--insecure", *superlink, *here, str(port))
        settings = f'num-rounds={rounds + 1} side={SIDE} out="{out}"'
        start("flwr", "run", str(APP), "bench", "--format", "json", "-c", settings)
        end = time.monotonic() + TIMEOUT_S
        while not out.exists() or not out.read_text():
            if time.monotonic() > end:
                raise SystemExit(f"Flower did not finish in {TIMEOUT_S} s:\n{started.tail()}")
            time.sleep(0.1)
        return _gaps(json.loads(out.read_text()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peer-rounds", type=int, default=5)
    parser.add_argument("--skip-peer", action="store_true", help="only our side")
    parser.add_argument("--echo", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--token", help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.echo is not None:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(echo_client(args.echo, args.token, args.name))
        return
    with tempfile.TemporaryDirectory(prefix="fedge-round-") as name:
        folder = Path(name)
        bundle = fedge.build(one_tensor_model(), loss="mse", out=folder / "bundle", name="echo")
        fast = ours(folder, bundle, args.rounds)
        print(f"fedge:  {_summary(fast)}")
        median = statistics.median(fast)
        row: dict[str, Any] = {"name": "round 1MB", "ours": round(median, 4), "unit": "s"}
        if not args.skip_peer:
            slow = peer(folder, args.peer_rounds)
            print(f"Flower: {_summary(slow)}")
            reference = statistics.median(slow)
            row |= {"peer": round(reference, 4), "ratio": round(reference / median, 1)}
        print(json.dumps(row))


def _quiet(line: str) -> None:
    del line


def _gaps(ends: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(ends)]


def _summary(seconds: list[float]) -> str:
    low, high = min(seconds), max(seconds)
    middle = statistics.median(seconds)
    return f"median {middle:.4f} s, {low:.4f} to {high:.4f} s, {len(seconds)} rounds"


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _wait_for_port(port: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise SystemExit(f"nothing listens on port {port}")


if __name__ == "__main__":
    main()
