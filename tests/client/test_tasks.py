"""The desk: what a client does with a task, and what it refuses."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fedge.errors import (
    DataError,
    EngineError,
    FedgeError,
    LinkError,
    PolicyError,
    WorkerDiedError,
)
from fedge.wire import serde
from fedge.wire.v1 import link_pb2 as pb
from fedge_client.config import ClientConfig, DataConfig, EngineConfig
from fedge_client.outbox import Entry, Outbox
from fedge_client.session import failure
from fedge_client.state import Identity, State
from fedge_client.tasks import Desk

FEDERATED = Identity("clinic-a", "f" * 16, "10.0.0.5", 8443, "federated", "ab" * 32)
PERSONAL = Identity("own", "f" * 16, "10.0.0.5", 8443, "personal", "ab" * 32)
KINDS = (pb.TASK_KIND_TRAIN, pb.TASK_KIND_EVALUATE, pb.TASK_KIND_STATISTICS)


def task(kind: pb.TaskKind) -> pb.Task:
    return pb.Task(task_id="t1", kind=kind, bundle_digest="b" * 64, params_digest="c" * 64)


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state", create=True)


@pytest.mark.parametrize("kind", KINDS)
def test_personal_mode_answers_no_task(state: State, kind: pb.TaskKind) -> None:
    desk = Desk(state, PERSONAL, ClientConfig())
    with pytest.raises(PolicyError, match="personal mode"):
        asyncio.run(desk.do(task(kind)))
    with pytest.raises(PolicyError, match="uploads nothing"):
        desk.signed(Entry("t1", "b" * 64, 1, "d" * 64, 10, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_data_source_every_task_is_a_data_error(state: State, kind: pb.TaskKind) -> None:
    desk = Desk(state, FEDERATED, ClientConfig(), Outbox(state, FEDERATED))
    assert not desk.has_data
    with pytest.raises(DataError, match=r"client.toml \[data\]"):
        asyncio.run(desk.do(task(kind)))


def test_what_was_finished_is_not_trained_again(state: State) -> None:
    outbox = Outbox(state, FEDERATED)
    work = state.scratch("train")
    (work / "update.fedge").write_bytes(b"one")
    entry = outbox.commit(work, "t1", "b" * 64, 1)
    desk = Desk(state, FEDERATED, ClientConfig(), outbox)
    assert asyncio.run(desk.do(task(pb.TASK_KIND_TRAIN))) == (
        None,
        "its update waits in the outbox",
    )
    desk.delivered(entry)
    assert asyncio.run(desk.do(task(pb.TASK_KIND_TRAIN))) == (
        None,
        "its update was delivered before",
    )


_ANSWERS: list[dict[str, Any]] = [
    {},
    {"num_examples": 3},
    {"num_examples": 3, "metrics": [1]},
    {"num_examples": -3, "metrics": {}},
    {"num_examples": "3 rows", "metrics": {"train_loss": "low"}},
    {"num_examples": 3, "metrics": {"loss": float("nan"), "train_loss": {}}},
    {"num_examples": 3, "metrics": {}, "no": "update file"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", _ANSWERS)
def test_a_worker_that_answers_nonsense_fails_the_task_alone(
    state: State, monkeypatch: pytest.MonkeyPatch, kind: pb.TaskKind, answer: dict[str, Any]
) -> None:
    async def call(*_: object) -> tuple[str, dict[str, Any], list[bytes]]:
        return "ort", answer, [b"x" * (1 << 21)]

    async def found(*_: object) -> Path:
        return Path("anything")

    desk = Desk(state, FEDERATED, ClientConfig(DataConfig("r.csv", "y")), Outbox(state, FEDERATED))
    for name, instead in (("call", call), ("_bundle", found), ("_params", found)):
        monkeypatch.setattr(desk, name, instead)
    with pytest.raises(FedgeError):
        asyncio.run(desk.do(task(kind)))


def test_an_engine_that_is_set_needs_no_probe(state: State) -> None:
    data = DataConfig("rows.csv", "y")
    desk = Desk(state, FEDERATED, ClientConfig(data, EngineConfig("ort")))
    assert desk.has_data
    manifest = None  # never looked at
    chosen = desk.choose_engine(manifest)  # type: ignore[arg-type]
    assert asyncio.run(chosen) == ("ort", "set in client.toml")


def test_offline_there_is_nothing_to_fetch(state: State) -> None:
    with pytest.raises(LinkError, match="no connection"):
        asyncio.run(Desk(state, FEDERATED, ClientConfig()).prepare("b" * 64))


@pytest.mark.parametrize(
    ("exc", "told"),
    [
        (EngineError("Gather: index 7351 is out of bounds"), "the engine failed; "),
        (WorkerDiedError("worker died during train: killed by SIGKILL"), "killed by SIGKILL"),
        (DataError("rows.csv line 3,\n column 'a' is empty"), "line 3, column 'a' is empty"),
    ],
)
def test_a_failure_is_told_in_one_line_without_values(exc: EngineError, told: str) -> None:
    failed = failure(task(pb.TASK_KIND_TRAIN), exc).failed
    serde.check_failed(failed)
    assert (failed.task_id, failed.error) == ("t1", type(exc).__name__)
    assert told in failed.message
    assert "7351" not in failed.message
    assert "\n" not in failed.message
