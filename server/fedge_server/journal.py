"""The round loop's journal on the server's disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedge_server.blobs import Blobs
from fedge_server.store import ModelRow, Store

KEEP_ROUNDS = 10  # whose params stay on disk; a run's numbers stay for ever


class StoreJournal:
    """Implements :class:`fedge.flower.journal.Journal` over SQLite and blobs.

    Args:
        store: Events, and the list of committed models.
        blobs: Params and strategy state.
        on_model: Called after a new model stands.
    """

    durable = True

    def __init__(self, store: Store, blobs: Blobs, on_model: Callable[[], None]) -> None:
        self._store, self._blobs, self._on_model = store, blobs, on_model
        self._seen: dict[str, list[dict[str, Any]]] = {}

    def append(self, run_id: str, event: dict[str, Any]) -> None:
        """Add one event; a committed round also becomes the newest model, in one transaction."""
        seen = self._known(run_id)
        model = None
        if event["event"] == "RoundCommitted":
            bundle = seen[0]["bundle_digest"]
            model = ModelRow(run_id, event["round_num"], bundle, event["params_digest"])
        self._store.append_event(run_id, event, model)
        seen.append(event)
        if model is not None:
            self._on_model()
            self._prune(run_id, seen)

    def events(self, run_id: str) -> list[dict[str, Any]]:
        """All events of the run, in order."""
        return list(self._known(run_id))

    def put_blob(self, data: bytes) -> str:
        """Store bytes durably under their SHA-256."""
        return self._blobs.put(data)

    def get_blob(self, digest: str) -> bytes:
        """The bytes stored under a digest, checked."""
        return self._blobs.get(digest)

    def _known(self, run_id: str) -> list[dict[str, Any]]:
        if run_id not in self._seen:
            self._seen[run_id] = self._store.events(run_id)
        return self._seen[run_id]

    def _prune(self, run_id: str, events: list[dict[str, Any]]) -> None:
        """Remove the params and strategy states of rounds long past."""
        commits = [e for e in events if e["event"] == "RoundCommitted"]
        old, kept = commits[:-KEEP_ROUNDS], commits[-KEEP_ROUNDS:]
        if not old:
            return
        self._store.drop_models(run_id, before=kept[0]["round_num"])
        used = {m.params_digest for m in self._store.models()} | {events[0]["params_digest"]}
        for event in old:
            event_digests = {event["params_digest"], event["strategy_digest"]} - {""}
            for digest in event_digests - used - {e["strategy_digest"] for e in kept}:
                self._blobs.remove(digest)
