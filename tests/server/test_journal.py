"""Runs on disk: order, models, and what is kept of old rounds."""

from __future__ import annotations

from typing import Any

import pytest

from fedge.errors import StateError
from fedge_server.journal import KEEP_ROUNDS, StoreJournal
from fedge_server.store import RunRow


@pytest.fixture
def journal(state: Any) -> StoreJournal:
    state.store.add_run(RunRow("run-1", "running", "{}", 1.0))
    return StoreJournal(state.store, state.blobs, lambda: None)


def started(digest: str) -> dict[str, Any]:
    return {"event": "RunStarted", "bundle_digest": "b", "params_digest": digest}


def committed(number: int, params: str, strategy: str = "") -> dict[str, Any]:
    event = {"event": "RoundCommitted", "round_num": number}
    return {**event, "params_digest": params, "strategy_digest": strategy}


def test_events_survive_in_order(journal: StoreJournal, state: Any) -> None:
    events = [started("p"), {"event": "RoundStarted", "round_num": 1}, committed(1, "q")]
    for event in events:
        journal.append("run-1", event)
    again = StoreJournal(state.store, state.blobs, lambda: None)
    assert again.events("run-1") == journal.events("run-1") == events
    assert again.events("run-2") == []
    model = state.store.newest_model()
    assert (model.round_num, model.bundle_digest, model.params_digest) == (1, "b", "q")


def test_devices_are_told_after_the_commit(state: Any, journal: StoreJournal) -> None:
    told = []
    listening = StoreJournal(
        state.store, state.blobs, lambda: told.append(state.store.newest_model().round_num)
    )
    listening.append("run-1", started("p"))
    listening.append("run-1", committed(1, "q"))
    assert told == [1]


def test_old_params_go_and_what_is_used_stays(journal: StoreJournal, state: Any) -> None:
    first = journal.put_blob(b"initial")
    journal.append("run-1", started(first))
    same = journal.put_blob(b"the same in every other round")
    params, states = [], []
    for number in range(1, 2 * KEEP_ROUNDS + 1):
        digest = same if number % 2 else journal.put_blob(b"params %d" % number)
        params.append(digest)
        states.append(journal.put_blob(b"moments %d" % number))
        journal.append("run-1", committed(number, digest, states[-1]))
    kept = [state.blobs.has(d) for d in params]
    assert kept[-KEEP_ROUNDS:] == [True] * KEEP_ROUNDS
    assert kept[:KEEP_ROUNDS] == [d == same for d in params[:KEEP_ROUNDS]]
    assert [state.blobs.has(d) for d in states] == [n >= KEEP_ROUNDS for n in range(len(states))]
    assert state.blobs.has(first)
    assert [m.round_num for m in state.store.models()] == list(
        range(KEEP_ROUNDS + 1, 2 * KEEP_ROUNDS + 1)
    )


def test_damaged_or_missing_blob_is_named(journal: StoreJournal, state: Any) -> None:
    digest = journal.put_blob(b"params")
    assert journal.get_blob(digest) == b"params"
    state.blobs.path(digest).write_bytes(b"parans")
    with pytest.raises(StateError, match="damaged"):
        journal.get_blob(digest)
    state.blobs.remove(digest)
    with pytest.raises(StateError, match="missing"):
        journal.get_blob(digest)
