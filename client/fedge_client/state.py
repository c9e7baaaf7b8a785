"""The client's state folder: every durable file and where it lies.

::

    client.toml          settings of the site
    client.json          who this client is: name, federation, server, mode
    keys/                device.key device.crt ca.crt update.key (0600 in 0700)
    bundles/<digest>/    verified bundles
    blobs/<sha256>       downloaded params, and ``.part`` of what is on its way
    model.json           the newest global model: bundle, params, round
    engines.json         which engine was chosen per bundle, and why
    data.json            what the data source held when last read
    outbox/<id>/         finished updates waiting for delivery
    personal/<digest>/   personal tensors, the personal model and its report
    session.json         what the running client last said about itself
    work/                scratch; emptied at start
    lock                 held by the running client
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedge.config import from_mapping
from fedge.errors import ConfigError, StateError
from fedge.platform import atomic_write, exclusive, private_dir

SCHEMA = 1
FEDERATED, PERSONAL = "federated", "personal"
MODES = (FEDERATED, PERSONAL)
_MAX_JSON_BYTES = 4 << 20


@dataclass(frozen=True)
class Identity:
    """Who this client is, once admitted.

    Attributes:
        client_id: The name the server gave.
        federation_id: Of the federation that admitted it.
        host: Server address.
        port: Server port.
        mode: ``federated`` or ``personal``.
        signer: Ed25519 public key that signs this federation's bundles, hex.
        schema: Of this file.
    """

    client_id: str
    federation_id: str
    host: str
    port: int
    mode: str
    signer: str
    schema: int = SCHEMA

    @property
    def address(self) -> str:
        """``host:port`` as gRPC wants it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class State:
    """One client's state folder.

    Args:
        root: The folder.
        create: Whether to make it (0700) where it is missing.

    Raises:
        StateError: If it is missing and ``create`` is false, or is not a folder.
    """

    def __init__(self, root: Path, create: bool = False) -> None:
        self.root = root.absolute()
        if create:
            private_dir(self.root)
        if not self.root.is_dir():
            raise StateError(
                f"no client state in {self.root}; run fedge-client join first, or give --state"
            )

    def folder(self, *parts: str) -> Path:
        """A private subfolder, made where missing."""
        return private_dir(self.root.joinpath(*parts))

    @property
    def keys(self) -> Path:
        """Folder of the keys."""
        return self.folder("keys")

    def bundle(self, digest: str) -> Path:
        """Where the bundle of this digest lies once it is verified."""
        return self.folder("bundles") / digest

    def blob(self, digest: str) -> Path:
        """Where content of this digest lies."""
        return self.folder("blobs") / digest

    def personal(self, bundle_digest: str) -> Path:
        """Folder of what stays on this device, per bundle."""
        return self.folder("personal", bundle_digest)

    def identity(self) -> Identity | None:
        """Who this client is, or None before it joined."""
        raw = self.read_json("client.json")
        if raw is None:
            return None
        if raw.get("schema") != SCHEMA:
            raise StateError(
                f"{self.root}/client.json has schema {raw.get('schema')!r}, wanted {SCHEMA}; "
                "use the fedge version that wrote it"
            )
        try:
            return from_mapping(Identity, raw, "client.json")
        except ConfigError as exc:
            raise StateError(f"{self.root}/client.json is damaged: {exc}") from exc

    def require_identity(self) -> Identity:
        """Who this client is.

        Raises:
            StateError: If it has not joined a federation.
        """
        identity = self.identity()
        if identity is None:
            raise StateError(
                f"{self.root} has not joined a federation; run fedge-client join TOKEN"
            )
        return identity

    def save_identity(self, identity: Identity) -> None:
        """Write who this client is."""
        self.write_json("client.json", asdict(identity))

    def read_key(self, name: str) -> bytes:
        """A file of ``keys/``.

        Raises:
            StateError: If it is missing, or others than its owner may read it.
        """
        path = self.keys / name
        try:
            wide = path.stat().st_mode & 0o077
            if wide and os.name == "posix":
                raise StateError(f"{path} may be read by others; run chmod 600 {path}")
            return path.read_bytes()
        except OSError as exc:
            raise StateError(f"cannot read {path}: {exc.strerror}; join again") from exc

    def write_key(self, name: str, data: bytes) -> None:
        """Write a file of ``keys/`` (0600)."""
        atomic_write(self.keys / name, data)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder; None where it is missing.

        Raises:
            StateError: If it is not a JSON object.
        """
        path = self.root / name
        try:
            data = path.read_bytes()[:_MAX_JSON_BYTES]
            value = json.loads(data)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as exc:
            raise StateError(f"{path} is damaged: {exc}") from exc
        if not isinstance(value, dict):
            raise StateError(f"{path} is damaged: not an object")
        return value

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Replace a JSON file of the folder, durably."""
        atomic_write(self.root / name, json.dumps(value, indent=1, sort_keys=True).encode())

    def note(self, name: str, value: dict[str, Any]) -> None:
        """Replace a JSON file that may be lost in a power cut (no fsync)."""
        tmp = self.root / f".{name}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(os.open(tmp, flags, 0o600), "wb") as handle:
            handle.write(json.dumps(value, sort_keys=True).encode())
        tmp.replace(self.root / name)

    def read_note(self, name: str) -> dict[str, Any]:
        """What :meth:`note` wrote; empty where it is missing or was lost."""
        try:
            return self.read_json(name) or {}
        except StateError:
            return {}

    def scratch(self, name: str) -> Path:
        """A fresh empty folder under ``work/``."""
        path = self.folder("work") / name
        shutil.rmtree(path, ignore_errors=True)
        return private_dir(path)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Hold the folder for the running client; empties ``work/``.

        Raises:
            StateError: If another client runs on this folder.
        """
        with exclusive(self.root / "lock", f"fedge-client on {self.root}"):
            shutil.rmtree(self.root / "work", ignore_errors=True)
            try:
                yield
            finally:
                shutil.rmtree(self.root / "work", ignore_errors=True)
