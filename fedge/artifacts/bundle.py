"""A bundle on disk: written once, signed, and verified before anything in it is used.

::

    manifest.json   canonical JSON (see :mod:`fedge.artifacts.manifest`)
    manifest.sig    64 bytes, Ed25519 over manifest.json
    step.onnx …     the files the manifest names, each with its size and SHA-256

Verification imports neither numpy, onnx nor onnxruntime; models are parsed in a worker process.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fedge.artifacts import signing
from fedge.artifacts.manifest import (
    COMMON_FILES,
    ENGINE_FILES,
    MAX_MANIFEST_BYTES,
    PARAMS,
    REFERENCE,
    FileEntry,
    Manifest,
)
from fedge.errors import ArtifactError, ConfigError
from fedge.platform import atomic_write, fsync_dir
from fedge.types import Examples, Params

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
MAX_FILE_BYTES = (2 << 30) - 1  # protobuf's own limit for one message
_CHUNK_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Reference:
    """A recorded training step at the initial params, for engines to be compared with.

    Attributes:
        examples: Preprocessed inputs and labels of one small batch.
        loss: The loss before the step.
        grads: Trainable param name -> gradient, float32.
    """

    examples: Examples
    loss: float
    grads: Params


@dataclass(frozen=True, eq=False)
class Bundle:
    """A verified bundle folder.

    Attributes:
        path: The folder.
        manifest: What it holds.
    """

    path: Path
    manifest: Manifest

    def __repr__(self) -> str:
        made = self.manifest
        return f"Bundle({str(self.path)!r}, {made.name}, {made.loss}, {made.digest[:12]})"

    @classmethod
    def open(
        cls,
        path: str | Path,
        signer: str | None = None,
        *,
        engine: str | None = None,
        admit: bool = True,
    ) -> Bundle:
        """Verify a bundle folder: form, signature, sizes, digests, then every model's content.

        Args:
            path: The folder.
            signer: Public key (hex) that must have signed it. Without one the signature is
                checked against the key the manifest names, which shows damage but not origin.
            engine: The engine whose files must be there; None asks for any one. Files of other
                engines may be missing: a device fetches only what it needs.
            admit: Whether to check the models' content too (operators, external data, sizes), in
                a worker process. False only where somebody else has just done it.

        Raises:
            SignatureError: If the manifest was not signed by ``signer``.
            AdmissionError: If a model holds something that is not on the allow-list.
            ArtifactError: If a file is missing, damaged or too large.
        """
        folder = Path(path)
        manifest = read_manifest(folder, signer)
        present = _present(folder, manifest, engine)
        verify_files(folder, manifest, present)
        bundle = cls(folder, manifest)
        if admit:
            from fedge.artifacts.admission import admit_files

            admit_files(folder, {n: manifest.files[n] for n in present if n.endswith(".onnx")})
        return bundle

    @classmethod
    def write(
        cls,
        manifest: Manifest,
        files: Mapping[str, bytes],
        signing_key: Ed25519PrivateKey,
        out: str | Path | None = None,
    ) -> Bundle:
        """Write a bundle, whole or not at all.

        Args:
            manifest: Everything but ``files`` and ``signer``, which are filled in here.
            files: File name -> content.
            signing_key: Whose name stands behind it.
            out: Folder to make; it must be absent or empty. None makes a temporary one that
                lives as long as the returned object.

        Raises:
            ConfigError: If ``out`` holds something already, or cannot be made.
            ArtifactError: If ``files`` and manifest do not fit.
        """
        entries = {n: FileEntry(len(d), hashlib.sha256(d).hexdigest()) for n, d in files.items()}
        manifest = replace(manifest, files=entries, signer=signing.public_hex(signing_key))
        data = manifest.to_json()
        manifest = Manifest.from_json(data)  # never sign what a device would refuse
        signed = {MANIFEST: data, SIGNATURE: signing.sign(signing_key, data)}
        if out is None:
            folder = Path(tempfile.mkdtemp(prefix="fedge-bundle-"))
            bundle = cls(folder, manifest)
            weakref.finalize(bundle, shutil.rmtree, folder, ignore_errors=True)
            _fill(folder, {**files, **signed})
            return bundle
        folder = Path(out)
        try:
            _write_folder(folder, {**files, **signed})
        except OSError as exc:
            raise ConfigError(f"cannot write a bundle to {folder}: {exc.strerror}") from exc
        return cls(folder, manifest)

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, hex: the bundle's identity."""
        return self.manifest.digest

    @property
    def engines(self) -> tuple[str, ...]:
        """Engines all of whose files are in the folder."""
        return tuple(e for e in _offered(self.manifest) if _complete(self.path, e))

    def read(self, name: str) -> bytes:
        """One file's bytes, checked against its digest once more.

        Raises:
            ArtifactError: If it is missing or damaged.
        """
        return read_file(self.path, name, self.manifest.files[name])

    def initial_params(self) -> Params:
        """Every param at the start of training, in manifest order.

        Raises:
            ArtifactError: If the file does not hold exactly the manifest's params.
        """
        from fedge import tensors

        params, _ = tensors.load(self.read(PARAMS))
        specs = [(p.name, p.dtype, p.shape) for p in self.manifest.params]
        if [(n, str(a.dtype), a.shape) for n, a in params.items()] != specs:
            raise ArtifactError(f"{PARAMS} does not hold the manifest's params, in its order")
        return params

    def reference(self) -> Reference:
        """The recorded reference step.

        Raises:
            ArtifactError: If the file is no reference step of this manifest.
        """
        from fedge import tensors

        found, meta = tensors.load(self.read(REFERENCE))
        try:
            specs = (*self.manifest.training_inputs, *self.manifest.noise)
            inputs = {s.name: found[f"input/{s.name}"] for s in specs}
            grads = {n: found[f"grad/{n}"] for n in self.manifest.trainable}
            return Reference(Examples(inputs, found["labels"]), float(meta["loss"]), grads)
        except (KeyError, TypeError, ValueError) as exc:
            raise ArtifactError(f"{REFERENCE} lacks {exc}") from exc


