from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from fedge import rounds, tensors
from fedge.config import RunConfig, TrainConfig
from fedge.errors import ConfigError, EngineError, StateError, UpdateError
from fedge.flower import Coordinator, MemoryJournal
from fedge.flower.grid import node_id_of
from fedge.local import TrainTask, prepare, train
from fedge.rounds import Event
from fedge.simulation.grid import LocalGrid, LocalWork
from fedge.strategies import FedAvg
from fedge.testing import LogisticEngine, logistic_clients, logistic_manifest, logistic_params
from fedge.types import ClientData, ClientId, Metrics, Params

MANIFEST = logistic_manifest()
INITIAL = logistic_params(MANIFEST)
CLIENTS = logistic_clients(3)
CONFIG = RunConfig(rounds=3, min_clients=2, deadline_s=20)


def local_grid(**settings: Any) -> LocalGrid:
    clients = settings.pop("clients", CLIENTS)
    return LocalGrid(
        MANIFEST, INITIAL, clients, lambda: LogisticEngine(MANIFEST, INITIAL), **settings
    )


def run(
    grid: LocalGrid | None = None,
    strategy: flower.Strategy | None = None,
    config: RunConfig = CONFIG,
    **settings: Any,
) -> tuple[Params, list[Event]]:
    events: list[Event] = []
    settings.setdefault("journal", MemoryJournal())
    with grid or local_grid() as fleet:
        coordinator = Coordinator(
            fleet,
            strategy or FedAvg(),
            MANIFEST,
            config,
            "run",
            initial=INITIAL,
            observer=events.append,
            pause_s=0,
            **settings,
        )
        return coordinator.run(), events


def of(kind: type[Any], events: list[Event]) -> list[Any]:
    return [e for e in events if isinstance(e, kind)]


def same(a: Params, b: Params) -> bool:
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


def by_hand(rounds_: int, seed: int = 0, config: TrainConfig = MANIFEST.train) -> Params:
    """FedAvg written out: the mean in float64 of base + delta, in client_id order."""
    engine = LogisticEngine(MANIFEST, INITIAL)
    shared = dict(INITIAL)
    for number in range(1, rounds_ + 1):
        task = TrainTask(number, config, seed)
        total, sums = 0, {n: np.zeros(v.shape) for n, v in shared.items()}
        for data in CLIENTS:
            site = prepare(engine, MANIFEST, data)
            update, _ = train(engine, MANIFEST, INITIAL, site, shared, task)
            total += update.num_examples
            for n in sums:
                sums[n] += (shared[n] + update.delta[n]).astype(np.float64) * update.num_examples
        shared = {n: (v / total).astype(np.float32) for n, v in sums.items()}
    return shared


def test_fedavg_is_the_formula() -> None:
    params, events = run()
    assert same(params, by_hand(3))
    assert [type(e).__name__ for e in events] == [
        "RunStarted",
        *["RoundStarted", "RoundCommitted", "EvaluationStarted", "RoundEvaluated"] * 3,
        "RunFinished",
    ]


def test_events_say_enough_for_a_line_and_a_table() -> None:
    _, events = run()
    commit, evaluated = of(rounds.RoundCommitted, events)[-1], of(rounds.RoundEvaluated, events)[-1]
    assert [r["client_id"] for r in commit.rows] == ["site-0", "site-1", "site-2"]
    assert [r["num_examples"] for r in commit.rows] == [len(c.train) for c in CLIENTS]
    for row in commit.rows:
        assert row.keys() == {
            "client_id",
            "num_examples",
            "train_loss",
            "bytes_up",
            "bytes_down",
            "seconds",
        }
    assert evaluated.metrics.keys() == {"loss", "accuracy"}
    assert evaluated.metrics["accuracy"] > 0.6
    weights = np.array([r["num_examples"] for r in evaluated.rows])
    scores = np.array([r["accuracy"] for r in evaluated.rows])
    assert evaluated.metrics["accuracy"] == pytest.approx(np.average(scores, weights=weights))


@pytest.mark.parametrize("workers", [2, 3, 9])
def test_the_number_of_workers_changes_nothing(workers: int) -> None:
    assert same(run(local_grid(workers=workers))[0], run()[0])


