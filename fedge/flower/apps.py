"""fedge's rounds and clients as a standard Flower app, for sites that already run Flower.

Here a Flower app, that is code, is shipped to the sites; a bundle is not: Flower's app bundles
drop ``.onnx`` files silently. Each side finds it in a folder of its own, named by ``bundle`` in
the run's config or, at a site, in the node's config.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from fedge import local, tensors
from fedge import params as algebra
from fedge.artifacts.bundle import Bundle
from fedge.config import RunConfig
from fedge.engines import TrainingEngine, open_engine
from fedge.errors import ConfigError
from fedge.flower import messages
from fedge.flower.coordinator import Coordinator
from fedge.flower.grid import Group
from fedge.flower.journal import MemoryJournal
from fedge.flower.statistics import answer_statistics
from fedge.flower.stock import StockGrid
from fedge.platform import atomic_write
from fedge.rounds import Event
from fedge.strategies.fedavg import FedAvg
from fedge.types import ClientData, Params

RUN_ID = "flower"
PERSONAL = "personal"
LoadData: TypeAlias = Callable[[Context], ClientData]


def server_app(
    make_strategy: Callable[[], Strategy] = FedAvg,
    observer: Callable[[Event], None] | None = None,
) -> ServerApp:
    """A ServerApp that runs fedge's rounds on Flower's grid.

    It reads from the run's config: ``bundle`` (folder), ``num-rounds``, ``min-clients``, ``seed``,
    ``deadline-s`` and ``out`` (file for the final shared params, safetensors; optional). The run
    lives in the ServerApp's process: Flower ends it when that process dies.

    Args:
        make_strategy: Makes the strategy of one run.
        observer: Called with each event of the run.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = dict(context.run_config)
        bundle = _bundle(config)
        params = Coordinator(
            StockGrid(grid),
            make_strategy(),
            bundle.manifest,
            run_settings(config),
            RUN_ID,
            journal=MemoryJournal(),
            initial=bundle.initial_params(),
            observer=observer,
        ).run()
        if config.get("out"):
            atomic_write(Path(str(config["out"])), tensors.dump(params))

    return app


def client_app(load: LoadData) -> ClientApp:
    """A ClientApp that trains, evaluates and tells statistics through the bundle's engine.

    It reads ``bundle`` (folder) and ``engine`` (``ort`` by default) from the node's config, else
    from the run's. Personal params stay in the node's ``context.state``.

    Args:
        load: Gives the site's data; the client_id in it decides the row order.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        with _Client(load, context) as client:
            return client.train(message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        with _Client(load, context) as client:
            return client.evaluate(message)

    @app.query("statistics")
    def statistics(message: Message, context: Context) -> Message:
        return answer_statistics(message, load(context).train)

    return app


def run_settings(config: dict[str, Any]) -> RunConfig:
    """The run's settings from a Flower run config; its names have dashes.

    Raises:
        ConfigError: If a value is out of range.
    """
    names = {
        "num-rounds": "rounds",
        "min-clients": "min_clients",
        "seed": "seed",
        "deadline-s": "deadline_s",
    }
    return RunConfig(**{ours: config[theirs] for theirs, ours in names.items() if theirs in config})


class _Client:
    """One message's worth of a client: Flower starts a process for each."""

    def __init__(self, load: LoadData, context: Context) -> None:
        config = {**context.run_config, **context.node_config}
        self._bundle = _bundle(config)
        self._manifest = self._bundle.manifest
        self._initial = self._bundle.initial_params()
        self._context, self._data = context, load(context)
        self._engine: TrainingEngine = open_engine(self._bundle, str(config.get("engine", "ort")))

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self._engine.close()

    def train(self, message: Message) -> Message:
        """Answer a train message."""
        config = messages.config_in(message)
        task = local.TrainTask(
            round_num=Group.parse(message.metadata.group_id).round_num,
            config=messages.train_config(self._manifest.train, config),
            seed=messages.run_seed(config),
        )
        shared = messages.params_of(messages.arrays_in(message))
        site = self._site()
        update, kept = local.train(self._engine, self._manifest, self._initial, site, shared, task)
        if kept:
            self._context.state[PERSONAL] = messages.array_record(kept)
        return messages.train_reply(message, update, shared, {})

    def evaluate(self, message: Message) -> Message:
        """Answer an evaluate message."""
        shared = messages.params_of(messages.arrays_in(message))
        rows, metrics = local.evaluate(
            self._engine, self._manifest, self._initial, self._site(), shared
        )
        return messages.metrics_reply(message, rows, metrics)

    def _site(self) -> local.Site:
        record = self._context.state.get(PERSONAL)
        kept: Params = messages.params_of(record) if isinstance(record, ArrayRecord) else {}
        personal = algebra.select(kept, self._manifest.personal) if kept else {}
        return local.prepare(self._engine, self._manifest, self._data, personal)


def _bundle(config: dict[str, Any]) -> Bundle:
    path = str(config.get("bundle", ""))
    if not path:
        raise ConfigError("no bundle is named; set bundle to its folder in the run or node config")
    return Bundle.open(path)
