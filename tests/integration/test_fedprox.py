"""FedProx over the link: the server's strategy asks, devices obey, as on the local grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.serverapp.strategy import FedProx

import fedge
from fedge.artifacts.bundle import Bundle
from fedge.types import ClientData

ROUNDS = 2
TOML = """
[strategy]
name = "fedprox"
proximal_mu = 3.0
"""


def test_fedprox_over_the_link_equals_the_local_grid(
    world: Any,
    make_bundle: Callable[..., Bundle],
    hospitals: dict[str, ClientData],
    data_flags: Callable[[str], list[str]],
) -> None:
    bundle = make_bundle("mlp")
    federation = fedge.Federation(
        bundle, list(hospitals.values()), FedProx(proximal_mu=3.0), seed=5, engine="ort"
    )
    local = federation.run(ROUNDS)
    plain = fedge.Federation(bundle, list(hospitals.values()), seed=5, engine="ort").run(ROUNDS)
    initial = bundle.initial_params()
    moved = [
        sum(float(np.sum((run.params[n] - initial[n]) ** 2)) for n in initial)
        for run in (local, plain)
    ]
    assert moved[0] < moved[1]

    settings = world.root / "federation.toml"
    settings.write_text(TOML)
    flags = ["--config", str(settings), "--rounds", str(ROUNDS), "--seed", "5"]
    server = world.serve(str(bundle.path), *flags)
    joined = [world.join(server, n, *data_flags(n), "--engine", "ort") for n in hospitals]
    server.wait_for("finished")
    for client in joined:
        client.wait_for(f"model of round {ROUNDS} is here")
        for name, values in client.newest_params().items():
            np.testing.assert_array_equal(values, local.params[name])
