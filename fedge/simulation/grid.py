"""A fleet in this process: virtual clients over a few engines, no sockets."""

from __future__ import annotations

import concurrent.futures
import numbers
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from flwr.app import ArrayRecord, Message

from fedge import local, tensors
from fedge import params as algebra
from fedge.artifacts.manifest import Manifest
from fedge.engines.base import TrainingEngine
from fedge.errors import ConfigError, DataError, FedgeError, WorkerDiedError
from fedge.flower import messages
from fedge.flower.grid import FleetGrid, Group, message_id_of, node_id_of
from fedge.flower.identity import set_message_id
from fedge.flower.statistics import answer_statistics
from fedge.seeds import derive_seed
from fedge.types import ClientData, ClientId, Metrics, Params, RoundNum
from fedge.update import Update, compute_delta

LocalWork: TypeAlias = Callable[
    [ClientId, ClientData, Params, RoundNum, int], tuple[Params, int, Metrics]
]
"""A researcher's own client: ``(client_id, data, params, round_num, seed)`` gives
``(new params, num_examples, metrics)``; metrics hold at least ``train_loss``."""


class LocalGrid(FleetGrid):
    """Virtual clients that train in worker processes of their own engines.

    Clients are dealt to ``workers`` lanes; each lane has one thread and one engine and takes its
    clients one after another. A client's result is a function of its rows, the params it was sent
    and the seed, so the number of lanes changes nothing but the time.

    A client that fails answers with an error, as a device would. Personal params stay with their
    client from round to round.

    Args:
        manifest: Of the bundle.
        initial: All of the bundle's initial params.
        clients: Who takes part; ids must differ.
        engines: Opens one engine.
        workers: Number of lanes.
        work: A researcher's own client instead of the bundle's training.
    """

    def __init__(
        self,
        manifest: Manifest,
        initial: Params,
        clients: Sequence[ClientData],
        engines: Callable[[], TrainingEngine],
        *,
        workers: int = 1,
        work: LocalWork | None = None,
    ) -> None:
        ids = [c.client_id for c in clients]
        if not clients or len(set(ids)) != len(ids):
            raise ConfigError(f"clients {ids}: wanted at least one, each with an id of its own")
        if workers < 1:
            raise ConfigError(f"workers is {workers}; it must be at least 1")
        self._manifest, self._initial, self._work = manifest, initial, work
        opening = threading.Lock()
        self._lanes = [_Lane(engines, opening) for _ in range(min(workers, len(clients)))]
        ordered = sorted(clients, key=lambda c: c.client_id)
        self._clients = {
            node_id_of(c.client_id): _Virtual(c, self._lanes[i % len(self._lanes)])
            for i, c in enumerate(ordered)
        }
        self._answers: dict[str, concurrent.futures.Future[Message]] = {}
        self._downloads = _Downloads()

    def clients(self) -> dict[int, ClientId]:
        """Everybody: virtual clients are always there."""
        return {node: c.data.client_id for node, c in self._clients.items()}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue each message at its client's lane."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there, one at a time."""
        for message_id in message_ids:
            answer = self._answers.get(message_id)
            if answer is not None and answer.done() and not answer.cancelled():
                yield answer.result()

    def ready(self, ids: Iterable[str]) -> set[str]:
        """Those that are answered."""
        return {i for i in ids if i in self._answers and self._answers[i].done()}

    def wait(self, ids: Iterable[str], timeout_s: float) -> set[str]:
        """Wait for the lanes."""
        wanted = list(ids)
        known = [self._answers[i] for i in wanted if i in self._answers]
        concurrent.futures.wait(known, timeout_s)
        return self.ready(wanted)

    def cancel(self, ids: Iterable[str]) -> None:
        """Forget tasks and replies."""
        for message_id in ids:
            answer = self._answers.pop(message_id, None)
            if answer is not None:
                answer.cancel()

    def personal(self, client_id: ClientId) -> Params:
        """A client's personal params; the bundle's initial ones before its first training."""
        initial = algebra.select(self._initial, self._manifest.personal)
        return {**initial, **self._clients[node_id_of(client_id)].personal}

    def close(self) -> None:
        """Drop what is queued and end the engines."""
        self.cancel(list(self._answers))
        for lane in self._lanes:
            lane.close()

    def __enter__(self) -> LocalGrid:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _push(self, message: Message) -> str:
        meta = message.metadata
        message_id = message_id_of(meta.group_id, meta.dst_node_id)
        if message_id in self._answers:
            return message_id
        client = self._clients.get(meta.dst_node_id)
        if client is None:
            raise ConfigError(f"a message goes to node {meta.dst_node_id}, which is no client here")
        set_message_id(message, message_id)
        self._answers[message_id] = client.lane.submit(lambda e: self._answer(message, client, e))
        return message_id

    def _answer(self, message: Message, client: _Virtual, lane: _Lane) -> Message:
        """Do what a message asks; whatever goes wrong becomes the client's error reply."""
        kinds = {
            messages.TRAIN: self._train,
            messages.EVALUATE: self._evaluate,
            messages.STATISTICS: self._statistics,
        }
        try:
            return kinds[message.metadata.message_type](message, client, lane)
        except WorkerDiedError as exc:
            lane.drop_engine()
            return messages.error_reply(message, str(exc))
        except FedgeError as exc:
            return messages.error_reply(message, str(exc))
        except Exception as exc:  # noqa: BLE001 - a researcher's function may raise anything
            return messages.error_reply(message, f"{type(exc).__name__}: {exc}")

    def _train(self, message: Message, client: _Virtual, lane: _Lane) -> Message:
        started = time.perf_counter()
        shared, size = self._downloads.read(messages.arrays_in(message))
        config = messages.config_in(message)
        task = local.TrainTask(
            round_num=Group.parse(message.metadata.group_id).round_num,
            config=messages.train_config(self._manifest.train, config),
            seed=messages.run_seed(config),
        )
        if self._work is not None:
            update, kept = self._own_work(self._work, client, shared, task)
        else:
            site = self._site(client, lane)
            engine = lane.engine()
            update, kept = local.train(engine, self._manifest, self._initial, site, shared, task)
        client.personal = kept
        extra = {
            "bytes_down": size,
            "bytes_up": len(update.to_bytes()),
            "seconds": time.perf_counter() - started,
        }
        return messages.train_reply(message, update, shared, extra)

    def _own_work(
        self, work: LocalWork, client: _Virtual, shared: Params, task: local.TrainTask
    ) -> tuple[Update, Params]:
        if task.config.proximal_mu:
            raise ConfigError("a local function of your own is not told proximal_mu; use FedAvg")
        name = client.data.client_id
        before = {**self._initial, **client.personal, **shared}
        seed = derive_seed(task.seed, task.round_num, name, "batches")
        given = algebra.copy(before)
        returned = work(name, client.data, given, task.round_num, seed)
        after, num_examples, metrics = _three(returned)
        after = {**before, **_fitting(after, before)}
        delta = compute_delta(after, {n: shared[n] for n in self._manifest.shared})
        update = Update(name, task.round_num, delta, num_examples, messages.finite(metrics))
        return update, algebra.select(after, self._manifest.personal)

    def _evaluate(self, message: Message, client: _Virtual, lane: _Lane) -> Message:
        started = time.perf_counter()
        shared, size = self._downloads.read(messages.arrays_in(message))
        site = self._site(client, lane)
        rows, metrics = local.evaluate(lane.engine(), self._manifest, self._initial, site, shared)
        extra = {"bytes_down": size, "seconds": time.perf_counter() - started}
        return messages.metrics_reply(message, rows, {**metrics, **extra})

    def _statistics(self, message: Message, client: _Virtual, _: _Lane) -> Message:
        return answer_statistics(message, client.data.train)

    def _site(self, client: _Virtual, lane: _Lane) -> local.Site:
        """The client's rows, preprocessed once, with its personal params of now."""
        if client.site is None:
            client.site = local.prepare(lane.engine(), self._manifest, client.data)
        site = client.site
        return local.Site(site.client_id, site.train, site.test, client.personal)


