"""Rows on their way into a step's buffers, and the random numbers that go with them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np

from fedge.artifacts.manifest import BATCH, Manifest, TensorSpec
from fedge.engines.checks import check_training, sizes_of
from fedge.seeds import derive_seed
from fedge.types import Examples, Indices, Params


class Feed:
    """One data set, checked, for one training call.

    Random numbers (a graph's ``noise`` inputs) are drawn step by step from a Philox generator keyed
    by ``derive_seed(seed, "noise")``: the same for every engine, and for a run that is repeated.
    Noise that comes with the rows, as in a bundle's recorded step, is used instead.

    Args:
        manifest: The bundle's.
        data: Preprocessed rows.
        seed: Of the training call.

    Attributes:
        rows: Every row of inputs and labels, by the graphs' names.

    Raises:
        DataError: If the rows do not fit the bundle.
    """

    def __init__(self, manifest: Manifest, data: Examples, seed: int) -> None:
        ready = check_training(manifest, data)
        self.rows: Params = {**ready.inputs, manifest.labels.name: ready.labels}
        self._specs = _specs(manifest)
        self._sizes = sizes_of(manifest, self.rows)
        self._rng = np.random.Generator(np.random.Philox(derive_seed(seed, "noise")))

    def key(self, size: int) -> Hashable:
        """What buffers for ``size`` rows may be kept under."""
        return (size, *self._sizes.values()) if self._sizes else size

    def buffers(self, size: int) -> Params:
        """Zeroed buffers for ``size`` rows of all that a step takes but params and state."""
        sizes = {**self._sizes, BATCH: size}
        return {s.name: np.zeros(_shape(s, sizes), s.dtype) for s in self._specs}

    def fill(self, buffers: Params, chosen: Indices) -> None:
        """Put the chosen rows into buffers of their number."""
        rows = self.rows
        for name, buffer in buffers.items():
            source = rows.get(name)
            if source is None:
                self._rng.random(dtype=np.float32, out=buffer)
            else:
                source.take(chosen, 0, buffer, "clip")  # in range; "raise" would copy

    def whole(self) -> Params:
        """All rows at once."""
        size = len(next(iter(self.rows.values())))
        drawn = self.buffers(size)
        missing = {n: b for n, b in drawn.items() if n not in self.rows}
        self.fill(missing, np.arange(size))
        return {**self.rows, **missing}


def _shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)


def _specs(manifest: Manifest) -> tuple[TensorSpec, ...]:
    labels = manifest.labels
    spec = TensorSpec(labels.name, labels.dtype, labels.shape)
    return (*manifest.training_inputs, spec, *manifest.noise)