def test_cohorts_are_drawn_per_round_and_repeat() -> None:
    config = replace(CONFIG, rounds=8, cohort_size=2)
    params, events = run(config=config)
    cohorts = [e.cohort for e in of(rounds.RoundStarted, events)]
    assert all(len(c) == 2 for c in cohorts)
    assert len(set(cohorts)) > 1
    random.seed(1)
    again, repeated = run(config=config)
    assert same(params, again)
    assert cohorts == [e.cohort for e in of(rounds.RoundStarted, repeated)]
    other = run(config=replace(config, seed=1))[0]
    assert not same(params, other)


def test_flowers_global_random_is_neither_used_nor_touched() -> None:
    strategy = flower.FedAvg(fraction_train=0.7)
    config = replace(CONFIG, min_clients=2)
    random.seed(5)
    first, expected = run(strategy=strategy, config=config)[0], random.random()
    random.seed(5)
    assert random.random() == expected
    random.seed(99)
    assert same(first, run(strategy=strategy, config=config)[0])


# --- A client that goes wrong never ends a run ---------------------------------------------------


def bad(client: ClientId, result: Callable[[Params], Any]) -> LocalWork:
    """Everybody trains with the engine's arithmetic, except one client that answers nonsense."""

    def work(
        client_id: ClientId, data: ClientData, params: Params, round_num: int, seed: int
    ) -> tuple[Params, int, Metrics]:
        if client_id == client:
            answer: tuple[Params, int, Metrics] = result(params)
            return answer
        engine = LogisticEngine(MANIFEST, params)
        outcome = engine.train(data.train, MANIFEST.train, seed)
        return engine.get_params(), len(data.train), {"train_loss": outcome.loss}

    return work


def raises(params: Params) -> Any:
    raise RuntimeError("disk on fire")


def with_nan(params: Params) -> Any:
    return {**params, "bias": params["bias"] * np.float32("nan")}, 5, {"train_loss": 1.0}


BAD = {
    "raises": (raises, "RuntimeError: disk on fire"),
    "NaN": (with_nan, "NaN or infinity"),
    "huge": (lambda p: ({**p, "bias": p["bias"] + 1e9}, 5, {"train_loss": 1.0}), "norm"),
    "no rows": (lambda p: (p, 0, {"train_loss": 1.0}), "num-examples is 0"),
    "negative rows": (lambda p: (p, -3, {"train_loss": 1.0}), "num-examples is -3"),
    "too many rows": (lambda p: (p, 1 << 41, {"train_loss": 1.0}), "examples"),
    "no loss": (lambda p: (p, 5, {}), "lacks a finite train_loss"),
    "NaN loss": (lambda p: (p, 5, {"train_loss": float("nan")}), "lacks a finite train_loss"),
    "wrong shape": (lambda p: ({**p, "bias": np.zeros(7, "f4")}, 5, {"train_loss": 1.0}), ""),
    "not a tuple": (lambda p: None, "wanted (params, num_examples, metrics)"),
    "text": (lambda p: ({**p, "bias": np.array(["x"] * 3)}, 5, {"train_loss": 1.0}), ""),
}


@pytest.mark.parametrize("strategy", [FedAvg, flower.FedAvg, flower.FedAdam])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_reply_is_dropped_and_named(name: str, strategy: type[flower.Strategy]) -> None:
    result, reason = BAD[name]
    params, events = run(local_grid(work=bad("site-1", result)), strategy())
    for commit in of(rounds.RoundCommitted, events):
        assert [r["client_id"] for r in commit.rows] == ["site-0", "site-2"]
        assert reason in commit.dropped["site-1"]
    without, _ = run(local_grid(work=bad("", raises), clients=[CLIENTS[0], CLIENTS[2]]), strategy())
    assert same(params, without)


def test_extra_metrics_stay_out_of_the_strategy_but_reach_the_table() -> None:
    def extra(params: Params) -> Any:
        return params, 5, {"train_loss": 1.0, "mood": 7.0}

    _, events = run(local_grid(work=bad("site-1", extra)), flower.FedAvg())
    commit = of(rounds.RoundCommitted, events)[0]
    assert commit.metrics.keys() == {"train_loss"}
    assert commit.rows[1]["mood"] == 7.0


def test_a_client_without_held_out_rows_is_left_out_of_the_scores() -> None:
    clients = [*CLIENTS[:2], replace(CLIENTS[2], test=None)]
    _, events = run(local_grid(clients=clients))
    evaluated = of(rounds.RoundEvaluated, events)[0]
    assert [r["client_id"] for r in evaluated.rows] == ["site-0", "site-1"]
    assert "holds out no rows" in evaluated.dropped["site-2"]


