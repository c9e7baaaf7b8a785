"""One run of a federation over the real link: a server process, client processes, mutual TLS."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import fedge
from fedge import tensors
from fedge.types import ClientData, Params
from fedge_server.processes import Processes

WAIT_S = 120.0
_SPLIT, _LABEL = "part", "label"


def over_link(
    bundle: fedge.Bundle, clients: Sequence[ClientData], rounds: int, seed: int, engine: str
) -> Params:
    """Train ``bundle`` on loopback and return the shared params every client ends up with.

    Args:
        bundle: What to train.
        clients: One process is started for each; all take part in every round.
        rounds: How many.
        seed: Of the run.
        engine: Of the clients.

    Raises:
        FedgeError: If a process ends early, the run takes too long or clients differ at its end.
    """
    root = bundle.path.parent / f"link-{engine}"
    root.mkdir()
    with Processes(root / "logs") as processes:
        options = ["--rounds", str(rounds), "--seed", str(seed), "--min-clients", str(len(clients))]
        options += ["--host", "127.0.0.1", "--port", "0", "--no-evaluate", "--json"]
        server = processes.server(
            _command("fedge_server", "start", root / "server", str(bundle.path), options)
        )
        ready = server.wait_for("ready")
        where = [ready["address"], "--token", ready["token"], "--engine", engine]
        joined = {c.client_id: processes.start(_join(root, c, where), c.client_id) for c in clients}
        server.wait_for("finished")
        results = [_newest(root, name, rounds, joined[name]) for name in joined]
    if any(tensors.dump(r) != tensors.dump(results[0]) for r in results):
        raise fedge.FedgeError("clients ended with different params")
    return results[0]


def largest_gap(ours: Params, reference: Params) -> float:
    """The largest absolute difference of any element, over the names of ``ours``."""
    return max(float(abs(ours[name] - reference[name]).max()) for name in ours)


def _join(root: Path, client: ClientData, where: Sequence[str]) -> list[str]:
    rows = root / f"{client.client_id}.csv"
    _write_csv(rows, client)
    data = ["--data", str(rows), "--label", _LABEL, "--split", _SPLIT]
    options = [*where[1:], "--name", client.client_id, *data]
    return _command("fedge_client", "join", root / client.client_id, where[0], options)


def _command(
    package: str, command: str, state: Path, target: str, options: Sequence[str]
) -> list[str]:
    return [sys.executable, "-m", package, command, target, *options, "--state", str(state)]


def _write_csv(path: Path, client: ClientData) -> None:
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        width = client.train.inputs["x"].shape[1]
        writer.writerow([*(f"c{i:02d}" for i in range(width)), _LABEL, _SPLIT])
        for part, examples in (("train", client.train), ("test", client.test)):
            if examples is not None:
                for x, y in zip(examples.inputs["x"], examples.labels, strict=True):
                    writer.writerow([*(repr(float(v)) for v in x), int(y), part])


def _newest(root: Path, name: str, rounds: int, process: subprocess.Popen[bytes]) -> Params:
    """A client's params once the last round's model has arrived."""
    log, deadline = root / "logs" / f"{name}.log", time.monotonic() + WAIT_S
    while f"model of round {rounds} is here" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise fedge.FedgeError(f"{name} has no model of round {rounds}: {log.read_text()}")
        time.sleep(0.02)
    model = json.loads((root / name / "model.json").read_bytes())
    return tensors.load((root / name / "blobs" / model["params"]).read_bytes())[0]
