"""What both engines do alike: preprocess, score and predict, on the bundle's inference graphs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from fedge.artifacts.bundle import Bundle
from fedge.artifacts.estimate import SCORE_ROWS
from fedge.artifacts.manifest import EVALUATE, INFER, PREPROCESS
from fedge.engines.base import EvalResult
from fedge.engines.checks import check_examples, check_inputs, without_extras
from fedge.engines.files import read_model
from fedge.engines.runtime import Session
from fedge.types import Array, Examples, Params

PREPROCESS_ROWS = 1024  # rows per call; bounds the memory of a large data set


class Scorer:
    """A bundle's inference graphs, each loaded when it is first needed."""

    def __init__(self, bundle: Bundle, threads: int, most_rows: int = SCORE_ROWS) -> None:
        self._most_rows = most_rows
        self._bundle, self._manifest, self._threads = bundle, bundle.manifest, threads

    def preprocess(self, raw: Examples, site: Params | None) -> Examples:
        """Raw rows as the model takes them; labels and what only training asks for pass through."""
        fixed = {n: np.ascontiguousarray(v, np.float32) for n, v in (site or {}).items()}
        own = without_extras(self._manifest, raw.inputs)
        extras = {n: a for n, a in raw.inputs.items() if n not in own}
        inputs = check_inputs(self._manifest.raw_inputs, own)
        parts = [self._preprocess.run({**c, **fixed}) for c in _chunks(inputs, PREPROCESS_ROWS)]
        joined = _join(parts)
        ready = {n.removesuffix("@pre"): v for n, v in joined.items()}
        return Examples({**ready, **extras}, raw.labels)

    def evaluate(self, params: Params, data: Examples, batch_size: int) -> EvalResult:
        """Loss weighted by rows, and outputs."""
        data = check_examples(self._manifest, data)
        rows = {**data.inputs, self._manifest.labels.name: data.labels}
        total, parts = 0.0, []
        for chunk in _chunks(rows, min(batch_size, self._most_rows)):
            got = self._evaluate.run({**chunk, **params})
            total += float(got.pop("loss")) * _rows(chunk)
            parts.append(got)
        return EvalResult(total / len(data), _join(parts))

    def predict(self, params: Params, inputs: Params, batch_size: int) -> Params:
        """Outputs for preprocessed inputs."""
        inputs = check_inputs(self._manifest.inputs, inputs)
        size = min(batch_size, self._most_rows)
        return _join([self._infer.run({**c, **params}) for c in _chunks(inputs, size)])

    @cached_property
    def _preprocess(self) -> Session:
        return self._open(PREPROCESS)

    @cached_property
    def _evaluate(self) -> Session:
        return self._open(EVALUATE)

    @cached_property
    def _infer(self) -> Session:
        return self._open(INFER)

    def _open(self, name: str) -> Session:
        return Session(read_model(self._bundle, name), self._threads)


def _chunks(rows: Params, size: int) -> Iterator[Params]:
    for start in range(0, _rows(rows), size):
        yield {n: a[start : start + size] for n, a in rows.items()}


def _rows(rows: Params) -> int:
    return int(next(iter(rows.values())).shape[0])


def _join(parts: list[Params]) -> Params:
    return {n: _concatenate([p[n] for p in parts]) for n in parts[0]}


def _concatenate(arrays: list[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