def test_too_few_updates_start_the_round_again() -> None:
    failures = {"left": 2}

    def now_and_then(params: Params) -> Any:
        if failures["left"]:
            failures["left"] -= 1
            raise RuntimeError("not yet")
        return params, 5, {"train_loss": 1.0}

    config = replace(CONFIG, rounds=1, min_clients=3)
    _, events = run(local_grid(work=bad("site-1", now_and_then)), config=config)
    retried = of(rounds.RoundRetried, events)
    assert [(e.attempt, e.accepted, e.wanted) for e in retried] == [(1, 2, 3), (2, 2, 3)]
    assert retried[0].dropped == {"site-1": "RuntimeError: not yet"}
    assert [e.attempt for e in of(rounds.RoundStarted, events)] == [1, 2, 3]


def test_a_failed_attempt_leaves_no_trace_in_the_strategys_memory() -> None:
    """The moments of FedAdam are put back before the round is tried again."""
    config = replace(CONFIG, rounds=2, min_clients=3)
    calls = {"n": 0}

    def second_time_fails(params: Params) -> Any:
        calls["n"] += 1
        if calls["n"] == 2:
            raise RuntimeError("once")
        return params, 5, {"train_loss": 1.0}

    def fine(params: Params) -> Any:
        return params, 5, {"train_loss": 1.0}

    retried, events = run(
        local_grid(work=bad("site-1", second_time_fails)), flower.FedAdam(), config
    )
    assert len(of(rounds.RoundRetried, events)) == 1
    assert same(retried, run(local_grid(work=bad("site-1", fine)), flower.FedAdam(), config)[0])


def test_a_simulation_gives_up_after_some_attempts() -> None:
    config = replace(CONFIG, min_clients=3)
    with pytest.raises(EngineError, match=r"got 2 of 3 updates in 2 attempts \(site-1: Runtime"):
        run(local_grid(work=bad("site-1", raises)), config=config, max_attempts=2)


# --- Deadlines, quorum, stop ---------------------------------------------------------------------


def test_a_round_closes_at_its_deadline_with_what_it_has() -> None:
    asleep = threading.Event()

    def sleeps(params: Params) -> Any:
        asleep.wait(5)
        raise RuntimeError("too late")

    grid = local_grid(work=bad("site-1", sleeps), workers=3)
    config = replace(CONFIG, rounds=1, deadline_s=0.3, evaluate=False)
    events: list[Event] = []
    coordinator = Coordinator(
        grid,
        FedAvg(),
        MANIFEST,
        config,
        "run",
        journal=MemoryJournal(),
        initial=INITIAL,
        observer=events.append,
    )
    coordinator.run()
    asleep.set()
    grid.close()
    commit = of(rounds.RoundCommitted, events)[0]
    assert commit.dropped == {"site-1": "no reply before the deadline"}
    assert len(commit.rows) == 2


class LateGrid(LocalGrid):
    """A fleet whose clients connect one after another."""

    asked = 0

    def clients(self) -> dict[int, ClientId]:
        self.asked += 1
        everybody = sorted(super().clients().items(), key=lambda item: item[1])
        return dict(everybody[: self.asked])


def test_a_round_waits_for_its_quorum() -> None:
    grid = LateGrid(MANIFEST, INITIAL, CLIENTS, lambda: LogisticEngine(MANIFEST, INITIAL))
    _, events = run(grid, config=replace(CONFIG, rounds=1, min_clients=3))
    assert of(rounds.RoundStarted, events)[0].cohort == ("site-0", "site-1", "site-2")
    assert grid.asked >= 3


def test_a_stop_ends_the_wait_for_a_quorum_and_keeps_the_params() -> None:
    stop = threading.Event()
    timer = threading.Timer(0.2, stop.set)
    timer.start()
    params, events = run(config=replace(CONFIG, min_clients=4), stop=stop)
    timer.join()
    assert same(params, INITIAL)
    assert len(events) == 1


@pytest.mark.parametrize("field", ["min_train_nodes", "min_available_nodes"])
def test_a_strategy_that_wants_more_nodes_than_the_quorum_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=r"FedAvg wants 5 nodes.*min_clients = 2"):
        run(strategy=flower.FedAvg(**{field: 5}))


