"""The durable round loop: any Flower strategy over any fleet grid.

Flower's own loop (``Strategy.start``) keeps a run in memory. This one asks
:mod:`fedge.rounds` what to do next and writes each event to a journal before it acts on it, so a
run that was killed anywhere goes on from its journal and ends with the same bits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TypeAlias

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy

from fedge import params as algebra
from fedge import rounds, tensors
from fedge.artifacts.manifest import Manifest
from fedge.config import RunConfig
from fedge.errors import ConfigError, EngineError, UpdateError
from fedge.flower import messages
from fedge.flower.grid import FleetGrid, FrozenGrid, Group, message_id_of
from fedge.flower.identity import ensure_identity
from fedge.flower.journal import Journal
from fedge.flower.replies import (
    Replies,
    Task,
    gate_for,
    judge_scores,
    judge_train,
    strategy_call,
)
from fedge.metrics import score_name
from fedge.rounds import Action, Event, Phase, RunState
from fedge.seeds import derive_seed
from fedge.strategies.state import state_of
from fedge.types import ClientId, Metrics, Params

Observer: TypeAlias = Callable[[Event], None]
_log = logging.getLogger("fedge.rounds")
_SLICE_S = 0.5  # how late a stop may be noticed
_LONGEST_PAUSE_S = 60.0
_SHOWN = 3  # failed clients in a message


class Coordinator:
    """One run over a fleet.

    Args:
        grid: Where the clients are.
        strategy: Any Flower strategy.
        manifest: Of the bundle the clients run.
        config: The run's settings.
        run_id: Names the run in the journal; letters, digits, ``._-``.
        journal: Keeps events and blobs. A run found there is continued.
        initial: Params to start from; at least the shared ones.
        observer: Called with each event once it is durable: enough for a line per round.
        stop: When set, :meth:`run` returns soon; the run can be continued later.
        max_attempts: How often a round may fall short of ``min_clients``; None: for ever.
        pause_s: Wait before a second attempt; doubles with each further one, up to a minute.

    Raises:
        ConfigError: If strategy and settings contradict each other, or the journal holds a run
            of that name with other settings.
    """

    def __init__(
        self,
        grid: FleetGrid,
        strategy: Strategy,
        manifest: Manifest,
        config: RunConfig,
        run_id: str,
        *,
        journal: Journal,
        initial: Params,
        observer: Observer | None = None,
        stop: threading.Event | None = None,
        max_attempts: int | None = None,
        pause_s: float = 1.0,
    ) -> None:
        self._grid, self._strategy, self._manifest = grid, strategy, manifest
        self._config, self._run_id, self._journal = config, run_id, journal
        self._initial = algebra.select(initial, manifest.shared)
        self._observe = observer or (lambda _: None)
        self._stop = stop or threading.Event()
        self._max_attempts, self._pause_s = max_attempts, pause_s
        self._keeper = state_of(strategy)
        self.state = RunState()
        _check_settings(strategy, config, run_id)

    def run(self) -> Params:
        """Do all that is left of the run, and return the newest shared params."""
        ensure_identity()
        self._restore()
        steps: dict[Action, Callable[[], None]] = {
            Action.START_RUN: self._start_run,
            Action.START_ROUND: self._start_round,
            Action.COLLECT_UPDATES: self._collect_updates,
            Action.START_EVALUATION: self._start_evaluation,
            Action.COLLECT_SCORES: self._collect_scores,
            Action.FINISH: self._finish,
        }
        while not self._stop.is_set():
            action = rounds.next_action(self.state)
            if action is Action.REST:
                break
            steps[action]()
        return self.params()

    def params(self) -> Params:
        """The newest committed shared params, in the manifest's dtypes."""
        if not self.state.params_digest:
            return algebra.copy(self._initial)
        return algebra.copy(tensors.load(self._journal.get_blob(self.state.params_digest))[0])

    def _restore(self) -> None:
        events = [rounds.from_json(e) for e in self._journal.events(self._run_id)]
        self.state = rounds.replay(events)
        if self._keeper is None and self._journal.durable:
            _log.warning(
                "strategy %s is not resumable: its state is lost on a crash", self._strategy_name
            )
        if not events:
            if self._keeper:
                self._keeper.reset(self._strategy)
            return
        self._check_same_run()
        if self._keeper and self.state.strategy_digest:
            self._keeper.restore(self._strategy, self._journal.get_blob(self.state.strategy_digest))
        self._close_leftovers(events)

    def _check_same_run(self) -> None:
        was = (self.state.bundle_digest, self.state.strategy, self.state.settings)
        now = (self._manifest.digest, self._strategy_name, self._config)
        for name, old, new in zip(("bundle", "strategy", "settings"), was, now, strict=True):
            if old != new:
                raise ConfigError(
                    f"run {self._run_id} was started with {name} {old}, now it is {new}; "
                    "continue it as it was or give the new run another name"
                )

    def _close_leftovers(self, events: list[Event]) -> None:
        """Withdraw what a crash between a commit and its cancel left open."""
        phase = self.state.phase
        for event in events[-3:]:
            if isinstance(event, rounds.RoundStarted) and phase is not Phase.TRAINING:
                self._cancel(Group(self._run_id, event.round_num, "train", event.attempt), event)
            if isinstance(event, rounds.EvaluationStarted) and phase is not Phase.EVALUATING:
                self._cancel(Group(self._run_id, event.round_num, "evaluate"), event)

    def _cancel(self, group: Group, event: rounds.RoundStarted | rounds.EvaluationStarted) -> None:
        nodes = [self._grid.node_id(c) for c in event.cohort]
        self._grid.cancel([message_id_of(str(group), n) for n in nodes])

    def _emit(self, event: Event) -> None:
        state = rounds.apply(self.state, event)  # refuses what cannot follow before it is written
        self._journal.append(self._run_id, rounds.to_json(event))
        self.state = state
        self._observe(event)

    def _start_run(self) -> None:
        self._emit(
            rounds.RunStarted(
                run_id=self._run_id,
                bundle_digest=self._manifest.digest,
                strategy=self._strategy_name,
                config=asdict(self._config),
                params_digest=self._journal.put_blob(tensors.dump(self._initial)),
            )
        )

    def _start_round(self) -> None:
        attempt = self.state.attempt + 1
        if attempt > 1 and self._stop.wait(self._pause(attempt)):
            return
        population = self._quorum()
        if population is None:
            return
        number = self.state.round_num
        cohort = self._draw(population, number, attempt)
        self._emit(rounds.RoundStarted(number, attempt, cohort))

    def _quorum(self) -> list[ClientId] | None:
        """Everybody there, once there are enough; None if the run was stopped before."""
        pause = 0.02
        while len(clients := self._grid.clients()) < self._config.min_clients:
            if self._stop.wait(pause):
                return None
            pause = min(pause * 1.5, 2.0)
        return list(clients.values())

    def _draw(self, population: Iterable[ClientId], *path: object) -> tuple[ClientId, ...]:
        size, seed = self._config.cohort_size, self._config.seed
        return rounds.sample_cohort(population, size, seed, self._run_id, *path)

    def _pause(self, attempt: int) -> float:
        return float(min(self._pause_s * 2.0 ** min(attempt - 2, 20), _LONGEST_PAUSE_S))

    def _collect_updates(self) -> None:
        number, least = self.state.round_num, self._config.min_clients
        tasks = self._push(Group(self._run_id, number, "train", self.state.attempt))
        if len(tasks) < least:
            raise ConfigError(
                f"the strategy trains {len(tasks)} of the cohort's {len(self.state.cohort)} "
                f"clients, but min_clients is {least}; raise the strategy's fraction_train"
            )
        if not self._await(tasks):
            return
        gate = gate_for(self._manifest.shared_shapes(), self._config.max_norm)
        judge = judge_train(number, None if self._grid.gates_updates else gate)
        replies = Replies(self._grid, tasks, judge)
        before = self._keeper.dump(self._strategy) if self._keeper else b""
        if len(tasks.keys() - self._grid.withdraw(tasks)) >= least:
            with strategy_call("aggregate_train", self._seed("aggregate")):
                arrays, metrics = self._strategy.aggregate_train(number, replies)
            if arrays is not None and len(replies.rows) >= least:
                self._commit(arrays, metrics, replies)
                self._grid.cancel(tasks)
                return
            if self._keeper:
                self._keeper.restore(self._strategy, before)
        self._retry(replies, tasks)

    def _commit(self, arrays: ArrayRecord, metrics: MetricRecord | None, replies: Replies) -> None:
        params = self._cast(messages.params_of(arrays))
        state = self._keeper.dump(self._strategy) if self._keeper else b""
        self._emit(
            rounds.RoundCommitted(
                round_num=self.state.round_num,
                params_digest=self._journal.put_blob(tensors.dump(params)),
                strategy_digest=self._journal.put_blob(state) if state else "",
                metrics=_numbers(metrics),
                rows=tuple(replies.rows),
                dropped=replies.dropped,
            )
        )

    def _retry(self, replies: Replies, tasks: dict[str, Task]) -> None:
        if not replies.rows and not replies.dropped:  # the strategy was not asked: list them now
            for _ in replies:
                pass
        accepted, least = len(replies.rows), self._config.min_clients
        event = rounds.RoundRetried(
            self.state.round_num, self.state.attempt, accepted, least, replies.dropped
        )
        self._emit(event)
        self._grid.cancel(tasks)
        if self._max_attempts is not None and event.attempt >= self._max_attempts:
            raise EngineError(_shortfall(event, self._strategy_name))

    def _start_evaluation(self) -> None:
        number = self.state.round_num
        cohort = self._draw(self._grid.clients().values(), number, "evaluate")
        needed = least_nodes(self._strategy, "min_evaluate_nodes")
        self._emit(rounds.EvaluationStarted(number, cohort if len(cohort) >= needed else ()))

    def _collect_scores(self) -> None:
        number = self.state.round_num
        group = Group(self._run_id, number, "evaluate")
        tasks = self._push(group) if self.state.cohort else {}
        if not self._await(tasks):
            return
        score = score_name(self._manifest.scored_as)
        replies = Replies(self._grid, tasks, judge_scores(score))
        with strategy_call("aggregate_evaluate", self._seed("aggregate")):
            metrics = self._strategy.aggregate_evaluate(number, replies)
        self._emit(
            rounds.RoundEvaluated(number, _numbers(metrics), tuple(replies.rows), replies.dropped)
        )
        self._grid.cancel(tasks)

    def _finish(self) -> None:
        self._emit(rounds.RunFinished(self.state.committed))

    def _push(self, group: Group) -> dict[str, Task]:
        """Let the strategy write this phase's messages and send them; message id -> task."""
        nodes = {self._grid.node_id(c): c for c in self.state.cohort}
        arrays = messages.array_record(self.params())
        config = messages.instruction_config(self._config.seed)
        train = group.phase == "train"
        call = self._strategy.configure_train if train else self._strategy.configure_evaluate
        with strategy_call(call.__name__, self._seed(group.phase)):
            sent = list(call(group.round_num, arrays, config, FrozenGrid(list(nodes))))
        bases: dict[int, Params] = {}
        tasks: list[Task] = []
        for message in sent:
            _check_instruction(message, nodes, group)
            record = messages.arrays_in(message)
            base = bases.setdefault(id(record), {}) or messages.params_of(record)
            bases[id(record)] = base
            message.metadata.group_id = str(group)
            message.metadata.ttl = self._config.deadline_s
            tasks.append(Task(nodes[message.metadata.dst_node_id], base))
        ids = self._grid.push_messages(sent)
        return dict(zip(ids, tasks, strict=True))

    def _await(self, tasks: dict[str, Task]) -> bool:
        """Wait for all replies or the deadline; False if the run was stopped instead."""
        end = time.monotonic() + self._config.deadline_s
        while (left := end - time.monotonic()) > 0:
            if self._stop.is_set():
                return False
            if self._grid.wait(tasks, min(left, _SLICE_S)) >= tasks.keys():
                break
        return True

    def _cast(self, new: Params) -> Params:
        """The strategy's arrays in the manifest's shapes and dtypes."""
        specs = {p.name: p for p in self._manifest.params if p.name in self._initial}
        shapes = {n: v.shape for n, v in new.items()}
        wanted = {n: tuple(p.shape) for n, p in specs.items()}
        if shapes != wanted:
            raise ConfigError(f"the strategy returned {shapes}, wanted {wanted}")
        with np.errstate(over="ignore", invalid="ignore"):
            cast = {n: np.asarray(new[n]).astype(p.dtype) for n, p in specs.items()}
        if not algebra.all_finite(cast):
            raise UpdateError(
                f"{self._strategy_name} made NaN or infinity in round {self.state.round_num}; "
                "lower its learning rate"
            )
        return cast

    def _seed(self, what: str) -> int:
        state = self.state
        return derive_seed(self._config.seed, self._run_id, state.round_num, state.attempt, what)

    @property
    def _strategy_name(self) -> str:
        return type(self._strategy).__name__


