"""Randomness as a function of (seed, round, client, purpose), so that runs repeat."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *path: object) -> int:
    """A 64-bit seed for one purpose, independent of every other purpose.

    Args:
        seed: The run's seed.
        path: What it is for, such as ``(round_num, client_id, "batches")``.

    Returns:
        The first eight bytes, little-endian, of SHA-256 over the parts, each length-prefixed.
    """
    digest = hashlib.sha256()
    for part in (seed, *path):
        text = str(part).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest()[:8], "little")
