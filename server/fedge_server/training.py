"""What a server trains: the run it continues or begins, its bundle, its strategy."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedge import tensors
from fedge.artifacts.bundle import Bundle
from fedge.artifacts.manifest import PREPROCESS
from fedge.config import RunConfig, from_mapping
from fedge.errors import ConfigError
from fedge.platform import silence_telemetry
from fedge.types import Params
from fedge_server.config import Settings, StrategyConfig
from fedge_server.state import ServerState
from fedge_server.store import RunRow

silence_telemetry()  # before Flower is imported

from flwr.serverapp import strategy as flower  # noqa: E402
from flwr.serverapp.strategy import Strategy  # noqa: E402

from fedge.flower.coordinator import Coordinator, Observer  # noqa: E402
from fedge.flower.statistics import collect_statistics  # noqa: E402
from fedge.rounds import Phase  # noqa: E402
from fedge.strategies.fedavg import FedAvg  # noqa: E402
from fedge_server.grid import LinkGrid, StoppedError  # noqa: E402
from fedge_server.journal import StoreJournal  # noqa: E402

_FLOWER: dict[str, Callable[..., Strategy]] = {
    "fedavgm": flower.FedAvgM,
    "fedadam": flower.FedAdam,
    "fedyogi": flower.FedYogi,
    "fedadagrad": flower.FedAdagrad,
    "fedprox": flower.FedProx,
}


@dataclass(frozen=True)
class RunPlan:
    """A run's settings as they are kept with it, so that a restart cannot change them.

    Attributes:
        run_id: Its name.
        bundle: Digest of the bundle it began with; a global scaling makes a second one.
        params: Blob with the params it starts from; empty: the bundle's own.
        scaling: "global" where a statistics round comes first.
        run: Rounds, quorum, deadline.
        strategy: Name and settings.
    """

    run_id: str
    bundle: str
    params: str
    scaling: str
    run: RunConfig
    strategy: StrategyConfig

    @classmethod
    def from_row(cls, row: RunRow) -> RunPlan:
        """Read a plan back."""
        values = json.loads(row.config_json)
        values["run"] = from_mapping(RunConfig, values["run"], "run")
        values["strategy"] = from_mapping(StrategyConfig, values["strategy"], "strategy")
        return cls(run_id=row.run_id, **values)

    def to_row(self, now_s: float) -> RunRow:
        """The plan as it is kept."""
        values = asdict(self)
        run_id = values.pop("run_id")
        return RunRow(run_id, "running", json.dumps(values), now_s)


def plan_run(state: ServerState, settings: Settings, *, again: bool = False) -> RunPlan | None:
    """The unfinished run; else the first one; None if the last one is finished.

    With ``again``, a finished run is followed by another, which starts from the newest model.
    """
    runs = state.store.runs()
    if runs and runs[-1].status == "running":
        return RunPlan.from_row(runs[-1])
    if runs and not again:
        return None
    bundle = state.registry.newest()
    if bundle is None:
        raise ConfigError("no bundle to train; give a model or run `fedge-server build`")
    model = state.store.newest_model()
    scaled = state.registry.manifest(bundle).scaling != "none"
    make_strategy(settings.strategy, settings.run)  # its settings must fit before they are kept
    plan = RunPlan(
        run_id=f"run-{len(runs) + 1}",
        bundle=bundle,
        params=model.params_digest if model else "",
        scaling="none" if scaled else settings.model.scaling,
        run=settings.run,
        strategy=settings.strategy,
    )
    state.store.add_run(plan.to_row(time.time()))
    return plan


def make_strategy(config: StrategyConfig, run: RunConfig) -> Strategy:
    """A Flower strategy by name.

    Raises:
        ConfigError: If it does not take one of the settings.
    """
    try:
        if config.name == "fedavg":
            return FedAvg(**config.settings)
        least = min(2, run.min_clients)
        nodes = dict.fromkeys(
            ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"), least
        )
        settings: dict[str, Any] = {**nodes, **config.settings}
        return _FLOWER[config.name](**settings)
    except TypeError as exc:
        raise ConfigError(f"[strategy] {config.name}: {exc}") from exc


class Training:
    """One run, to its end or until stopped; call :meth:`run` in a thread of its own.

    Args:
        state: The server's.
        plan: What to run.
        grid: Where the devices are.
        journal: Keeps the run.
        observer: Told each event once it is durable.
        stop: Set it to leave soon; the run goes on at the next start.
    """

    def __init__(  # each is one collaborator
        self,
        state: ServerState,
        plan: RunPlan,
        grid: LinkGrid,
        journal: StoreJournal,
        observer: Observer,
        stop: threading.Event,
    ) -> None:
        self._state, self._plan, self._grid = state, plan, grid
        self._journal, self._observer, self._stop = journal, observer, stop

    def run(self) -> bool:
        """Do what is left of the run; whether it is finished."""
        try:
            return self._run()
        except StoppedError:
            return False

    def _run(self) -> bool:
        bundle = self._bundle()
        if bundle is None:
            return False
        self._grid.bundle_digest = bundle.digest
        coordinator = Coordinator(
            self._grid,
            make_strategy(self._plan.strategy, self._plan.run),
            bundle.manifest,
            self._plan.run,
            self._plan.run_id,
            journal=self._journal,
            initial=self._initial(bundle),
            observer=self._observer,
            stop=self._stop,
        )
        coordinator.run()
        if coordinator.state.phase is not Phase.FINISHED:
            return False
        self._state.store.set_run_status(self._plan.run_id, "finished")
        return True

    def _initial(self, bundle: Bundle) -> Params:
        own = bundle.initial_params()
        if not self._plan.params:
            return own
        return {**own, **tensors.load(self._state.blobs.get(self._plan.params))[0]}

    def _bundle(self) -> Bundle | None:
        """The run's bundle, scaled if need be; None if stopped before it could be."""
        registry, store = self._state.registry, self._state.store
        if self._plan.scaling != "global":
            return registry.open(self._plan.bundle)
        key = f"scaled/{self._plan.run_id}"
        known = store.get_meta(key)
        if known is None:
            scaled = self._scaled(registry.open(self._plan.bundle))
            if scaled is None:
                return None
            known = registry.add(scaled, time.time()).digest
            store.set_meta(key, known)
        return registry.open(known)

    def _scaled(self, bundle: Bundle) -> Bundle | None:
        """Ask the devices for sums, and fold mean and standard deviation into the bundle."""
        self._grid.bundle_digest = bundle.digest
        while len(self._grid.clients()) < self._plan.run.min_clients:
            if self._stop.wait(0.05):
                return None
        told = collect_statistics(
            self._grid, self._plan.run_id, timeout_s=self._plan.run.deadline_s
        ).standardize()
        return fold_scaling(bundle, told.mean, told.std, self._state.keys.signing_key)


def fold_scaling(bundle: Bundle, mean: Any, std: Any, key: Any) -> Bundle:  # noqa: ANN401
    """The bundle with ``(x − mean) / std`` as its preprocessing; a temporary folder holds it."""
    from fedge.artifacts.preprocessing import Standardize, build_preprocessor

    graph = build_preprocessor(Standardize(mean, std), bundle.manifest.inputs).model
    files = {n: bundle.read(n) for n in bundle.manifest.files}
    files[PREPROCESS] = graph.SerializeToString(deterministic=True)
    return Bundle.write(replace(bundle.manifest, scaling="global"), files, key)
