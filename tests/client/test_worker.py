"""The numeric jobs, in a real worker process as the client starts it."""

from __future__ import annotations

import asyncio
import csv
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from fedge import local, tensors
from fedge.artifacts.bundle import Bundle
from fedge.data.scaling import moments
from fedge.engines import open_in_process
from fedge.errors import ArtifactError, DataError, PolicyError, WorkerDiedError
from fedge.pipe import Child
from fedge.update import Update
from fedge_client import config as settings
from fedge_client import jobs, sources
from fedge_client.config import DataConfig, EngineConfig
from fedge_client.workers import MODULE, Workers


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """One worker for all tests: jobs must not disturb each other."""
    with Child(MODULE) as worker:
        yield worker


@pytest.fixture
def job(bundle: Callable[..., Bundle], rows: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A job's header on a bundle and the rows."""

    def make(made: Bundle | None = None, **more: Any) -> dict[str, Any]:
        made = made or bundle()
        initial = made.initial_params()
        shared = tmp_path / f"shared-{made.digest[:8]}"
        shared.write_bytes(tensors.dump({n: initial[n] for n in made.manifest.shared}))
        source = DataConfig(str(rows), "sick", split="part")
        return {
            "bundle": str(made.path),
            "digest": made.digest,
            "engine": "ort",
            "threads": 1,
            "client_id": "clinic-a",
            "data": json.loads(json.dumps(settings.as_json(source))),
            "personal": str(tmp_path / "personal.safetensors"),
            "params": str(shared),
            "round_num": 2,
            "config": {"seed": "7", "lr": 0.25, "epochs": 3},
            "mode": "federated",
            "out": str(tmp_path),
            **more,
        }

    return make


def test_describe(child: Child, job: Callable[..., dict[str, Any]]) -> None:
    assert child.call("describe", job())[0] == {"train": 30, "test": 10}


@pytest.mark.parametrize("personal", [None, ["b"]])
def test_train_writes_what_local_training_gives(
    child: Child,
    bundle: Callable[..., Bundle],
    job: Callable[..., dict[str, Any]],
    rows: Path,
    tmp_path: Path,
    personal: list[str] | None,
) -> None:
    made = bundle(personal=personal)
    answer, _ = child.call("train", job(made))
    update = Update.from_bytes((tmp_path / "update.fedge").read_bytes())

    engine = open_in_process(made, "ort")
    data = sources.load(DataConfig(str(rows), "sick", split="part"), made.manifest)
    site = local.prepare(engine, made.manifest, local.ClientData("clinic-a", data.train, data.test))
    initial = made.initial_params()
    task = local.TrainTask(2, made.manifest.train.replace(lr=0.25, epochs=3), 7)
    shared = {n: initial[n] for n in made.manifest.shared}
    wanted, kept = local.train(engine, made.manifest, initial, site, shared, task)
    assert set(update.delta) == set(made.manifest.shared)
    for name, values in wanted.delta.items():
        np.testing.assert_array_equal(update.delta[name], values)
    assert (update.client_id, update.round_num, update.num_examples) == ("clinic-a", 2, 30)
    assert answer["num_examples"] == 30
    written = tmp_path / "personal.safetensors"
    assert written.exists() == bool(personal)
    if personal:
        np.testing.assert_array_equal(tensors.load(written.read_bytes())[0]["b"], kept["b"])


def test_personal_mode_encodes_no_update(
    child: Child, job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(PolicyError, match="personal mode"):
        child.call("train", job(mode="personal"))
    assert not (tmp_path / "update.fedge").exists()


def test_a_tensor_that_is_not_shared_is_never_encoded(bundle: Callable[..., Bundle]) -> None:
    manifest = bundle(personal=["b"]).manifest
    update = Update("clinic-a", 1, {"w": np.zeros(1), "b": np.zeros(1)}, 1)
    with pytest.raises(PolicyError, match="b may not leave"):
        jobs.encode_update(update, manifest, "federated")


def test_evaluate_and_statistics(
    child: Child, bundle: Callable[..., Bundle], job: Callable[..., dict[str, Any]], rows: Path
) -> None:
    answer, _ = child.call("evaluate", job())
    assert answer["num_examples"] == 10
    assert set(answer["metrics"]) == {"loss", "accuracy", "auc"}
    answer, blobs = child.call("statistics", job())
    data = sources.load(DataConfig(str(rows), "sick", split="part"), bundle().manifest)
    told, _ = tensors.load(blobs[0])
    np.testing.assert_array_equal(told["sum"], moments(data.train).sum)
    np.testing.assert_array_equal(told["sumsq"], moments(data.train).sumsq)
    assert answer["num_examples"] == 30


def test_statistics_of_a_few_rows_are_refused(
    child: Child, job: Callable[..., dict[str, Any]], rows: Path
) -> None:
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join(lines[:9]) + "\n")
    with pytest.raises(DataError, match="statistics are sent for 10 or more"):
        child.call("statistics", job())


def test_personalize_reports_three_models_and_the_majority(
    child: Child, bundle: Callable[..., Bundle], job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "model.safetensors"
    answer, _ = child.call("personalize", job(out=str(out)))
    assert answer["rows"] == {"train": 30, "test": 10}
    assert set(answer["metrics"]) == {"local_only", "global", "personal", "majority"}
    of_global = answer["metrics"]["global"]
    assert of_global["accuracy_low"] < of_global["accuracy"] <= of_global["accuracy_high"]
    assert of_global["auc_low"] < of_global["auc_high"]
    kept = tensors.load(out.read_bytes())[0]
    assert list(kept) == [p.name for p in bundle().manifest.params]
    assert answer["metrics"]["personal"] != of_global


@pytest.mark.parametrize("loss", ["bce_with_logits", "cross_entropy", "mse"])
def test_export_and_predict_agree(
    child: Child,
    bundle: Callable[..., Bundle],
    job: Callable[..., dict[str, Any]],
    rows: Path,
    tmp_path: Path,
    loss: str,
) -> None:
    made = bundle(loss, preprocessing="site")
    header = job(made, out=str(tmp_path / "model.onnx"))
    child.call("export", header)
    scores = tmp_path / "scores.csv"
    child.call("predict", {**header, "source": header["data"], "out": str(scores)})
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    raw = sources.load_inputs(DataConfig(str(rows), "sick", split="part"), made.manifest)
    outputs = dict(
        zip([o.name for o in session.get_outputs()], session.run(None, raw), strict=True)
    )
    wanted = {"bce_with_logits": "probability", "cross_entropy": "probabilities", "mse": "y"}[loss]
    with scores.open(newline="") as handle:
        said = np.array(
            [[float(v) for k, v in r.items() if k != "row"] for r in csv.DictReader(handle)]
        )
    np.testing.assert_allclose(said, outputs[wanted], rtol=2e-5)


def test_params_that_do_not_fit_are_refused(
    child: Child, job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "odd").write_bytes(tensors.dump({"w": np.zeros(3, np.float32)}))
    with pytest.raises(ArtifactError, match="wanted w, b"):
        child.call("train", job(params=str(tmp_path / "odd")))
    with pytest.raises(ArtifactError, match="cannot read params"):
        child.call("evaluate", job(params=str(tmp_path / "none")))


def test_a_changed_file_is_read_again(
    child: Child, job: Callable[..., dict[str, Any]], rows: Path
) -> None:
    assert child.call("evaluate", job())[0]["num_examples"] == 10
    rows.write_text(rows.read_text() + "1,2,3,1,test\n")
    assert child.call("evaluate", job())[0]["num_examples"] == 11


def test_probabilities_do_not_overflow(bundle: Callable[..., Bundle]) -> None:
    for loss in ("bce_with_logits", "cross_entropy"):
        huge = np.array([[1e4, -1e4, 0.0]], np.float32)
        found = jobs.probabilities(bundle(loss).manifest, huge)
        assert np.isfinite(found).all()


# the resident's side


def test_workers_start_when_needed_and_close_when_idle(
    job: Callable[..., dict[str, Any]],
) -> None:
    async def scenario() -> None:
        workers = Workers(EngineConfig("ort", worker_idle_s=0.1))
        assert workers.pid is None
        answer, _ = await workers.call("describe", job())
        assert answer["train"] == 30
        first = workers.pid
        assert first is not None
        await asyncio.sleep(0.5)
        assert workers.pid is None
        await workers.call("describe", job())
        assert workers.pid not in (None, first)
        await workers.close()
        assert workers.pid is None

    asyncio.run(scenario())


def test_an_aborted_job_is_an_error_and_the_next_one_works(
    job: Callable[..., dict[str, Any]],
) -> None:
    async def scenario() -> None:
        workers = Workers(EngineConfig("ort"))
        await workers.call("describe", job())
        endless = {"seed": "0", "epochs": 10_000_000}
        running = asyncio.create_task(workers.call("train", job(config=endless)))
        await asyncio.sleep(0.5)
        began = time.monotonic()
        workers.abort()
        with pytest.raises(WorkerDiedError, match="SIGKILL"):
            await running
        assert time.monotonic() - began < 2
        assert (await workers.call("describe", job()))[0]["train"] == 30
        await workers.close()

    asyncio.run(scenario())
