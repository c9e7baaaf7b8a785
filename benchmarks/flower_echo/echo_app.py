"""Flower's own FedAvg and a client that sends back what it got."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

server = ServerApp()
client = ClientApp()


class TimedFedAvg(FedAvg):
    """FedAvg that notes when each round was aggregated."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
        self.ends: list[float] = []

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:  # noqa: ANN401
        """Average, then look at the clock."""
        result = super().aggregate_train(server_round, replies)
        self.ends.append(time.monotonic())
        return result


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and write when each ended."""
    side = int(context.run_config["side"])
    strategy = TimedFedAvg()
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord({"weight": Array(np.zeros((side, side), np.float32))}),
        num_rounds=int(context.run_config["num-rounds"]),
    )
    Path(str(context.run_config["out"])).write_text(json.dumps(strategy.ends))


@client.train()
def train(message: Message, context: Context) -> Message:  # noqa: ARG001
    """Send the params back."""
    content = RecordDict(
        {
            "arrays": message.content["arrays"],
            "metrics": MetricRecord({"num-examples": 1, "train_loss": 0.0}),
        }
    )
    return Message(content, reply_to=message)
