"""Child processes that are certain to be gone afterwards, and the events one of them prints."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fedge.errors import FedgeError

TIMEOUT_S = 120.0


class Processes:
    """Child processes in sessions of their own, ended with everything below them."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Processes:
        self._logs.mkdir()
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._running:
            _signal_group(process, signal.SIGTERM)
        for process in self._running:
            self.stop(process)

    def start(
        self, command: list[str], name: str, stdout: int | None = None
    ) -> subprocess.Popen[bytes]:
        """Start ``command``; its output goes to the log of ``name`` (or to ``stdout``)."""
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout or log,
                stderr=log,
                start_new_session=True,
            )
        self._running.append(process)
        return process

    def server(self, command: list[str]) -> EventSource:
        """Start the server with its events on a pipe."""
        return EventSource(self.start(command, "server", subprocess.PIPE), self)

    def begin(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Start a command whose output is wanted."""
        return self.start(command, "commands", subprocess.PIPE)

    def finish(self, process: subprocess.Popen[bytes]) -> str:
        """Wait for :meth:`begin`'s command and return its output."""
        stdout, _ = process.communicate(timeout=TIMEOUT_S)
        if process.returncode:
            command = " ".join(map(str, process.args))  # type: ignore[arg-type]
            raise FedgeError(f"{command} failed: {self.tail('commands')}")
        return stdout.decode()

    def call(self, command: list[str]) -> str:
        """Run a command to its end and return its output."""
        return self.finish(self.begin(command))

    def stop(self, process: subprocess.Popen[bytes] | None) -> None:
        """End a process and its whole session; politely first."""
        if process is None:
            return
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        _signal_group(process, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def tail(self, name: str) -> str:
        """The last line a process wrote."""
        lines = self._log(name).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"


@dataclass
class EventSource:
    """A process whose standard output is one JSON event per line."""

    process: subprocess.Popen[bytes]
    processes: Processes
    _buffer: bytes = field(default=b"")

    def wait_for(self, kind: str) -> dict[str, Any]:
        """The first event of a kind."""
        return next(e for e in self.events() if e["event"] == kind)

    def events(self, check: Callable[[], None] | None = None) -> Iterator[dict[str, Any]]:
        """Events as the server prints them, until it closes its output."""
        while True:
            line = self._line(time.monotonic() + TIMEOUT_S, check)
            yield json.loads(line)

    def _line(self, deadline: float, check: Callable[[], None] | None) -> bytes:
        stream = self.process.stdout
        if stream is None:
            raise FedgeError("the server was started without a pipe")
        while b"\n" not in self._buffer:
            if time.monotonic() > deadline:
                raise FedgeError(f"no news for {TIMEOUT_S:.0f} s: {self.processes.tail('server')}")
            if check is not None:
                check()
            self._buffer += _read(stream)
            if self.process.poll() is not None and b"\n" not in self._buffer:
                raise FedgeError(f"the server stopped: {self.processes.tail('server')}")
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line


def _read(stream: IO[bytes], wait_s: float = 0.5) -> bytes:
    ready, _, _ = select.select([stream], [], [], wait_s)
    return os.read(stream.fileno(), 65536) if ready else b""


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Let SIGTERM and a closed terminal unwind like Ctrl-C, so that nothing is left running.

    SIGINT is set as well, because a shell script's background jobs start with it ignored; a
    SIGHUP that nohup has set to be ignored stays so.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
