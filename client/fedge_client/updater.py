"""Fetching bundles and params: in chunks, resumed where they broke off, verified before use."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from fedge.artifacts.bundle import (
    MANIFEST,
    MAX_FILE_BYTES,
    SIGNATURE,
    parse_signed,
    verify_files,
)
from fedge.artifacts.manifest import (
    COMMON_FILES,
    ENGINE_FILES,
    MAX_MANIFEST_BYTES,
    RECOMPUTED,
    Manifest,
)
from fedge.artifacts.signing import SIGNATURE_BYTES
from fedge.errors import ArtifactError
from fedge.platform import atomic_write, fsync_dir, private_dir
from fedge.wire import serde
from fedge_client.state import State

ADMITTED = "admitted"  # lies beside a bundle's files once all of them have passed
Fetch = Callable[[str, serde.Receiver], Awaitable[None]]
"""Fetches content by digest into a receiver until it is complete."""


async def fetch_bundle(
    state: State, digest: str, signer: str, engines: tuple[str, ...], fetch: Fetch
) -> Manifest:
    """Have a verified bundle in ``bundles/<digest>``, with the files of these engines.

    Args:
        state: The client's folder.
        digest: Of the manifest; the bundle's identity.
        signer: The key this federation signs with, hex.
        engines: Whose files are wanted; those the bundle does not offer are left out.
        fetch: How content arrives.

    Raises:
        SignatureError: If the manifest is not the signer's.
        AdmissionError: If a model holds what it may not, or cannot be parsed within limits.
        ArtifactError: If a file is not what the manifest says, or no engine fits.
    """
    folder = state.bundle(digest)
    manifest = await _manifest(state, digest, signer, fetch)
    usable = [e for e in engines if manifest.engines.get(e, "no") == ""]
    if not usable:
        raise ArtifactError(
            f"bundle {digest[:12]}… offers {_offers(manifest)}; "
            f"this device has {', '.join(engines)}"
        )
    wanted = [*COMMON_FILES, *(f for e in usable for f in ENGINE_FILES[e])]
    if "ort" in usable:
        wanted += [f for f in RECOMPUTED.values() if f in manifest.files]
    admitted = folder / ADMITTED
    missing = [n for n in wanted if not (folder / n).exists()]
    if missing:
        admitted.unlink(missing_ok=True)
    for name in missing:
        await _file(folder / name, manifest, fetch)
    if not admitted.exists():
        await asyncio.to_thread(_admit, folder, manifest, wanted)
        atomic_write(admitted, b"")
    return manifest


async def fetch_blob(state: State, digest: str, max_bytes: int, fetch: Fetch) -> Path:
    """Have the content of this digest under ``blobs/``.

    Raises:
        LinkError: If what arrives is larger than ``max_bytes`` or has another digest.
    """
    path = state.blob(digest)
    if not path.exists():
        await _receive(path, digest, max_bytes, None, fetch)
    return path


def prune(state: State, bundles: set[str], blobs: set[str]) -> None:
    """Remove bundles and params that nobody needs any more."""
    for folder, keep in ((state.folder("bundles"), bundles), (state.folder("blobs"), blobs)):
        for path in folder.iterdir():
            if path.name.removesuffix(".part") in keep:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


async def _manifest(state: State, digest: str, signer: str, fetch: Fetch) -> Manifest:
    folder = state.bundle(digest)
    if (folder / SIGNATURE).exists():
        data, signature = (folder / MANIFEST).read_bytes(), (folder / SIGNATURE).read_bytes()
    else:
        data, signature = await _signed(state, digest, fetch)
    manifest = parse_signed(data, signature, signer)
    if manifest.digest != digest:
        raise ArtifactError(f"manifest has digest {manifest.digest[:12]}…, wanted {digest[:12]}…")
    private_dir(folder)
    atomic_write(folder / MANIFEST, data)
    atomic_write(folder / SIGNATURE, signature)
    return manifest


async def _signed(state: State, digest: str, fetch: Fetch) -> tuple[bytes, bytes]:
    """Manifest and signature; they come as one content, the signature last."""
    part = state.folder("blobs") / f"{digest}.manifest.part"
    part.unlink(missing_ok=True)
    receiver = serde.Receiver(part, digest, MAX_MANIFEST_BYTES + SIGNATURE_BYTES)
    try:
        await fetch(digest, receiver)
        receiver.close()
        both = part.read_bytes()
    finally:
        receiver.discard()
    return both[:-SIGNATURE_BYTES], both[-SIGNATURE_BYTES:]


def _admit(folder: Path, manifest: Manifest, names: list[str]) -> None:
    """Verify the files, then have their models parsed under limits before any engine does."""
    from fedge.artifacts.admission import admit_files

    verify_files(folder, manifest, names)
    fsync_dir(folder)
    admit_files(folder, {n: manifest.files[n] for n in names if n.endswith(".onnx")})


async def _file(path: Path, manifest: Manifest, fetch: Fetch) -> None:
    entry = manifest.files[path.name]
    if entry.bytes > MAX_FILE_BYTES:
        raise ArtifactError(f"{path.name} claims {entry.bytes} bytes; at most {MAX_FILE_BYTES}")
    await _receive(path, entry.sha256, entry.bytes, entry.bytes, fetch)


async def _receive(
    path: Path, digest: str, max_bytes: int, total_bytes: int | None, fetch: Fetch
) -> None:
    part = path.with_name(f"{path.name}.part")
    receiver = serde.Receiver(part, digest, max_bytes, total_bytes)
    try:
        if not receiver.complete:
            await fetch(digest, receiver)
        receiver.commit(path)
    finally:
        receiver.close()


def _offers(manifest: Manifest) -> str:
    return ", ".join(e for e, reason in manifest.engines.items() if not reason) or "no engine"
