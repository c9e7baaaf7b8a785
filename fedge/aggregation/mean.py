"""The weighted mean of params, one client at a time.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data"
(AISTATS 2017), Algorithm 1: w ← Σₖ (nₖ/n) wₖ. Departure: Σ nₖ wₖ and Σ nₖ are summed apart and
divided at the end, so that nothing has to be known beforehand and memory is one model.
"""

from __future__ import annotations

import math

import numpy as np

from fedge.errors import UpdateError
from fedge.types import Params


class WeightedMean:
    """A running weighted mean in float64. The order of :meth:`add` decides the last bits."""

    def __init__(self) -> None:
        self._sums: Params = {}
        self._total = 0.0

    @property
    def total_weight(self) -> float:
        """Sum of the weights so far."""
        return self._total

    def add(self, params: Params, weight: float) -> None:
        """Take in one client.

        Args:
            params: Name -> array of any float dtype; the same names and shapes every time.
            weight: Above 0, finite; usually the number of examples.

        Raises:
            UpdateError: If weight, names or shapes do not fit; nothing is added then.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise UpdateError(f"weight is {weight}; it must be above 0 and finite")
        if self._total:
            seen = {n: v.shape for n, v in self._sums.items()}
            got = {n: v.shape for n, v in params.items()}
            if got != seen:
                raise UpdateError(f"tensors {got} do not fit the ones before: {seen}")
            for name in self._sums:
                self._sums[name] += np.multiply(params[name], weight, dtype=np.float64)
        else:
            self._sums = {n: np.multiply(v, weight, dtype=np.float64) for n, v in params.items()}
        self._total += weight

    def result(self) -> Params:
        """The mean, float64.

        Raises:
            UpdateError: If nothing was added.
        """
        if not self._total:
            raise UpdateError("the mean of no clients; at least one is needed")
        return {n: v / self._total for n, v in self._sums.items()}
