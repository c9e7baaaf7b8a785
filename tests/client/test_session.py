"""What the session does when the disk is full or the server fails again and again."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedge.errors import StateError
from fedge.wire import serde
from fedge.wire.v1 import link_pb2 as pb
from fedge_client import session as sessions
from fedge_client import updater
from fedge_client.config import ClientConfig
from fedge_client.session import Backoff, Session
from fedge_client.state import Identity, State
from fedge_client.tasks import Desk

ME = Identity("clinic-a", "f" * 16, "10.0.0.5", 8443, "personal", "ab" * 32)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def session(root: Path, said: list[str]) -> Session:
    state = State(root, create=True)
    return Session(state, ME, Desk(state, ME, ClientConfig()), said.append)


def test_a_full_disk_is_waited_out(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "BACKOFF_S", 0.01)
    said: list[str] = []
    client = session(small_disk / "state", said)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(600 << 10))
    content = bytes(range(256)) * 2048  # half a megabyte
    digest = hashlib.sha256(content).hexdigest()

    async def fetch(_: str, receiver: serde.Receiver) -> None:
        if len(said) == 2:
            filler.unlink(missing_ok=True)
        while receiver.offset < len(content):
            data = content[receiver.offset : receiver.offset + (64 << 10)]
            offset, total = receiver.offset, len(content)
            receiver.add(pb.Chunk(offset=offset, total_bytes=total, data=data))

    state = State(small_disk / "state")
    work = client._stored(lambda: updater.fetch_blob(state, digest, 1 << 20, fetch))
    assert asyncio.run(work).read_bytes() == content
    assert said == [f"{small_disk}/state cannot be used: No space left on device; trying again"] * 2


def test_other_failures_of_the_state_folder_are_errors_of_ours(tmp_path: Path) -> None:
    async def denied() -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    said: list[str] = []
    with pytest.raises(StateError, match="state cannot be used: Permission denied"):
        asyncio.run(session(tmp_path / "state", said)._stored(denied))
    assert said == []


def test_waits_double_up_to_half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    backoff = Backoff()

    async def wait() -> None:
        for _ in range(10):
            await backoff.wait()

    asyncio.run(wait())
    assert all(0.25 * 2**i <= s <= 0.5 * 2**i for i, s in enumerate(slept[:6]))
    assert all(15 <= s <= 30 for s in slept[7:])
