from __future__ import annotations

import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedge import platform
from fedge.errors import StateError
from fedge.platform import atomic_write, exclusive, private_dir, silence_telemetry


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_telemetry_switches_override_what_the_user_set() -> None:
    environ = {"ORT_DISABLE_TELEMETRY": "0", "FLWR_TELEMETRY_ENABLED": "1", "PATH": "/bin"}
    silence_telemetry(environ)
    assert environ == {
        "ORT_DISABLE_TELEMETRY": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": "/bin",
    }


def test_private_dir_and_the_parents_it_makes_are_the_owners_alone(tmp_path: Path) -> None:
    made = private_dir(tmp_path / "state" / "keys")
    assert _mode(made) == 0o700
    assert _mode(made.parent) == 0o700
    assert private_dir(made) == made


def test_an_empty_folder_becomes_private_and_one_in_use_stays_as_it_is(tmp_path: Path) -> None:
    for name in ("mounted", "home"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o755)
    (tmp_path / "home" / "file").touch()
    assert _mode(private_dir(tmp_path / "mounted")) == 0o700
    assert _mode(private_dir(tmp_path / "home")) == 0o755


def test_private_dir_says_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(StateError, match=r"cannot make the folder .*state: File exists"):
        private_dir(tmp_path / "state")


def test_atomic_write_replaces_content_and_sets_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "key"
    atomic_write(path, b"old")
    assert _mode(path) == 0o600
    atomic_write(path, b"new", mode=0o644)
    assert path.read_bytes() == b"new"
    assert _mode(path) == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


def test_atomic_write_that_fails_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "taken"
    target.mkdir()
    (target / "x").touch()
    with pytest.raises(OSError, match="directory"):
        atomic_write(target, b"data")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


_WRITER = """
import sys
from pathlib import Path
from fedge.platform import atomic_write
path = Path(sys.argv[1])
print("ready", flush=True)
while True:
    for letter in (b"a", b"b"):
        atomic_write(path, letter * 200_000)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    atomic_write(path, b"a" * 200_000)
    for delay_ms in (1, 5, 11, 23):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(delay_ms / 1000)
            writer.send_signal(signal.SIGKILL)
        content = path.read_bytes()
        assert content in (b"a" * 200_000, b"b" * 200_000)


_HOLDER = """
import sys, time
from pathlib import Path
from fedge.platform import exclusive
with exclusive(Path(sys.argv[1]), "fedge-server on ./state"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_held_by_one_process_and_dies_with_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(lock)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(StateError, match=r"fedge-server on \./state is already running"),
            exclusive(lock, "fedge-server on ./state"),
        ):
            pass
        holder.kill()
    with exclusive(lock, "fedge-server on ./state"):
        assert _mode(lock) == 0o600
    with exclusive(lock, "again"):
        pass


def test_memory_that_is_free_is_less_than_all(tmp_path: Path) -> None:
    free = platform.available_memory()
    assert free is None or 1 << 20 < free < 1 << 50
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 4096\n")
    assert platform._cache_bytes(tmp_path) == 4096
