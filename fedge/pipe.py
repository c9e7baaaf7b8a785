"""A child process behind a narrow pipe.

A frame is eight bytes little-endian length, four bytes header length, a JSON header, then the
header's blobs one after another (``header["blobs"]`` holds their sizes). Nothing is unpickled: a
child that has been taken over by a hostile file can only send JSON and bytes. This module imports
neither numpy nor anything else that is large, so that the resident client can use it.

A worker module calls :func:`serve` with its handlers; the parent holds a :class:`Child`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedge import errors
from fedge.errors import OUT_OF_MEMORY, FedgeError, WorkerDiedError
from fedge.platform import die_first, limit_process, silence_telemetry

MAX_FRAME_BYTES = 4 << 30
MAX_HEADER_BYTES = 16 << 20
_MAX_SAID_BYTES = 1 << 20
Frame = tuple[dict[str, Any], list[bytes]]
Handler = Callable[[dict[str, Any], list[bytes]], Frame | None]


def send(
    sock: socket.socket, header: dict[str, Any], blobs: Sequence[bytes | memoryview] = ()
) -> None:
    """Write one frame."""
    views = [memoryview(b).cast("B") if len(b) else memoryview(b"") for b in blobs]
    head = json.dumps({**header, "blobs": [len(v) for v in views]}).encode()
    total = 4 + len(head) + sum(len(v) for v in views)
    sock.sendall(total.to_bytes(8, "little") + len(head).to_bytes(4, "little") + head)
    for view in views:
        sock.sendall(view)


def receive(sock: socket.socket, max_bytes: int = MAX_FRAME_BYTES) -> Frame:
    """Read one frame of at most ``max_bytes``.

    Raises:
        EOFError: If the other side closed.
        WorkerDiedError: If the frame is malformed or too large.
    """
    total = int.from_bytes(_exactly(sock, 8), "little")
    _want(4 <= total <= max_bytes, f"frame of {total} bytes")
    size = int.from_bytes(_exactly(sock, 4), "little")
    _want(size <= min(total - 4, MAX_HEADER_BYTES), f"header of {size} bytes")
    try:
        header = json.loads(_exactly(sock, size))
        sizes = header.pop("blobs")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise WorkerDiedError(f"the worker sent a malformed frame: {exc}") from exc
    _want(
        isinstance(sizes, list) and all(type(s) is int and s >= 0 for s in sizes),
        "blob sizes are not sizes",
    )
    _want(sum(sizes) == total - 4 - size, "blob sizes do not add up")
    return header, [_exactly(sock, s) for s in sizes]


def serve(handlers: Mapping[str, Handler], argv: Sequence[str] | None = None) -> int:
    """Answer requests on the inherited socket until the parent closes it.

    Standard output is turned to standard error, so that a chatty library cannot disturb anybody.
    A crash leaves no memory dump: it would hold the site's rows. Of all processes a worker is the
    one that may be lost when memory runs out. ``--memory-bytes`` limits its address space.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    limited = "--memory-bytes" in args
    limit_process(memory_bytes=int(args[args.index("--memory-bytes") + 1]) if limited else None)
    die_first()
    sock = socket.socket(fileno=int(args[args.index("--pipe-fd") + 1]))
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _end_with_parent(sock)
    while True:
        try:
            header, blobs = receive(sock)
        except (EOFError, ConnectionError):
            return 0
        try:
            answer = handlers[header.pop("call")](header, blobs) or ({}, [])
        except FedgeError as exc:
            answer = ({"error": type(exc).__name__, "message": str(exc)}, [])
        except MemoryError:
            answer = ({"error": "EngineError", "message": f"out of memory: {OUT_OF_MEMORY}"}, [])
        except Exception as exc:  # noqa: BLE001 - every failure must reach the parent as an answer
            answer = ({"error": "EngineError", "message": f"{type(exc).__name__}: {exc}"}, [])
        try:
            send(sock, *answer)
        except ConnectionError:
            return 0


def _end_with_parent(sock: socket.socket) -> None:
    """End this process when the other side is gone, however busy it is just then."""
    if not hasattr(select, "poll"):
        return
    hangup = select.poll()
    hangup.register(sock, 0)  # POLLHUP and POLLERR are always reported

    def watch() -> None:
        hangup.poll()
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


class Child:
    """A worker process and the pipe to it; not shared between threads without a lock.

    Args:
        module: What to run, with ``python -m``.
        python: In which interpreter.
        args: Further arguments.
        environ: Variables to set for it.
        max_answer_bytes: Largest answer taken from it.
        hush: Keep what it writes to standard error, for the message should it die, instead of
            showing it.
    """

    def __init__(
        self,
        module: str,
        python: str | Path = sys.executable,
        args: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        max_answer_bytes: int = MAX_FRAME_BYTES,
        *,
        hush: bool = False,
    ) -> None:
        self._said = tempfile.TemporaryFile() if hush else None  # noqa: SIM115 - closed with us
        ours, theirs = socket.socketpair()
        env = {**os.environ, **(environ or {})}
        silence_telemetry(env)
        if Path(python) == Path(sys.executable):
            env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        elif "PYTHONPATH" not in (environ or {}):
            env.pop("PYTHONPATH", None)  # our packages are not that interpreter's
        with theirs:
            self._process = subprocess.Popen(
                [str(python), "-m", module, "--pipe-fd", str(theirs.fileno()), *args],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                env=env,
            )
        self._sock = ours
        self._what = module
        self._max_answer_bytes = max_answer_bytes

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def call(
        self,
        name: str,
        header: dict[str, Any] | None = None,
        blobs: Sequence[bytes | memoryview] = (),
        timeout_s: float | None = None,
    ) -> Frame:
        """Ask the worker and wait for its answer.

        Raises:
            WorkerDiedError: If it died, or did not answer within ``timeout_s`` (it is killed then).
            FedgeError: The error the worker's handler raised, by class.
        """
        try:
            self._sock.settimeout(timeout_s)
            send(self._sock, {**(header or {}), "call": name}, blobs)
            answer, data = receive(self._sock, self._max_answer_bytes)
        except TimeoutError as exc:
            self.kill()
            raise WorkerDiedError(f"{self._what} did not answer {name} in {timeout_s} s") from exc
        except (EOFError, OSError) as exc:
            raise WorkerDiedError(f"{self._what} died during {name}: {self._epitaph()}") from exc
        if "error" in answer:
            kind = errors.BY_NAME.get(str(answer["error"]), FedgeError)
            raise kind(str(answer.get("message", "")))
        return answer, data

    def close(self, timeout_s: float = 5.0) -> None:
        """Let the worker finish and go; kill it if it does not."""
        self._sock.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
        if self._said is not None:
            self._said.close()

    def kill(self) -> None:
        """End the worker now."""
        self._sock.close()
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _epitaph(self) -> str:
        self._sock.close()
        deadline = time.monotonic() + 5
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        code = self._process.poll()
        if code is None:
            self.kill()
            return "it closed the pipe"
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{ended}{self._last_words()}"

    def _last_words(self) -> str:
        """The last line it wrote, where that was kept."""
        if self._said is None:
            return ""
        self._said.seek(0)
        lines = self._said.read(_MAX_SAID_BYTES).decode(errors="replace").split("\n")
        return next((f" ({text})" for line in reversed(lines) if (text := line.strip())), "")


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return bytes(data)


def _want(ok: bool, message: str) -> None:
    if not ok:
        raise WorkerDiedError(f"the worker sent a malformed frame: {message}")
