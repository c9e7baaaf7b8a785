"""benchmarks/heart.py against FLamby's published row and against a federation in plain numpy."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from fedge.data import combine, heart_disease, moments, site_stats
from fedge.engines.batches import batch_indices
from fedge.seeds import derive_seed
from fedge.types import Array, ClientData, Examples, Params

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "heart.py"
pytestmark = pytest.mark.usefixtures("fedge_data")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def heart() -> ModuleType:
    return _load(BENCHMARK)


def _scaled(rows: Examples, mean: Array, std: Array) -> Array:
    return np.asarray((rows.inputs["x"] - mean) / (std + 1e-9))


def _local_sgd(heart: ModuleType, x: Array, y: Array, start: Array, seed: int) -> Array:
    """Logistic regression by hand; ``start`` is the weight with the bias last."""
    import fedge

    config = fedge.TrainConfig(lr=heart.LR, batch_size=heart.BATCH_SIZE, steps=heart.STEPS)
    ones = np.column_stack([x, np.ones(len(x))])
    w = start.copy()
    for rows in batch_indices(len(y), config, seed):
        residual = 1 / (1 + np.exp(-ones[rows] @ w)) - y[rows]
        w -= heart.LR * residual @ ones[rows] / len(rows)
    return w


def _reference_params(heart: ModuleType, seed: int) -> Array:
    torch.manual_seed(seed)
    model = torch.nn.Linear(13, 1)
    w = torch.cat([model.weight[0], model.bias]).detach().double().numpy()
    clients = heart_disease()
    scaled = {c.client_id: _scaled(c.train, *site_stats(c.train).values()) for c in clients}
    total = sum(len(c.train) for c in clients)
    for round_num in range(1, heart.ROUNDS + 1):
        after = np.zeros_like(w)
        for c in clients:
            order = derive_seed(seed, round_num, c.client_id, "batches")
            local = _local_sgd(heart, scaled[c.client_id], c.train.labels, w, order)
            after += len(c.train) / total * local
        w = after
    return w


def _reference_row(heart: ModuleType, seed: int) -> dict[str, float]:
    w = _reference_params(heart, seed)
    clients = heart_disease()

    def correct(client: ClientData, mean: Array, std: Array) -> Array:
        assert client.test is not None
        scores = _scaled(client.test, mean, std) @ w[:-1] + w[-1]
        return np.asarray((scores > 0) == client.test.labels)

    sites = {c.client_id: correct(c, *site_stats(c.train).values()).mean() for c in clients}
    scale = combine(moments(c.train) for c in clients).standardize()
    pooled = np.concatenate([correct(c, *scale) for c in clients]).mean()
    return {**sites, "pooled": pooled, "mean": np.mean(list(sites.values()))}


def test_the_protocol_gives_the_published_row(heart: ModuleType) -> None:
    rows = [_reference_row(heart, seed) for seed in heart.SEEDS]
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    assert mean == pytest.approx(heart.published(heart.SEEDS), abs=heart.TOLERANCE)


def test_the_published_row_is_as_published(heart: ModuleType, fedge_data: Path) -> None:
    tests = [*(f"client_test_{i}" for i in range(4)), "Pooled Test"]
    for seed, row in heart.PUBLISHED.items():
        path = fedge_data / "published_results" / f"flamby_heart_seed{seed}.csv"
        lines = csv.DictReader(path.read_text().splitlines())
        found = {r["Test"]: float(r["Metric"]) for r in lines if r["Method"] == "FedAvg100"}
        assert row == pytest.approx([found[test] for test in tests], abs=5e-5)


@pytest.mark.parametrize("engine", ["ort", "ort-training"])
def test_one_seed_of_the_federation_equals_plain_numpy(
    heart: ModuleType, tmp_path: Path, engine: str
) -> None:
    if engine == "ort-training":
        from fedge.engines import find_training_python

        if find_training_python() is None:
            pytest.skip("no interpreter with onnxruntime-training here")
    seed = heart.SEEDS[0]
    bundle = heart.build(tmp_path / "bundle", seed, heart.SiteStandardize())
    params: Params = heart.fedavg(bundle, heart_disease(), seed, engine)
    want = _reference_params(heart, seed)
    got = np.append(params["weight"].ravel(), params["bias"])
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-5


def test_the_link_gives_the_local_grids_params(
    heart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = _load(BENCHMARK.parent / "heart_link.py")
    monkeypatch.setattr(heart, "ROUNDS", 2)
    bundle = heart.build(tmp_path / "bundle", 42, heart.SiteStandardize())
    clients = heart_disease()
    local = heart.fedavg(bundle, clients, 42, "ort")
    assert link.largest_gap(link.over_link(bundle, clients, 2, 42, "ort"), local) <= 1e-6


def test_resampled_auc_counts_each_patient_as_often_as_drawn(heart: ModuleType) -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 30), rng.normal(size=30).round(1)
    weights = rng.integers(0, 3, (5, 30))
    table = heart.Scores()
    table.add([(scores, labels)], np.arange(30))
    for got, times in zip(table.resampled_auc(weights), weights, strict=True):
        want = heart.metrics.auc(np.repeat(scores, times), np.repeat(labels, times))
        assert got == pytest.approx(want)


def test_the_short_form_ends_in_json_rows(fedge_data: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--short", "--engine", "ort"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "FEDGE_DATA": str(fedge_data)},
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()[-2:]]
    assert [row["name"] for row in rows] == ["fedavg pooled ort", "fedavg mean ort"]
    for row in rows:
        assert row["ours"] == pytest.approx(row["peer"], abs=0.005)
    assert "site scale" in done.stdout
