"""What our Flower messages hold.

``train``
    Instruction: ``arrays`` (shared params, full values), ``config`` (see below).
    Reply: ``arrays`` (base + delta of the shared params), ``metrics`` (num-examples, train_loss).
``evaluate``
    Instruction: the same. Reply: ``metrics`` (num-examples, loss, the loss's score).
``query.statistics``
    Instruction: ``config``. Reply: ``arrays`` (sum and sumsq of each input's columns, float64),
    ``metrics`` (num-examples).

Metrics of a reply may hold more (``auc``, ``bytes_up``, ``bytes_down``, ``seconds``): the
coordinator keeps these for the run's table and shows the strategy only the ones above, because
Flower's strategies refuse replies whose metric names differ.

``config`` holds ``seed`` (the run's seed, decimal text), ``server-round`` and any of
:data:`fedge.config.OVERRIDES`, which override the manifest's training settings; ``proximal-mu``,
as Flower's FedProx writes it, is ``proximal_mu``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedge.config import OVERRIDES, TrainConfig
from fedge.errors import ConfigError, UpdateError
from fedge.flower.identity import ensure_identity
from fedge.types import Array, Metrics, Params
from fedge.update import Update, apply_delta

TRAIN, EVALUATE, STATISTICS = "train", "evaluate", "query.statistics"
ARRAYS, CONFIG, METRICS, WEIGHT = "arrays", "config", "metrics", "num-examples"
_FLOWERS_WORDS = {"proximal-mu": "proximal_mu"}
CLIENT_FAILED = 2  # Flower's ErrorCode.CLIENT_APP_RAISED_EXCEPTION


def array_record(params: Params) -> ArrayRecord:
    """Tensors as Flower's record, in the dictionary's order."""
    return ArrayRecord({n: FlowerArray(np.asarray(v)) for n, v in params.items()})


def params_of(record: ArrayRecord) -> Params:
    """Flower's record as tensors."""
    return {name: array.numpy() for name, array in record.items()}


def arrays_in(message: Message) -> ArrayRecord:
    """The one array record of a message.

    Raises:
        UpdateError: If there is none, or more than one.
    """
    records = list(message.content.array_records.values())
    if len(records) != 1:
        raise UpdateError(f"reply refused: it holds {len(records)} array records, wanted 1")
    return records[0]


def metrics_in(message: Message) -> Metrics:
    """The scalar metrics of a reply.

    Raises:
        UpdateError: If there is not exactly one metric record, or a value is no number.
    """
    records = list(message.content.metric_records.values())
    if len(records) != 1:
        raise UpdateError(f"reply refused: it holds {len(records)} metric records, wanted 1")
    values: dict[str, Any] = dict(records[0].items())
    lists = sorted(n for n, v in values.items() if isinstance(v, list))
    if lists:
        raise UpdateError(f"reply refused: metric {', '.join(lists)} is a list, wanted a number")
    return values


def config_in(message: Message) -> dict[str, Any]:
    """The scalars an instruction carries: ``seed`` and any overrides.

    Raises:
        ConfigError: For a setting that fedge's clients would not obey.
    """
    records = list(message.content.config_records.values())
    given: dict[str, Any] = dict(records[0].items()) if records else {}
    given.pop("server-round", None)
    values = {_FLOWERS_WORDS.get(n, n): v for n, v in given.items()}
    unknown = sorted(set(values) - {"seed", *OVERRIDES})
    if unknown:
        raise ConfigError(
            f"the strategy asks clients for {', '.join(unknown)}, which they cannot do; "
            f"they know seed, {', '.join(OVERRIDES)}"
        )
    return values


def train_config(default: TrainConfig, config: Mapping[str, Any]) -> TrainConfig:
    """The local settings of one task: the manifest's, with the task's overrides."""
    return default.override(config)


def run_seed(config: Mapping[str, Any]) -> int:
    """The run's seed in a task's config; 0 if it names none."""
    return int(config.get("seed", 0))


def instruction_config(seed: int) -> ConfigRecord:
    """What the coordinator hands to a strategy's ``configure_*``."""
    return ConfigRecord({"seed": str(seed)})


def train_reply(message: Message, update: Update, base: Params, extra: Metrics) -> Message:
    """A client's update as the reply a strategy reads: base + delta.

    Args:
        message: The instruction.
        update: Its result.
        base: The shared params of the instruction.
        extra: Metrics for the table alone, such as ``bytes_up``; what is not finite is left out.
    """
    ensure_identity()
    metrics = _record(update.num_examples, {**update.metrics, **extra})
    content = RecordDict(
        {
            ARRAYS: array_record(apply_delta(base, update.delta)),
            METRICS: metrics,
        }
    )
    return Message(content, reply_to=message)


def metrics_reply(
    message: Message, num_examples: int, metrics: Metrics, arrays: dict[str, Array] | None = None
) -> Message:
    """A reply of numbers, with small arrays for statistics; what is not finite is left out."""
    ensure_identity()
    content = RecordDict({METRICS: _record(num_examples, metrics)})
    if arrays is not None:
        content[ARRAYS] = array_record(arrays)
    return Message(content, reply_to=message)


def error_reply(message: Message, reason: str) -> Message:
    """A reply that says why there is no result."""
    ensure_identity()
    return Message(Error(code=CLIENT_FAILED, reason=reason), reply_to=message)


def finite(metrics: Mapping[str, float]) -> Metrics:
    """The metrics that are numbers: an AUC of one class is NaN, and JSON has no NaN."""
    return {n: float(v) for n, v in metrics.items() if math.isfinite(v)}


def _record(num_examples: int, metrics: Metrics) -> MetricRecord:
    """The weight comes last: no metric of a stranger's choosing may pass for it."""
    return MetricRecord({**finite(metrics), WEIGHT: num_examples})
