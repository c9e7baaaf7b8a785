"""The zoo's models in torch, float64: the judge of tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedge.types import Array, Examples, Params
from zoo import Model

LR = 0.05


class Judge:
    """The same model in torch, float64; Dropout uses the numbers that come with the rows."""

    def __init__(self, model: Model) -> None:
        self.loss = model.loss
        self.module: Any = model.build().double()
        self._optimizer = torch.optim.SGD(
            [p for p in self.module.parameters() if p.requires_grad], LR
        )

    def gradients(self, rows: Examples) -> tuple[float, Params]:
        """Loss and gradients of the trained params."""
        self._optimizer.zero_grad()
        loss = self._loss(rows)
        loss.backward()
        named = {n: p.grad for n, p in self.module.named_parameters() if p.grad is not None}
        return loss.item(), {n: g.numpy().copy() for n, g in named.items()}

    def step(self, rows: Examples) -> None:
        """One step of SGD at ``LR``."""
        self.gradients(rows)
        self._optimizer.step()

    def params(self) -> Params:
        """Params and buffers."""
        state = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return {n: v.detach().numpy() for n, v in state.items()}

    def outputs(self, rows: Examples) -> Array:
        """Outputs in inference mode."""
        self.module.eval()
        with torch.no_grad():
            found: Array = self.module(*_tensors(rows)).numpy()
        self.module.train()
        return found

    def _loss(self, rows: Examples) -> Tensor:
        noise = [a for n, a in rows.inputs.items() if n.startswith("noise/")]
        with _DropoutBy(noise):
            output = self.module(*_tensors(rows))
        labels = torch.from_numpy(rows.labels)
        if self.loss == "cross_entropy":
            return F.cross_entropy(output, labels)
        return F.binary_cross_entropy_with_logits(output, labels.double())


def _tensors(rows: Examples) -> list[Tensor]:
    own = [torch.from_numpy(a) for n, a in rows.inputs.items() if not n.startswith("noise/")]
    return [t.double() if t.is_floating_point() else t for t in own]


class _DropoutBy:
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
