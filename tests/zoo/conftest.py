"""The zoo's models, as the benchmarks have them, with torch in float64 as the judge."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

import fedge
from fedge.artifacts.bundle import Bundle
from fedge.types import Examples, Params

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from zoo import SMALL, Model
from zoo.judge import Judge

torch.set_num_threads(1)


@dataclass
class Case:
    """One model of the zoo: its bundles, rows, and what torch makes of them."""

    name: str
    model: Model
    bundles: dict[str, Bundle] = field(default_factory=dict)

    def bundle(self, exporter: str = "auto") -> Bundle:
        if exporter not in self.bundles:
            self.bundles[exporter] = fedge.build(
                self.model.build(),
                loss=self.model.loss,
                sample=self.model.inputs(2),
                exporter=exporter,
            )
        return self.bundles[exporter]

    def judge(self) -> Judge:
        return Judge(self.model)

    def rows(self, bundle: Bundle, count: int, seed: int) -> Examples:
        """Rows with the random numbers Dropout is to use."""
        rng = np.random.default_rng((seed, 2))
        shapes = {s.name: (count, *map(int, s.shape[1:])) for s in bundle.manifest.noise}
        noise = {n: rng.random(shape, np.float32) for n, shape in shapes.items()}
        inputs: Params = {**self.model.inputs(count, seed), **noise}
        return Examples(inputs, self.model.targets(count, seed))


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    return {name: Case(name, model) for name, model in SMALL.items()}


@pytest.fixture
def case(cases: dict[str, Case], name: str) -> Case:
    return cases[name]
