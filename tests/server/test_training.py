"""Which run is due, and folding a federated scale into a bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from fedge.artifacts.bundle import Bundle
from fedge.artifacts.manifest import PREPROCESS
from fedge.errors import ConfigError
from fedge_server import config
from fedge_server import state as states
from fedge_server.store import ModelRow
from fedge_server.training import RunPlan, fold_scaling, plan_run


def settings(**flags: Any) -> config.Settings:
    return config.load(None, {k.replace("__", "."): v for k, v in flags.items()}, {})


def test_first_run_is_planned_once_and_found_again(state: Any) -> None:
    wanted = settings(run__rounds=3, strategy__name="fedadam", model__scaling="global")
    plan = plan_run(state, wanted)
    assert plan == RunPlan.from_row(state.store.runs()[0])
    assert (plan.run_id, plan.run.rounds, plan.scaling) == ("run-1", 3, "global")
    assert plan_run(state, settings(run__rounds=99)) == plan  # it goes on as it was


def test_a_finished_run_rests_until_asked_again(state: Any) -> None:
    first = plan_run(state, settings())
    state.store.append_event("run-1", {}, ModelRow("run-1", 1, first.bundle, "digest"))
    state.store.set_run_status("run-1", "finished")
    assert plan_run(state, settings(run__rounds=5)) is None
    second = plan_run(state, settings(run__rounds=5), again=True)
    assert (second.run_id, second.params, second.run.rounds) == ("run-2", "digest", 5)


def test_nothing_to_train_is_said(tmp_path: Path) -> None:
    states.create(tmp_path / "empty")
    with states.opened(tmp_path / "empty") as empty, pytest.raises(ConfigError, match="no bundle"):
        plan_run(empty, settings())


def test_folded_bundle_standardises_and_is_signed_by_the_federation(
    state: Any, bundle: Bundle
) -> None:
    mean, std = np.arange(30, dtype=np.float32), np.linspace(1, 4, 30, dtype=np.float32)
    made = fold_scaling(bundle, mean, std, state.keys.signing_key)
    kept = state.registry.add(made, time.time())
    assert state.registry.newest() == kept.digest
    opened = Bundle.open(kept.path, signer=state.fleet.signer_public_key.hex())
    assert opened.manifest.scaling == "global"
    x = np.random.default_rng(0).standard_normal((5, 30)).astype(np.float32)
    session = onnxruntime.InferenceSession(opened.read(PREPROCESS))
    (scaled,) = session.run(None, {"x": x})
    np.testing.assert_allclose(scaled, (x - mean) / std, rtol=1e-6)
    assert opened.manifest.files["step.onnx"] == bundle.manifest.files["step.onnx"]
