"""The round as an event-sourced state machine: pure, without clock, socket or file.

A run is the list of its events. :func:`apply` folds one event into the state, :func:`next_action`
says what the state asks for, and whoever drives the run appends each event durably *before*
acting on it. A run that was killed is continued by folding its events again::

    NEW ──RunStarted──► WAITING ──RoundStarted──► TRAINING ──RoundCommitted──► COMMITTED
                         ▲  ▲ │                      │                             │
                         │  └─┼─────RoundRetried─────┘                     EvaluationStarted
                         │    └──RunFinished──► FINISHED                           ▼
                         └───────────────RoundEvaluated──────────────────── EVALUATING

Without federated evaluation a commit leads straight back to WAITING.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any, TypeAlias

from fedge.config import RunConfig, from_mapping
from fedge.errors import ConfigError, StateError
from fedge.seeds import derive_seed
from fedge.types import ClientId, RoundNum

Row: TypeAlias = dict[str, Any]  # one client's line of a round: "client_id" and numbers


class Phase(Enum):
    """Where a run stands."""

    NEW = "new"
    WAITING = "waiting"
    TRAINING = "training"
    COMMITTED = "committed"
    EVALUATING = "evaluating"
    FINISHED = "finished"


class Action(Enum):
    """What a run asks of its driver."""

    START_RUN = "start the run"
    START_ROUND = "wait for a quorum and draw a cohort"
    COLLECT_UPDATES = "push train tasks, collect updates, reduce, commit"
    START_EVALUATION = "draw the clients that score the new params"
    COLLECT_SCORES = "push evaluate tasks, collect scores, commit"
    FINISH = "write that the run is over"
    REST = "nothing is left to do"


@dataclass(frozen=True)
class RunStarted:
    """A run begins from params that are stored under ``params_digest``."""

    run_id: str
    bundle_digest: str
    strategy: str
    config: dict[str, Any]
    params_digest: str


@dataclass(frozen=True)
class RoundStarted:
    """A cohort was drawn; ``attempt`` counts from 1 within the round."""

    round_num: RoundNum
    attempt: int
    cohort: tuple[ClientId, ...]


@dataclass(frozen=True)
class RoundRetried:
    """The round closed with too few accepted updates and starts again with a new cohort."""

    round_num: RoundNum
    attempt: int
    accepted: int
    wanted: int
    dropped: dict[ClientId, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundCommitted:
    """New params stand, together with the strategy state that belongs to them.

    Attributes:
        round_num: Which round.
        params_digest: Blob with the new shared params.
        strategy_digest: Blob with the strategy's state; empty if it has none.
        metrics: What the strategy made of the clients' training metrics.
        rows: One per accepted client: client_id, num_examples, train_loss and, where known,
            bytes_up, bytes_down, seconds.
        dropped: Client -> why its reply did not count.
    """

    round_num: RoundNum
    params_digest: str
    strategy_digest: str
    metrics: dict[str, float]
    rows: tuple[Row, ...]
    dropped: dict[ClientId, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationStarted:
    """These clients are asked to score the new params; nobody if the cohort is empty."""

    round_num: RoundNum
    cohort: tuple[ClientId, ...]


@dataclass(frozen=True)
class RoundEvaluated:
    """The clients' scores; ``rows`` hold client_id, num_examples, loss, accuracy or rmse, auc."""

    round_num: RoundNum
    metrics: dict[str, float]
    rows: tuple[Row, ...]
    dropped: dict[ClientId, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFinished:
    """All rounds are done."""

    round_num: RoundNum


Event: TypeAlias = (
    RunStarted
    | RoundStarted
    | RoundRetried
    | RoundCommitted
    | EvaluationStarted
    | RoundEvaluated
    | RunFinished
)
EVENTS: dict[str, type[Event]] = {
    cls.__name__: cls
    for cls in (
        RunStarted,
        RoundStarted,
        RoundRetried,
        RoundCommitted,
        EvaluationStarted,
        RoundEvaluated,
        RunFinished,
    )
}


@dataclass(frozen=True)
class RunState:
    """What the events so far come to.

    Attributes:
        phase: Where the run stands.
        run_id: Its name.
        bundle_digest: What the clients run.
        strategy: Class name of the strategy.
        config: Its settings; None before ``RunStarted``.
        committed: Rounds whose params stand.
        attempt: Of the round under way; 0 between rounds.
        cohort: Clients of the phase under way, sorted.
        params_digest: Blob of the newest params.
        strategy_digest: Blob of the newest strategy state, or empty.
    """

    phase: Phase = Phase.NEW
    run_id: str = ""
    bundle_digest: str = ""
    strategy: str = ""
    config: RunConfig | None = None
    committed: int = 0
    attempt: int = 0
    cohort: tuple[ClientId, ...] = ()
    params_digest: str = ""
    strategy_digest: str = ""

    @property
    def settings(self) -> RunConfig:
        """The run's settings.

        Raises:
            StateError: Before the run has started.
        """
        if self.config is None:
            raise StateError("the run has not started; its first event must be RunStarted")
        return self.config

    @property
    def round_num(self) -> RoundNum:
        """The round under way, or the next one; during evaluation the one being scored."""
        scoring = self.phase in (Phase.COMMITTED, Phase.EVALUATING)
        return self.committed if scoring else self.committed + 1


def apply(state: RunState, event: Event) -> RunState:
    """Fold one event into the state.

    Raises:
        StateError: If the event cannot follow, which means a damaged or mixed-up journal.
    """
    step = TRANSITIONS.get((state.phase, type(event)))
    if step is None:
        raise StateError(f"{type(event).__name__} cannot follow while a run is {state.phase.value}")
    return step(state, event)


def replay(events: Iterable[Event]) -> RunState:
    """The state after all events."""
    state = RunState()
    for event in events:
        state = apply(state, event)
    return state


def next_action(state: RunState) -> Action:
    """What the driver has to do now."""
    if state.phase is Phase.WAITING and state.committed >= state.settings.rounds:
        return Action.FINISH
    return _ACTIONS[state.phase]


def sample_cohort(
    population: Iterable[ClientId], size: int | None, *seed_path: object
) -> tuple[ClientId, ...]:
    """Draw clients without replacement, as a function of the seed alone.

    Each client gets a hash of (seed path, client_id); the ``size`` smallest are taken. Nothing
    depends on the order in which clients connected.

    Args:
        population: Clients that are there.
        size: How many to draw; None takes all.
        seed_path: Seed first, then what the draw is for: ``(seed, run_id, round_num, attempt)``.

    Returns:
        The cohort, sorted by client_id.
    """
    seed, *path = seed_path
    everybody = sorted(population)
    if size is None or size >= len(everybody):
        return tuple(everybody)
    drawn = sorted(everybody, key=lambda c: (derive_seed(int(str(seed)), "cohort", *path, c), c))
    return tuple(sorted(drawn[:size]))


def to_json(event: Event) -> dict[str, Any]:
    """The event as plain JSON values."""
    return {"event": type(event).__name__, **asdict(event)}


def from_json(values: dict[str, Any]) -> Event:
    """Read what :func:`to_json` wrote.

    Raises:
        StateError: If it is not an event this version knows.
    """
    try:
        fields = dict(values)
        cls = EVENTS[fields.pop("event")]
        for name in ("cohort", "rows"):
            if name in fields:
                fields[name] = tuple(fields[name])
        return cls(**fields)
    except (KeyError, TypeError) as exc:
        raise StateError(f"the journal holds an event that cannot be read: {exc!r}") from exc


def _run_started(_: RunState, e: RunStarted) -> RunState:
    try:
        config = from_mapping(RunConfig, e.config, "run")
    except ConfigError as exc:
        raise StateError(f"the journal holds settings that cannot be read: {exc}") from exc
    return RunState(
        phase=Phase.WAITING,
        run_id=e.run_id,
        bundle_digest=e.bundle_digest,
        strategy=e.strategy,
        config=config,
        params_digest=e.params_digest,
    )


def _round_started(s: RunState, e: RoundStarted) -> RunState:
    _want(e.round_num == s.committed + 1, e, f"round {s.committed + 1}")
    _want(e.attempt == s.attempt + 1, e, f"attempt {s.attempt + 1}")
    return replace(s, phase=Phase.TRAINING, attempt=e.attempt, cohort=e.cohort)


def _round_retried(s: RunState, e: RoundRetried) -> RunState:
    _want((e.round_num, e.attempt) == (s.round_num, s.attempt), e, "the attempt under way")
    return replace(s, phase=Phase.WAITING, cohort=())


def _round_committed(s: RunState, e: RoundCommitted) -> RunState:
    _want(e.round_num == s.round_num, e, f"round {s.round_num}")
    return replace(
        s,
        phase=Phase.COMMITTED if s.settings.evaluate else Phase.WAITING,
        committed=e.round_num,
        attempt=0,
        cohort=(),
        params_digest=e.params_digest,
        strategy_digest=e.strategy_digest,
    )


def _evaluation_started(s: RunState, e: EvaluationStarted) -> RunState:
    _want(e.round_num == s.committed, e, f"round {s.committed}")
    return replace(s, phase=Phase.EVALUATING, cohort=e.cohort)


def _round_evaluated(s: RunState, e: RoundEvaluated) -> RunState:
    _want(e.round_num == s.committed, e, f"round {s.committed}")
    return replace(s, phase=Phase.WAITING, cohort=())


def _run_finished(s: RunState, e: RunFinished) -> RunState:
    _want(e.round_num == s.committed == s.settings.rounds, e, f"round {s.settings.rounds}")
    return replace(s, phase=Phase.FINISHED)


def _want(ok: bool, event: Event, wanted: str) -> None:
    if not ok:
        raise StateError(f"the journal holds {event}, wanted {wanted}")


Step: TypeAlias = Callable[[RunState, Any], RunState]
TRANSITIONS: dict[tuple[Phase, type[Event]], Step] = {
    (Phase.NEW, RunStarted): _run_started,
    (Phase.WAITING, RoundStarted): _round_started,
    (Phase.WAITING, RunFinished): _run_finished,
    (Phase.TRAINING, RoundRetried): _round_retried,
    (Phase.TRAINING, RoundCommitted): _round_committed,
    (Phase.COMMITTED, EvaluationStarted): _evaluation_started,
    (Phase.EVALUATING, RoundEvaluated): _round_evaluated,
}
_ACTIONS: dict[Phase, Action] = {
    Phase.NEW: Action.START_RUN,
    Phase.WAITING: Action.START_ROUND,
    Phase.TRAINING: Action.COLLECT_UPDATES,
    Phase.COMMITTED: Action.START_EVALUATION,
    Phase.EVALUATING: Action.COLLECT_SCORES,
    Phase.FINISHED: Action.REST,
}