def test_a_strategy_that_picks_too_few_is_refused() -> None:
    with pytest.raises(ConfigError, match="trains 1 of the cohort's 3"):
        run(strategy=FedAvg(fraction_train=0.4))


def test_evaluation_is_skipped_where_the_strategy_wants_more_nodes() -> None:
    _, events = run(strategy=FedAvg(min_evaluate_nodes=4))
    assert all(e.cohort == () for e in of(rounds.EvaluationStarted, events))
    assert all(e.rows == () and e.metrics == {} for e in of(rounds.RoundEvaluated, events))


def test_a_strategy_may_evaluate_nowhere() -> None:
    _, events = run(strategy=flower.FedAvg(fraction_evaluate=0.0))
    assert all(e.rows == () for e in of(rounds.RoundEvaluated, events))


# --- Strategies that misbehave -------------------------------------------------------------------


class Silent(FedAvg):
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        grid.push_messages([])
        return []


class Broken(FedAvg):
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        raise KeyError("oops")


class Exploding(FedAvg):
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        huge = {n: flower_array(a.numpy() * 1e300) for n, a in arrays.items()}
        return ArrayRecord(huge), metrics


class Forgetful(FedAvg):
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        arrays.pop("bias")
        return arrays, metrics


class Demanding(FedAvg):
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        config["dropout-rate"] = 0.1
        return super().configure_train(server_round, arrays, config, grid)


def flower_array(values: Any) -> Any:
    from flwr.app import Array

    return Array(values)


