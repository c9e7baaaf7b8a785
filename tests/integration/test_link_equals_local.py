"""The same federation over the link and on the local grid gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fedge
from fedge.artifacts.bundle import Bundle
from fedge.engines import find_training_python
from fedge.types import ClientData

ROUNDS = 3


@pytest.mark.parametrize("engine", ["ort", "ort-training"])
@pytest.mark.parametrize("personal", [None, ["head.*"]])
def test_fedavg_over_the_link_equals_the_local_grid(
    world: Any,
    make_bundle: Callable[..., Bundle],
    hospitals: dict[str, ClientData],
    data_flags: Callable[[str], list[str]],
    engine: str,
    personal: list[str] | None,
) -> None:
    if engine == "ort-training" and find_training_python() is None:
        pytest.skip("no interpreter with onnxruntime-training here")
    bundle = make_bundle("mlp", personal=personal)
    federation = fedge.Federation(bundle, list(hospitals.values()), seed=5, engine=engine)
    local = federation.run(ROUNDS)

    server = world.serve(str(bundle.path), "--rounds", str(ROUNDS), "--seed", "5")
    joined = [world.join(server, n, *data_flags(n), "--engine", engine) for n in hospitals]
    server.wait_for("finished")
    for client in joined:
        client.wait_for(f"model of round {ROUNDS} is here")
        params = client.newest_params()
        assert list(params) == list(bundle.manifest.shared)
        for name, values in params.items():
            np.testing.assert_array_equal(values, local.params[name])
        for name, values in (client.personal_params() if personal else {}).items():
            np.testing.assert_array_equal(values, local.personal[client.name][name])

    reported = [e for e in server.events if e["event"] == "round"]
    for row in local.table.to_dict("records"):
        (told,) = [
            c for c in reported[row["round"] - 1]["clients"] if c["client_id"] == row["client_id"]
        ]
        for name in ("train_loss", "loss", "accuracy", "auc"):
            assert told[name] == row[name]
