"""Finished updates, kept as durable files until the server has them.

An entry is a folder ``outbox/<id>/`` that appears whole, by rename: the update, what is needed to
deliver it, and the personal tensors that belong to it. A crash before the rename trains the same
task again with the same result; after it, the entry is delivered, never trained again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fedge.config import from_mapping
from fedge.errors import ConfigError, PolicyError, StateError
from fedge.platform import atomic_write, fsync_dir
from fedge.wire import serde
from fedge_client.state import FEDERATED, Identity, State

UPDATE, TASK, PERSONAL = "update.fedge", "task.json", "personal.safetensors"
_REMEMBERED = 256  # delivered tasks a server may still ask for again


@dataclass(frozen=True)
class Entry:
    """One update on its way.

    Attributes:
        task_id: Which task it answers.
        bundle_digest: What it was trained from.
        round_num: In which round.
        digest: SHA-256 of the update file, hex.
        bytes: Its size.
        order: Position in the queue.
    """

    task_id: str
    bundle_digest: str
    round_num: int
    digest: str
    bytes: int
    order: int


class Outbox:
    """The queue of finished updates of one client.

    Args:
        state: Its state folder.
        identity: Who it is; a client in personal mode has no outbox.

    Raises:
        PolicyError: In personal mode.
    """

    def __init__(self, state: State, identity: Identity) -> None:
        if identity.mode != FEDERATED:
            raise PolicyError(f"this client is in {identity.mode} mode: it uploads nothing")
        self._state = state
        self._client_id = identity.client_id
        self._root = state.folder("outbox")
        for entry in self:  # a crash between commit and install
            self.install(entry)

    def __iter__(self) -> Iterator[Entry]:
        """Entries in the order they were committed."""
        found = [self._read(p) for p in self._root.iterdir() if p.is_dir()]
        return iter(sorted(found, key=lambda e: e.order))

    def __contains__(self, task_id: str) -> bool:
        return self._folder(task_id).is_dir()

    def delivered(self, task_id: str) -> bool:
        """Whether the server has already judged this task's update."""
        return task_id in self._done()

    def path(self, entry: Entry) -> Path:
        """The update file of an entry."""
        return self._folder(entry.task_id) / UPDATE

    def update_id(self, entry: Entry) -> bytes:
        """The update's id, 32 bytes: the same whenever this task is answered with this update."""
        return serde.update_id(entry.task_id, self._client_id, entry.digest)

    def commit(self, work: Path, task_id: str, bundle_digest: str, round_num: int) -> Entry:
        """Make a finished update durable and part of the queue.

        Args:
            work: Scratch folder on the same file system with ``update.fedge`` and, where the
                bundle has personal tensors, ``personal.safetensors``. It becomes the entry.
            task_id: Which task it answers.
            bundle_digest: What it was trained from.
            round_num: In which round.
        """
        digest, size = serde.file_digest(work / UPDATE)
        order = 1 + max((e.order for e in self), default=0)
        entry = Entry(task_id, bundle_digest, round_num, digest, size, order)
        for name in (UPDATE, PERSONAL):
            if (work / name).exists():
                _sync(work / name)
        atomic_write(work / TASK, json.dumps(asdict(entry), sort_keys=True).encode())
        work.rename(self._folder(task_id))
        fsync_dir(self._root)
        self.install(entry)
        return entry

    def install(self, entry: Entry) -> None:
        """Move an entry's personal tensors to their place, once: the move is one rename."""
        held = self._folder(entry.task_id) / PERSONAL
        if held.exists():
            target = self._state.personal(entry.bundle_digest) / PERSONAL
            held.replace(target)
            fsync_dir(target.parent)

    def remove(self, entry: Entry) -> None:
        """Forget an update that the server has judged; remember that it did."""
        done = [t for t in self._done() if t != entry.task_id]
        self._state.write_json("delivered.json", {"tasks": [*done, entry.task_id][-_REMEMBERED:]})
        folder = self._folder(entry.task_id)
        gone = (
            self._state.folder("work") / folder.name
        )  # leaves whole; work/ may be left half-empty
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        fsync_dir(self._root)
        shutil.rmtree(gone, ignore_errors=True)

    def _done(self) -> list[str]:
        return list((self._state.read_json("delivered.json") or {}).get("tasks", []))

    def _folder(self, task_id: str) -> Path:
        return self._root / hashlib.sha256(task_id.encode()).hexdigest()[:32]

    @staticmethod
    def _read(folder: Path) -> Entry:
        try:
            found = json.loads((folder / TASK).read_bytes())
            return from_mapping(Entry, dict(found), "outbox")
        except (OSError, ValueError, TypeError, ConfigError) as exc:
            raise StateError(f"outbox entry {folder} is damaged: {exc}; remove it") from exc


def _sync(path: Path) -> None:
    import os

    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
