"""The engine's process: ``python -m fedge.engines.worker``, driven by :class:`WorkerEngine`.

Data sets are sent once and then named by a handle. Arrays cross the pipe as tensor files.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedge import tensors
from fedge.config import TrainConfig, from_mapping
from fedge.engines.base import TrainingEngine
from fedge.engines.files import reopen_bundle
from fedge.engines.inprocess import open_in_process
from fedge.engines.probe import measure
from fedge.errors import EngineError
from fedge.pipe import Frame, serve
from fedge.types import Examples

LABELS = "labels"
INPUT = "input/"


def pack_examples(data: Examples) -> bytes:
    """Rows as one tensor file."""
    named = {f"{INPUT}{n}": a for n, a in data.inputs.items()}
    return tensors.dump({**named, LABELS: data.labels})


def unpack_examples(blob: bytes) -> Examples:
    """What :func:`pack_examples` packed, as views of ``blob``."""
    found, _ = tensors.load(blob)
    labels = found.pop(LABELS)
    return Examples({n.removeprefix(INPUT): a for n, a in found.items()}, labels)


class Host:
    """One engine and the data sets it was sent; one method per call."""

    def __init__(self) -> None:
        self._engine: TrainingEngine | None = None
        self._data: dict[int, Examples] = {}

    @property
    def engine(self) -> TrainingEngine:
        """The opened engine."""
        if self._engine is None:
            raise EngineError("the worker was asked to work before it was told on which bundle")
        return self._engine

    def open(self, header: dict[str, Any], _: list[bytes]) -> Frame:
        """Load the bundle's params and graphs."""
        bundle = reopen_bundle(Path(header["folder"]), header["digest"])
        self._engine = open_in_process(bundle, header["engine"], header["threads"])
        return {"pid": os.getpid()}, []

    def probe(self, header: dict[str, Any], _: list[bytes]) -> Frame:
        """Compare the engine with the recorded step, and time it."""
        from fedge.engines.runtime import offered

        bundle = reopen_bundle(Path(header["folder"]), header["digest"])
        return {**asdict(measure(self.engine, bundle)), "offered": offered()}, []

    def put(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        """Keep a data set under a handle, and forget others."""
        self._forget(header["forget"])
        self._data[header["data"]] = unpack_examples(blobs[0])

    def preprocess(self, header: dict[str, Any], blobs: list[bytes]) -> Frame:
        """Preprocess a kept data set; the result is kept too, under the handle ``result``."""
        site = tensors.load(blobs[0])[0] if blobs else None
        done = self.engine.preprocess(self._data[header["data"]], site)
        self._data[header["result"]] = done
        return {}, [pack_examples(done)]

    def get_params(self, _: dict[str, Any], __: list[bytes]) -> Frame:
        """All params."""
        return {}, [tensors.dump(self.engine.get_params())]

    def set_params(self, _: dict[str, Any], blobs: list[bytes]) -> None:
        """Overwrite some params."""
        self.engine.set_params(tensors.load(blobs[0])[0])

    def train_step(self, header: dict[str, Any], blobs: list[bytes]) -> Frame:
        """One step on the rows that come along."""
        return {"loss": self.engine.train_step(unpack_examples(blobs[0]), header["lr"])}, []

    def train(self, header: dict[str, Any], _: list[bytes]) -> Frame:
        """Train on a kept data set."""
        config = from_mapping(TrainConfig, header["config"], "train")
        return asdict(self.engine.train(self._data[header["data"]], config, header["seed"])), []

    def gradients(self, _: dict[str, Any], blobs: list[bytes]) -> Frame:
        """Loss and gradients on the rows that come along."""
        loss, grads = self.engine.gradients(unpack_examples(blobs[0]))
        return {"loss": loss}, [tensors.dump(grads)]

    def evaluate(self, header: dict[str, Any], _: list[bytes]) -> Frame:
        """Score a kept data set."""
        result = self.engine.evaluate(self._data[header["data"]], header["batch_size"])
        return {"loss": result.loss}, [tensors.dump(result.outputs)]

    def predict(self, header: dict[str, Any], blobs: list[bytes]) -> Frame:
        """Outputs for the inputs that come along."""
        outputs = self.engine.predict(tensors.load(blobs[0])[0], header["batch_size"])
        return {}, [tensors.dump(outputs)]

    def _forget(self, handles: Iterable[int]) -> None:
        for handle in handles:
            self._data.pop(handle, None)


CALLS = (
    "open",
    "probe",
    "put",
    "preprocess",
    "get_params",
    "set_params",
    "train_step",
    "train",
    "gradients",
    "evaluate",
    "predict",
)


def main() -> int:
    """Serve one engine until the parent closes the pipe."""
    host = Host()
    return serve({name: getattr(host, name) for name in CALLS})


if __name__ == "__main__":
    sys.exit(main())
