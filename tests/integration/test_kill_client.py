"""kill -9 of a client, anywhere: the run ends with the bits of an undisturbed one."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import fedge
from fedge.artifacts.bundle import Bundle
from fedge.types import ClientData

ROUNDS, KILLS = 8, 5
KILL_POINTS = 12  # a round's commit, install and removal touch the disk about so often
# The real command, killed just before it touches the outbox's files for the n-th time.
KILLED_AT = """
import os, pathlib, signal, sys
from fedge_client import outbox
left = int(sys.argv.pop(1))

def counted(real):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call

for name in ("atomic_write", "fsync_dir", "_sync"):
    setattr(outbox, name, counted(getattr(outbox, name)))
for name in ("rename", "replace"):
    real = getattr(pathlib.Path, name)
    seen = counted(real)
    def move(self, target, real=real, seen=seen):
        ours = "/outbox/" in f"{self}/{target}" or "/outbox/" in f"{target}/"
        return (seen if ours else real)(self, target)
    setattr(pathlib.Path, name, move)
from fedge_client.cli import main
sys.exit(main())
"""
SLOW = fedge.TrainConfig(lr=0.02, batch_size=4, epochs=600)  # some tenths of a second
ENDLESS = fedge.TrainConfig(lr=0.02, batch_size=4, epochs=1_000_000)


def test_a_killed_client_finishes_the_same_run(
    world: Any,
    make_bundle: Callable[..., Bundle],
    hospitals: dict[str, ClientData],
    data_flags: Callable[[str], list[str]],
) -> None:
    bundle = make_bundle("slow", personal=["head.*"], train=SLOW)
    undisturbed = fedge.Federation(bundle, list(hospitals.values()), engine="ort").run(ROUNDS)

    server = world.serve(str(bundle.path), "--rounds", str(ROUNDS))
    first, second = (world.join(server, n, *data_flags(n), "--engine", "ort") for n in hospitals)
    first.wait_for("round 1:")
    draw = random.Random(3)
    for kill in range(KILLS):
        if kill % 2 == 0:
            _wait_until_training(first)
        time.sleep(draw.uniform(0.0, 0.3))
        first.kill()
        connected = first.log.read_text().count("connected to")
        first = world.client(first.name, "run")
        while first.log.read_text().count("connected to") == connected:
            time.sleep(0.02)
        first.wait_for("ready")

    server.wait_for("finished", wait_s=90)
    for client in (first, second):
        client.wait_for(f"model of round {ROUNDS} is here")
        for name, values in client.newest_params().items():
            np.testing.assert_array_equal(values, undisturbed.params[name], err_msg=name)
        for name, values in client.personal_params().items():
            kept = undisturbed.personal[client.name][name]
            np.testing.assert_array_equal(values, kept, err_msg=name)
    rounds = [e for e in server.events if e["event"] == "round"]
    assert [e["round"] for e in rounds] == list(range(1, ROUNDS + 1))
    assert all(len(e["clients"]) == 2 for e in rounds)


def test_a_client_killed_between_any_two_writes_finishes_the_same_run(
    world: Any,
    make_bundle: Callable[..., Bundle],
    hospitals: dict[str, ClientData],
    data_flags: Callable[[str], list[str]],
) -> None:
    rounds = KILL_POINTS + 3
    bundle = make_bundle("mlp", personal=["head.*"])
    undisturbed = fedge.Federation(bundle, list(hospitals.values()), engine="ort").run(rounds)

    (world.root / "killed.py").write_text(KILLED_AT)
    server = world.serve(str(bundle.path), "--rounds", str(rounds))
    names = list(hospitals)
    assert world.join(server, names[0], *data_flags(names[0]), "--enroll-only").wait_gone() == 0
    (world.root / names[0] / "client.toml").open("a").write('[engine]\nname = "ort"\n')
    world.join(server, names[1], *data_flags(names[1]), "--engine", "ort")
    for point in range(1, KILL_POINTS + 1):
        victim = world.script(world.root / "killed.py", names[0], str(point), "run")
        assert victim.wait_gone() == -signal.SIGKILL, victim.log.read_text()
    first = world.client(names[0], "run")
    server.wait_for("finished")
    first.wait_for(f"model of round {rounds} is here")
    for name, values in first.newest_params().items():
        np.testing.assert_array_equal(values, undisturbed.params[name], err_msg=name)
    for name, values in first.personal_params().items():
        kept = undisturbed.personal[first.name][name]
        np.testing.assert_array_equal(values, kept, err_msg=name)


def _wait_until_training(client: Any) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        status = json.loads((client.state / "session.json").read_bytes())
        if status["phase"] == "online" and status.get("doing") == "TASK_KIND_TRAIN":
            return
        time.sleep(0.01)
    raise AssertionError(f"never trained: {client.log.read_text()}")


def test_a_task_whose_round_is_over_is_given_up(
    world: Any,
    make_bundle: Callable[..., Bundle],
    hospitals: dict[str, ClientData],
    data_flags: Callable[[str], list[str]],
) -> None:
    del hospitals
    bundle = make_bundle("endless", train=ENDLESS)
    flags = ("--rounds", "1", "--min-clients", "1", "--deadline", "1")
    server = world.serve(str(bundle.path), *flags)
    client = world.join(server, "clinic-a", *data_flags("clinic-a"), "--engine", "ort")
    client.wait_for("round 1: cancelled by the server")
    assert client.process.poll() is None
    assert '"connection": "online"' in world.command("clinic-a", "status", "--json").stdout


def test_a_killed_worker_is_an_error_of_one_task(
    world: Any,
    make_bundle: Callable[..., Bundle],
    hospitals: dict[str, ClientData],
    data_flags: Callable[[str], list[str]],
) -> None:
    import psutil

    bundle = make_bundle("endless", train=ENDLESS)
    server = world.serve(str(bundle.path), "--rounds", "1", "--min-clients", "1")
    client = world.join(server, "clinic-a", *data_flags("clinic-a"), "--engine", "ort")
    client.wait_for("ready")
    deadline = time.monotonic() + 20
    killed = 0
    while not killed and time.monotonic() < deadline:
        time.sleep(0.3)
        for child in psutil.Process(client.process.pid).children():
            child.send_signal(signal.SIGKILL)
            killed += 1
    client.wait_for("died during train: killed by SIGKILL")
    time.sleep(0.5)
    assert client.process.poll() is None
    said = world.command("clinic-a", "status", "--json").stdout
    assert '"connection": "online"' in said
    client.process.send_signal(signal.SIGTERM)
    assert client.wait_gone() == 0
