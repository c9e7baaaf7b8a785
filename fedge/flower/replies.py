"""From a phase's tasks to what a strategy may see of their replies."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from flwr.app import Message, MetricRecord, RecordDict

from fedge.errors import ConfigError, FedgeError, UpdateError
from fedge.flower import messages
from fedge.flower.grid import FleetGrid
from fedge.rounds import Row
from fedge.types import ClientId, Metrics, Params, RoundNum
from fedge.update import Update, check_update

NO_REPLY = "no reply before the deadline"


@dataclass(frozen=True)
class Task:
    """One message under way: to whom, and the shared params it carries."""

    client_id: ClientId
    base: Params


Judge: TypeAlias = Callable[[Message, Task], tuple[Row, Message]]


class Replies:
    """A phase's replies in client_id order, pulled, judged and handed over one at a time.

    What fails is left out and noted, so that no single client can end a run.

    Attributes:
        rows: One per reply handed over.
        dropped: Client -> why its reply was not.
    """

    def __init__(self, grid: FleetGrid, tasks: Mapping[str, Task], judge: Judge) -> None:
        self._grid, self._judge = grid, judge
        self._tasks = sorted(tasks.items(), key=lambda item: item[1].client_id)
        self.rows: list[Row] = []
        self.dropped: dict[ClientId, str] = {}

    def __iter__(self) -> Iterator[Message]:
        self.rows, self.dropped = [], {}
        for message_id, task in self._tasks:
            reply = next(iter(self._grid.pull_messages([message_id])), None)
            try:
                row, cleaned = self._judged(reply, task)
            except UpdateError as exc:
                self.dropped[task.client_id] = str(exc)
                continue
            self.rows.append(row)
            yield cleaned

    def _judged(self, reply: Message | None, task: Task) -> tuple[Row, Message]:
        if reply is None:
            raise UpdateError(NO_REPLY)
        if reply.has_error():
            raise UpdateError(reply.error.reason)
        try:
            return self._judge(reply, task)
        except FedgeError:
            raise
        except Exception as exc:  # the reply's bytes are a stranger's
            raise UpdateError(f"reply refused: {type(exc).__name__}: {exc}") from exc


def judge_train(round_num: RoundNum, gate: Callable[[Update], None] | None) -> Judge:
    """A judge for train replies.

    Args:
        round_num: Of the phase.
        gate: Raises UpdateError for a delta that must not count; None if the grid did that.
    """

    def judge(reply: Message, task: Task) -> tuple[Row, Message]:
        metrics = messages.metrics_in(reply)
        weight = _weight(metrics)
        if gate is not None:
            local = messages.params_of(messages.arrays_in(reply))
            delta = _delta(local, task.base)
            gate(Update(task.client_id, round_num, delta, weight, messages.finite(metrics)))
        return _row(task, weight, metrics), _cleaned(reply, weight, metrics, ("train_loss",))

    return judge


def judge_scores(score: str) -> Judge:
    """A judge for evaluate replies; ``score`` is ``accuracy``, ``rmse``, or "": the loss alone."""
    keys = ("loss", score) if score else ("loss",)

    def judge(reply: Message, task: Task) -> tuple[Row, Message]:
        metrics = messages.metrics_in(reply)
        weight = _weight(metrics)
        return _row(task, weight, metrics), _cleaned(reply, weight, metrics, keys)

    return judge


def gate_for(shapes: dict[str, tuple[int, ...]], max_norm: float) -> Callable[[Update], None]:
    """The gate as a function of one update."""
    return lambda update: check_update(update, shapes, max_norm)


@contextlib.contextmanager
def strategy_call(what: str, seed: int) -> Iterator[None]:
    """Call into a strategy: Flower's draws seeded, its log lines held back, its errors ours.

    Flower's strategies draw nodes with the global ``random``; its state is put back afterwards.

    Raises:
        ConfigError: If the strategy fails.
    """
    logger = logging.getLogger("flwr")
    level, drawn = logger.level, random.getstate()
    random.seed(seed)
    if not logging.getLogger("fedge.rounds").isEnabledFor(logging.DEBUG):
        logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    except FedgeError:
        raise
    except Exception as exc:
        raise ConfigError(f"the strategy failed in {what}: {type(exc).__name__}: {exc}") from exc
    finally:
        logger.setLevel(level)
        random.setstate(drawn)


def _delta(local: Params, base: Params) -> Params:
    """local − base where they fit; what does not fit is left for the gate to name."""
    return {
        n: v - base[n] if n in base and (v.shape, v.dtype) == (base[n].shape, base[n].dtype) else v
        for n, v in local.items()
    }


def _weight(metrics: Metrics) -> int:
    value = metrics.pop(messages.WEIGHT, None)
    if value is None or value != value or int(value) != value or value < 1:
        raise UpdateError(f"reply refused: {messages.WEIGHT} is {value}, wanted a whole number ≥ 1")
    return int(value)


def _row(task: Task, weight: int, metrics: Metrics) -> Row:
    """One client's line; what it calls its metrics cannot make the line another's."""
    return {**messages.finite(metrics), "client_id": task.client_id, "num_examples": weight}


def _cleaned(reply: Message, weight: int, metrics: Metrics, keys: tuple[str, ...]) -> Message:
    """The reply with exactly the metrics every client gives."""
    known = messages.finite(metrics)
    missing = [k for k in keys if k not in known]
    if missing:
        raise UpdateError(f"reply refused: it lacks a finite {', '.join(missing)}")
    numbers = MetricRecord({messages.WEIGHT: weight, **{k: known[k] for k in keys}})
    content = RecordDict({messages.METRICS: numbers})
    for record in reply.content.array_records.values():
        content[messages.ARRAYS] = record
    cleaned = copy.copy(reply)  # the grid's own message stays whole, to be pulled again
    cleaned.content = content
    return cleaned
