"""Finished updates: whole or not there, in order, installed once, forgotten once judged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from fedge.errors import PolicyError, StateError
from fedge.wire import serde
from fedge_client.outbox import PERSONAL, UPDATE, Outbox
from fedge_client.state import Identity, State

IDENTITY = Identity("clinic-a", "f" * 16, "10.0.0.5", 8443, "federated", "ab" * 32)
BUNDLE = "b" * 64


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state", create=True)


def _finish(state: State, update: bytes, personal: bytes | None = None) -> Path:
    work = state.scratch("train")
    (work / UPDATE).write_bytes(update)
    if personal is not None:
        (work / PERSONAL).write_bytes(personal)
    return work


def test_a_committed_update_is_there_after_a_restart(state: State) -> None:
    entry = Outbox(state, IDENTITY).commit(_finish(state, b"one"), "t1", BUNDLE, 1)
    again = Outbox(state, IDENTITY)
    assert list(again) == [entry]
    assert "t1" in again
    assert again.path(entry).read_bytes() == b"one"
    assert entry.digest == hashlib.sha256(b"one").hexdigest()
    assert again.update_id(entry) == serde.update_id("t1", "clinic-a", entry.digest)


def test_entries_come_in_the_order_of_commit(state: State) -> None:
    outbox = Outbox(state, IDENTITY)
    for name in ("z", "a", "m"):
        outbox.commit(_finish(state, name.encode()), name, BUNDLE, 1)
    assert [e.task_id for e in outbox] == ["z", "a", "m"]


def test_removed_entries_are_remembered_as_delivered(state: State) -> None:
    outbox = Outbox(state, IDENTITY)
    entry = outbox.commit(_finish(state, b"one"), "t1", BUNDLE, 1)
    assert not outbox.delivered("t1")
    outbox.remove(entry)
    assert list(outbox) == []
    assert outbox.delivered("t1")
    assert Outbox(state, IDENTITY).delivered("t1")


def test_personal_tensors_move_to_their_place_once(state: State) -> None:
    outbox = Outbox(state, IDENTITY)
    entry = outbox.commit(_finish(state, b"one", b"mine"), "t1", BUNDLE, 1)
    kept = state.personal(BUNDLE) / PERSONAL
    assert kept.read_bytes() == b"mine"
    kept.write_bytes(b"newer")
    outbox.install(entry)
    assert kept.read_bytes() == b"newer"


def test_a_crash_between_commit_and_install_is_made_good(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(state, IDENTITY)
    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "install", lambda *_: None)
        outbox.commit(_finish(state, b"one", b"mine"), "t1", BUNDLE, 1)
    assert not (state.personal(BUNDLE) / PERSONAL).exists()
    Outbox(state, IDENTITY)
    assert (state.personal(BUNDLE) / PERSONAL).read_bytes() == b"mine"


def test_personal_mode_has_no_outbox(state: State) -> None:
    with pytest.raises(PolicyError, match="uploads nothing"):
        Outbox(state, dataclasses.replace(IDENTITY, mode="personal"))


@pytest.mark.parametrize("text", ["", "[]", '{"task_id": "t1"}', '{"unknown": 1}'])
def test_a_damaged_entry_is_a_state_error(state: State, text: str) -> None:
    outbox = Outbox(state, IDENTITY)
    entry = outbox.commit(_finish(state, b"one"), "t1", BUNDLE, 1)
    (outbox.path(entry).parent / "task.json").write_text(text)
    with pytest.raises(StateError, match="damaged"):
        list(outbox)


def test_the_record_of_delivered_tasks_is_bounded(state: State) -> None:
    outbox = Outbox(state, IDENTITY)
    state.write_json("delivered.json", {"tasks": [f"t{n}" for n in range(300)]})
    outbox.remove(outbox.commit(_finish(state, b"x"), "last", BUNDLE, 1))
    tasks = json.loads((state.root / "delivered.json").read_bytes())["tasks"]
    assert len(tasks) == 256
    assert tasks[-1] == "last"
