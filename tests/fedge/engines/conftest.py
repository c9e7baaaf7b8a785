"""Bundles of the three model families, built once, and engines on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedge
from fedge.artifacts.bundle import Bundle
from fedge.engines import TrainingEngine, find_training_python, open_engine, open_in_process
from fedge.types import Examples

torch.set_num_threads(1)  # two busy cores: more threads wait for each other


class Family:
    """One model as torch has it, its data and its bundles."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], loss: str, classes: int) -> None:
        self.model, self.shape, self.loss, self.classes = model, shape, loss, classes
        self._bundles: dict[str, Bundle] = {}

    def bundle(self, optimizer: str) -> Bundle:
        if optimizer not in self._bundles:
            self._bundles[optimizer] = fedge.build(
                self.model, loss=self.loss, optimizer=optimizer, sample=torch.zeros(1, *self.shape)
            )
        return self._bundles[optimizer]

    def data(self, rows: int, seed: int = 0) -> Examples:
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(rows, *self.shape)).astype(np.float32)
        return Examples({"x": x}, rng.integers(0, self.classes, rows))


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.f1, self.f2, self.f3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.max_pool2d(torch.relu(self.c1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.c2(x)), 2)
        x = torch.relu(self.f1(torch.flatten(x, 1)))
        y: torch.Tensor = self.f3(torch.relu(self.f2(x)))
        return y


@pytest.fixture(scope="session")
def families() -> dict[str, Family]:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return {
        "lr": Family(nn.Linear(13, 1), (13,), "bce_with_logits", 2),
        "mlp": Family(mlp, (64,), "cross_entropy", 10),
        "lenet": Family(LeNet(), (1, 28, 28), "cross_entropy", 10),
    }


@pytest.fixture(scope="session")
def mlp(families: dict[str, Family]) -> Family:
    return families["mlp"]


@pytest.fixture(params=["ort", "ort-training"])
def engine_name(request: pytest.FixtureRequest) -> str:
    if request.param == "ort-training" and find_training_python() is None:
        pytest.skip("no interpreter with onnxruntime-training-cpu is installed")
    return str(request.param)


@pytest.fixture
def opened(engine_name: str) -> Iterator[Callable[[Bundle], TrainingEngine]]:
    """Opens the engine under test: ``ort`` in this process, ``ort-training`` in its worker."""
    engines: list[Any] = []

    def open_it(bundle: Bundle) -> TrainingEngine:
        here = engine_name == "ort"
        engines.append(open_in_process(bundle) if here else open_engine(bundle, engine_name))
        return engines[-1]  # type: ignore[no-any-return]

    yield open_it
    for engine in engines:
        engine.close()
