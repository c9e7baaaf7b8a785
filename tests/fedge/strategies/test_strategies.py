from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from hypothesis import given
from hypothesis import strategies as st

from fedge.flower import messages
from fedge.flower.grid import FrozenGrid
from fedge.flower.identity import ensure_identity
from fedge.strategies import FedAvg, StrategyState, state_of
from fedge.types import Params

ensure_identity()


def reply(params: Params, weight: int, loss: float = 1.0) -> Message:
    content = RecordDict(
        {
            "arrays": messages.array_record(params),
            "metrics": MetricRecord({"num-examples": weight, "train_loss": loss}),
        }
    )
    return Message(content, reply_to=Message(RecordDict(), 7, "train"))


def model(seed: int) -> Params:
    rng = np.random.default_rng(seed)
    return {
        "w": rng.standard_normal((3, 2)).astype(np.float32),
        "b": rng.standard_normal(2).astype(np.float32),
        "s": np.asarray(rng.standard_normal(), np.float32),
    }


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(0, 50))
def test_fedavg_agrees_with_flowers(weights: list[int], seed: int) -> None:
    replies = [reply(model(seed + k), w, loss=float(k)) for k, w in enumerate(weights)]
    ours, our_metrics = FedAvg().aggregate_train(1, replies)
    theirs, their_metrics = flower.FedAvg().aggregate_train(1, replies)
    assert ours is not None
    assert theirs is not None
    for name, array in ours.items():
        assert array.numpy().dtype == np.float64
        np.testing.assert_allclose(array.numpy(), theirs[name].numpy(), rtol=2e-6, atol=2e-6)
    assert our_metrics == their_metrics


def test_fedavg_takes_one_reply_at_a_time() -> None:
    """A reply is free to go before the next is made: memory is one model, not the cohort."""
    import weakref

    alive: list[weakref.ref[Message]] = []

    def stream() -> Any:
        for k in range(4):
            assert sum(r() is not None for r in alive) <= 1
            message = reply(model(k), 1)
            alive.append(weakref.ref(message))
            yield message
            del message

    FedAvg().aggregate_train(1, stream())
    assert len(alive) == 4


def test_fedavg_of_nobody_and_of_failures_is_nothing() -> None:
    failed = Message(Error(code=2, reason="no"), reply_to=Message(RecordDict(), 7, "train"))
    assert FedAvg().aggregate_train(1, []) == (None, None)
    assert FedAvg().aggregate_train(1, [failed]) == (None, None)
    arrays, _ = FedAvg().aggregate_train(1, [failed, reply(model(0), 3)])
    assert arrays is not None


def test_fedavg_asks_for_no_nodes_of_its_own() -> None:
    ours = FedAvg()
    assert (ours.min_train_nodes, ours.min_evaluate_nodes, ours.min_available_nodes) == (1, 1, 1)
    assert FedAvg(min_train_nodes=4).min_train_nodes == 4


FACTORIES: dict[str, Callable[[], Any]] = {
    "FedAdam": flower.FedAdam,
    "FedAdagrad": flower.FedAdagrad,
    "FedYogi": flower.FedYogi,
    "FedAvgM": lambda: flower.FedAvgM(server_momentum=0.9, server_learning_rate=0.5),
}


def one_round(strategy: Any, number: int, params: Params) -> Params:
    """What the strategy makes of three replies that differ from round to round."""
    record = messages.array_record(params)
    sent = strategy.configure_train(
        number, record, messages.instruction_config(0), FrozenGrid([1, 2])
    )
    assert len(list(sent)) == 2
    replies = [
        reply({n: v + model(10 * number + k)[n] for n, v in params.items()}, k + 1)
        for k in range(3)
    ]
    arrays, _ = strategy.aggregate_train(number, replies)
    return messages.params_of(arrays)


@pytest.mark.parametrize("name", FACTORIES)
def test_state_survives_as_bytes_bit_for_bit(name: str) -> None:
    params, ours, theirs = model(0), FACTORIES[name](), FACTORIES[name]()
    keeper = state_of(ours)
    assert keeper is not None
    assert keeper.dump(ours) == b""
    for number in (1, 2, 3):
        expected = one_round(ours, number, params)
        got = one_round(theirs, number, params)
        assert all(expected[n].tobytes() == got[n].tobytes() for n in expected)
        theirs = FACTORIES[name]()
        keeper.restore(theirs, keeper.dump(ours))
        assert keeper.dump(theirs) == keeper.dump(ours)
        params = {n: v.astype(np.float32) for n, v in expected.items()}


@pytest.mark.parametrize("name", FACTORIES)
def test_a_strategy_can_be_made_like_new(name: str) -> None:
    strategy, fresh = FACTORIES[name](), FACTORIES[name]()
    keeper = state_of(strategy)
    assert keeper is not None
    one_round(strategy, 1, model(0))
    assert keeper.dump(strategy)
    keeper.reset(strategy)
    expected, got = one_round(fresh, 1, model(3)), one_round(strategy, 1, model(3))
    assert all(expected[n].tobytes() == got[n].tobytes() for n in expected)


@pytest.mark.parametrize(
    "strategy",
    [FedAvg(), flower.FedAvg(), flower.FedMedian(), flower.FedTrimmedAvg(), flower.QFedAvg(0.1)],
    ids=lambda s: type(s).__name__,
)
def test_stateless_strategies_have_nothing_to_keep(strategy: flower.Strategy) -> None:
    keeper = state_of(strategy)
    assert keeper is not None
    assert keeper.dump(strategy) == b""
    keeper.restore(strategy, b"")


class Counting(FedAvg):
    """A strategy of a user's own, with its own way to be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = np.zeros(1)

    def save_state(self) -> Params:
        return {"seen": self.seen}

    def load_state(self, tensors: Params) -> None:
        self.seen = np.array(tensors["seen"])


def test_a_users_own_strategy_brings_its_own_methods() -> None:
    ours, other = Counting(), Counting()
    ours.seen += 5
    keeper = state_of(ours)
    assert isinstance(keeper, StrategyState)
    keeper.restore(other, keeper.dump(ours))
    assert other.seen.tolist() == [5.0]
    keeper.reset(other)
    assert other.seen.tolist() == [5.0]


def test_a_subclass_of_flowers_may_keep_more_than_we_know_of() -> None:
    class Own(flower.FedAdam):
        pass

    assert state_of(Own()) is None


def test_flower_is_silenced_before_it_is_imported() -> None:
    program = (
        "import os, sys; os.environ['FLWR_TELEMETRY_ENABLED'] = '1';"
        "os.environ['FLWR_DISABLE_UPDATE_CHECK'] = '0';"
        "import fedge.strategies as s; assert 'flwr' not in sys.modules; s.FedAvg;"
        "assert os.environ['FLWR_TELEMETRY_ENABLED'] == '0';"
        "assert os.environ['FLWR_DISABLE_UPDATE_CHECK'] == '1';"
        "assert 'flwr' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
