"""Flower's grid over the link: real messages, a device that answers by hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedge import rounds, tensors
from fedge.config import RunConfig
from fedge.errors import StateError
from fedge.flower import Coordinator, messages
from fedge.flower.grid import message_id_of, node_id_of
from fedge.flower.identity import ensure_identity
from fedge.strategies import FedAvg
from fedge.wire.v1 import link_pb2 as pb
from fedge_server.grid import LinkGrid, StoppedError
from fedge_server.journal import StoreJournal

BASE = {"weight": np.full((1, 30), 2, np.float32), "bias": np.zeros(1, np.float32)}
GROUP = "run-1/1/train"
HELLO: dict[str, Any] = {"wire_version": 1, "mode": pb.MODE_FEDERATED, "has_data": True}


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


def test_who_is_not_counted_is_told_so(served: Any, device: Any) -> None:
    """An update that arrives while the others are being reduced must not be called accepted."""
    early, late = device("b"), device("a")
    sessions = {d.name: d.link().session(pb.Hello(**HELLO)) for d in (early, late)}
    for session in sessions.values():
        session.next("welcome")
    verdicts = []

    class Slow(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            result = super().aggregate_train(server_round, replies)
            task = sessions["a"].next("task")
            reply = late.link().upload(*late.parts(task.task_id, late.update(task)))
            verdicts.append(reply.verdict)
            return result

    def answer() -> None:
        task = sessions["b"].next("task")
        early.link().upload(*early.parts(task.task_id, early.update(task)))

    answering = threading.Thread(target=answer)
    answering.start()
    bundle = served.state.registry.open(served.state.registry.newest())
    events: list[rounds.Event] = []
    Coordinator(
        served.grid,
        Slow(),
        bundle.manifest,
        RunConfig(rounds=1, min_clients=1, deadline_s=1.5, evaluate=False),
        "run-1",
        journal=StoreJournal(served.state.store, served.state.blobs, served.link.wake),
        initial=bundle.initial_params(),
        observer=events.append,
    ).run()
    answering.join()
    (commit,) = [e for e in events if isinstance(e, rounds.RoundCommitted)]
    assert [row["client_id"] for row in commit.rows] == ["b"]
    assert commit.dropped == {"a": "no reply before the deadline"}
    assert verdicts == [pb.VERDICT_LATE]
    assert not list((served.state.path / "blobs" / "updates").iterdir())


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
