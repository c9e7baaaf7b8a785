"""What goes wrong at a site: one line, the right exit code, and nothing of the data."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedge.artifacts.bundle import Bundle
from fedge.types import ClientData

SECRET = "7351.25"


@pytest.fixture
def server(world: Any, make_bundle: Callable[..., Bundle], hospitals: dict[str, ClientData]) -> Any:
    """A server that waits for two clients."""
    del hospitals
    return world.serve(str(make_bundle("mlp").path), "--rounds", "2", "--min-clients", "2")


def _exit(client: Any, code: int) -> str:
    assert client.wait_gone() == code, client.log.read_text()
    *_, last = client.log.read_text().splitlines()
    assert last.startswith("fedge-client: error: ")
    return str(last)


def test_data_that_do_not_fit_stop_the_client_with_code_3(
    world: Any, server: Any, tmp_path: Path
) -> None:
    header = "c0,c1,c2,c3,c4,c5,sick"
    cases = {
        "wrong": (f"{header.replace('sick', 'ill')}\n1,2,3,4,5,6,1\n", "lacks the column sick"),
        "empty": ("", "is empty"),
        "nan": (f"{header}\n{SECRET},nan,3,4,5,6,1\n", "line 2, column 'c1' is NaN"),
        "range": (f"{header}\n1,2,3,4,5,6,{SECRET}\n", "out of range in 1 of 1 rows"),
    }
    clients = {}
    for name, (text, _) in cases.items():
        (tmp_path / f"{name}.csv").write_text(text)
        flags = ["--data", str(tmp_path / f"{name}.csv"), "--label", "sick", "--engine", "ort"]
        clients[name] = world.join(server, name, *flags)
    for name, (_, says) in cases.items():
        message = _exit(clients[name], 3)
        assert says in message
        assert SECRET not in clients[name].log.read_text()
    missing = world.join(server, "none", "--data", str(tmp_path / "none.csv"), "--label", "y")
    assert "does not exist" in _exit(missing, 3)
    assert not (missing.state / "client.json").exists()


def test_data_that_break_later_fail_the_task_and_not_the_client(
    world: Any, server: Any, tmp_path: Path, data_flags: Callable[[str], list[str]]
) -> None:
    client = world.join(server, "clinic-a", *data_flags("clinic-a"), "--engine", "ort")
    client.wait_for("ready")
    path = tmp_path / "clinic-a.csv"
    good = path.read_text()
    path.write_text(good + f"{SECRET},1,1,1,1,1,7,train\n")
    other = world.join(server, "clinic-b", *data_flags("clinic-b"), "--engine", "ort")
    client.wait_for("round 1: failed: clinic-a.csv line 62: label 'sick' is out of range")
    assert client.process.poll() is None
    path.write_text(good)
    server.wait_for("finished")
    other.wait_for("model of round 2 is here")
    stored = b"".join(p.read_bytes() for p in (tmp_path / "server").rglob("*") if p.is_file())
    assert SECRET.encode() not in stored
    assert b"is out of range" in stored  # the control: the message itself did arrive
    client.process.send_signal(signal.SIGTERM)
    assert client.wait_gone() == 0


def test_admission_is_refused_in_one_line(world: Any, server: Any) -> None:
    first = world.join(server, "clinic-a", "--enroll-only")
    assert first.wait_gone() == 0
    taken = world.client(
        "thief", "join", server.events[0]["token"], "--name", "clinic-a", "--enroll-only"
    )
    assert "clinic-a" in _exit(taken, 7)
    damaged = world.client("damaged", "join", server.events[0]["token"][:-9])
    assert "copy the whole line" in _exit(damaged, 2)
    nobody = world.client("nobody", "join", "127.0.0.1:9", "--token", server.events[0]["token"])
    assert "127.0.0.1:9" in _exit(nobody, 6)


def test_two_clients_on_one_state_folder_and_ctrl_c(world: Any, server: Any) -> None:
    first = world.join(server, "clinic-a")
    first.wait_for("ready")
    second = world.command("clinic-a", "run")
    assert second.returncode == 10
    assert "already running" in second.stderr
    assert json.loads(world.command("clinic-a", "status", "--json").stdout)["running"]
    first.process.send_signal(signal.SIGINT)
    assert first.wait_gone() == 130
    assert not json.loads(world.command("clinic-a", "status", "--json").stdout)["running"]
