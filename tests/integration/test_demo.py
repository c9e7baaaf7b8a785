"""``fedge-server demo`` as a newcomer runs it, and as an impatient one stops it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnxruntime
import psutil
import pytest

from fedge.engines import find_training_python

HOSPITALS = ["east", "north", "south", "west"]


def _command(out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "fedge_server", "demo", "--out", str(out), *options]


def _mentioning(folder: Path) -> list[psutil.Process]:
    """Every process whose command line names the folder."""
    return [
        p
        for p in psutil.process_iter(["cmdline"])
        if any(str(folder) in word for word in p.info["cmdline"] or [])
    ]


def test_demo_reports_every_hospital_and_leaves_models(tmp_path: Path) -> None:
    out, home = tmp_path / "demo", tmp_path / "home"
    home.mkdir()
    env = {**os.environ, "HOME": str(home)}
    done = subprocess.run(
        _command(out, "--json"), env=env, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [h["hospital"] for h in report["hospitals"]] == HOSPITALS
    assert [r["round"] for r in report["rounds"]] == list(range(1, 11))
    engines = [h["engine"] for h in report["hospitals"]]
    both = ["ort-training"] * 2 + ["ort"] * 2
    assert engines == (both if find_training_python() else ["ort"] * 4)
    for hospital in report["hospitals"]:
        assert hospital["bytes_sent"] > 0
        for model in ("local_only", "global", "personal"):
            scores = hospital[model]
            assert scores["accuracy_low"] <= scores["accuracy"] <= scores["accuracy_high"]
            assert scores["auc_low"] <= scores["auc"] <= scores["auc_high"]
            assert scores["accuracy"] > hospital["majority"]["accuracy"]
        exported = out / hospital["hospital"] / "personal.onnx"
        onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    onnxruntime.InferenceSession(out / "global.onnx", providers=["CPUExecutionProvider"])
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert list(home.iterdir()) == []
    assert _mentioning(out) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_running_when_it_is_stopped(tmp_path: Path, number: int) -> None:
    out = tmp_path / "demo"
    before = signal.signal(number, signal.SIG_IGN)  # as a background job of a script starts
    try:
        process = subprocess.Popen(
            _command(out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    finally:
        signal.signal(number, before)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(b"round  2"):
            break
    assert len(_mentioning(out)) >= 6  # the demo, the server, four clients
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert b"Traceback" not in stderr
    deadline = time.monotonic() + 5
    while _mentioning(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _mentioning(out) == []


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = subprocess.run(_command(tmp_path), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "holds other files; give an empty folder with --out" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
