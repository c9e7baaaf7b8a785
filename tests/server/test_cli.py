"""The command line as a user meets it."""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedge.artifacts.bundle import Bundle
from fedge.wire.token import Token
from fedge_server import cli, example


def commands(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, Any]]:
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield name.strip(), parser
    for group in groups:
        for sub, made in group.choices.items():
            yield from commands(made, f"{name} {sub}")


COMMANDS = dict(commands(cli.parser()))


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(argv)
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    path = str(tmp_path / "state")
    assert run(capsys, "init", "--state", path)[0] == 0
    return path


def test_every_command_there_is() -> None:
    wanted = {"start", "init", "build", "export", "status", "demo", "estimate"}
    wanted |= {"token create", "token ls", "token rm", "nodes ls", "nodes revoke"}
    assert set(COMMANDS) == wanted


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_has_an_example_that_parses(name: str) -> None:
    parser = COMMANDS[name]
    text = parser.format_help()
    example_line = re.search(r"example: fedge-server (.+)", text)
    assert example_line, text
    assert cli.parser().parse_args(example_line[1].split()).func
    for action in parser._actions:
        assert action.help, f"{name} {action.dest} has no help"


def test_init_is_private_and_harmless_twice(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name: p.read_bytes() for p in (Path(folder) / "keys").iterdir()}
    code, out, _ = run(capsys, "init", "--state", folder, "--json")
    assert code == 0
    assert json.loads(out)["state"] == folder
    after = {p.name: p.read_bytes() for p in (Path(folder) / "keys").iterdir()}
    assert before == after
    assert set(before) == {"ca.crt", "ca.key", "server.crt", "server.key", "signing.key"}
    for path in (Path(folder) / "keys").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    assert Path(folder).stat().st_mode & 0o077 == 0


def test_state_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDGE_STATE", str(tmp_path / "elsewhere"))
    assert run(capsys, "init")[0] == 0
    assert (tmp_path / "elsewhere" / "fedge.db").is_file()


def test_token_carries_everything(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("token", "create", "--uses", "4", "--ttl", "7d", "--tag", "x", "--state", folder)
    code, out, _ = run(capsys, *argv, "--json")
    made = json.loads(out)
    token = Token.decode(made["token"])
    assert code == 0
    assert (made["address"], token.token_id) == (token.address, made["id"])
    assert made["join"] == f"fedge-client join {token.address} --token {made['token']}"
    (listed,) = json.loads(run(capsys, "token", "ls", "--json", "--state", folder)[1])
    assert (listed["id"], listed["uses_left"], listed["state"]) == (made["id"], 4, "living")
    assert token.secret not in (Path(folder) / "fedge.db").read_bytes().decode("latin1")
    assert run(capsys, "token", "rm", made["id"], "--state", folder)[0] == 0
    assert json.loads(run(capsys, "token", "ls", "--json", "--state", folder)[1]) == []


def test_start_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx").write_bytes(example.model())
    where = ("--state", str(tmp_path / "s"))
    code, _, err = run(capsys, "start", str(tmp_path / "model.onnx"), "--port", "0", *where)
    assert code == 2
    assert "--loss (one of bce_with_logits, cox, cross_entropy, " in err
    assert "--lr" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "code", "wanted"),
    [
        (["status"], 10, "fedge-server init"),
        (["nodes", "ls"], 10, "holds no federation"),
        (["export", "m.onnx"], 10, "holds no federation"),
        (["start", "--loss", "hinge"], 2, "choose one of bce_with_logits"),
        (["start", "no.onnx", "--loss=mse", "--lr=1", "--port=0"], 2, "no.onnx does not exist"),
        (["start", "--config", "nothing.toml"], 2, "cannot read settings"),
    ],
)
def test_errors_are_one_line_with_their_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, wanted: str
) -> None:
    found, out, err = run(capsys, *argv, "--state", str(tmp_path / "state"))
    assert (found, out) == (code, "")
    assert err.startswith("fedge-server: ")
    assert wanted in err
    assert err.count("\n") == 1


def test_unknown_devices_and_tokens(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (("nodes", "revoke", "ghost"), ("token", "rm", "ghost")):
        code, _, err = run(capsys, *argv, "--state", folder)
        assert code == 2
        assert "ghost" in err
    with pytest.raises(SystemExit):
        cli.main(["token", "create", "--ttl", "soon", "--state", folder])


def test_build_keeps_the_bundle_and_writes_a_copy(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.onnx").write_bytes(example.model())
    argv = ["build", str(tmp_path / "my.onnx"), "--loss", "bce_with_logits", "--lr", "0.1"]
    out = str(tmp_path / "copy")
    code, text, _ = run(capsys, *argv, "--out", out, "--json", "--state", folder)
    made = json.loads(text)
    assert (code, made["name"], made["engines"]["ort"]) == (0, "my", "ready")
    assert Bundle.open(out).digest == made["digest"]
    status = json.loads(run(capsys, "status", "--json", "--state", folder)[1])
    assert (status["bundle"], status["run"], status["running"]) == (made["digest"], None, False)
    code, _, err = run(capsys, "export", str(tmp_path / "m.onnx"), "--state", folder)
    assert code == 10
    assert "no round was committed" in err


def test_a_foreign_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    code, _, err = run(capsys, "init", "--state", str(tmp_path))
    assert code == 10
    assert "thesis.txt" in err


def test_keys_others_can_read_are_refused(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(folder) / "keys" / "ca.key").chmod(0o644)
    code, _, err = run(capsys, "status", "--state", folder)
    assert code == 10
    assert "chmod 600" in err


def test_two_servers_cannot_share_a_state_folder(folder: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedge_server", "start", "--host", "127.0.0.1", "--port", "0"]
    command += ["--json", "--state", folder]
    first = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert first.stdout is not None
    try:
        assert json.loads(first.stdout.readline())["event"] == "ready"
        model = json.loads(first.stdout.readline())
        told = model["event"], model["name"], len(model["bundle"])
        assert told == ("model", "breast-cancer", 64)
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert second.returncode == 10
        assert "already running" in second.stderr
    finally:
        first.terminate()
        assert first.wait(20) == 0
        first.stdout.close()


def test_a_taken_port_is_found_before_anything_is_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "state"
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        argv = ["start", "--host", "127.0.0.1", "--port", port, "--state", str(folder)]
        assert cli.main(argv) == 6
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"fedge-server: cannot listen on 127.0.0.1 port {port}: ")
    assert err.count("\n") == 1
    assert not folder.exists()


def test_flags_are_not_guessed_from_their_beginnings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["start", "--min", "3"])
    assert "unrecognized arguments: --min" in capsys.readouterr().err


def test_help_names_values_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("start", "build"):
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert not re.search(r"[A-Z]+\.[A-Z]", capsys.readouterr().out)
