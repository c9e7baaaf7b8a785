"""A bundle's files on their way to ONNX Runtime: hashed and admitted each time."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from fedge.artifacts.admission import admit_model
from fedge.artifacts.bundle import MANIFEST, Bundle
from fedge.artifacts.manifest import MAX_MANIFEST_BYTES, ORT_FILES, Manifest
from fedge.errors import ArtifactError


def reopen_bundle(folder: Path, digest: str) -> Bundle:
    """The bundle another process has opened and verified, known by its digest.

    Raises:
        ArtifactError: If the folder's manifest is not the one with that digest.
    """
    try:
        with (folder / MANIFEST).open("rb") as handle:
            data = handle.read(MAX_MANIFEST_BYTES + 1)
    except OSError as exc:
        raise ArtifactError(f"cannot read {folder / MANIFEST}: {exc.strerror}") from exc
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise ArtifactError(f"the bundle in {folder} is {found[:12]}…; wanted {digest[:12]}…")
    return Bundle(folder, Manifest.from_json(data))


def worker_header(bundle: Bundle, engine: str, threads: int) -> dict[str, Any]:
    """What a worker needs to know to open an engine on a bundle this process has verified."""
    folder = str(bundle.path.absolute())
    return {"folder": folder, "digest": bundle.digest, "engine": engine, "threads": threads}


def read_model(bundle: Bundle, name: str) -> bytes:
    """One model, re-serialised by admission; nothing else may reach ONNX Runtime.

    Raises:
        AdmissionError: If it holds something that is not on the allow-list.
        ArtifactError: If the file is missing, or is not the one its manifest describes.
    """
    if name not in bundle.manifest.files:
        raise ArtifactError(f"the bundle {bundle.manifest.name} has no {name}; build it again")
    return admit_model(bundle.read(name), "ort-training" if name in ORT_FILES else "standard")
