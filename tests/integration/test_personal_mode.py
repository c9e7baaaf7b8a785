"""Personal mode and clients without data: they get the model and send nothing."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from fedge.artifacts.bundle import Bundle
from fedge.engines import find_training_python
from fedge.types import ClientData

ROUNDS = 2


def test_they_get_the_model_and_send_nothing(
    world: Any,
    make_bundle: Callable[..., Bundle],
    hospitals: dict[str, ClientData],
    data_flags: Callable[[str], list[str]],
) -> None:
    bundle = make_bundle("mlp", preprocessing="site")
    server = world.serve(str(bundle.path), "--rounds", str(ROUNDS), "--min-clients", "2")
    engine = "ort" if find_training_python() is None else "ort-training"
    how = ["--mode", "personal", "--engine", engine]
    own = world.join(server, "own", *how, *data_flags("clinic-a"))
    bare = world.join(server, "bare")
    bare.wait_for("no data source configured")
    own.wait_for("ready")
    clients = [world.join(server, n, *data_flags(n), "--engine", "ort") for n in hospitals]
    server.wait_for("finished")
    for client in (own, bare, *clients):
        client.wait_for(f"model of round {ROUNDS} is here")

    for event in server.events:
        if event["event"] == "round":
            assert {c["client_id"] for c in event["clients"]} == {"clinic-a", "clinic-b"}
    assert "update of" not in own.log.read_text()
    status = json.loads(world.command("own", "status", "--json").stdout)
    assert (status["mode"], status["updates_sent"], status["bytes_sent"]) == ("personal", 0, 0)
    assert status["model_round"] == ROUNDS
    status = json.loads(world.command("bare", "status", "--json").stdout)
    assert "no data source" in status["data"]
    assert status["updates_sent"] == 0
    _personalize_export_predict(world, hospitals["clinic-a"])


def _personalize_export_predict(world: Any, data: ClientData) -> None:
    tuned = world.command("own", "personalize", "--epochs", "5", "--json")
    assert tuned.returncode == 0, tuned.stderr
    report = json.loads(tuned.stdout)
    assert report["rows"] == {"train": 48, "test": 12}
    for name in ("local_only", "global", "personal"):
        scores = report["metrics"][name]
        assert 0 <= scores["accuracy_low"] <= scores["accuracy"] <= scores["accuracy_high"] <= 1
        assert 0 <= scores["auc_low"] <= scores["auc"] <= scores["auc_high"] <= 1
    assert report["metrics"]["majority"].keys() == {"accuracy"}

    assert world.command("own", "export", str(world.root / "own.onnx")).returncode == 0
    assert world.command("own", "export", "--global", str(world.root / "all.onnx")).returncode == 0
    scores = world.root / "scores.csv"
    rows = str(world.root / "clinic-a.csv")
    assert world.command("own", "predict", rows, "--out", str(scores)).returncode == 0
    with scores.open(newline="") as handle:
        said = np.array([float(r["probability"]) for r in csv.DictReader(handle)])
    assert data.test is not None
    x = np.concatenate([data.train.inputs["x"], data.test.inputs["x"]])
    np.testing.assert_allclose(_probability(world.root / "own.onnx", x), said, rtol=1e-5)
    assert not np.allclose(_probability(world.root / "all.onnx", x), said, rtol=1e-3)


def _probability(model: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    return np.asarray(session.run(["probability"], {name: x})[0]).ravel()


def test_commands_before_there_is_a_model(world: Any, tmp_path: Path) -> None:
    said = world.command("nobody", "status")
    assert said.returncode == 10
    assert said.stderr.startswith("fedge-client: error: no client state in")
    assert said.stderr.count("\n") == 1
    (tmp_path / "nobody").mkdir()
    assert "has not joined" in world.command("nobody", "personalize").stderr
