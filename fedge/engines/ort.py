"""The ``ort`` engine: a training step in standard operators on stock onnxruntime.

One ``run`` of ``step.onnx`` is forward, backward and optimizer. Everything that a step changes
lives in two sets of buffers; a step reads one and writes the other, so nothing is copied or
allocated between steps, and a step costs little more than its kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fedge.artifacts.bundle import Bundle
from fedge.artifacts.manifest import GRAD, STEP
from fedge.config import TrainConfig
from fedge.engines.base import EvalResult, TrainResult
from fedge.engines.batches import batch_indices
from fedge.engines.checks import check_examples, check_params
from fedge.engines.files import read_model
from fedge.engines.runtime import Session, engine_errors, finite_loss, row_buffers, shared
from fedge.engines.scoring import Scorer
from fedge.types import Examples, Params

NEXT = "@next"
KEPT_SIZES = 4  # batch sizes whose buffers are kept


@dataclass
class _Bound:
    """Buffers of one batch size, and the bindings that read set 0 and set 1."""

    rows: Params
    bindings: tuple[Any, Any]


class OrtEngine:
    """Trains and scores one bundle in this process; see :class:`TrainingEngine`.

    Args:
        bundle: A verified bundle.
        threads: Of one operator. Results are bitwise repeatable for a given number.
    """

    name = "ort"

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        self._bundle, self._manifest, self._threads = bundle, bundle.manifest, threads
        self._scorer = Scorer(bundle, threads)
        params = bundle.initial_params()
        specs = bundle.manifest.state
        state = {s.name: np.zeros([int(d) for d in s.shape], s.dtype) for s in specs}
        self._sets = tuple({n: np.array(v) for n, v in {**params, **state}.items()} for _ in "01")
        self._current = 0
        self._lr, self._loss = np.zeros((), np.float32), np.zeros((), np.float32)
        self._bound: dict[int, _Bound] = {}

    def preprocess(self, raw: Examples, site: Params | None = None) -> Examples:
        """See :meth:`TrainingEngine.preprocess`."""
        return self._scorer.preprocess(raw, site)

    def get_params(self) -> Params:
        """See :meth:`TrainingEngine.get_params`."""
        return {n: v.copy() for n, v in self._params().items()}

    def set_params(self, params: Params) -> None:
        """See :meth:`TrainingEngine.set_params`."""
        ready = check_params(self._manifest, params)
        now = self._sets[self._current]
        for name, value in ready.items():
            now[name][...] = value
        for spec in self._manifest.state:
            now[spec.name][...] = 0

    def train_step(self, batch: Examples, lr: float) -> float:
        """See :meth:`TrainingEngine.train_step`."""
        ready = check_examples(self._manifest, batch)
        rows = {**ready.inputs, self._manifest.labels.name: ready.labels}
        bound = self._bind(len(ready))
        self._lr[...] = lr
        for name, buffer in bound.rows.items():
            buffer[...] = rows[name]
        with engine_errors("in a training step"):
            self._step.run_with_iobinding(bound.bindings[self._current])
        self._current ^= 1
        return finite_loss(self._loss.item(), 1)

    def train(self, data: Examples, config: TrainConfig, seed: int) -> TrainResult:
        """See :meth:`TrainingEngine.train`."""
        ready = check_examples(self._manifest, data)
        rows = {**ready.inputs, self._manifest.labels.name: ready.labels}
        self._lr[...] = config.lr
        total, steps, seen = 0.0, 0, 0
        with engine_errors("in training"):
            run = self._step.run_with_iobinding
            for chosen in batch_indices(len(ready), config, seed):
                size = len(chosen)
                bound = self._bound.get(size) or self._bind(size)
                for name, buffer in bound.rows.items():
                    rows[name].take(chosen, 0, buffer, "clip")  # in range; "raise" would copy
                run(bound.bindings[self._current])
                self._current ^= 1
                total += self._loss.item() * size
                seen += size
                steps += 1
        return TrainResult(finite_loss(total / seen, steps), steps, seen)

    def gradients(self, batch: Examples) -> tuple[float, Params]:
        """See :meth:`TrainingEngine.gradients`."""
        ready = check_examples(self._manifest, batch)
        rows = {**ready.inputs, self._manifest.labels.name: ready.labels}
        out = self._grad.run({**rows, **self._params()})
        return float(out["loss"]), {n: out[f"{n}@grad"] for n in self._manifest.trainable}

    def evaluate(self, data: Examples, batch_size: int = 256) -> EvalResult:
        """See :meth:`TrainingEngine.evaluate`."""
        return self._scorer.evaluate(self._params(), data, batch_size)

    def predict(self, inputs: Params, batch_size: int = 256) -> Params:
        """See :meth:`TrainingEngine.predict`."""
        return self._scorer.predict(self._params(), inputs, batch_size)

    def close(self) -> None:
        """See :meth:`TrainingEngine.close`."""
        self.__dict__.clear()

    def _params(self) -> Params:
        now = self._sets[self._current]
        return {p.name: now[p.name] for p in self._manifest.params}

    def _bind(self, size: int) -> _Bound:
        if size not in self._bound:
            if len(self._bound) >= KEPT_SIZES:
                self._bound.pop(next(iter(self._bound)))
            rows = row_buffers(self._manifest, size)
            self._bound[size] = _Bound(rows, (self._binding(rows, 0), self._binding(rows, 1)))
        return self._bound[size]

    def _binding(self, rows: Params, source: int) -> Any:  # noqa: ANN401 - onnxruntime's
        read, write = self._sets[source], self._sets[1 - source]
        values = {**rows, **read, "lr": self._lr}
        binding = self._step.io_binding()
        for graph_input in self._step.get_inputs():
            binding.bind_ortvalue_input(graph_input.name, shared(values[graph_input.name]))
        for graph_output in self._step.get_outputs():
            name = graph_output.name
            target = self._loss if name == "loss" else write[name.removesuffix(NEXT)]
            binding.bind_ortvalue_output(name, shared(target))
        return binding

    @cached_property
    def _step(self) -> Any:  # noqa: ANN401 - onnxruntime's session
        session = Session(read_model(self._bundle, STEP), self._threads)
        first, second = self._sets
        for name in first.keys() - {n.removesuffix(NEXT) for n in session.outputs}:
            second[name] = first[name]  # a step leaves it alone, so both sets share it
        return session.raw

    @cached_property
    def _grad(self) -> Session:
        return Session(read_model(self._bundle, GRAD), self._threads)
