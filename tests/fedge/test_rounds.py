from __future__ import annotations

import itertools
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge import rounds
from fedge.config import RunConfig
from fedge.errors import StateError
from fedge.rounds import Action, Phase, RunState

CONFIG = RunConfig(rounds=2, min_clients=1)
STARTED = rounds.RunStarted("r", "bundle", "FedAvg", asdict(CONFIG), "p0")
ROUND_1 = rounds.RoundStarted(1, 1, ("a", "b"))
RETRIED = rounds.RoundRetried(1, 1, 0, 1, {"a": "gone"})
COMMITTED = rounds.RoundCommitted(1, "p1", "s1", {"train_loss": 0.5}, ({"client_id": "a"},))
EVALUATING = rounds.EvaluationStarted(1, ("a",))
EVALUATED = rounds.RoundEvaluated(1, {"accuracy": 1.0}, ({"client_id": "a", "loss": 0.1},))
ROUND_2 = [
    rounds.RoundStarted(2, 1, ("a",)),
    rounds.RoundCommitted(2, "p2", "", {}, ()),
    rounds.EvaluationStarted(2, ()),
    rounds.RoundEvaluated(2, {}, ()),
]
WHOLE = [STARTED, ROUND_1, COMMITTED, EVALUATING, EVALUATED, *ROUND_2, rounds.RunFinished(2)]

# One journal leading to each phase, and the events that may follow it there.
JOURNALS = {
    Phase.NEW: [],
    Phase.WAITING: [STARTED],
    Phase.TRAINING: [STARTED, ROUND_1],
    Phase.COMMITTED: [STARTED, ROUND_1, COMMITTED],
    Phase.EVALUATING: [STARTED, ROUND_1, COMMITTED, EVALUATING],
    Phase.FINISHED: WHOLE,
}
EDGES = {
    (Phase.NEW, "RunStarted"): (STARTED, Phase.WAITING),
    (Phase.WAITING, "RoundStarted"): (ROUND_1, Phase.TRAINING),
    (Phase.TRAINING, "RoundRetried"): (RETRIED, Phase.WAITING),
    (Phase.TRAINING, "RoundCommitted"): (COMMITTED, Phase.COMMITTED),
    (Phase.COMMITTED, "EvaluationStarted"): (EVALUATING, Phase.EVALUATING),
    (Phase.EVALUATING, "RoundEvaluated"): (EVALUATED, Phase.WAITING),
}
ANY = {type(e).__name__: e for e in [*WHOLE[:5], RETRIED, rounds.RunFinished(2)]}


@pytest.mark.parametrize(("phase", "name"), list(itertools.product(Phase, rounds.EVENTS)))
def test_every_edge_and_every_missing_edge(phase: Phase, name: str) -> None:
    before = rounds.replay(JOURNALS[phase])
    assert before.phase is phase
    if (phase, name) in EDGES:
        event, after = EDGES[phase, name]
        assert rounds.apply(before, event).phase is after
    elif (phase, name) == (Phase.WAITING, "RunFinished"):
        done = rounds.replay(WHOLE[:-1])
        assert rounds.apply(done, rounds.RunFinished(2)).phase is Phase.FINISHED
    else:
        assert (phase, rounds.EVENTS[name]) not in rounds.TRANSITIONS
        with pytest.raises(StateError, match=f"{name} cannot follow"):
            rounds.apply(before, ANY[name])


def test_the_table_has_no_edge_the_test_does_not_know() -> None:
    known = {(p, rounds.EVENTS[n]) for p, n in EDGES} | {(Phase.WAITING, rounds.RunFinished)}
    assert set(rounds.TRANSITIONS) == known