def _check_settings(strategy: Strategy, config: RunConfig, run_id: str) -> None:
    if not run_id or not all(c.isalnum() or c in "._-" for c in run_id):
        raise ConfigError(f"run id {run_id!r} may hold letters, digits, '.', '_' and '-' only")
    needed = least_nodes(strategy, "min_train_nodes")
    if needed > config.min_clients:
        raise ConfigError(
            f"{type(strategy).__name__} wants {needed} nodes, but a round may start with "
            f"min_clients = {config.min_clients}; set min_clients to {needed} or lower the "
            "strategy's min_train_nodes and min_available_nodes"
        )


def least_nodes(strategy: Strategy, name: str) -> int:
    """How many nodes a strategy waits for; ``name`` is its field for the phase."""
    fields = (name, "min_available_nodes")
    return max(int(getattr(strategy, field, 0)) for field in fields)


def _check_instruction(message: Message, nodes: dict[int, ClientId], group: Group) -> None:
    meta = message.metadata
    if meta.dst_node_id not in nodes or meta.message_type != group.phase:
        raise ConfigError(
            f"the strategy wrote a {meta.message_type} message to node {meta.dst_node_id}; "
            f"wanted {group.phase} messages to nodes of its grid"
        )
    messages.config_in(message)


def _shortfall(event: rounds.RoundRetried, strategy: str) -> str:
    """Why a round was given up, in one line."""
    where = f"round {event.round_num}", f"in {event.attempt} attempts"
    if event.accepted >= event.wanted:
        return (
            f"{where[0]} did not commit {where[1]}: aggregate_train of {strategy} returned no "
            f"params, though it had {event.accepted} updates"
        )
    failed = sorted(event.dropped.items())
    reasons = "; ".join(f"{c}: {r}" for c, r in failed[:_SHOWN])
    more = f"; and {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
    return f"{where[0]} got {event.accepted} of {event.wanted} updates {where[1]} ({reasons}{more})"


def _numbers(record: MetricRecord | None) -> Metrics:
    scalars = {n: v for n, v in (record or {}).items() if not isinstance(v, list)}
    return messages.finite(scalars)
