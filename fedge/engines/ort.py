"""The ``ort`` engine: a training step in standard operators on stock onnxruntime.

One ``run`` of ``step.onnx`` is forward, backward and optimizer. Clipping, cutting a batch in
pieces and a proximal term need the gradient itself: such steps are in
:mod:`fedge.engines.shaped`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from fedge.artifacts.bundle import Bundle
from fedge.artifacts.estimate import AS_USUAL, Frugal, is_small
from fedge.artifacts.manifest import GRAD, RECOMPUTED, STEP, UPDATE
from fedge.config import TrainConfig
from fedge.engines.base import EvalResult, TrainResult
from fedge.engines.batches import batch_indices, learning_rates
from fedge.engines.checks import check_params
from fedge.engines.feed import Feed
from fedge.engines.files import read_model
from fedge.engines.memory import Memory
from fedge.engines.providers import CPU
from fedge.engines.runtime import Session, engine_errors
from fedge.engines.scoring import Scorer
from fedge.engines.shaped import ShapedSteps
from fedge.engines.stepping import finite_loss, in_pieces, run_steps
from fedge.types import Examples, Indices, Params

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
        provider: What computes the steps; the rest is done on the CPU.
        frugal: How memory is saved.
    """

    def __init__(
        self, bundle: Bundle, threads: int = 1, provider: str = CPU, frugal: Frugal = AS_USUAL
    ) -> None:
        self.name = "ort" if provider == CPU else f"ort:{provider}"
        self._provider = provider
        self._bundle, self._manifest, self._threads = bundle, bundle.manifest, threads
        self._frugal = frugal
        self._scorer = Scorer(bundle, threads, frugal.score_rows)
        self._memory = Memory(bundle)
        self._lr, self._loss = np.zeros((), np.float32), np.zeros((), np.float32)
        self._bound: dict[Hashable, _Bound] = {}
        self._calls = 0  # of train_step since params were set

    def preprocess(self, raw: Examples, site: Params | None = None) -> Examples:
        """See :meth:`TrainingEngine.preprocess`."""
        return self._scorer.preprocess(raw, site)

    def get_params(self) -> Params:
        """See :meth:`TrainingEngine.get_params`."""
        return {n: v.copy() for n, v in self._params().items()}

    def set_params(self, params: Params) -> None:
        """See :meth:`TrainingEngine.set_params`."""
        ready = check_params(self._manifest, params)
        now = self._memory.now
        for name, value in ready.items():
            now[name][...] = value
        for spec in self._manifest.state:
            now[spec.name][...] = 0
        self._calls = 0

    def train_step(self, batch: Examples, lr: float) -> float:
        """See :meth:`TrainingEngine.train_step`."""
        feed = Feed(self._manifest, batch, self._calls)
        bound = self._bind(feed, len(batch))
        self._calls += 1
        self._lr[...] = lr
        feed.fill(bound.rows, np.arange(len(batch)))
        with engine_errors("in a training step"):
            self._step.run_with_iobinding(bound.bindings[self._memory.current])
        self._memory.current ^= 1
        return finite_loss(self._loss.item(), 1)

    def train(self, data: Examples, config: TrainConfig, seed: int) -> TrainResult:
        """See :meth:`TrainingEngine.train`."""
        config = in_pieces(config, self._frugal)
        feed = Feed(self._manifest, data, seed)
        rates = learning_rates(len(data), config)
        batches = batch_indices(len(data), config, seed)
        with engine_errors("in training"):
            if config.is_plain:
                return self._plain(feed, batches, rates, config.lr)
            steps = ShapedSteps((self._grad, self._update), self._memory, self._manifest, config)
            return run_steps(partial(steps.step, feed), batches, rates, config.lr)

    def _plain(
        self, feed: Feed, batches: Iterator[Indices], rates: Iterator[float] | None, lr: float
    ) -> TrainResult:
        """:func:`run_steps` of ``step.onnx`` without a call per step: they may take 20 µs."""
        self._lr[...] = lr
        total, steps, seen = 0.0, 0, 0
        run, memory = self._step.run_with_iobinding, self._memory
        for chosen in batches:
            size = len(chosen)
            bound = self._bound.get(feed.key(size)) or self._bind(feed, size)
            feed.fill(bound.rows, chosen)
            if rates is not None:
                self._lr[...] = next(rates)
            run(bound.bindings[memory.current])
            memory.current ^= 1
            total += self._loss.item() * size
            seen += size
            steps += 1
        return TrainResult(finite_loss(total / seen, steps), steps, seen)

    def gradients(self, batch: Examples) -> tuple[float, Params]:
        """See :meth:`TrainingEngine.gradients`."""
        out = self._grad.run({**Feed(self._manifest, batch, 0).whole(), **self._params()})
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
        now = self._memory.now
        return {p.name: now[p.name] for p in self._manifest.params}

    def _bind(self, feed: Feed, size: int) -> _Bound:
        key = feed.key(size)
        if key not in self._bound:
            if len(self._bound) >= KEPT_SIZES:
                self._bound.pop(next(iter(self._bound)))
            rows, session = feed.buffers(size), self._step
            given, target = {**rows, "lr": self._lr}, {"loss": self._loss}
            first, second = (self._memory.binding(session, i, given, target) for i in (0, 1))
            self._bound[key] = _Bound(rows, (first, second))
        return self._bound[key]

    @cached_property
    def _step(self) -> Any:  # noqa: ANN401 - onnxruntime's session
        session = self._open(STEP)
        self._memory.share_all_but(session.outputs)
        return session.raw

    @cached_property
    def _grad(self) -> Session:
        return self._open(GRAD)

    @cached_property
    def _update(self) -> Session:
        return self._open(UPDATE)

    def _open(self, name: str) -> Session:
        if self._frugal.recompute:
            name = RECOMPUTED.get(name, name)
        model, small = read_model(self._bundle, name), is_small(self._manifest)
        return Session(model, self._threads, self._provider, small)