@pytest.mark.parametrize(
    ("journal", "event"),
    [
        ([STARTED], rounds.RoundStarted(2, 1, ("a",))),
        ([STARTED], rounds.RoundStarted(1, 2, ("a",))),
        ([STARTED, ROUND_1], rounds.RoundCommitted(2, "p", "", {}, ())),
        ([STARTED, ROUND_1], rounds.RoundRetried(1, 2, 0, 1)),
        ([STARTED, ROUND_1, COMMITTED], rounds.EvaluationStarted(2, ())),
        ([STARTED, ROUND_1, COMMITTED, EVALUATING], rounds.RoundEvaluated(2, {}, ())),
        ([STARTED], rounds.RunFinished(0)),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    journal: list[rounds.Event], event: rounds.Event
) -> None:
    with pytest.raises(StateError, match="wanted"):
        rounds.apply(rounds.replay(journal), event)


def test_actions_lead_through_a_whole_run() -> None:
    seen, state = [rounds.next_action(RunState())], RunState()
    for event in WHOLE:
        state = rounds.apply(state, event)
        seen.append(rounds.next_action(state))
    loop = [
        Action.START_ROUND,
        Action.COLLECT_UPDATES,
        Action.START_EVALUATION,
        Action.COLLECT_SCORES,
    ]
    assert seen == [Action.START_RUN, *loop, *loop, Action.FINISH, Action.REST]
    assert (state.committed, state.params_digest, state.strategy_digest) == (2, "p2", "")


def test_without_evaluation_a_commit_leads_to_the_next_round() -> None:
    config = asdict(RunConfig(rounds=2, min_clients=1, evaluate=False))
    state = rounds.replay([rounds.RunStarted("r", "b", "FedAvg", config, "p0"), ROUND_1, COMMITTED])
    assert (state.phase, rounds.next_action(state)) == (Phase.WAITING, Action.START_ROUND)
    assert state.round_num == 2


def test_a_retried_round_counts_its_attempts() -> None:
    state = rounds.replay([STARTED, ROUND_1, RETRIED])
    assert (state.round_num, state.attempt, state.cohort) == (1, 1, ())
    state = rounds.apply(state, rounds.RoundStarted(1, 2, ("b",)))
    assert (state.attempt, state.cohort) == (2, ("b",))
    assert rounds.apply(state, COMMITTED).attempt == 0


@pytest.mark.parametrize("event", [*WHOLE, RETRIED], ids=lambda e: type(e).__name__)
def test_events_survive_json(event: rounds.Event) -> None:
    import json

    assert rounds.from_json(json.loads(json.dumps(rounds.to_json(event)))) == event


@pytest.mark.parametrize("values", [{}, {"event": "Other"}, {"event": "RunFinished", "x": 1}])
def test_unreadable_events_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(StateError, match="cannot be read"):
        rounds.from_json(values)


def test_unreadable_settings_are_refused() -> None:
    with pytest.raises(StateError, match="no setting wishes"):
        rounds.replay([rounds.RunStarted("r", "b", "FedAvg", {"wishes": 3}, "p")])
    with pytest.raises(StateError, match="first event"):
        _ = RunState().settings


@given(
    st.sets(st.text(min_size=1, max_size=8), min_size=1, max_size=30),
    st.integers(1, 30),
    st.integers(0, 9),
)
def test_a_cohort_depends_on_seed_and_population_alone(
    population: set[str], size: int, seed: int
) -> None:
    drawn = rounds.sample_cohort(population, size, seed, "run", 1, 1)
    assert list(drawn) == sorted(set(drawn))
    assert set(drawn) <= population
    assert len(drawn) == min(size, len(population))
    assert drawn == rounds.sample_cohort(sorted(population, reverse=True), size, seed, "run", 1, 1)


def test_cohorts_differ_between_rounds_and_use_everybody() -> None:
    population = [f"c{i}" for i in range(20)]
    drawn = [rounds.sample_cohort(population, 5, 0, "run", r, 1) for r in range(60)]
    assert len(set(drawn)) > 50
    counts = [sum(c in d for d in drawn) for c in population]
    assert min(counts) > 3
    assert rounds.sample_cohort(population, None, 0, "run", 1, 1) == tuple(sorted(population))
