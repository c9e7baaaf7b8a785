"""A whole federation in one process, with the server's own round loop."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from fedge import rounds as machine
from fedge.artifacts.bundle import Bundle
from fedge.artifacts.manifest import ENGINE_FILES
from fedge.config import RunConfig, from_mapping
from fedge.engines import TrainingEngine, open_engine
from fedge.errors import ConfigError
from fedge.flower.coordinator import Coordinator, least_nodes
from fedge.flower.journal import MemoryJournal
from fedge.flower.statistics import collect_statistics
from fedge.rounds import Event
from fedge.simulation.grid import LocalGrid, LocalWork
from fedge.simulation.run import Run
from fedge.strategies.fedavg import FedAvg
from fedge.types import ClientData, ClientId

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

RUN_ID = "local"
MAX_ATTEMPTS = 3  # virtual clients do not come back by themselves
_log = logging.getLogger(__name__)
DEADLINE_S = 24 * 3600.0  # a simulation waits for its slowest client


class Federation:
    """Virtual clients, a bundle and a strategy.

    Args:
        bundle: From :func:`fedge.build`.
        clients: From :mod:`fedge.data`, or your own.
        strategy: Any Flower strategy; streaming FedAvg by default.
        seed: Fixes cohorts and row order. The same seed gives the same bits for one engine.
        engine: ``ort``, ``ort-training``, or ``auto``: the fastest that is installed.
        workers: Engine processes; None: one per core. The result does not depend on it. Each is
            served by a thread, so with ``local`` the default is 1.
        local: A client of your own in Python, in place of the bundle's training: a function of
            ``(client_id, data, params, round_num, seed)`` that returns ``(new params,
            num_examples, metrics)``, with ``train_loss`` among the metrics. In simulation only: a
            device runs what is in the bundle.
        scaling: ``"global"`` asks all clients for the sums of their columns first and puts the
            common mean and standard deviation into the bundle's preprocessing; clients with fewer
            than 10 rows are left out of the sums. None keeps the bundle as it is.

    Raises:
        ConfigError: If an argument is out of range.
    """

    def __init__(
        self,
        bundle: Bundle,
        clients: Sequence[ClientData],
        strategy: Strategy | None = None,
        seed: int = 0,
        engine: str = "auto",
        workers: int | None = None,
        local: LocalWork | None = None,
        scaling: str | None = None,
    ) -> None:
        if scaling not in (None, "global"):
            raise ConfigError(f"scaling={scaling!r} is unknown; give 'global' or None")
        _check_arguments(bundle, strategy, engine)
        self._clients = _checked_clients(clients)
        self._strategy = strategy or FedAvg()
        self._seed, self._engine, self._local = seed, engine, local
        default = 1 if local is not None else os.cpu_count() or 1
        self._workers = default if workers is None else workers
        self._bundle = self._rescaled(bundle) if scaling == "global" else bundle

    def __repr__(self) -> str:
        strategy = type(self._strategy).__name__
        return f"Federation({self._bundle!r}, {len(self._clients)} clients, {strategy})"

    @property
    def bundle(self) -> Bundle:
        """What the clients run; with ``scaling="global"`` a copy with the common scale."""
        return self._bundle

    def run(
        self,
        rounds: int = 10,
        *,
        cohort_size: int | None = None,
        min_clients: int | None = None,
        evaluate: bool = True,
        observer: Callable[[Event], None] | None = None,
    ) -> Run:
        """Train from the bundle's initial params.

        Args:
            rounds: How many.
            cohort_size: Clients drawn per round; None draws all.
            min_clients: Accepted updates a round needs; by default what the strategy asks for, and
                at least 2 where there are two clients.
            evaluate: Whether clients score the new params on their held-out rows each round.
            observer: Called with each event of the run, for a live line per round.

        Raises:
            ConfigError: If settings contradict each other or the number of clients.
            EngineError: If a round got too few usable updates three times over; says why.
        """
        settings = {
            "rounds": rounds,
            "min_clients": self._quorum(min_clients),
            "cohort_size": cohort_size,
            "deadline_s": DEADLINE_S,
            "evaluate": evaluate,
            "seed": self._seed,
        }
        config = from_mapping(RunConfig, settings, "run")
        events: list[Event] = []
        known: set[ClientId] = set()

        def note(event: Event) -> None:
            events.append(event)
            _warn_of_dropped(event, known)
            if observer is not None:
                observer(event)

        with self._grid(self._bundle) as grid:
            coordinator = Coordinator(
                grid,
                self._strategy,
                self._bundle.manifest,
                config,
                RUN_ID,
                journal=MemoryJournal(),
                initial=self._bundle.initial_params(),
                observer=note,
                max_attempts=MAX_ATTEMPTS,
                pause_s=0.0,
            )
            shared = coordinator.run()
            personal = {c.client_id: grid.personal(c.client_id) for c in self._clients}
        return Run(
            bundle=self._bundle,
            params={**self._bundle.initial_params(), **shared},
            personal=personal if self._bundle.manifest.personal else {},
            events=tuple(events),
            clients=self._clients,
        )

    @contextlib.contextmanager
    def _grid(self, bundle: Bundle) -> Iterator[LocalGrid]:
        def engines() -> TrainingEngine:
            return open_engine(bundle, self._engine)

        grid = LocalGrid(
            bundle.manifest,
            bundle.initial_params(),
            self._clients,
            engines,
            workers=self._workers,
            work=self._local,
        )
        try:
            yield grid
        finally:
            grid.close()

    def _quorum(self, wanted: int | None) -> int:
        there = len(self._clients)
        if not there:
            raise ConfigError("a federation without clients; give at least one")
        least = least_nodes(self._strategy, "min_train_nodes")
        quorum = max(least, min(2, there)) if wanted is None else wanted
        if quorum > there:
            raise ConfigError(
                f"a round needs {quorum} clients, there are {there}; lower min_clients, or the "
                "strategy's min_train_nodes and min_available_nodes"
            )
        return quorum

    def _rescaled(self, bundle: Bundle) -> Bundle:
        from fedge.artifacts.preprocessing import Standardize
        from fedge.artifacts.rescale import with_preprocessing

        with self._grid(bundle) as grid:
            mean, std = collect_statistics(grid, RUN_ID).standardize()
        return with_preprocessing(bundle, Standardize(mean, std))


def _check_arguments(bundle: Bundle, strategy: object, engine: str) -> None:
    if not isinstance(bundle, Bundle):
        raise ConfigError(
            f"bundle is a {type(bundle).__name__}; give what fedge.build or Bundle.open returned"
        )
    if strategy is not None and (isinstance(strategy, type) or not _is_strategy(strategy)):
        what = f"the class {strategy.__name__}" if isinstance(strategy, type) else repr(strategy)
        raise ConfigError(f"strategy is {what}; give an object, such as fedge.strategies.FedAvg()")
    if engine != "auto" and engine not in ENGINE_FILES:
        raise ConfigError(f"engine={engine!r} is unknown; known: auto, {', '.join(ENGINE_FILES)}")


def _is_strategy(strategy: object) -> bool:
    return hasattr(strategy, "configure_train") and hasattr(strategy, "aggregate_train")


def _checked_clients(clients: Sequence[ClientData]) -> list[ClientData]:
    for client in clients:
        if not isinstance(client, ClientData):
            raise ConfigError(
                f"clients hold a {type(client).__name__}; give fedge.ClientData objects, such as "
                "those of fedge.data.partition"
            )
        if not isinstance(client.client_id, str) or not client.client_id:
            raise ConfigError(f"client id {client.client_id!r}; wanted text that is not empty")
    return list(clients)


def _warn_of_dropped(event: Event, known: set[ClientId]) -> None:
    """A client whose data do not fit is missing from the table: say so, once per client."""
    if not isinstance(event, (machine.RoundCommitted, machine.RoundEvaluated)):
        return
    for client_id in sorted(event.dropped.keys() - known):
        known.add(client_id)
        reason = event.dropped[client_id]
        _log.warning("round %d: %s is left out: %s", event.round_num, client_id, reason)
