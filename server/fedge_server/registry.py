"""The federation's bundles: signed with its key, kept by digest, found by content."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.artifacts.bundle import MANIFEST, SIGNATURE, Bundle
from fedge.artifacts.manifest import Manifest
from fedge.errors import StateError
from fedge.platform import atomic_write, fsync_dir, private_dir
from fedge.wire.serde import max_update_bytes
from fedge_server.store import Store


class Registry:
    """Bundles under ``root/<digest>/``; the store knows their order.

    Beside each folder lies ``<digest>.signed``: manifest and signature (its last 64 bytes) in one
    file, which is what a device gets when it asks for the bundle's digest.
    """

    def __init__(self, root: Path, store: Store, signing_key: Ed25519PrivateKey) -> None:
        self._root, self._store, self._key = private_dir(root), store, signing_key
        self._content: dict[str, Path] = {}
        self._manifests: dict[str, Manifest] = {}

    def clear_partial(self) -> None:
        """Remove what was being added when the last process died; only the server calls this."""
        for folder in (*self._root.glob("tmp-*"), *self._root.glob(".tmp-*")):
            shutil.rmtree(folder)

    def add(self, bundle: Bundle, now_s: float) -> Bundle:
        """Sign a bundle with the federation's key, keep it durably and make it the newest."""
        tmp = self._root / f"tmp-{secrets.token_hex(8)}"
        files = {name: bundle.read(name) for name in bundle.manifest.files}
        digest = Bundle.write(bundle.manifest, files, self._key, tmp).digest
        home = self._root / digest
        if home.exists():
            shutil.rmtree(tmp)
        else:
            os.replace(tmp, home)  # noqa: PTH105 - atomic
            fsync_dir(self._root)
        signed = (home / MANIFEST).read_bytes() + (home / SIGNATURE).read_bytes()
        atomic_write(self._root / f"{digest}.signed", signed)
        self._store.add_bundle(digest, now_s)
        return self.open(digest)

    def open(self, digest: str) -> Bundle:
        """A bundle by digest; its models were admitted when it came in."""
        return Bundle.open(self._root / digest, admit=False)

    def newest(self) -> str | None:
        """Digest of the newest bundle."""
        known = self._store.bundles()
        return known[-1] if known else None

    def manifest(self, digest: str) -> Manifest:
        """A bundle's manifest."""
        if digest not in self._manifests:
            if digest not in self._store.bundles():
                raise StateError(f"bundle {digest} is not in the registry: restore a backup")
            data = (self._root / digest / MANIFEST).read_bytes()
            self._manifests[digest] = Manifest.from_json(data)
        return self._manifests[digest]

    def max_update_bytes(self, digest: str | None) -> int:
        """The largest update a bundle's devices may send; 0 without a bundle."""
        return 0 if digest is None else max_update_bytes(self.manifest(digest).shared_shapes())

    def find(self, digest: str) -> Path | None:
        """The bundle file with this content, or the signed manifest of this bundle."""
        if digest not in self._content:
            for name in self._store.bundles():
                self._content[name] = self._root / f"{name}.signed"
                for file, entry in self.manifest(name).files.items():
                    self._content[entry.sha256] = self._root / name / file
        return self._content.get(digest)
