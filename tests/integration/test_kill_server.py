"""kill -9 of the server, again and again: the run ends with the bits of an undisturbed one."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAdam

import fedge
from fedge.artifacts.bundle import Bundle
from fedge.types import ClientData

ROUNDS, KILLS = 6, 4
TRAIN = fedge.TrainConfig(lr=0.02, batch_size=4, epochs=100)  # a tenth of a second
STRATEGIES: dict[str, Callable[[], Any]] = {
    "fedavg": fedge.strategies.FedAvg,
    "fedadam": lambda: FedAdam(eta=0.1),
}


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_killed_server_finishes_the_same_run(
    world: Any,
    make_bundle: Callable[..., Bundle],
    hospitals: dict[str, ClientData],
    data_flags: Callable[[str], list[str]],
    strategy: str,
) -> None:
    bundle = make_bundle(f"server-{strategy}", train=TRAIN)
    rule = STRATEGIES[strategy]()
    undisturbed = fedge.Federation(bundle, list(hospitals.values()), strategy=rule, engine="ort")
    wanted = undisturbed.run(ROUNDS)

    args = (str(bundle.path), "--rounds", str(ROUNDS), "--strategy", strategy)
    server = world.serve(*args)
    clients = [world.join(server, n, *data_flags(n), "--engine", "ort") for n in hospitals]
    draw = random.Random(strategy)
    seen = {}
    for _ in range(KILLS):
        event = server.wait_for("round", "idle")  # idle: the run was over when it was killed
        if event["event"] == "idle":
            break
        seen[event["round"]] = event
        time.sleep(draw.uniform(0.0, 0.2))
        server.process.kill()
        server.process.wait()
        server = world.serve(*args)
    server.wait_for("finished", "idle")

    for client in clients:
        client.wait_for(f"model of round {ROUNDS} is here")
        for name, values in client.newest_params().items():
            np.testing.assert_array_equal(values, wanted.params[name], err_msg=name)
    assert len(seen) >= 2  # it was killed in different rounds
    history = status(world, server)["run"]["history"]
    assert [e["round"] for e in history] == list(range(1, ROUNDS + 1))
    assert all(len(e["clients"]) == 2 for e in history)


def test_a_stopped_server_continues_and_then_rests(
    world: Any,
    make_bundle: Callable[..., Bundle],
    hospitals: dict[str, ClientData],
    data_flags: Callable[[str], list[str]],
) -> None:
    bundle = make_bundle("polite", train=TRAIN)
    args = (str(bundle.path), "--rounds", "3", "--scaling", "global")
    server = world.serve(*args)
    for name in hospitals:
        world.join(server, name, *data_flags(name), "--engine", "ort")
    server.wait_for("round")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    server = world.serve(*args)
    server.wait_for("finished")
    before = status(world, server)
    assert before["running"]
    assert before["run"]["status"] == "finished"
    assert before["run"]["round"] == 3
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(10) == 0
    server = world.serve(*args)
    server.wait_for("idle")
    again = status(world, server)
    assert (again["run"], again["bundle"]) == (before["run"], before["bundle"])


def status(world: Any, server: Any) -> dict[str, Any]:
    """What ``fedge-server status`` says, while the server runs."""
    import sys

    command = [sys.executable, "-m", "fedge_server", "status", "--json"]
    command += ["--state", str(world.root / "server")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return dict(json.loads(found.stdout))
