"""The round loop's journal on the server's disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedge_server.blobs import Blobs
from fedge_server.store import ModelRow, Store


class StoreJournal:
    """Implements :class:`fedge.flower.journal.Journal` over SQLite and blobs.

    Args:
        store: Events, and the list of committed models.
        blobs: Params and strategy state.
        on_model: Called after a new model stands.
    """

    def __init__(self, store: Store, blobs: Blobs, on_model: Callable[[], None]) -> None:
        self._store, self._blobs, self._on_model = store, blobs, on_model

    def append(self, run_id: str, event: dict[str, Any]) -> None:
        """Add one event; a committed round also becomes the newest model, in one transaction."""
        model = None
        if event.get("event") == "RoundCommitted":
            bundle = next(e for e in self.events(run_id) if e["event"] == "RunStarted")
            model = ModelRow(
                run_id, event["round_num"], bundle["bundle_digest"], event["params_digest"]
            )
        self._store.append_event(run_id, event, model)
        if model is not None:
            self._on_model()

    def events(self, run_id: str) -> list[dict[str, Any]]:
        """All events of the run, in order."""
        return self._store.events(run_id)

    def put_blob(self, data: bytes) -> str:
        """Store bytes durably under their SHA-256."""
        return self._blobs.put(data)

    def get_blob(self, digest: str) -> bytes:
        """The bytes stored under a digest, checked."""
        return self._blobs.get(digest)