def _three(returned: object) -> tuple[Params, int, Metrics]:
    """What a researcher's function returned, if it has the parts it is to have."""
    wanted = (Mapping, numbers.Integral, Mapping)
    parts = returned if isinstance(returned, tuple) else (returned,)
    if len(parts) != 3 or not all(map(isinstance, parts, wanted)):
        seen = ", ".join(type(p).__name__ for p in parts)
        raise DataError(
            f"local returned ({seen}); wanted (params, num_examples, metrics): arrays by name, a "
            "whole number, and numbers by name"
        )
    params, num_examples, metrics = parts
    return dict(params), int(num_examples), dict(metrics)


def _fitting(found: Params, wanted: Params) -> Params:
    """What a researcher's function returned, as arrays of the model's shapes and dtypes."""
    unknown = sorted(found.keys() - wanted.keys())
    if unknown:
        raise DataError(f"local returned {unknown[0]!r}; the params are {', '.join(wanted)}")
    arrays = {n: np.asarray(v, wanted[n].dtype) for n, v in found.items()}
    for name, array in arrays.items():
        if array.shape != wanted[name].shape:
            raise DataError(
                f"local returned {name} {list(array.shape)}; wanted {list(wanted[name].shape)}"
            )
    return arrays


class _Virtual:
    """A client: its rows, its lane, and what it keeps between rounds."""

    def __init__(self, data: ClientData, lane: _Lane) -> None:
        self.data, self.lane = data, lane
        self.site: local.Site | None = None
        self.personal: Params = {}


class _Lane:
    """One thread with one engine, opened when first needed and again after its worker died."""

    def __init__(self, engines: Callable[[], TrainingEngine], opening: threading.Lock) -> None:
        self._open, self._opening = engines, opening
        self._engine: TrainingEngine | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "fedge-lane")

    def submit(self, work: Callable[[_Lane], Message]) -> concurrent.futures.Future[Message]:
        """Queue work for this lane's thread."""
        return self._pool.submit(work, self)

    def engine(self) -> TrainingEngine:
        """This lane's engine; for its own thread only."""
        if self._engine is None:
            with self._opening:  # one at a time: "auto" measures the engines' speed
                self._engine = self._open()
        return self._engine

    def drop_engine(self) -> None:
        """Forget an engine whose worker died."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def close(self) -> None:
        """End the thread and its engine."""
        self._pool.submit(self.drop_engine)
        self._pool.shutdown(wait=True)


class _Downloads:
    """The params of the newest instruction, decoded once for all clients that get them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: tuple[ArrayRecord, Params, int] | None = None

    def read(self, record: ArrayRecord) -> tuple[Params, int]:
        """Params, and the bytes they would have on the link."""
        with self._lock:
            if self._newest is None or self._newest[0] is not record:
                params = messages.params_of(record)
                self._newest = (record, params, len(tensors.dump(params)))
            return self._newest[1], self._newest[2]
