"""Ed25519 signatures of manifests, and the key files behind them.

Needs only ``cryptography``, imported where it is used: the training interpreter has none and
must still be able to import this package.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from fedge.errors import ConfigError, SignatureError, StateError
from fedge.platform import atomic_write

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SIGNATURE_BYTES = 64
_MAX_KEY_BYTES = 4096


def generate_signing_key() -> Ed25519PrivateKey:
    """A fresh key from the operating system's randomness."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.generate()


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public half: 32 raw bytes as 64 hex digits, as in ``Manifest.signer``."""
    try:
        return key.public_key().public_bytes_raw().hex()
    except AttributeError as exc:
        raise ConfigError(f"a {type(key).__name__} is no Ed25519 private key") from exc


def sign(key: Ed25519PrivateKey, data: bytes) -> bytes:
    """The 64-byte Ed25519 signature (RFC 8032) of ``data``."""
    return key.sign(data)


def verify(public: str, data: bytes, signature: bytes) -> None:
    """Check a signature.

    Args:
        public: The signer's public key, 64 hex digits.
        data: What was signed.
        signature: 64 bytes.

    Raises:
        SignatureError: If the key is no key, or did not sign ``data``.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
    except ValueError as exc:
        raise SignatureError(f"{public!r:.80} is not an Ed25519 public key in hex") from exc
    try:
        key.verify(signature, data)
    except InvalidSignature as exc:
        raise SignatureError(f"not signed by key {public[:16]}…; fetch it again") from exc


def save_key(key: Ed25519PrivateKey, path: Path) -> None:
    """Write the private key as PKCS#8 PEM, readable by its owner alone (0600)."""
    from cryptography.hazmat.primitives import serialization

    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    atomic_write(path, pem, mode=0o600)


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read what :func:`save_key` wrote.

    Raises:
        StateError: If the file is missing, or others than its owner may read or write it.
        ConfigError: If it holds no Ed25519 key.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    pem = _read_private(path)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as exc:
        raise ConfigError(f"{path} holds no unencrypted private key in PEM form") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} holds a {type(key).__name__}; wanted an Ed25519 key")
    return key


def _read_private(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            mode = stat.S_IMODE(os.fstat(handle.fileno()).st_mode)
            if os.name == "posix" and mode & 0o077:
                raise StateError(
                    f"key file {path} has mode {mode:04o}, wanted 0600; run: chmod 600 {path}"
                )
            return handle.read(_MAX_KEY_BYTES)
    except OSError as exc:
        raise StateError(f"cannot read key file {path}: {exc.strerror}") from exc
