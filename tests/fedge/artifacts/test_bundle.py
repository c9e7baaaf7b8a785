from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedge
from fedge.artifacts.bundle import (
    MANIFEST,
    SIGNATURE,
    Bundle,
    parse_signed,
    read_manifest,
    verify_files,
)
from fedge.artifacts.manifest import MAX_MANIFEST_BYTES, ORT_FILES
from fedge.artifacts.signing import generate_signing_key, public_hex, sign
from fedge.errors import (
    AdmissionError,
    ArtifactError,
    ConfigError,
    FedgeError,
    SignatureError,
)

FILES = [
    "step.onnx",
    "grad.onnx",
    "evaluate.onnx",
    "infer.onnx",
    "preprocess.onnx",
    "params.safetensors",
    "reference.safetensors",
]


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x01
    path.write_bytes(data)


def test_an_untouched_bundle_opens_with_its_signer(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert repr(bundle).startswith(f"Bundle({str(folder)!r}, ")
    assert bundle.digest[:12] in repr(bundle)
    assert len(repr(bundle)) < len(str(folder)) + 100
    again = Bundle.open(folder, bundle.manifest.signer)
    assert again.digest == bundle.digest
    assert list(again.initial_params()) == ["W", "b"]
    assert again.reference().loss > 0


@pytest.mark.parametrize("where", [0, 0.25, 0.5, 0.75, 1])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_file_is_found(folder: Path, name: str, where: float) -> None:
    path = folder / name
    _flip(path, round(where * (path.stat().st_size - 1)))
    with pytest.raises(ArtifactError, match=f"{name} is damaged"):
        Bundle.open(folder)


@pytest.mark.parametrize("where", [i / 20 for i in range(21)])
def test_a_flipped_bit_in_the_manifest_is_found(folder: Path, where: float) -> None:
    signer = read_manifest(folder).signer
    path = folder / MANIFEST
    _flip(path, round(where * (path.stat().st_size - 1)))
    with pytest.raises(SignatureError):
        Bundle.open(folder, signer)
    with pytest.raises(ArtifactError):
        Bundle.open(folder)


@pytest.mark.parametrize("at", range(0, 64, 9))
def test_a_flipped_bit_in_the_signature_is_found(folder: Path, at: int) -> None:
    _flip(folder / SIGNATURE, at)
    with pytest.raises(SignatureError):
        Bundle.open(folder)


@pytest.mark.parametrize("name", [*FILES, MANIFEST, SIGNATURE])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"cannot read .*{name}"):
        Bundle.open(folder, engine="ort")


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_size_is_refused_before_it_is_read(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as handle:
        handle.write(b"\0")
    with pytest.raises(ArtifactError, match="the manifest says"):
        Bundle.open(folder)
    (folder / name).write_bytes(b"")
    with pytest.raises(ArtifactError, match=f"{name} has 0 bytes"):
        Bundle.open(folder)


def test_a_huge_sparse_file_is_refused_at_once(folder: Path) -> None:
    with (folder / "step.onnx").open("wb") as handle:
        handle.truncate(1 << 40)
    began = time.monotonic()
    with pytest.raises(ArtifactError, match="the manifest says"):
        Bundle.open(folder)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", [MANIFEST, "step.onnx"])
def test_a_pipe_or_a_folder_in_place_of_a_file_does_not_hang(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ArtifactError, match="not a regular file"):
        Bundle.open(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ArtifactError, match="not a regular file"):
        Bundle.open(folder)


def test_an_oversized_manifest_or_signature_is_refused(folder: Path) -> None:
    original = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(original + b" " * MAX_MANIFEST_BYTES)
    with pytest.raises(ArtifactError, match=f"more than {MAX_MANIFEST_BYTES} bytes"):
        Bundle.open(folder)
    (folder / MANIFEST).write_bytes(original)
    (folder / SIGNATURE).write_bytes(b"\0" * 65)
    with pytest.raises(ArtifactError, match="more than 64 bytes"):
        Bundle.open(folder)


def test_another_signer_is_refused_even_if_the_bundle_is_consistent(folder: Path) -> None:
    mine = generate_signing_key()
    forged = replace(read_manifest(folder), signer=public_hex(mine)).to_json()
    expected = read_manifest(folder).signer
    (folder / MANIFEST).write_bytes(forged)
    (folder / SIGNATURE).write_bytes(sign(mine, forged))
    Bundle.open(folder)  # whole, but of whom?
    with pytest.raises(SignatureError, match=f"not signed by key {expected[:16]}"):
        Bundle.open(folder, expected)


def test_a_manifest_that_is_not_canonical_is_refused_though_signed() -> None:
    key = generate_signing_key()
    for data in (b"{}", b"[]", b'{"schema":1}', b"\xff", b"{" * 100_000):
        with pytest.raises(ArtifactError, match="broken manifest"):
            parse_signed(data, sign(key, data), public_hex(key))


@settings(max_examples=200)
@given(st.data())
def test_a_mutated_manifest_signed_anew_is_a_manifest_or_an_artifact_error(
    manifest_bytes: bytes, draw: st.DataObject
) -> None:
    key, data = generate_signing_key(), bytearray(manifest_bytes)
    for _ in range(draw.draw(st.integers(1, 6))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(32, 126))
    with contextlib.suppress(ArtifactError):  # and nothing else
        manifest = parse_signed(bytes(data), sign(key, bytes(data)))
        assert manifest.to_json() == bytes(data)


def test_files_of_engines_a_device_does_not_use_may_be_missing(folder: Path) -> None:
    full = Bundle.open(folder).engines
    for name in ORT_FILES:
        (folder / name).unlink(missing_ok=True)
    assert Bundle.open(folder).engines == ("ort",)
    assert Bundle.open(folder, engine="ort").engines == ("ort",)
    if "ort-training" in full:
        with pytest.raises(ArtifactError, match=r"cannot read .*checkpoint"):
            Bundle.open(folder, engine="ort-training")
    (folder / "step.onnx").unlink()
    with pytest.raises(ArtifactError, match="lacks the files of every engine"):
        Bundle.open(folder)


def test_a_damaged_file_of_another_engine_is_still_found(folder: Path) -> None:
    path = folder / ORT_FILES[0]
    if not path.exists():
        pytest.skip("built without a training interpreter")
    _flip(path, 5)
    with pytest.raises(ArtifactError, match="is damaged"):
        Bundle.open(folder, engine="ort")


def test_an_engine_the_bundle_lacks_is_refused_with_its_reason(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="no files for engine 'tpu': known: ort, ort-training"):
        Bundle.open(folder, engine="tpu")


def test_foreign_files_are_neither_needed_nor_looked_at(folder: Path) -> None:
    (folder / "README").write_text("hello")
    (folder / "weights.bin").write_bytes(b"\0" * 100)
    Bundle.open(folder)


def test_reading_checks_the_digest_again(folder: Path) -> None:
    bundle = Bundle.open(folder)
    _flip(folder / "params.safetensors", -1)
    with pytest.raises(ArtifactError, match="is damaged"):
        bundle.initial_params()


def test_signed_models_that_admission_refuses_do_not_open(folder: Path) -> None:
    bundle = Bundle.open(folder)
    files = {n: bundle.read(n) for n in bundle.manifest.files}
    files["grad.onnx"] = b"not a model"
    evil = Bundle.write(bundle.manifest, files, generate_signing_key(), folder.parent / "evil")
    with pytest.raises(AdmissionError, match=r"grad\.onnx: model refused"):
        Bundle.open(evil.path)
    Bundle.open(evil.path, admit=False)


def test_writing_refuses_a_place_that_is_taken(folder: Path) -> None:
    bundle = Bundle.open(folder)
    files = {n: bundle.read(n) for n in bundle.manifest.files}
    with pytest.raises(ConfigError, match="not empty"):
        Bundle.write(bundle.manifest, files, generate_signing_key(), folder)
    target = folder.parent / "file"
    target.write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        Bundle.write(bundle.manifest, files, generate_signing_key(), target)
    empty = folder.parent / "empty"
    empty.mkdir()
    Bundle.write(bundle.manifest, files, generate_signing_key(), empty)
    Bundle.open(empty)


def test_a_failed_write_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(folder)
    files = {n: bundle.read(n) for n in bundle.manifest.files}

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    place = folder.parent / "place"
    place.mkdir()
    with pytest.raises(ConfigError, match=r"cannot write a bundle to .*No space"):
        Bundle.write(bundle.manifest, files, generate_signing_key(), place / "bundle")
    assert list(place.iterdir()) == []


def test_files_the_manifest_does_not_know_cannot_be_written(folder: Path) -> None:
    bundle = Bundle.open(folder)
    files = {n: bundle.read(n) for n in bundle.manifest.files}
    for name in ("../evil", "step.onnx.bak"):
        with pytest.raises(ArtifactError, match="is not part of a bundle"):
            Bundle.write(bundle.manifest, {**files, name: b""}, generate_signing_key())


def test_a_temporary_bundle_lives_as_long_as_its_object(folder: Path) -> None:
    bundle = Bundle.open(folder)
    files = {n: bundle.read(n) for n in bundle.manifest.files}
    temporary = Bundle.write(bundle.manifest, files, generate_signing_key())
    path = temporary.path
    verify_files(path, temporary.manifest)
    del temporary
    gc.collect()
    assert not path.exists()


def test_the_reference_fits_the_manifest(folder: Path) -> None:
    bundle = Bundle.open(folder)
    reference = bundle.reference()
    assert reference.examples.inputs["x"].shape == (4, 4)
    assert reference.examples.labels.dtype == np.int64
    assert {n: g.shape for n, g in reference.grads.items()} == bundle.manifest.shared_shapes()


def test_a_params_file_of_another_model_is_refused(
    folder: Path, lr_of: Callable[..., object]
) -> None:
    other = fedge.build(lr_of(features=5), loss="cross_entropy")
    bundle = Bundle.open(folder)
    files = {n: bundle.read(n) for n in bundle.manifest.files}
    files["params.safetensors"] = other.read("params.safetensors")
    mixed = Bundle.write(bundle.manifest, files, generate_signing_key())
    with pytest.raises(ArtifactError, match="does not hold the manifest's params"):
        mixed.initial_params()


def test_opening_needs_no_numpy_onnx_or_onnxruntime_in_this_process(folder: Path) -> None:
    program = (
        "import sys; from fedge.artifacts.bundle import Bundle; "
        f"Bundle.open({str(folder)!r}); "
        "print([m for m in ('numpy', 'onnx', 'onnxruntime', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_failure_is_one_of_ours(folder: Path) -> None:
    for path in (folder.parent / "nothing", folder / "step.onnx"):
        with pytest.raises(FedgeError, match="cannot read"):
            Bundle.open(path)
