"""The ``ort-training`` engine: ONNX Runtime's on-device training API, 1.19.2.

It runs only in an interpreter that holds the training wheel, and only in a worker: several
mistakes end the process instead of raising (an empty batch, labels out of range), so every row is
checked first, and what is left kills a worker and not the client.
"""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedge.artifacts.bundle import Bundle
from fedge.artifacts.estimate import AS_USUAL, Frugal, is_small
from fedge.artifacts.ort_import import import_training
from fedge.config import TrainConfig
from fedge.engines.base import EvalResult, TrainResult
from fedge.engines.batches import batch_indices, learning_rates
from fedge.engines.checks import check_params
from fedge.engines.feed import Feed
from fedge.engines.files import read_model
from fedge.engines.runtime import engine_errors, session_options, shared
from fedge.engines.scoring import Scorer
from fedge.engines.stepping import Shaper, Step, finite_loss, in_pieces, run_steps
from fedge.errors import ArtifactError
from fedge.types import Array, Examples, Indices, Params

api = import_training("api")

from onnxruntime.capi.onnxruntime_pybind11_state import OrtValueVector  # noqa: E402

TRAINING, OPTIMIZER, CHECKPOINT = "training_model.onnx", "optimizer_model.onnx", "checkpoint"
KEPT_SIZES = 4  # batch sizes whose buffers are kept


@dataclass
class _Batch:
    """Buffers of one batch size: rows by name, the same as ORT's inputs, and its outputs."""

    rows: Params
    inputs: Any
    outputs: Any
    loss: Array | None = None


