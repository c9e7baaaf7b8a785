"""The device link over real mutual TLS on loopback."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import grpc
import numpy as np
import pytest

from fedge import rounds
from fedge.artifacts.bundle import parse_signed
from fedge.config import RunConfig
from fedge.update import Update
from fedge.wire import serde
from fedge.wire.v1 import link_pb2 as pb
from fedge_server.inbox import Inbox
from fedge_server.store import RunRow


def code_of(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as failure:
        call()
    return failure.value.code()


def test_bundle_is_found_by_digest_and_verifies(served: Any, device: Any) -> None:
    link = device().link()
    digest = link.session().next("welcome").bundle_digest
    signed = link.download(digest)
    assert hashlib.sha256(signed[:-64]).hexdigest() == digest
    signer = served.state.fleet.signer_public_key.hex()
    manifest = parse_signed(signed[:-64], signed[-64:], signer)
    for entry in manifest.files.values():
        assert hashlib.sha256(link.download(entry.sha256)).hexdigest() == entry.sha256


def test_download_resumes_at_an_offset(served: Any, device: Any) -> None:
    link = device().link()
    digest = served.state.registry.newest()
    whole = link.download(digest)
    assert link.download(digest, 100) == whole[100:]
    assert link.download(digest, len(whole)) == b""
    assert (
        code_of(lambda: link.download(digest, len(whole) + 1)) == grpc.StatusCode.INVALID_ARGUMENT
    )


def test_only_content_meant_for_a_device_is_readable(served: Any, device: Any, task: Any) -> None:
    mine, other = device("clinic-1").link(), device("clinic-2").link()
    secret = served.state.blobs.put(b"strategy state")
    work = task("clinic-1")
    assert mine.download(work.params_digest)
    for digest in (work.params_digest, secret, "0" * 64):
        assert code_of(lambda d=digest: other.download(d)) == grpc.StatusCode.NOT_FOUND
    for broken in ("", "../keys/ca.key", "A" * 64):
        assert code_of(lambda d=broken: other.download(d)) == grpc.StatusCode.INVALID_ARGUMENT


def test_task_is_pushed_at_once_and_again_after_reconnecting(device: Any, task: Any) -> None:
    one = device()
    session = one.link().session()
    session.next("welcome")
    began = time.monotonic()
    work = task("clinic-1")
    assert session.next("task").task_id == work.task_id
    assert time.monotonic() - began < 1
    session.close()
    assert one.link().session().next("task").task_id == work.task_id


def test_update_is_accepted_once(served: Any, device: Any, task: Any) -> None:
    one = device()
    work, link = task("clinic-1"), one.link()
    data = one.update(work)
    assert link.upload(*one.parts(work.task_id, data)).verdict == pb.VERDICT_ACCEPTED
    assert link.upload(*one.parts(work.task_id, data)).verdict == pb.VERDICT_DUPLICATE
    other = one.update(work, num_examples=1000)
    assert link.upload(*one.parts(work.task_id, other)).verdict == pb.VERDICT_DUPLICATE
    result = served.state.store.result(work.task_id)
    kept = served.state.blobs.update_path(work.task_id, result.digest).read_bytes()
    assert kept == data
    assert Update.from_bytes(kept).num_examples == 10
    assert served.grid.ready([work.task_id]) == {work.task_id}


def test_late_update_is_told_so_and_not_kept(served: Any, device: Any, task: Any) -> None:
    one = device()
    work = task("clinic-1")
    served.grid.cancel([work.task_id])
    reply = one.link().upload(*one.parts(work.task_id, one.update(work)))
    assert reply.verdict == pb.VERDICT_LATE
    assert not list((served.state.path / "blobs" / "updates").iterdir())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"delta": {"weight": np.zeros((1, 30), np.float32)}}, "lacks"),
        ({"delta": {"weight": np.zeros(30, np.float32), "bias": np.zeros(1, np.float32)}}, "shape"),
        ({"delta": {"weight": np.zeros((1, 30)), "bias": np.zeros(1)}}, "float64"),
        (
            {
                "delta": {
                    "weight": np.full((1, 30), np.nan, np.float32),
                    "bias": np.zeros(1, np.float32),
                }
            },
            "NaN",
        ),
        (
            {
                "delta": {
                    "weight": np.full((1, 30), 1e30, np.float32),
                    "bias": np.zeros(1, np.float32),
                }
            },
            "norm",
        ),
        ({"num_examples": 0}, "examples"),
        ({"num_examples": -80}, "examples"),
        ({"round_num": 7}, "round"),
        ({"client_id": "clinic-2"}, "clinic-2"),
    ],
)
def test_gate_refuses(
    served: Any, device: Any, task: Any, changes: dict[str, Any], why: str
) -> None:
    one = device()
    work = task("clinic-1")
    link = one.link()
    reply = link.upload(*one.parts(work.task_id, one.update(work, **changes)))
    assert reply.verdict == pb.VERDICT_REFUSED
    assert why in reply.message
    assert not list((served.state.path / "blobs" / "updates").iterdir())
    again = link.upload(*one.parts(work.task_id, one.update(work)))
    assert again.verdict == pb.VERDICT_REFUSED  # a task has one answer
    assert why in served.state.store.result(work.task_id).error


def test_broken_uploads_get_clean_codes_and_leave_nothing(
    served: Any, device: Any, task: Any
) -> None:
    one = device()
    work, link = task("clinic-1"), one.link()
    data = one.update(work)
    header = pb.UploadPart(header=one.header(work.task_id, data))
    chunk = pb.UploadPart(chunk=pb.Chunk(offset=0, total_bytes=len(data), data=data))
    gap = pb.UploadPart(chunk=pb.Chunk(offset=5, total_bytes=len(data), data=data[5:]))
    flipped = pb.UploadPart(
        chunk=pb.Chunk(offset=0, total_bytes=len(data), data=data[:-1] + b"\xff")
    )
    half = pb.UploadPart(chunk=pb.Chunk(offset=0, total_bytes=len(data), data=data[:9]))
    beyond = pb.UploadPart(chunk=pb.Chunk(offset=len(data), total_bytes=len(data), data=b"x"))
    bomb = pb.UploadHeader()
    bomb.CopyFrom(header.header)
    bomb.total_bytes = 1 << 40
    bad: list[list[pb.UploadPart]] = [
        [],
        [chunk],
        [header],
        [header, half],
        [header, gap],
        [header, flipped],
        [header, header],
        [header, chunk, beyond],
        [pb.UploadPart(header=bomb), chunk],
        [pb.UploadPart()],
    ]
    for parts in bad:
        assert code_of(lambda p=parts: link.upload(*p)) == grpc.StatusCode.INVALID_ARGUMENT
    for folder in ("updates", "tmp"):
        assert not list((served.state.path / "blobs" / folder).iterdir())
    assert link.upload(header, chunk).verdict == pb.VERDICT_ACCEPTED


def test_oversized_message_is_refused_by_the_transport(device: Any, task: Any) -> None:
    one = device()
    work, link = task("clinic-1"), one.link()
    data = bytes(serde.MAX_MESSAGE_BYTES + 1)
    parts = one.parts(work.task_id, data)
    assert code_of(lambda: link.upload(*parts)) in (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INVALID_ARGUMENT,
    )


def test_small_answers_are_recorded_once(served: Any, device: Any, task: Any) -> None:
    session = device().link().session()
    work = task("clinic-1", kind=pb.TASK_KIND_EVALUATE)
    assert session.next("task").task_id == work.task_id
    for loss in (0.25, 99.0):
        answer = pb.TaskResult(task_id=work.task_id, num_examples=7, metrics={"loss": loss})
        session.send(pb.DeviceEvent(result=answer))
    assert served.grid.wait([work.task_id], 5) == {work.task_id}
    time.sleep(0.1)
    result = served.state.store.result(work.task_id)
    assert (result.num_examples, result.metrics_json) == (7, '{"loss": 0.25}')


def test_failed_task_is_an_answer(served: Any, device: Any, task: Any) -> None:
    session = device().link().session()
    work = task("clinic-1")
    session.next("task")
    failed = pb.TaskFailed(task_id=work.task_id, error="DataError", message="no rows")
    session.send(pb.DeviceEvent(failed=failed))
    assert served.grid.wait([work.task_id], 5) == {work.task_id}
    assert served.state.store.result(work.task_id).error == "DataError: no rows"


@pytest.mark.parametrize(
    "event",
    [
        pb.DeviceEvent(),
        pb.DeviceEvent(result=pb.TaskResult(task_id="none")),
        pb.DeviceEvent(result=pb.TaskResult(task_id="../../x")),
        pb.DeviceEvent(result=pb.TaskResult(task_id="a", metrics={"loss": float("nan")})),
        pb.DeviceEvent(result=pb.TaskResult(task_id="a", tensors=bytes((1 << 20) + 1))),
        pb.DeviceEvent(failed=pb.TaskFailed(task_id="a", message="x" * 1000)),
        pb.DeviceEvent(hello=pb.Hello(wire_version=99, mode=pb.MODE_FEDERATED)),
        pb.DeviceEvent(hello=pb.Hello(wire_version=1, mode=pb.MODE_PERSONAL)),
    ],
)
def test_broken_events_end_the_session_cleanly(device: Any, event: pb.DeviceEvent) -> None:
    session = device().link().session()
    session.next("welcome")
    session.send(event)
    assert session.ended() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


def test_same_device_replaces_its_session(served: Any, device: Any) -> None:
    one = device()
    first = one.link().session()
    first.next("welcome")
    second = one.link().session()
    second.next("welcome")
    assert first.ended() == grpc.StatusCode.ABORTED
    assert served.state.store.node("clinic-1").connected
    second.close()
    until(lambda: not served.state.store.node("clinic-1").connected)


def test_eligible_clients_are_connected_federated_and_have_data(served: Any, device: Any) -> None:
    assert served.grid.clients() == {}
    federated = device("a").link().session()
    federated.next("welcome")
    device("b").link().session(pb.Hello(wire_version=1, mode=pb.MODE_FEDERATED)).next("welcome")
    personal = device("c", mode=pb.MODE_PERSONAL).link()
    personal.session(pb.Hello(wire_version=1, mode=pb.MODE_PERSONAL, has_data=True)).next("welcome")
    device("d")
    assert list(served.grid.clients().values()) == ["a"]
    assert {n.client_id: n.mode for n in served.state.store.nodes()} == {
        "a": "federated",
        "b": "federated",
        "c": "personal",
        "d": "federated",
    }
    federated.close()
    until(lambda: not served.grid.clients())


def test_withdrawn_task_is_cancelled_on_the_device(served: Any, device: Any, task: Any) -> None:
    session = device().link().session()
    work = task("clinic-1")
    session.next("task")
    served.grid.cancel([work.task_id])
    served.link.wake()
    assert session.next("cancel").task_id == work.task_id


def test_second_hello_changes_the_facts(served: Any, device: Any) -> None:
    session = device().link().session()
    session.next("welcome")
    facts = {"machine": "aarch64"}
    hello = pb.Hello(wire_version=1, mode=pb.MODE_FEDERATED, engine="ort", facts=facts)
    session.send(pb.DeviceEvent(hello=hello))
    until(lambda: served.state.store.node("clinic-1").engine == "ort")
    assert "aarch64" in served.state.store.node("clinic-1").facts_json


def test_sessions_that_come_and_go_leave_nothing_behind(served: Any, device: Any) -> None:
    devices = [device(f"d{i}") for i in range(12)]
    for _ in range(3):
        sessions = [d.link().session() for d in devices]
        for session in sessions:
            session.next("welcome")
        assert len(served.grid.clients()) == len(devices)
        for session in sessions:
            served.link.wake()
            session.close()
        served.link.wake()
        until(lambda: not served.grid.clients())
    until(lambda: served.loop_tasks() <= 3)


def test_closing_server_says_so_to_its_devices(served: Any, device: Any) -> None:
    session = device().link().session()
    session.next("welcome")
    served.loop.call_soon_threadsafe(served.link.close)
    assert session.ended() == grpc.StatusCode.UNAVAILABLE


def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_a_start_removes_the_updates_that_no_round_waits_for(
    served: Any, device: Any, task: Any
) -> None:
    state, one = served.state, device()
    work = task("clinic-1")
    data = one.update(work)
    one.link().upload(*one.parts(work.task_id, data))
    kept = state.blobs.update_path(work.task_id, hashlib.sha256(data).hexdigest())
    orphan = state.blobs.update_path(work.task_id, "0" * 64)  # committed, never recorded
    stranger = state.blobs.update_path("f" * 32, "1" * 64)
    for path in (orphan, stranger):
        path.write_bytes(b"update")
    _start_round(state, work)
    inbox = Inbox(state.store, state.blobs, state.registry, 1e6)
    inbox.forget_orphans()
    assert [p.exists() for p in (kept, orphan, stranger)] == [True, False, False]
    state.store.append_event(
        "run-1", rounds.to_json(rounds.RoundRetried(work.round_num, 1, 1, 2)), None
    )
    inbox.forget_orphans()
    assert not kept.exists()


def _start_round(state: Any, work: Any) -> None:
    """A run's journal up to the round of a task."""
    config = RunConfig(rounds=3, min_clients=1)
    state.store.add_run(RunRow("run-1", "running", "{}", 0.0))
    for event in (
        rounds.RunStarted("run-1", "3" * 64, "FedAvg", asdict(config), "2" * 64),
        rounds.RoundStarted(work.round_num, 1, ("clinic-1",)),
    ):
        state.store.append_event("run-1", rounds.to_json(event), None)


def test_an_update_that_was_under_way_twice_is_kept_once(
    served: Any, device: Any, task: Any
) -> None:
    """The second upload begins while its task is open and ends after its round was reduced."""
    state, one = served.state, device()
    work = task("clinic-1")
    data = one.update(work)
    inbox = Inbox(state.store, state.blobs, state.registry, 1e6)
    header, node = one.header(work.task_id, data), state.store.node("clinic-1")
    receivers = [inbox.begin(node, header) for _ in range(2)]
    for receiver in receivers:
        receiver.add(pb.Chunk(offset=0, total_bytes=len(data), data=data))
    assert inbox.finish(node, header, receivers[0]).verdict == pb.VERDICT_ACCEPTED
    served.grid.cancel([work.task_id])
    assert inbox.finish(node, header, receivers[1]).verdict == pb.VERDICT_DUPLICATE
    assert not list((state.path / "blobs" / "updates").iterdir())
    assert not list((state.path / "blobs" / "tmp").iterdir())