def read_manifest(folder: Path, signer: str | None = None) -> Manifest:
    """The manifest of a folder, parsed and its signature checked; no other file is looked at.

    Raises:
        SignatureError: If it was not signed by ``signer`` (or the key it names).
        ArtifactError: If it is missing, too large or broken.
    """
    data = _read_capped(folder / MANIFEST, MAX_MANIFEST_BYTES)
    signature = _read_capped(folder / SIGNATURE, signing.SIGNATURE_BYTES)
    return parse_signed(data, signature, signer)


def parse_signed(data: bytes, signature: bytes, signer: str | None = None) -> Manifest:
    """Parse manifest bytes after checking their signature.

    With ``signer`` given, nothing is parsed before the signature has been found right.

    Raises:
        SignatureError: If they were not signed by ``signer`` (or the key they name).
        ArtifactError: If they are broken.
    """
    if signer is not None:
        signing.verify(signer, data, signature)
    manifest = Manifest.from_json(data)
    signing.verify(manifest.signer, data, signature)
    if not _NAME.fullmatch(manifest.name):
        raise ArtifactError(
            f"broken manifest: name {manifest.name!r:.80}; use letters, digits, ._-"
        )
    return manifest


def verify_files(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Check size and SHA-256 of files, streaming.

    Args:
        folder: Where they lie.
        manifest: What they must be.
        names: Which; all of the manifest's by default.

    Raises:
        ArtifactError: For the first that is missing, no regular file, too large or different.
    """
    for name in manifest.files if names is None else names:
        for _ in _verified_chunks(folder / name, manifest.files[name]):
            pass


def read_file(folder: Path, name: str, entry: FileEntry) -> bytes:
    """One file's bytes, if they are what ``entry`` says.

    Raises:
        ArtifactError: If it is missing or damaged.
    """
    return b"".join(_verified_chunks(folder / name, entry))


def _verified_chunks(path: Path, entry: FileEntry) -> Iterator[bytes]:
    """The file's content; the digest is judged after the last chunk has been taken."""
    if entry.bytes > MAX_FILE_BYTES:
        raise ArtifactError(f"{path.name} claims {entry.bytes} bytes; at most {MAX_FILE_BYTES}")
    digest = hashlib.sha256()
    with _open_regular(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size != entry.bytes:
            raise ArtifactError(f"{path.name} has {size} bytes, the manifest says {entry.bytes}")
        left = entry.bytes
        while left and (chunk := handle.read(min(_CHUNK_BYTES, left))):
            left -= len(chunk)
            digest.update(chunk)
            yield chunk
    if digest.hexdigest() != entry.sha256:
        raise ArtifactError(f"{path.name} is damaged: its SHA-256 differs; fetch the bundle again")


def _read_capped(path: Path, limit: int) -> bytes:
    with _open_regular(path) as handle:
        data = handle.read(limit + 1)
    if len(data) > limit:
        raise ArtifactError(f"{path.name} has more than {limit} bytes")
    return data


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file; a pipe or device in its place must not make us wait for ever."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as exc:
        raise ArtifactError(f"cannot read {path}: {exc.strerror}") from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ArtifactError(f"{path} is not a regular file")
    return os.fdopen(fd, "rb")


def _offered(manifest: Manifest) -> list[str]:
    return [e for e, reason in manifest.engines.items() if not reason]


def _complete(folder: Path, engine: str) -> bool:
    return all((folder / f).exists() for f in ENGINE_FILES[engine])


def _present(folder: Path, manifest: Manifest, engine: str | None) -> list[str]:
    """The files to verify: common ones, the asked engine's, and whatever else is there."""
    offered = _offered(manifest)
    if engine is not None and engine not in offered:
        reason = manifest.engines.get(engine, f"known: {', '.join(ENGINE_FILES)}")
        raise ArtifactError(f"the bundle has no files for engine {engine!r}: {reason}")
    if engine is None and not any(_complete(folder, e) for e in offered):
        raise ArtifactError(
            f"{folder} lacks the files of every engine the bundle offers "
            f"({', '.join(offered) or 'none'}); fetch one engine's files"
        )
    wanted = {*COMMON_FILES, *(ENGINE_FILES[engine] if engine else ())}
    return [n for n in manifest.files if n in wanted or (folder / n).exists()]


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Fill a neighbouring temporary folder, then rename it: the whole bundle or nothing."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already and not empty; choose another place")
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _fill(tmp, files)
        os.replace(tmp, folder)  # noqa: PTH105 - the rename is the point
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    fsync_dir(folder.parent)


def _fill(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        atomic_write(folder / name, data, mode=0o644)
