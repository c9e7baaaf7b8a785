"""The worker process as the session sees it: started when work comes, closed when it is idle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Any

from fedge.engines.interpreters import find_training_python, interpreter_for
from fedge.engines.providers import CPU, split
from fedge.errors import WorkerDiedError
from fedge.pipe import Child
from fedge_client import memory
from fedge_client.config import EngineConfig
from fedge_client.memory import address_limit

MODULE = "fedge_client.worker"
_MAX_ANSWER_BYTES = 4 << 20  # numbers and small tensors; everything large goes through files
# Fewer malloc arenas and no spare OpenMP threads: a worker's memory is most of what a device pays.
_ENVIRON = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def available(config: EngineConfig) -> tuple[str, ...]:
    """Engines this device may use, as configured.

    Raises:
        EngineUnavailableError: If the one that is configured is not installed.
    """
    if config.name != "auto":
        interpreter_for(config.name, config.training_python or None)
        return (config.name,)
    training = find_training_python(config.training_python or None)
    return ("ort", "ort-training") if training else ("ort",)


class Workers:
    """At most one worker process; one job at a time.

    Args:
        config: Engine settings of the site.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config, self._limit_bytes = config, address_limit(config)
        self._child: Child | None = None
        self._started: tuple[Path, tuple[str, ...]] | None = None
        self._lock = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        """The worker's process id, if one is alive."""
        return None if self._child is None else self._child.pid

    async def call(
        self, name: str, header: dict[str, Any], engine: str = "ort"
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Have a job done in the interpreter of ``engine``.

        Raises:
            WorkerDiedError: If the worker died; the next call starts another.
            FedgeError: What the job raised.
        """
        async with self._lock:
            python = interpreter_for(engine, self._config.training_python or None)
            child = self._start(python, self._limits(engine))
            try:
                return await asyncio.to_thread(child.call, name, header)
            except WorkerDiedError as exc:
                self._drop()
                raise WorkerDiedError(f"{exc}{self._suspicion(str(exc))}") from exc
            except asyncio.CancelledError:
                self._drop()
                raise
            finally:
                self._arm()

    def abort(self) -> None:
        """End the job that is running now; its caller gets WorkerDiedError."""
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, signal.SIGKILL)

    async def close(self) -> None:
        """End the worker."""
        self.abort()
        async with self._lock:
            self._drop()

    def _start(self, python: Path, limits: tuple[str, ...]) -> Child:
        if self._idle is not None:
            self._idle.cancel()
        if self._child is not None and self._started != (python, limits):
            self._drop()
        if self._child is None:
            self._child = Child(
                *(MODULE, python, limits),
                environ=_ENVIRON,
                max_answer_bytes=_MAX_ANSWER_BYTES,
            )
            self._started = (python, limits)
        return self._child

    def _limits(self, engine: str) -> tuple[str, ...]:
        """A limit on address space, except where a GPU's driver maps its own memory into it."""
        if self._limit_bytes is None or split(engine)[1] != CPU:
            return ()
        return ("--memory-bytes", str(self._limit_bytes))

    def _suspicion(self, epitaph: str) -> str:
        if not any(sign in epitaph for sign in ("SIGABRT", "SIGKILL", "SIGSEGV")):
            return ""
        return f"; out of memory? {memory.describe(self._config)}"

    def _arm(self) -> None:
        loop = asyncio.get_running_loop()
        self._idle = loop.call_later(self._config.worker_idle_s, self._on_idle)

    def _on_idle(self) -> None:
        if not self._lock.locked():
            self._drop()

    def _drop(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        child, self._child = self._child, None
        if child is not None:
            child.kill()
