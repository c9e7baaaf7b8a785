"""The command line: help, mistakes, exit codes. Commands that need a server: tests/integration."""

from __future__ import annotations

import datetime
import io
import json
import os
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedge import errors
from fedge.wire.token import Token, new_secret
from fedge_client import commands
from fedge_client.cli import EXIT_CODES, main

COMMANDS = ("join", "run", "status", "personalize", "export", "predict", "engines")


@pytest.fixture
def token() -> str:
    """A well-formed token of a federation that does not exist."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")])
    start = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name)
    builder = builder.public_key(key.public_key()).serial_number(1)
    cert = (
        builder.not_valid_before(start)
        .not_valid_after(start.replace(year=2120))
        .sign(key, hashes.SHA256())
    )
    der = cert.public_bytes(serialization.Encoding.DER)
    return Token("id", "127.0.0.1", 9, der, new_secret()).encode()


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(list(args))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_the_exit_codes(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"example:\n  fedge-client {command}" in said
    assert EXIT_CODES in said


def test_the_exit_codes_in_the_help_are_those_of_the_errors() -> None:
    codes = {cls.exit_code for cls in errors.BY_NAME.values()}
    listed = {int(word) for word in EXIT_CODES.split() if word.isdigit()}
    assert codes | {0, 130} == listed


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["join", "10.0.0.5:8443"], 2, "give --token"),
        (["join", "fedge1.!!!"], 2, "copy the whole line"),
        (["join", "nowhere", "--token", "{token}"], 2, "wanted HOST:PORT"),
        (["join", "a:99999", "--token", "{token}"], 2, "wanted HOST:PORT"),
        (["join", "{token}", "--data", "{dir}/none.csv"], 2, "--data needs --label"),
        (["join", "{token}", "--label", "y"], 2, "--label needs --data"),
        (["join", "{token}", "--data", "{dir}/none.csv", "--label", "y"], 3, "does not exist"),
        (["join", "{token}", "--name", "bad name"], 2, "--name 'bad name'"),
        (["join", "{token}"], 6, "127.0.0.1:9 does not answer: check address and port"),
        (
            ["join", "{token}", "--data", "{rows}", "--label", "z"],
            3,
            "lacks the column z; it has a, b, y",
        ),
        (["join", "{token}", "--data", "{rows}", "--label", "y", "--split", "s"], 3, "column s;"),
        (["run", "--state", "{dir}/none"], 10, "fedge-client join"),
        (["status", "--state", "{dir}"], 10, "has not joined"),
        (["personalize", "--state", "{dir}"], 10, "has not joined"),
        (["export", "--state", "{dir}", "m.onnx"], 10, "has not joined"),
        (["predict", "--state", "{dir}", "rows.csv"], 10, "has not joined"),
    ],
)
def test_mistakes_are_one_line_and_a_code(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    token: str,
    args: list[str],
    code: int,
    says: str,
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("a,b,y\n1,2,0\n")
    names = {"token": token, "dir": tmp_path, "rows": rows}
    filled = [a.format(**names) for a in args]
    if "--state" not in filled:
        filled += ["--state", str(tmp_path / "state")]
    found, _, err = run(capsys, *filled)
    assert found == code, err
    assert says in err
    assert err.startswith("fedge-client: error: ")
    assert err.count("\n") == 1


def test_the_state_folder_comes_from_the_environment(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGE_STATE", str(tmp_path / "elsewhere"))
    assert str(tmp_path / "elsewhere") in run(capsys, "status")[2]


def test_engines_are_listed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "engines", "--json", "--state", str(tmp_path))
    assert code == 0
    found = json.loads(out)
    assert set(found) == {"configured", "ort", "ort-training"}
    assert os.access(found["ort"], os.X_OK)


def test_installing_without_a_fitting_python_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = ["--state", str(tmp_path), "--python", str(tmp_path / "no-python")]
    code, _, err = run(capsys, "engines", "install", "ort-training", *where)
    assert code == 5
    assert "give --python" in err


def test_the_token_need_not_be_on_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    where = ["127.0.0.1:9", "--state", str(tmp_path / "state")]
    monkeypatch.setattr("sys.stdin", io.StringIO(token + "\n"))
    assert run(capsys, "join", *where, "--token", "-")[0] == 6  # read, and then nobody answered
    monkeypatch.setenv("FEDGE_TOKEN", token)
    assert run(capsys, "join", *where)[0] == 6
    assert "FEDGE_TOKEN" not in os.environ  # the worker does not see it
    assert run(capsys, "join", *where)[0] == 2


@pytest.mark.parametrize(
    ("age_s", "said"),
    [(None, ""), (8, "8 s ago"), (130, "2 min ago"), (9000, "2 h ago"), (200_000, "2 d ago")],
)
def test_the_last_contact_is_told_as_an_age(age_s: float | None, said: str) -> None:
    assert commands._ago(None if age_s is None else time.time() - age_s) == said


def test_flags_are_not_guessed_from_their_beginnings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["join", "10.0.0.5:8443", "--tok", "fedge1.x"])
    assert "unrecognized arguments: --tok" in capsys.readouterr().err
