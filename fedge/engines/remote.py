"""An engine in a process of its own: ONNX Runtime may die, the caller does not."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedge import tensors
from fedge.artifacts.bundle import Bundle
from fedge.config import TrainConfig
from fedge.engines.base import EvalResult, TrainResult
from fedge.engines.files import worker_header
from fedge.engines.worker import pack_examples, unpack_examples
from fedge.errors import ArtifactError, DataError
from fedge.pipe import Child, Frame
from fedge.types import Examples, Params

KEPT_BYTES = 256 << 20  # of data sets a worker keeps; the least recently used go first


class WorkerEngine:
    """A :class:`TrainingEngine` behind a pipe; may be shared between threads.

    A data set is sent once and recognised by identity, so its arrays must not change while it is
    in use. When the worker dies, the call under way and all later ones raise
    :class:`~fedge.errors.WorkerDiedError`, until :meth:`reopen`.

    Args:
        bundle: A verified bundle.
        name: ``ort`` or ``ort-training``.
        python: Interpreter that holds the engine's ONNX Runtime.
        threads: Of one operator.
    """

    def __init__(
        self, bundle: Bundle, name: str, python: str | Path = sys.executable, threads: int = 1
    ) -> None:
        self.name = name
        self._bundle, self._python, self._threads = bundle, python, threads
        self._lock = threading.RLock()
        self._start()

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._child.pid

    def reopen(self) -> None:
        """Start a new worker in place of a dead or stuck one; params are the initial ones again."""
        with self._lock:
            self._child.kill()
            self._start()

    def preprocess(self, raw: Examples, site: Params | None = None) -> Examples:
        """See :meth:`TrainingEngine.preprocess`."""
        blobs = [tensors.dump(site)] if site is not None else []
        with self._lock:
            header = {"data": self._sent(raw), "result": self._kept.reserve()}
            _, (blob,) = self._call("preprocess", header, blobs)
            done = unpack_examples(blob)
            self._kept.add(done, header["result"])
        return done

    def get_params(self) -> Params:
        """See :meth:`TrainingEngine.get_params`."""
        _, (blob,) = self._call("get_params")
        return {n: a.copy() for n, a in tensors.load(blob)[0].items()}

    def set_params(self, params: Params) -> None:
        """See :meth:`TrainingEngine.set_params`."""
        self._call("set_params", blobs=[tensors.dump(params)])

    def train_step(self, batch: Examples, lr: float) -> float:
        """See :meth:`TrainingEngine.train_step`."""
        header, _ = self._call("train_step", {"lr": lr}, [_pack(batch)])
        return float(header["loss"])

    def train(self, data: Examples, config: TrainConfig, seed: int) -> TrainResult:
        """See :meth:`TrainingEngine.train`."""
        with self._lock:
            header = {"data": self._sent(data), "config": asdict(config), "seed": seed}
            return TrainResult(**self._call("train", header)[0])

    def gradients(self, batch: Examples) -> tuple[float, Params]:
        """See :meth:`TrainingEngine.gradients`."""
        header, (blob,) = self._call("gradients", blobs=[_pack(batch)])
        return float(header["loss"]), tensors.load(blob)[0]

    def evaluate(self, data: Examples, batch_size: int = 256) -> EvalResult:
        """See :meth:`TrainingEngine.evaluate`."""
        with self._lock:
            asked = {"data": self._sent(data), "batch_size": batch_size}
            header, (blob,) = self._call("evaluate", asked)
        return EvalResult(float(header["loss"]), tensors.load(blob)[0])

    def predict(self, inputs: Params, batch_size: int = 256) -> Params:
        """See :meth:`TrainingEngine.predict`."""
        _, (blob,) = self._call("predict", {"batch_size": batch_size}, [tensors.dump(inputs)])
        return tensors.load(blob)[0]

    def close(self) -> None:
        """See :meth:`TrainingEngine.close`."""
        with self._lock:
            self._child.close()

    def _start(self) -> None:
        self._child = Child("fedge.engines.worker", self._python)
        self._kept = _Kept(KEPT_BYTES)
        try:
            self._call("open", worker_header(self._bundle, self.name, self._threads))
        except BaseException:
            self._child.kill()
            raise

    def _call(
        self, name: str, header: dict[str, Any] | None = None, blobs: Sequence[bytes] = ()
    ) -> Frame:
        with self._lock:
            return self._child.call(name, header, blobs)

    def _sent(self, data: Examples) -> int:
        """The handle of a data set, which is sent if the worker does not have it."""
        handle = self._kept.find(data)
        if handle is None:
            blob = _pack(data)
            handle = self._kept.add(data, self._kept.reserve())
            forget = self._kept.dropped()
            self._call("put", {"data": handle, "forget": forget}, [blob])
        return handle


class _Kept:
    """Which data sets the worker has: by identity, while they live, within a number of bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._known: OrderedDict[int, tuple[weakref.ref[Examples], int, int]] = OrderedDict()
        self._last = 0
        self._dropped: list[int] = []

    def reserve(self) -> int:
        """A fresh handle."""
        self._last += 1
        return self._last

    def find(self, data: Examples) -> int | None:
        """The handle of ``data`` if the worker has it."""
        entry = self._known.get(id(data))
        if entry is None or entry[0]() is not data:
            return None
        self._known.move_to_end(id(data))
        return entry[1]

    def add(self, data: Examples, handle: int) -> int:
        """Note that the worker has ``data`` under ``handle``; drop what is too much."""
        size = sum(a.nbytes for a in (*data.inputs.values(), data.labels))
        self._drop(id(data))
        self._known[id(data)] = (weakref.ref(data), handle, size)
        while len(self._known) > 1 and self._bytes() > self._limit:
            self._drop(next(iter(self._known)))
        return handle

    def dropped(self) -> list[int]:
        """Handles the worker should forget, each told once."""
        for key in [k for k, (alive, _, _) in self._known.items() if alive() is None]:
            self._drop(key)
        handles, self._dropped = self._dropped, []
        return handles

    def _bytes(self) -> int:
        return sum(size for _, _, size in self._known.values())

    def _drop(self, key: int) -> None:
        entry = self._known.pop(key, None)
        if entry is not None:
            self._dropped.append(entry[1])


def _pack(data: Examples) -> bytes:
    try:
        return pack_examples(data)
    except ArtifactError as exc:
        raise DataError(f"rows cannot be sent to the engine: {exc}") from exc
