"""Bundles and params: fetched once, resumed, verified, pruned."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from fedge.artifacts.bundle import MANIFEST, SIGNATURE, Bundle
from fedge.errors import ArtifactError, LinkError, SignatureError
from fedge.wire import serde
from fedge_client import updater
from fedge_client.state import State


class Shelf:
    """Content by digest, as a server has it; breaks off after ``limit`` bytes per fetch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir()
        self.asked: list[tuple[str, int]] = []
        self.limit: int | None = None

    def put(self, data: bytes, digest: str | None = None) -> str:
        digest = digest or hashlib.sha256(data).hexdigest()
        (self._folder / digest).write_bytes(data)
        return digest

    def put_bundle(self, bundle: Bundle) -> None:
        for name in bundle.manifest.files:
            self.put((bundle.path / name).read_bytes())
        signed = (bundle.path / MANIFEST).read_bytes() + (bundle.path / SIGNATURE).read_bytes()
        self.put(signed, bundle.digest)

    async def fetch(self, digest: str, receiver: serde.Receiver) -> None:
        self.asked.append((digest, receiver.offset))
        sent = 0
        for chunk in serde.iter_chunks(self._folder / digest, receiver.offset):
            if self.limit is not None and sent + len(chunk.data) > self.limit:
                raise LinkError("the line went dead")
            receiver.add(chunk)
            sent += len(chunk.data)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "shelf")


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state", create=True)


def _fetch(state: State, bundle: Bundle, shelf: Shelf, signer: str = "") -> None:
    wanted = signer or bundle.manifest.signer
    asyncio.run(updater.fetch_bundle(state, bundle.digest, wanted, ("ort",), shelf.fetch))


def test_a_device_fetches_what_its_engine_needs(
    state: State, shelf: Shelf, bundle: Callable[..., Bundle]
) -> None:
    made = bundle()
    shelf.put_bundle(made)
    _fetch(state, made, shelf)
    names = {p.name for p in state.bundle(made.digest).iterdir()}
    assert {"manifest.json", "manifest.sig", "step.onnx", "grad.onnx", "infer.onnx"} <= names
    assert not names & {"training_model.onnx", "checkpoint"}
    Bundle.open(state.bundle(made.digest), made.manifest.signer, engine="ort")


def test_what_is_here_is_not_fetched_again(
    state: State, shelf: Shelf, bundle: Callable[..., Bundle]
) -> None:
    shelf.put_bundle(bundle())
    _fetch(state, bundle(), shelf)
    shelf.asked.clear()
    _fetch(state, bundle(), shelf)
    assert shelf.asked == []


def test_a_manifest_of_another_signer_is_refused_before_any_file(
    state: State, shelf: Shelf, bundle: Callable[..., Bundle]
) -> None:
    shelf.put_bundle(bundle())
    with pytest.raises(SignatureError):
        _fetch(state, bundle(), shelf, signer="00" * 32)
    assert len(shelf.asked) == 1
    assert not state.bundle(bundle().digest).exists()


def test_content_with_a_wrong_digest_is_refused_and_forgotten(
    state: State, shelf: Shelf, bundle: Callable[..., Bundle]
) -> None:
    made = bundle()
    shelf.put_bundle(made)
    entry = made.manifest.files["step.onnx"]
    shelf.put(b"x" * entry.bytes, entry.sha256)
    with pytest.raises(LinkError, match="digest"):
        _fetch(state, made, shelf)
    assert not (state.bundle(made.digest) / "step.onnx").exists()
    assert not (state.bundle(made.digest) / "step.onnx.part").exists()


def test_an_engine_the_bundle_does_not_offer(
    state: State, shelf: Shelf, bundle: Callable[..., Bundle]
) -> None:
    made = bundle()
    shelf.put_bundle(made)
    job = updater.fetch_bundle(state, made.digest, made.manifest.signer, ("npu",), shelf.fetch)
    with pytest.raises(ArtifactError, match="this device has npu"):
        asyncio.run(job)


def test_a_download_goes_on_where_it_broke_off(state: State, shelf: Shelf) -> None:
    data = bytes(range(256)) * (3 * serde.MAX_CHUNK_BYTES // 256)
    digest = shelf.put(data)
    shelf.limit = 2 * serde.MAX_CHUNK_BYTES
    with pytest.raises(LinkError, match="went dead"):
        asyncio.run(updater.fetch_blob(state, digest, len(data), shelf.fetch))
    assert not state.blob(digest).exists()
    path = asyncio.run(updater.fetch_blob(state, digest, len(data), shelf.fetch))
    assert path.read_bytes() == data
    assert shelf.asked == [(digest, 0), (digest, shelf.limit)]
    assert [p.name for p in path.parent.iterdir()] == [digest]


def test_more_than_allowed_is_not_taken(state: State, shelf: Shelf) -> None:
    digest = shelf.put(b"x" * 1000)
    with pytest.raises(LinkError, match="1000 bytes; at most 999"):
        asyncio.run(updater.fetch_blob(state, digest, 999, shelf.fetch))


def test_pruning_keeps_what_is_named(
    state: State, shelf: Shelf, bundle: Callable[..., Bundle]
) -> None:
    shelf.put_bundle(bundle())
    _fetch(state, bundle(), shelf)
    kept, old = shelf.put(b"new"), shelf.put(b"old")
    for digest in (kept, old):
        asyncio.run(updater.fetch_blob(state, digest, 9, shelf.fetch))
    (state.folder("blobs") / f"{old}.part").write_bytes(b"half")
    updater.prune(state, {bundle().digest}, {kept})
    assert [p.name for p in state.folder("blobs").iterdir()] == [kept]
    updater.prune(state, set(), {kept})
    assert list(state.folder("bundles").iterdir()) == []
