"""The server's state folder, opened: database, content, keys, bundles."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedge.errors import StateError
from fedge.platform import private_dir
from fedge_server import pki
from fedge_server.blobs import Blobs
from fedge_server.fleet import Fleet
from fedge_server.registry import Registry
from fedge_server.store import Store

DATABASE = "fedge.db"
LOCK = "server.lock"
DEFAULT = "fedge-server-state"


@dataclass(frozen=True)
class ServerState:
    """What a state folder holds.

    ``keys/`` certificates and keys (0600), ``fedge.db`` tokens, devices, runs, tasks and results,
    ``blobs/`` params and waiting updates, ``bundles/`` one folder per bundle.
    """

    path: Path
    store: Store
    blobs: Blobs
    keys: pki.Pki
    registry: Registry
    fleet: Fleet

    @property
    def lock(self) -> Path:
        """The file a running server holds."""
        return self.path / LOCK


def exists(path: Path) -> bool:
    """Whether the folder holds a finished server state."""
    return (path / DATABASE).exists() and (path / "keys" / "ca.key").exists()


def create(path: Path, hosts: Sequence[str] = ()) -> None:
    """Make a new federation: folder, certificate authority, keys, empty database.

    A creation that was cut short is done again.

    Args:
        path: Absent, empty, or left over from a creation that did not finish.
        hosts: Names under which devices reach this machine.

    Raises:
        StateError: If the folder holds something else.
    """
    if exists(path):
        return
    private_dir(path)
    foreign = {p.name for p in path.iterdir()} - {"keys", "blobs", "bundles", LOCK}
    if foreign:
        found = ", ".join(sorted(foreign)[:3])
        raise StateError(f"{path} holds {found} but no federation; choose an empty folder")
    shutil.rmtree(path / "keys", ignore_errors=True)
    pki.create(path / "keys", [socket.gethostname(), *hosts])
    Store(path / DATABASE).close()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[ServerState]:
    """Open a state folder.

    Raises:
        StateError: If there is none, it is damaged, or of a newer fedge.
    """
    if not exists(path):
        raise StateError(
            f"{path} holds no federation; make one with `fedge-server init --state {path}`"
        )
    store = Store(path / DATABASE)
    try:
        keys = pki.load(path / "keys")
        registry = Registry(path / "bundles", store, keys.signing_key)
        yield ServerState(path, store, Blobs(path / "blobs"), keys, registry, Fleet(store, keys))
    finally:
        store.close()


def folder(flag: Path | None) -> Path:
    """The state folder: ``--state``, else ``FEDGE_STATE``, else a folder here."""
    return flag or Path(os.environ.get("FEDGE_STATE") or DEFAULT)
