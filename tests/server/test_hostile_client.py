"""What an admitted device may try: each attempt fails, and costs nobody else anything."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedge import rounds
from fedge.flower import messages
from fedge.flower.grid import node_id_of
from fedge.flower.identity import ensure_identity
from fedge.flower.replies import Task, judge_scores, judge_train
from fedge.wire import serde
from fedge.wire.v1 import link_pb2 as pb
from fedge_server import cli_fleet
from fedge_server.report import Reporter

BASE = {"weight": np.zeros((1, 30), np.float32), "bias": np.zeros(1, np.float32)}


def hello_of(**changes: Any) -> pb.Hello:
    return pb.Hello(wire_version=serde.WIRE_VERSION, mode=pb.MODE_FEDERATED, **changes)


def instruction(client_id: str) -> Message:
    ensure_identity()
    content = RecordDict({"config": messages.instruction_config(0)})
    content["arrays"] = messages.array_record(BASE)
    return Message(content, node_id_of(client_id), "train", group_id="run-1/1/train")


@pytest.mark.parametrize("claimed", [1.7e308, 1e18, 0.0, -5.0])
def test_a_metric_cannot_pass_for_the_weight(served: Any, device: Any, claimed: float) -> None:
    one = device()
    (task_id,) = served.grid.push_messages([instruction("clinic-1")])
    task = one.link().session().next("task")
    metrics = {"train_loss": 0.5, "num-examples": claimed}
    one.link().upload(*one.parts(task_id, one.update(task, metrics=metrics)))
    (reply,) = served.grid.pull_messages([task_id])
    assert messages.metrics_in(reply)["num-examples"] == 10


@pytest.mark.parametrize("judge", [judge_train(1, None), judge_scores("accuracy")])
def test_a_metric_cannot_pass_for_another_clients_name(judge: Any) -> None:
    told = {"client_id": 7.0, "num_examples": 1e9, "train_loss": 1, "loss": 1, "accuracy": 1}
    reply = messages.metrics_reply(instruction("clinic-1"), 10, told, BASE)
    row, _ = judge(reply, Task("clinic-1", BASE))
    assert (row["client_id"], row["num_examples"]) == ("clinic-1", 10)


ESCAPE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e"


@pytest.mark.parametrize(
    "event",
    [
        pb.DeviceEvent(hello=hello_of(engine=ESCAPE)),
        pb.DeviceEvent(hello=hello_of(engine="ort\nclinic-9  connected")),
        pb.DeviceEvent(hello=hello_of(facts={"os": ESCAPE})),
        pb.DeviceEvent(failed=pb.TaskFailed(task_id="a", error=ESCAPE)),
        pb.DeviceEvent(failed=pb.TaskFailed(task_id="a", message=ESCAPE)),
        pb.DeviceEvent(result=pb.TaskResult(task_id="a", metrics={ESCAPE: 1.0})),
    ],
)
def test_control_characters_end_the_session(device: Any, event: pb.DeviceEvent) -> None:
    session = device().link().session()
    session.next("welcome")
    session.send(event)
    assert session.ended() == grpc.StatusCode.INVALID_ARGUMENT


def test_nothing_a_device_says_commands_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    retried = rounds.RoundRetried(1, 1, 0, 2, {"clinic-1": f"DataError: {ESCAPE}"})
    Reporter(as_json=False).observe(retried)
    cli_fleet._show([{"engine": f"ort{ESCAPE}\n"}], False, ("engine",))
    shown = capsys.readouterr().out
    assert "owned" in shown
    assert shown.replace("\n", "").isprintable()
    assert shown.count("\n") == 3
