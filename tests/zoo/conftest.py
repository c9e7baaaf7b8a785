"""The zoo's models, as the benchmarks have them, with torch in float64 as the judge."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fedge
from fedge.artifacts.bundle import Bundle
from fedge.types import Array, Examples, Params

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from zoo import SMALL, Model

torch.set_num_threads(1)
LR = 0.05


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

    def judge(self, module: Any = None) -> Judge:
        return Judge(self.model, module)

    def rows(self, bundle: Bundle, count: int, seed: int) -> Examples:
        """Rows with the random numbers Dropout is to use."""
        rng = np.random.default_rng((seed, 2))
        shapes = {s.name: (count, *map(int, s.shape[1:])) for s in bundle.manifest.noise}
        noise = {n: rng.random(shape, np.float32) for n, shape in shapes.items()}
        inputs: Params = {**self.model.inputs(count, seed), **noise}
        return Examples(inputs, self.model.targets(count, seed))


class Judge:
    """The same model in torch, float64; Dropout uses the numbers that come with the rows."""

    def __init__(self, model: Model, module: Any = None) -> None:
        self.loss = model.loss
        self.module = (model.build() if module is None else module).double()
        self._optimizer = torch.optim.SGD(
            [p for p in self.module.parameters() if p.requires_grad], LR
        )

    def gradients(self, rows: Examples) -> tuple[float, Params]:
        self._optimizer.zero_grad()
        loss = self._loss(rows)
        loss.backward()
        named = {n: p.grad for n, p in self.module.named_parameters() if p.grad is not None}
        return loss.item(), {n: g.numpy().copy() for n, g in named.items()}

    def step(self, rows: Examples) -> None:
        self.gradients(rows)
        self._optimizer.step()

    def params(self) -> Params:
        state = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return {n: v.detach().numpy() for n, v in state.items()}

    def outputs(self, rows: Examples) -> Array:
        self.module.eval()
        with torch.no_grad():
            found: Array = self.module(*_tensors(rows)).numpy()
        self.module.train()
        return found

    def _loss(self, rows: Examples) -> Tensor:
        noise = [a for n, a in rows.inputs.items() if n.startswith("noise/")]
        with _dropout_by(noise):
            output = self.module(*_tensors(rows))
        labels = torch.from_numpy(rows.labels)
        if self.loss == "cross_entropy":
            return F.cross_entropy(output, labels)
        return F.binary_cross_entropy_with_logits(output, labels.double())


def _tensors(rows: Examples) -> list[Tensor]:
    own = [torch.from_numpy(a) for n, a in rows.inputs.items() if not n.startswith("noise/")]
    return [t.double() if t.is_floating_point() else t for t in own]


class _dropout_by:
    """torch's dropout with given numbers, in the order of its calls."""

    def __init__(self, noise: list[Array]) -> None:
        self._noise = noise

    def __enter__(self) -> None:
        self._kept = F.dropout

        def dropout(x: Tensor, p: float = 0.5, training: bool = True, _: bool = False) -> Tensor:
            if not training or p == 0:
                return x
            drawn = torch.from_numpy(self._noise.pop(0)).reshape(x.shape)
            return torch.where(drawn >= np.float32(p), x / (1 - p), 0.0)

        F.dropout = dropout

    def __exit__(self, *_: object) -> None:
        F.dropout = self._kept


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    return {name: Case(name, model) for name, model in SMALL.items()}


@pytest.fixture
def case(cases: dict[str, Case], name: str) -> Case:
    return cases[name]
