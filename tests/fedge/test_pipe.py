from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge import pipe
from fedge.errors import DataError, EngineError, FedgeError, WorkerDiedError
from fedge.pipe import Child

WORKER = """
import os, sys, time
from fedge.errors import DataError
from fedge.pipe import serve

def echo(header, blobs): return header, blobs
def refuse(header, blobs): raise DataError("column 'age' is missing")
def fail(header, blobs): raise ZeroDivisionError("one over nothing")
def chatter(header, blobs): print("noise on standard output")
def leave(header, blobs): os._exit(header["code"])
def spin(header, blobs):
    until = time.monotonic() + header["s"]
    while time.monotonic() < until: pass
def core_limit(header, blobs):
    import resource
    return {"bytes": resource.getrlimit(resource.RLIMIT_CORE)}, []
def oom_score(header, blobs):
    with open("/proc/self/oom_score_adj") as file:
        return {"value": int(file.read())}, []
def environ(header, blobs): return {"value": os.environ.get(header["name"])}, []

if __name__ == "__main__":
    calls = (echo, refuse, fail, chatter, leave, spin, core_limit, oom_score, environ)
    sys.exit(serve({f.__name__: f for f in calls}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("worker")
    (path / "pipe_test_worker.py").write_text(WORKER)
    return path


@pytest.fixture
def child(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    monkeypatch.syspath_prepend(str(folder))
    worker = Child("pipe_test_worker")
    yield worker
    worker.kill()


@given(st.dictionaries(st.text(min_size=1), st.integers()), st.lists(st.binary(max_size=2000)))
def test_frames_arrive_as_sent(header: dict[str, int], blobs: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        header.pop("blobs", None)
        pipe.send(ours, header, blobs)
        assert pipe.receive(theirs) == (header, blobs)


@given(st.binary(min_size=12, max_size=200))
def test_any_bytes_are_a_frame_or_a_named_error(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.sendall(data)
        ours.close()
        with contextlib.suppress(WorkerDiedError, EOFError):
            pipe.receive(theirs)


@pytest.mark.parametrize(
    "frame",
    [
        (pipe.MAX_FRAME_BYTES + 1).to_bytes(8, "little"),
        (6).to_bytes(8, "little") + (3).to_bytes(4, "little") + b"{}",
        (6).to_bytes(8, "little") + (2).to_bytes(4, "little") + b"{}",
        (16).to_bytes(8, "little") + (12).to_bytes(4, "little") + b'{"blobs":-1}',
        (16).to_bytes(8, "little") + (12).to_bytes(4, "little") + b'{"blobs":[9]',
        (7).to_bytes(8, "little") + (3).to_bytes(4, "little") + b"[1]",
    ],
)
def test_malformed_frames_are_refused(frame: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.sendall(frame)
        ours.close()
        with pytest.raises(WorkerDiedError, match="malformed"):
            pipe.receive(theirs)


def test_an_answer_larger_than_the_parent_wants_is_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    with Child("pipe_test_worker", max_answer_bytes=1000) as child:
        assert child.call("echo", blobs=[b"x" * 500])[1] == [b"x" * 500]
        with pytest.raises(WorkerDiedError, match="frame of"):
            child.call("echo", blobs=[b"x" * 1000])


@pytest.mark.parametrize("error", [[1], {"a": 1}, 7, None, "SystemExit"])
def test_an_error_of_no_known_class_is_still_ours(child: Child, error: object) -> None:
    with pytest.raises(FedgeError):
        child.call("echo", {"error": error, "message": {"not": "text"}})


def test_a_worker_answers_many_times_and_ends_when_closed(child: Child) -> None:
    big = os.urandom(3 << 20)
    for number in range(3):
        assert child.call("echo", {"number": number}, [b"", big]) == (
            {"number": number},
            [b"", big],
        )
    child.call("chatter")
    child.close()
    assert not _alive(child.pid)


def test_errors_come_back_by_class_and_the_worker_goes_on(child: Child) -> None:
    with pytest.raises(DataError, match="column 'age' is missing"):
        child.call("refuse")
    with pytest.raises(EngineError, match="ZeroDivisionError: one over nothing"):
        child.call("fail")
    with pytest.raises(EngineError, match="KeyError"):
        child.call("unheard_of")
    assert child.call("echo", {"still": "here"}) == ({"still": "here"}, [])


def test_death_by_signal_is_named(child: Child) -> None:
    killer = threading.Timer(0.3, os.kill, (child.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(WorkerDiedError, match="killed by SIGKILL"):
        child.call("spin", {"s": 60})
    with pytest.raises(WorkerDiedError):
        child.call("echo")


def test_exit_code_is_named(child: Child) -> None:
    with pytest.raises(WorkerDiedError, match="exit code 7"):
        child.call("leave", {"code": 7})


def test_a_crash_leaves_no_memory_dump(child: Child) -> None:
    assert child.call("core_limit")[0]["bytes"] == [0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's choice is Linux's")
def test_when_memory_runs_out_the_worker_goes_first(child: Child) -> None:
    assert child.call("oom_score")[0] == {"value": 1000}


def test_a_late_answer_kills_the_worker(child: Child) -> None:
    with pytest.raises(WorkerDiedError, match=r"did not answer spin in 0\.2 s"):
        child.call("spin", {"s": 60}, timeout_s=0.2)
    assert not _alive(child.pid)


def test_telemetry_is_off_in_a_worker_whatever_the_user_set(
    child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    with Child("pipe_test_worker") as other:
        assert other.call("environ", {"name": "ORT_DISABLE_TELEMETRY"})[0] == {"value": "1"}


def test_another_interpreter_does_not_inherit_our_packages(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/this/environment")
    other = tmp_path / "python"
    other.symlink_to(sys.executable)
    source = str(Path(pipe.__file__).parents[1])
    with Child("pipe_test_worker", other, environ={"PYTHONPATH": f"{folder}:{source}"}) as worker:
        value = worker.call("environ", {"name": "PYTHONPATH"})[0]["value"]
    assert value == f"{folder}:{source}"
    probe = subprocess.run(
        [sys.executable, "-c", _PRINT_PATH.format(python=str(other))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert "PYTHONPATH=None" in probe.stderr, probe.stderr


_PRINT_PATH = """
import os, stat, pathlib
from fedge.pipe import Child
script = pathlib.Path({python!r}).with_name("show")
script.write_text('#!/bin/sh\\necho "PYTHONPATH=${{PYTHONPATH:-None}}" >&2\\n')
script.chmod(0o700)
Child("nothing", script).close()
"""


def test_a_busy_worker_ends_when_its_parent_is_killed(folder: Path) -> None:
    code = (
        "import sys; from fedge.pipe import Child; c = Child('pipe_test_worker');"
        "print(c.pid, flush=True); c.call('spin', {'s': 60})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.5)
        assert _alive(pid)
        parent.kill()
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
