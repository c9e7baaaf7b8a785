"""Federated averaging, streamed.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data"
(AISTATS 2017). A Flower strategy: what it does is Flower's FedAvg, but replies are taken one at a
time into a float64 mean, so that memory does not grow with the cohort, and it asks for no
minimum of nodes, because the run's ``min_clients`` says that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedge.aggregation import WeightedMean


class FedAvg(FlowerFedAvg):
    """The mean of the clients' params, weighted by their numbers of examples.

    Deterministic for replies in a given order; the coordinator hands them over in client_id order.

    Args:
        settings: Any of Flower's FedAvg; the ``min_*`` ones default to 1 here.
    """

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - handed to Flower as they are
        least = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
        super().__init__(**{**least, **settings})

    def aggregate_train(
        self,
        server_round: int,  # noqa: ARG002 - Flower's signature
        replies: Iterable[Message],
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average replies as they come; those with an error are passed over."""
        mean, metrics = WeightedMean(), []
        for reply in replies:
            if reply.has_error():
                continue
            arrays = next(iter(reply.content.array_records.values()))
            numbers = next(iter(reply.content.metric_records.values()))
            weight = float(numbers[self.weighted_by_key])  # type: ignore[arg-type]
            mean.add({n: a.numpy() for n, a in arrays.items()}, weight)
            metrics.append(RecordDict({"metrics": numbers}))
        if not metrics:
            return None, None
        new = ArrayRecord({n: Array(np.asarray(v)) for n, v in mean.result().items()})
        return new, self.train_metrics_aggr_fn(metrics, self.weighted_by_key)
