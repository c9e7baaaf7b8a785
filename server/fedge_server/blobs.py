"""Content by digest on disk: written once, durable before anybody hears of it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from pathlib import Path

from fedge.errors import StateError
from fedge.platform import atomic_write, private_dir
from fedge.wire.serde import Receiver, check_digest, check_task_id


class Blobs:
    """A folder of immutable files named by their SHA-256.

    Args:
        root: Created 0700; ``root/tmp`` holds what is still arriving and is emptied at start.
    """

    def __init__(self, root: Path) -> None:
        self._root = private_dir(root)
        self._tmp = private_dir(root / "tmp")
        self._updates = private_dir(root / "updates")

    def clear_partial(self) -> None:
        """Remove what was arriving when the last process died; only the server calls this."""
        for part in self._tmp.iterdir():
            part.unlink()

    def path(self, digest: str) -> Path:
        """Where the content with this digest is, whether it exists or not."""
        check_digest("blob", digest)
        return self._root / digest[:2] / digest

    def has(self, digest: str) -> bool:
        """Whether the content is there."""
        return self.path(digest).is_file()

    def put(self, data: bytes | memoryview) -> str:
        """Store content durably; returns its SHA-256 in hex."""
        digest = hashlib.sha256(data).hexdigest()
        path = self.path(digest)
        if not path.is_file():
            private_dir(path.parent)
            atomic_write(path, bytes(data))
        return digest

    def get(self, digest: str) -> bytes:
        """Read content and check that it still is what it was.

        Raises:
            StateError: If it is missing or damaged.
        """
        try:
            data = self.path(digest).read_bytes()
        except OSError as exc:
            raise StateError(
                f"blob {digest} is missing from {self._root}: restore a backup"
            ) from exc
        if hashlib.sha256(data).hexdigest() != digest:
            raise StateError(f"blob {digest} in {self._root} is damaged: restore a backup")
        return data

    def remove(self, digest: str) -> None:
        """Forget content nobody refers to any more."""
        self.path(digest).unlink(missing_ok=True)

    def receiver(self, digest: str, total_bytes: int) -> Receiver:
        """A writer for an update that arrives in chunks; commit it to :meth:`update_path`."""
        part = self._tmp / f"{digest[:16]}-{secrets.token_hex(8)}"
        return Receiver(part, digest, max_bytes=total_bytes, total_bytes=total_bytes)

    def update_path(self, task_id: str, digest: str) -> Path:
        """Where a task's update lies.

        Updates are kept apart from other content and apart from each other: removing a refused
        one must not remove what somebody else sent.
        """
        check_task_id(task_id)
        check_digest("update", digest)
        return self._updates / f"{task_id}.{digest}"

    def updates(self) -> Iterator[tuple[str, str]]:
        """Task and digest of every update that lies here."""
        for path in list(self._updates.iterdir()):
            task_id, _, digest = path.name.partition(".")
            yield task_id, digest

    def remove_update(self, task_id: str, digest: str) -> None:
        """Forget an update that was refused or reduced."""
        self.update_path(task_id, digest).unlink(missing_ok=True)
