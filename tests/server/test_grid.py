"""Flower's grid over the link: real messages, a device that answers by hand."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedge import tensors
from fedge.errors import StateError
from fedge.flower import messages
from fedge.flower.grid import message_id_of, node_id_of
from fedge.flower.identity import ensure_identity
from fedge.wire.v1 import link_pb2 as pb
from fedge_server.grid import LinkGrid, StoppedError

BASE = {"weight": np.full((1, 30), 2, np.float32), "bias": np.zeros(1, np.float32)}
GROUP = "run-1/1/train"


def instruction(client_id: str, group: str = GROUP, kind: str = "train") -> Message:
    ensure_identity()
    content = RecordDict({"config": messages.instruction_config(7)})
    if kind != messages.STATISTICS:
        content["arrays"] = messages.array_record(BASE)
    return Message(content, node_id_of(client_id), kind, group_id=group)


def test_a_train_task_goes_out_and_comes_back_as_base_plus_delta(served: Any, device: Any) -> None:
    one = device()
    link = one.link()
    session = link.session()
    session.next("welcome")
    (task_id,) = served.grid.push_messages([instruction("clinic-1")])
    assert task_id == message_id_of(GROUP, node_id_of("clinic-1"))
    task = session.next("task")
    assert (task.task_id, task.run_id, task.round_num) == (task_id, "run-1", 1)
    assert task.config_json == b'{"seed":"7"}'
    assert task.bundle_digest == served.state.registry.newest()
    assert link.download(task.params_digest)
    assert served.grid.ready([task_id]) == set()
    assert list(served.grid.pull_messages([task_id])) == []
    link.upload(*one.parts(task_id, one.update(task)))
    assert served.grid.wait([task_id], 5) == {task_id}
    for _ in range(2):  # replies stay until the task is cancelled
        (reply,) = served.grid.pull_messages([task_id])
        arrays = messages.params_of(messages.arrays_in(reply))
        np.testing.assert_array_equal(arrays["weight"], BASE["weight"] + np.float32(0.5))
        metrics = messages.metrics_in(reply)
        assert (metrics["num-examples"], metrics["train_loss"]) == (10, 0.5)
        assert metrics["bytes_up"] > 120
    served.grid.cancel([task_id])
    assert list(served.grid.pull_messages([task_id])) == []
    assert not list((served.state.path / "blobs" / "updates").iterdir())


def test_pushing_again_after_a_restart_finds_the_answer(served: Any, device: Any) -> None:
    one = device()
    (task_id,) = served.grid.push_messages([instruction("clinic-1")])
    session = one.link().session()
    one.link().upload(*one.parts(task_id, one.update(session.next("task"))))
    restarted = LinkGrid(served.state.store, served.state.blobs)
    restarted.bundle_digest = served.grid.bundle_digest
    assert list(restarted.push_messages([instruction("clinic-1")])) == [task_id]
    (reply,) = restarted.pull_messages([task_id])
    assert messages.metrics_in(reply)["num-examples"] == 10


def test_params_of_a_cohort_are_stored_once(served: Any, device: Any) -> None:
    for name in ("a", "b", "c"):
        device(name)
    ids = served.grid.push_messages([instruction(n) for n in ("a", "b", "c")])
    tasks = [served.state.store.task(i) for i in ids]
    assert [t.client_id for t in tasks] == ["a", "b", "c"]
    assert len({t.params_digest for t in tasks}) == 1


def test_failures_and_withdrawals_are_replies_with_an_error(served: Any, device: Any) -> None:
    session = device().link().session()
    (failed,) = served.grid.push_messages([instruction("clinic-1")])
    session.next("task")
    session.send(pb.DeviceEvent(failed=pb.TaskFailed(task_id=failed, error="DataError")))
    assert served.grid.wait([failed], 5) == {failed}
    (reply,) = served.grid.pull_messages([failed])
    assert "DataError" in reply.error.reason
    (gone,) = served.grid.push_messages([instruction("clinic-1", "run-1/2/train")])
    served.grid.cancel([gone])
    served.grid.push_messages([instruction("clinic-1", "run-1/2/train")])
    (reply,) = served.grid.pull_messages([gone])
    assert "withdrawn" in reply.error.reason


def test_statistics_come_back_as_arrays(served: Any, device: Any) -> None:
    session = device().link().session()
    message = instruction("clinic-1", "run-1/0/statistics", messages.STATISTICS)
    (task_id,) = served.grid.push_messages([message])
    assert session.next("task").params_digest == ""
    sums = {"sum": np.arange(30.0), "sumsq": np.ones(30)}
    result = pb.TaskResult(task_id=task_id, num_examples=12, tensors=tensors.dump(sums))
    session.send(pb.DeviceEvent(result=result))
    served.grid.wait([task_id], 5)
    (reply,) = served.grid.pull_messages([task_id])
    arrays = messages.params_of(messages.arrays_in(reply))
    np.testing.assert_array_equal(arrays["sum"], sums["sum"])
    assert messages.metrics_in(reply)["num-examples"] == 12


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        tensors.dump({"sum": np.ones(30)}),
        tensors.dump({"sum": np.ones(30), "sumsq": np.ones(29)}),
        tensors.dump({"sum": np.ones(30), "sumsq": np.ones(30, np.float32)}),
        tensors.dump({"sum": np.ones(30), "sumsq": np.full(30, np.nan)}),
        tensors.dump({"sum": np.ones(30), "sumsq": np.full(30, 1e300)}),
        tensors.dump({"sum": np.ones(30), "sumsq": np.ones(30), "rows": np.ones(9)}),
    ],
)
def test_statistics_of_a_broken_device_stop_nobody(served: Any, device: Any, data: bytes) -> None:
    session = device().link().session()
    message = instruction("clinic-1", "run-1/0/statistics", messages.STATISTICS)
    (task_id,) = served.grid.push_messages([message])
    session.next("task")
    result = pb.TaskResult(task_id=task_id, num_examples=12, tensors=data)
    session.send(pb.DeviceEvent(result=result))
    assert served.grid.wait([task_id], 5) == {task_id}
    (reply,) = served.grid.pull_messages([task_id])
    assert reply.has_error()


def test_waiting_ends_with_its_time_or_with_the_server(served: Any, device: Any) -> None:
    device()
    ids = served.grid.push_messages([instruction("clinic-1")])
    began = time.monotonic()
    assert served.grid.wait(ids, 0.1) == set()
    assert time.monotonic() - began < 1
    threading.Timer(0.1, served.grid.stop).start()
    with pytest.raises(StoppedError):
        served.grid.wait(ids, 60)


def test_a_message_to_nobody_is_refused(served: Any) -> None:
    with pytest.raises(StateError, match="no enrolled device"):
        served.grid.push_messages([instruction("ghost")])
