"""Both engines against torch: loss, gradients and ten steps, per tensor to 1e-5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedge.artifacts.bundle import Bundle
from fedge.engines import TrainingEngine
from fedge.params import relative_distance
from fedge.types import Examples, Params

LR = {"sgd": 0.05, "adamw": 1e-3}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
Open = Callable[[Bundle], TrainingEngine]


class Oracle:
    """The same model in torch, at the bundle's initial params."""

    def __init__(self, family: Any, optimizer: str) -> None:
        self.model, self.loss_name = family.model, family.loss
        start = family.bundle(optimizer).initial_params()
        self.model.load_state_dict({n: torch.from_numpy(v.copy()) for n, v in start.items()})
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), lr=LR[optimizer])

    def loss(self, batch: Examples) -> torch.Tensor:
        out = self.model(torch.from_numpy(batch.inputs["x"]))
        labels = torch.from_numpy(batch.labels)
        if self.loss_name == "cross_entropy":
            return F.cross_entropy(out, labels)
        return F.binary_cross_entropy_with_logits(out, labels.float()[:, None])

    def gradients(self, batch: Examples) -> tuple[float, Params]:
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item(), {n: p.grad.numpy().copy() for n, p in self.model.named_parameters()}

    def step(self, batch: Examples) -> float:
        loss, _ = self.gradients(batch)
        self.optimizer.step()
        return loss

    def params(self) -> Params:
        return {n: p.detach().numpy() for n, p in self.model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("family", ["lr", "mlp", "lenet"])
def test_loss_gradients_and_ten_steps(
    families: dict[str, Any], family: str, optimizer: str, opened: Open
) -> None:
    one = families[family]
    engine, oracle = opened(one.bundle(optimizer)), Oracle(one, optimizer)
    batches = [one.data(rows=8 if number % 3 else 5, seed=number) for number in range(10)]
    loss, grads = engine.gradients(batches[0])
    wanted_loss, wanted = oracle.gradients(batches[0])
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert max(relative_distance(grads, wanted).values()) <= 1e-5
    for batch in batches:
        assert engine.train_step(batch, LR[optimizer]) == pytest.approx(
            oracle.step(batch), rel=1e-5
        )
    assert max(relative_distance(engine.get_params(), oracle.params()).values()) <= 1e-5
    result = engine.evaluate(one.data(rows=300, seed=99), batch_size=128)
    with torch.no_grad():
        x = torch.from_numpy(one.data(rows=300, seed=99).inputs["x"])
        assert result.loss == pytest.approx(oracle.loss(one.data(300, 99)).item(), rel=1e-5)
        output = {"out": one.model(x).numpy()}
    (got,) = result.outputs.values()
    assert max(relative_distance({"out": got}, output).values()) <= 1e-5
    (predicted,) = engine.predict(one.data(300, 99).inputs, batch_size=77).values()
    assert np.allclose(predicted, got, rtol=1e-5, atol=1e-6)
