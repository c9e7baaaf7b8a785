"""Where a run's events and blobs are kept."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Protocol

from fedge.errors import StateError


class Journal(Protocol):
    """Storage of runs."""

    @property
    def durable(self) -> bool:
        """Whether what a method was given survives a power cut once the method returns."""
        ...

    def append(self, run_id: str, event: dict[str, Any]) -> None:
        """Add one event (plain JSON values) at the end of the run's list."""
        ...

    def events(self, run_id: str) -> list[dict[str, Any]]:
        """All events of the run, in the order they were appended; empty for an unknown run."""
        ...

    def put_blob(self, data: bytes) -> str:
        """Store bytes under their SHA-256 and return it as lower-case hex. Repeating is free."""
        ...

    def get_blob(self, digest: str) -> bytes:
        """The bytes stored under a digest.

        Raises:
            StateError: If there are none.
        """
        ...


class MemoryJournal:
    """A journal that lives as long as the process: for simulations and tests."""

    durable = False

    def __init__(self) -> None:
        self._events: dict[str, list[str]] = {}
        self._blobs: dict[str, bytes] = {}

    def append(self, run_id: str, event: dict[str, Any]) -> None:
        """Keep the event, as JSON text, so that what only memory can hold fails here too."""
        self._events.setdefault(run_id, []).append(json.dumps(event, allow_nan=False))

    def events(self, run_id: str) -> list[dict[str, Any]]:
        """All events of the run."""
        return [json.loads(text) for text in self._events.get(run_id, [])]

    def put_blob(self, data: bytes) -> str:
        """Keep the bytes under their SHA-256."""
        digest = hashlib.sha256(data).hexdigest()
        self._blobs[digest] = data
        return digest

    def get_blob(self, digest: str) -> bytes:
        """The bytes stored under a digest."""
        try:
            return self._blobs[digest]
        except KeyError:
            raise StateError(f"the journal has no blob {digest}") from None
