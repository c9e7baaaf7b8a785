"""What an admitted device may try: each attempt fails, and costs nobody else anything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
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
from fedge.platform import commit_file
from fedge.wire import serde
from fedge.wire.v1 import link_pb2 as pb
from fedge_server import cli_fleet, link
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


def test_an_upload_that_stalls_is_ended_and_leaves_nothing(
    served: Any, device: Any, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "CHUNK_TIMEOUT_S", 0.2)
    one, work = device(), task("clinic-1")
    header, _ = one.parts(work.task_id, one.update(work))
    stall = threading.Event()

    def parts(*first: pb.UploadPart) -> Iterator[pb.UploadPart]:
        yield from first
        stall.wait(10)

    for first in ((), (header,)):
        with pytest.raises(grpc.RpcError) as failure:
            one.link()._stub.Upload(parts(*first), timeout=5)
        assert failure.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert "silent" in (failure.value.details() or "")
    stall.set()
    assert not list((served.state.path / "blobs" / "tmp").iterdir())


def test_a_device_has_few_uploads_at_a_time(served: Any, device: Any, task: Any) -> None:
    one, work = device(), task("clinic-1")
    parts = one.parts(work.task_id, one.update(work))
    stall, stub = threading.Event(), one.link()._stub

    def stalled() -> Iterator[pb.UploadPart]:
        yield parts[0]
        stall.wait(10)

    waiting = [stub.Upload.future(stalled(), timeout=10) for _ in range(link.MAX_UPLOADS)]
    until(lambda: served.link._uploads["clinic-1"] == link.MAX_UPLOADS)
    with pytest.raises(grpc.RpcError) as failure:
        stub.Upload(iter(parts), timeout=5)
    assert failure.value.code() == grpc.StatusCode.UNAVAILABLE
    for call in waiting:
        call.cancel()
    stall.set()
    until(lambda: not served.link._uploads)
    assert stub.Upload(iter(parts), timeout=5).verdict == pb.VERDICT_ACCEPTED


def test_hanging_up_while_an_update_is_recorded_does_not_lose_it(
    served: Any, device: Any, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = threading.Event()

    def slow(*args: Any) -> None:
        arrived.set()
        time.sleep(0.5)
        commit_file(*args)

    monkeypatch.setattr(serde, "commit_file", slow)
    one, work = device(), task("clinic-1")
    data = one.update(work)
    call = one.link()._stub.Upload.future(iter(one.parts(work.task_id, data)))
    assert arrived.wait(5)
    call.cancel()
    until(lambda: served.state.store.result(work.task_id) is not None)
    path = served.state.blobs.update_path(
        work.task_id, served.state.store.result(work.task_id).digest
    )
    assert path.read_bytes() == data
    assert not list((served.state.path / "blobs" / "tmp").iterdir())


def test_empty_chunks_do_not_keep_an_upload_open(device: Any, task: Any) -> None:
    one, work = device(), task("clinic-1")
    data = one.update(work)
    empty = pb.UploadPart(chunk=pb.Chunk(offset=0, total_bytes=len(data)))
    with pytest.raises(grpc.RpcError) as failure:
        one.link().upload(one.parts(work.task_id, data)[0], empty)
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "empty" in (failure.value.details() or "")


def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
