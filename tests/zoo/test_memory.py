"""What training takes: predicted, measured in processes of their own, and kept within a limit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import memory
from zoo import ZOO

import fedge
from fedge import tensors
from fedge.artifacts.bundle import Bundle
from fedge.artifacts.estimate import AS_USUAL, MB, Frugal, estimate
from fedge.engines import open_in_process
from fedge.params import relative_distance
from fedge.pipe import Child
from fedge.types import Examples
from fedge_client import config as settings
from fedge_client.config import DataConfig
from fedge_client.workers import MODULE

MODELS = ("mlp-1.1m", "lenet", "ecg", "lstm", "gpt")
BATCH = 32


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Bundles with both forms of their steps."""
    folder = tmp_path_factory.mktemp("bundles")
    return lambda name: memory.bundle_of(name, folder)


@pytest.mark.parametrize("name", MODELS)
def test_the_predicted_peak_is_within_a_fifth(built: Callable[[str], Bundle], name: str) -> None:
    bundle = built(name)
    said = estimate(bundle.manifest, BATCH)
    found = memory.measured(bundle, name, BATCH, AS_USUAL)
    assert said.peak_bytes == pytest.approx(found["peak"], rel=0.2)


def test_recomputation_takes_less_memory_for_the_same_training(
    built: Callable[[str], Bundle],
) -> None:
    bundle, again, model = built("deep"), Frugal(recompute=True), memory.MODELS["deep"]
    plain, lean = (memory.measured(bundle, "deep", 4096, f)["peak"] for f in (AS_USUAL, again))
    base = estimate(bundle.manifest, 1).peak_bytes
    assert lean - base < 0.6 * (plain - base)
    assert estimate(bundle.manifest, 4096, again).peak_bytes == pytest.approx(lean, rel=0.2)
    data = Examples(model.inputs(16), model.targets(16))
    ways = (AS_USUAL, again, Frugal(pieces=4), Frugal(recompute=True, pieces=3))
    results = []
    for frugal in ways:
        engine = open_in_process(bundle, "ort", frugal=frugal)
        engine.train(data, fedge.TrainConfig(lr=1e-3, batch_size=8, epochs=1), 0)
        results.append(engine.get_params())
    for other in results[1:]:
        assert max(relative_distance(other, results[0]).values()) < 1e-4


@pytest.fixture
def lenet_job(built: Callable[[str], Bundle], tmp_path: Path) -> dict[str, Any]:
    bundle, model = built("lenet"), ZOO["lenet"]
    np.savez(tmp_path / "rows.npz", **model.inputs(256), y=model.targets(256))
    initial = bundle.initial_params()
    shared = tmp_path / "shared"
    shared.write_bytes(tensors.dump({n: initial[n] for n in bundle.manifest.shared}))
    data = DataConfig(str(tmp_path / "rows.npz"), "y")
    return {
        **{"bundle": str(bundle.path), "digest": bundle.digest, "engine": "ort", "threads": 1},
        **{"client_id": "pi", "data": json.loads(json.dumps(settings.as_json(data)))},
        **{"personal": str(tmp_path / "personal"), "params": str(shared), "round_num": 1},
        **{"config": {"batch_size": 32}, "mode": "federated", "out": str(tmp_path)},
    }


def test_lenet_trains_in_a_worker_limited_to_256_mb(lenet_job: dict[str, Any]) -> None:
    with Child(MODULE, args=("--memory-bytes", str(256 * MB))) as child:
        answer, _ = child.call("train", lenet_job, timeout_s=120)
        assert answer["metrics"]["train_loss"] > 0
        child.call("evaluate", lenet_job, timeout_s=120)
        status = Path(f"/proc/{child.pid}/status").read_text()
    mapped = next(line for line in status.splitlines() if line.startswith("VmPeak"))
    assert int(mapped.split()[1]) * 1024 <= 256 * MB


def test_a_worker_at_its_limit_says_so(lenet_job: dict[str, Any]) -> None:
    with Child(MODULE, args=("--memory-bytes", str(200 * MB))) as child:
        job = {**lenet_job, "config": {"batch_size": 256}}
        child.call("describe", job, timeout_s=120)
        rows = Path(lenet_job["out"], "rows.npz")
        model = ZOO["lenet"]
        np.savez(rows, **model.inputs(4096), y=model.targets(4096))
        with pytest.raises(fedge.errors.EngineError, match=r"out of memory|died"):
            child.call("train", {**job, "config": {"batch_size": 4096}}, timeout_s=120)
