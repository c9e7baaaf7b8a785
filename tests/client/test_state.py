"""The state folder: private, whole, one client at a time."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from fedge.errors import StateError
from fedge_client.state import Identity, State

IDENTITY = Identity("clinic-a", "f" * 16, "10.0.0.5", 8443, "federated", "ab" * 32)


def test_folders_and_keys_are_private(tmp_path: Path) -> None:
    state = State(tmp_path / "state", create=True)
    state.write_key("device.key", b"secret")
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE(state.keys.stat().st_mode) == 0o700
    assert stat.S_IMODE((state.keys / "device.key").stat().st_mode) == 0o600
    assert state.read_key("device.key") == b"secret"
    state.note("session.json", {"phase": "online"})
    assert stat.S_IMODE((tmp_path / "state" / "session.json").stat().st_mode) == 0o600


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    state = State(tmp_path, create=True)
    state.write_key("device.key", b"secret")
    (state.keys / "device.key").chmod(0o640)
    with pytest.raises(StateError, match="chmod 600"):
        state.read_key("device.key")


def test_identity_round_trip_and_address(tmp_path: Path) -> None:
    state = State(tmp_path, create=True)
    assert state.identity() is None
    with pytest.raises(StateError, match="join"):
        state.require_identity()
    state.save_identity(IDENTITY)
    assert state.identity() == IDENTITY
    assert IDENTITY.address == "10.0.0.5:8443"
    assert Identity("a", "f", "::1", 1, "federated", "").address == "[::1]:1"


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 9}', '{"schema": 1, "client_id": "a"}'])
def test_a_damaged_identity_is_a_state_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "client.json").write_text(text)
    with pytest.raises(StateError):
        State(tmp_path).identity()


def test_a_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="fedge-client join"):
        State(tmp_path / "none")


def test_two_clients_cannot_share_a_folder(tmp_path: Path) -> None:
    state = State(tmp_path, create=True)
    with state.running(), pytest.raises(StateError, match="already running"), state.running():
        pass
    with state.running():
        pass


def test_starting_empties_the_scratch_folder(tmp_path: Path) -> None:
    state = State(tmp_path, create=True)
    (state.scratch("train") / "half").write_bytes(b"x")
    with state.running():
        assert not (tmp_path / "work").exists()
    assert list(state.scratch("train").iterdir()) == []