@pytest.mark.parametrize(
    ("strategy", "error", "message"),
    [
        (Silent, ConfigError, "called grid.push_messages"),
        (Broken, ConfigError, "failed in aggregate_train: KeyError"),
        (Exploding, UpdateError, "Exploding made NaN or infinity in round 1"),
        (Forgetful, ConfigError, "the strategy returned"),
        (Demanding, ConfigError, "asks clients for dropout-rate"),
    ],
)
def test_what_a_strategy_does_wrong_is_said(
    strategy: type[FedAvg], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(strategy=strategy())


def test_overrides_reach_the_clients() -> None:
    class Faster(FedAvg):
        def configure_train(
            self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
        ) -> Iterable[Message]:
            config["lr"] = 1e-12
            return super().configure_train(server_round, arrays, config, grid)

    params, _ = run(strategy=Faster())
    np.testing.assert_allclose(params["weight"], INITIAL["weight"], atol=1e-7)


def test_flowers_fedprox_holds_clients_to_the_rounds_params() -> None:
    params, _ = run(strategy=flower.FedProx(proximal_mu=0.7))
    wanted = by_hand(3, config=MANIFEST.train.replace(proximal_mu=0.7))
    for name, value in wanted.items():  # Flower's mean is in float32
        np.testing.assert_allclose(params[name], value, rtol=1e-5, atol=1e-6)
    plain, held = (
        float(np.linalg.norm(p["weight"] - INITIAL["weight"])) for p in (by_hand(3), params)
    )
    assert held < 0.9 * plain


def test_a_run_id_that_would_break_group_ids_is_refused() -> None:
    with local_grid() as grid, pytest.raises(ConfigError, match="run id 'a/b'"):
        Coordinator(
            grid, FedAvg(), MANIFEST, CONFIG, "a/b", journal=MemoryJournal(), initial=INITIAL
        )


# --- Resuming ------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone: nothing may catch it on the way."""


class CrashingJournal(MemoryJournal):
    """Dies before or after one write, chosen by number."""

    def __init__(self, at: int, written: bool) -> None:
        super().__init__()
        self.at, self.written, self.count = at, written, 0

    def append(self, run_id: str, event: dict[str, Any]) -> None:
        self.count += 1
        if self.count == self.at and not self.written:
            raise Crash
        super().append(run_id, event)
        if self.count == self.at:
            raise Crash


STRATEGIES = [FedAvg, flower.FedAvg, flower.FedAdam, flower.FedAdagrad, flower.FedYogi]
FACTORIES: dict[str, Callable[[], flower.Strategy]] = {
    **{f"{s.__module__.split('.')[0]}.{s.__name__}": s for s in STRATEGIES},
    "flwr.FedAvgM": lambda: flower.FedAvgM(server_momentum=0.9, server_learning_rate=0.7),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_a_run_killed_at_any_event_ends_with_the_same_bits(name: str) -> None:
    make = FACTORIES[name]
    config = replace(CONFIG, cohort_size=2)
    whole, events = run(strategy=make(), config=config)
    for at in range(1, len(events) + 1):
        for written in (False, True):
            journal = CrashingJournal(at, written)
            with pytest.raises(Crash):
                run(strategy=make(), config=config, journal=journal)
            resumed, _ = run(strategy=make(), config=config, journal=journal)
            assert same(resumed, whole), (at, written)
            kept = [rounds.from_json(e) for e in journal.events("run")]
            assert [type(e) for e in kept] == [type(e) for e in events]


def test_a_run_killed_between_two_replies_ends_with_the_same_bits() -> None:
    class Dying(FedAvg):
        def aggregate_train(
            self, server_round: int, replies: Iterable[Message]
        ) -> tuple[ArrayRecord | None, MetricRecord | None]:
            if server_round == 2 and not died:
                died.append(next(iter(replies)))
                raise Crash
            return super().aggregate_train(server_round, replies)

    died: list[Message] = []
    journal = MemoryJournal()
    with pytest.raises(Crash):
        run(strategy=Dying(), journal=journal)
    assert same(run(strategy=Dying(), journal=journal)[0], by_hand(3))


def test_a_finished_run_is_left_alone() -> None:
    journal = MemoryJournal()
    params, _ = run(journal=journal)
    again, events = run(journal=journal)
    assert same(params, again)
    assert events == []


def test_a_run_is_continued_as_it_was_or_not_at_all() -> None:
    journal = MemoryJournal()
    run(journal=journal)
    with pytest.raises(ConfigError, match="started with strategy FedAvg, now it is FedAdam"):
        run(strategy=flower.FedAdam(), journal=journal)
    with pytest.raises(ConfigError, match="started with settings"):
        run(config=replace(CONFIG, rounds=9), journal=journal)


def test_a_strategy_without_adapter_runs_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Own(FedAvg):
        pass

    class Durable(MemoryJournal):
        durable = True

    with caplog.at_level("WARNING", "fedge.rounds"):
        run(strategy=Own())
        assert "not resumable" not in caplog.text  # with the process its run is lost anyway
        params, _ = run(strategy=Own(), journal=Durable())
    assert same(params, by_hand(3))
    assert "Own is not resumable: its state is lost on a crash" in caplog.text


def test_the_journal_holds_every_rounds_params() -> None:
    journal = MemoryJournal()
    params, events = run(journal=journal)
    digests = [e.params_digest for e in of(rounds.RoundCommitted, events)]
    stored = [tensors.load(journal.get_blob(d))[0] for d in digests]
    assert same({n: np.array(v) for n, v in stored[-1].items()}, params)
    assert len(set(digests)) == 3
    with pytest.raises(StateError, match="no blob"):
        journal.get_blob("00")


def test_a_resumed_round_gives_its_tasks_the_same_ids() -> None:
    with local_grid() as grid:
        coordinator = Coordinator(
            grid, FedAvg(), MANIFEST, CONFIG, "run", journal=MemoryJournal(), initial=INITIAL
        )
        coordinator._start_run()
        coordinator._start_round()
        first = coordinator._push(rounds_group())
        assert coordinator._push(rounds_group()).keys() == first.keys()
        assert {t.client_id for t in first.values()} == {c.client_id for c in CLIENTS}
        assert set(grid.clients()) == {node_id_of(c.client_id) for c in CLIENTS}


def rounds_group() -> Any:
    from fedge.flower.grid import Group

    return Group("run", 1, "train")


class NoParams(flower.FedAvg):
    """A strategy of a user's own that forgets to return anything."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        super().aggregate_train(server_round, list(replies))
        return None, None


def test_a_strategy_that_returns_no_params_is_named() -> None:
    with pytest.raises(EngineError, match="aggregate_train of NoParams returned no params, though"):
        run(strategy=NoParams(min_train_nodes=2, min_available_nodes=2), max_attempts=2)


def test_a_failure_names_three_clients_and_counts_the_others() -> None:
    def fail(*_: Any) -> tuple[Params, int, Metrics]:
        raise RuntimeError("no")

    grid = local_grid(clients=logistic_clients(5), work=fail)
    with pytest.raises(EngineError, match=r"site-2: RuntimeError: no; and 2 more\)"):
        run(grid, max_attempts=1)