class OrtTrainingEngine:
    """Trains one bundle in this process with ORT's training API; see :class:`TrainingEngine`.

    Args:
        bundle: A verified bundle.
        threads: Of one operator. Results are bitwise repeatable for a given number.
        frugal: How memory is saved; this engine cannot recompute.
    """

    name = "ort-training"

    def __init__(self, bundle: Bundle, threads: int = 1, frugal: Frugal = AS_USUAL) -> None:
        self._frugal = frugal
        self._bundle, self._manifest, self._threads = bundle, bundle.manifest, threads
        self._scorer = Scorer(bundle, threads, frugal.score_rows)
        self._batches: dict[Hashable, _Batch] = {}
        self._calls = 0  # of train_step since params were set
        self._load(bundle.initial_params())

    def preprocess(self, raw: Examples, site: Params | None = None) -> Examples:
        """See :meth:`TrainingEngine.preprocess`."""
        return self._scorer.preprocess(raw, site)

    def get_params(self) -> Params:
        """See :meth:`TrainingEngine.get_params`."""
        return {n: v.copy() for n, v in self._params.items()}

    def set_params(self, params: Params) -> None:
        """See :meth:`TrainingEngine.set_params`."""
        ready = check_params(self._manifest, params)
        self._calls = 0
        if self._manifest.state and self._stepped:
            self._load({**self.get_params(), **ready})  # no other way empties the optimizer
        else:
            self._write(ready)

    def train_step(self, batch: Examples, lr: float) -> float:
        """See :meth:`TrainingEngine.train_step`."""
        feed = Feed(self._manifest, batch, self._calls)
        self._calls += 1
        with engine_errors("in a training step"):
            self._stepped = True
            self._optimizer.set_learning_rate(lr)
            loss = self._forward_backward(feed, np.arange(len(batch)))
            self._optimizer.step()
            self._module.lazy_reset_grad()
        return finite_loss(loss, 1)

    def train(self, data: Examples, config: TrainConfig, seed: int) -> TrainResult:
        """See :meth:`TrainingEngine.train`."""
        config = in_pieces(config, self._frugal)
        feed = Feed(self._manifest, data, seed)
        rates = learning_rates(len(data), config)
        batches = batch_indices(len(data), config, seed)
        self._stepped = True
        with engine_errors("in training"):
            self._optimizer.set_learning_rate(config.lr)
            if config.is_plain and rates is None:
                return self._plain(feed, batches)
            return run_steps(self._shaped(feed, config), batches, rates, config.lr)

    def _plain(self, feed: Feed, batches: Iterator[Indices]) -> TrainResult:
        """:func:`run_steps` without a call per step: they may take 20 µs."""
        total, steps, seen = 0.0, 0, 0
        update = self._optimizer._optimizer.optimizer_step  # without the Python wrappers,
        forget = self._module._model.lazy_reset_grad  # which cost as much as a small operator
        for chosen in batches:
            total += self._forward_backward(feed, chosen) * len(chosen)
            update()
            forget()
            seen += len(chosen)
            steps += 1
        return TrainResult(finite_loss(total / seen, steps), steps, seen)

    def _shaped(self, feed: Feed, config: TrainConfig) -> Step:
        """A step whose gradient is shaped in ORT's own memory before the optimizer reads it."""
        manifest = self._manifest
        gradients = {n: self._state.parameters[n].grad for n in manifest.trainable}
        held = tuple(p.name for p in manifest.params if p.trainable and p.shared)
        shaper = Shaper(config, gradients, self._params, held)

        def piece(chosen: Indices) -> float:
            loss = self._forward_backward(feed, chosen)
            self._module.lazy_reset_grad()  # the next piece, or step, starts afresh
            return loss

        def step(chosen: Indices, lr: float) -> float:
            loss = shaper.gather(piece, chosen)
            self._optimizer.set_learning_rate(lr)
            self._optimizer.step()
            return loss

        return step

    def gradients(self, batch: Examples) -> tuple[float, Params]:
        """See :meth:`TrainingEngine.gradients`."""
        feed = Feed(self._manifest, batch, 0)
        before = {n: np.array(self._params[n]) for n in self._manifest.running}
        with engine_errors("computing gradients"):
            loss = self._forward_backward(feed, np.arange(len(batch)))
            found = {n: np.array(self._state.parameters[n].grad) for n in self._manifest.trainable}
            self._module.lazy_reset_grad()
        self._write(before)
        return loss, found

    def evaluate(self, data: Examples, batch_size: int = 256) -> EvalResult:
        """See :meth:`TrainingEngine.evaluate`."""
        return self._scorer.evaluate(self._params, data, batch_size)

    def predict(self, inputs: Params, batch_size: int = 256) -> Params:
        """See :meth:`TrainingEngine.predict`."""
        return self._scorer.predict(self._params, inputs, batch_size)

    def close(self) -> None:
        """See :meth:`TrainingEngine.close`."""
        self.__dict__.clear()

    def _load(self, params: Params) -> None:
        """(Re)load module and optimizer, whose memory is zero then, and fill in the params.

        The files are admitted, then written for ORT, whose API takes paths, to a private folder
        that is gone when this returns.
        """
        self._batches.clear()
        with tempfile.TemporaryDirectory(prefix="fedge-engine-") as folder:
            place = Path(folder)
            (place / CHECKPOINT).write_bytes(self._bundle.read(CHECKPOINT))
            for name in (TRAINING, OPTIMIZER):
                (place / name).write_bytes(read_model(self._bundle, name))
            with engine_errors("loading the training artifacts"):
                self._open(place)
        self._write(params)
        self._stepped = False

    def _open(self, place: Path) -> None:
        self._state = api.CheckpointState.load_checkpoint(place / CHECKPOINT)
        options = session_options(self._threads, is_small(self._manifest))
        self._module = api.Module(place / TRAINING, self._state, session_options=options)
        size = self._module.get_parameters_size(False)
        zeros = shared(np.zeros(size, np.float32))
        # A nominal checkpoint holds no values; they must be completed in one piece first. The
        # wrapper passes its argument on as it is and the C object is what is wanted.
        self._module.copy_buffer_to_parameters(zeros._ortvalue, False)
        self._optimizer = api.Optimizer(place / OPTIMIZER, self._module)
        self._run = self._module._model.train_step_with_ort_values  # half the cost of a call
        self._order = tuple(self._module.input_names())
        self._params = {p.name: self._view(p.name) for p in self._manifest.params}

    def _view(self, name: str) -> Array:
        if name not in self._state.parameters:
            raise ArtifactError(f"the bundle's checkpoint has no param {name}; build it again")
        view: Array = self._state.parameters[name].data  # ORT's own memory, writable
        return view

    def _write(self, params: Params) -> None:
        for name, value in params.items():
            self._params[name][...] = value

    def _forward_backward(self, feed: Feed, chosen: Indices) -> float:
        size = len(chosen)
        batch = self._batches.get(feed.key(size)) or self._batch(feed, size)
        feed.fill(batch.rows, chosen)
        self._run(batch.inputs, batch.outputs)
        if batch.loss is None:
            batch.loss = batch.outputs[0].numpy()  # a view: later steps write to the same place
        loss: float = batch.loss.item()
        return loss

    def _batch(self, feed: Feed, size: int) -> _Batch:
        if len(self._batches) >= KEPT_SIZES:
            self._batches.pop(next(iter(self._batches)))
        rows, inputs = feed.buffers(size), OrtValueVector()
        inputs.reserve(len(rows))
        for name in self._order:
            inputs.push_back(shared(rows[name])._ortvalue)
        batch = self._batches[feed.key(size)] = _Batch(rows, inputs, OrtValueVector())
        return batch
