"""The same bundle with other preprocessing: how a federated mean and variance gets into it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedge.artifacts.admission import admit_model
from fedge.artifacts.bundle import Bundle
from fedge.artifacts.manifest import PREPROCESS
from fedge.artifacts.preprocessing import Preprocessing, build_preprocessor
from fedge.artifacts.signing import generate_signing_key
from fedge.artifacts.strip import strip

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def with_preprocessing(
    bundle: Bundle,
    how: Preprocessing,
    *,
    out: str | Path | None = None,
    signing_key: Ed25519PrivateKey | None = None,
) -> Bundle:
    """A new bundle that differs from ``bundle`` in ``preprocess.onnx`` alone.

    Args:
        bundle: With all its files. Its own preprocessing is replaced, not extended.
        how: As for :func:`fedge.build`.
        out: Folder to make; None makes a temporary one that lives as long as the new object.
        signing_key: Ed25519 key to sign with; a fresh one by default.

    Raises:
        ConfigError: If ``how`` does not fit the model's inputs.
        ArtifactError: If a file of the bundle is missing.
    """
    made = build_preprocessor(how, bundle.manifest.inputs)
    strip(made.model)
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    files[PREPROCESS] = admit_model(made.model.SerializeToString())
    manifest = replace(
        bundle.manifest,
        raw_inputs=made.raw_inputs,
        scaling=made.scaling,
        provenance={**bundle.manifest.provenance, "rescaled_from": bundle.digest},
    )
    return Bundle.write(manifest, files, signing_key or generate_signing_key(), out)
