from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Message

from fedge.data import moments
from fedge.errors import DataError
from fedge.flower import collect_statistics
from fedge.simulation.grid import LocalGrid
from fedge.testing import LogisticEngine, logistic_clients, logistic_manifest, logistic_params
from fedge.types import ClientData

MANIFEST = logistic_manifest()
INITIAL = logistic_params(MANIFEST)


def grid(clients: list[ClientData]) -> LocalGrid:
    return LocalGrid(MANIFEST, INITIAL, clients, lambda: LogisticEngine(MANIFEST, INITIAL))


def test_sums_of_all_sites_give_the_pooled_mean_and_spread() -> None:
    clients = logistic_clients(3)
    with grid(clients) as fleet:
        mean, std = collect_statistics(fleet, "run").standardize()
    rows = np.concatenate([c.train.inputs["x"] for c in clients])
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(std, rows.std(0, ddof=1), rtol=1e-5)


def test_small_sites_refuse_by_themselves_and_are_left_out() -> None:
    clients = logistic_clients(3)
    small = replace(clients[0], train=clients[0].train.take(slice(0, 9)))
    with grid([small, *clients[1:]]) as fleet:
        got = collect_statistics(fleet, "run", min_rows=1)
    assert got.count == sum(len(c.train) for c in clients[1:])
    np.testing.assert_array_equal(got.sum, sum(moments(c.train).sum for c in clients[1:]))


def test_a_common_scale_of_nobody_is_an_error() -> None:
    client = logistic_clients(1)[0]
    with grid([client]) as fleet, pytest.raises(DataError, match="no site has 1000 rows"):
        collect_statistics(fleet, "run", min_rows=1000)


class Spying(LocalGrid):
    def pull_messages(self, message_ids: list[str]) -> list[Message]:  # type: ignore[override]
        self.seen = list(super().pull_messages(message_ids))
        return self.seen


def test_nothing_but_counts_and_sums_is_told() -> None:
    fleet = Spying(
        MANIFEST, INITIAL, logistic_clients(2), lambda: LogisticEngine(MANIFEST, INITIAL)
    )
    with fleet:
        collect_statistics(fleet, "run")
    for message in fleet.seen:
        assert {n: a.shape for n, a in message.content["arrays"].items()} == {
            "sum": (4,),
            "sumsq": (4,),
        }
        assert set(message.content["metrics"]) == {"num-examples"}
