"""Clipped sums of per-example gradients against batches of one, by torch in float64."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import parser
from torch import nn
from torch.nn import functional as F

from fedge.autodiff.per_example import per_example_gradients
from fedge.errors import ConfigError, UnsupportedOperatorError
from fedge.losses import CrossEntropy
from fedge.types import Array, Params

Run = Callable[[onnx.ModelProto, Params], Params]


class Images(nn.Module):
    """Strided, grouped and padded convolutions, normalization by groups, a broadcast scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(self.norm(self.grouped(x))) * self.scale
        return self.head(x.mean((2, 3)))


class Text(nn.Module):
    """Embeddings of tokens and places, attention, LayerNorm: a token may come twice in a row."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.tokens, self.places = nn.Embedding(7, 8), nn.Embedding(length, 8)
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 24)
        self.out, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places(torch.arange(self.length))
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        x = x + self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)
        return self.head(x.mean(1))


class Signal(nn.Module):
    """Convolution along time, then a regression."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 3, 4, dilation=2), nn.Linear(9, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.PReLU(), nn.Linear(7, 5))


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ids(length: int) -> Callable[[int], Array]:
    return lambda rows: np.random.default_rng(rows).integers(0, 7, (rows, length))


Case = tuple[Callable[[], nn.Module], Callable[[int], Array], str]
CASES: dict[str, Case] = {
    "mlp": (mlp, lambda n: normal(n, n, 6), "cross_entropy"),
    "images": (Images, lambda n: normal(n, n, 3, 12, 12), "cross_entropy"),
    "text": (lambda: Text(3), ids(3), "cross_entropy"),
    "long text": (lambda: Text(20), ids(20), "cross_entropy"),
    "signal": (Signal, lambda n: normal(n, n, 2, 9), "mse"),
}
LOSSES = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


def exported(module: nn.Module, x: Array) -> onnx.ModelProto:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.tensor(x),),
            file,
            dynamo=False,
            training=torch.onnx.TrainingMode.TRAINING,
            do_constant_folding=False,
            opset_version=17,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
        )
    return onnx.load_from_string(file.getvalue())


def one_by_one(
    module: nn.Module, x: Array, labels: torch.Tensor, loss: str
) -> list[dict[str, torch.Tensor]]:
    """Each example's own gradient, float64."""
    module = module.double()
    inputs = torch.tensor(x)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    found = []
    for i in range(len(x)):
        value = LOSSES[loss](module(inputs[i : i + 1]), labels[i : i + 1])
        names, params = zip(*module.named_parameters(), strict=True)
        found.append(dict(zip(names, torch.autograd.grad(value, params), strict=True)))
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [1, 4])
def test_equal_to_batches_of_one(run_model: Run, name: str, rows: int) -> None:
    build, draw, loss = CASES[name]
    torch.manual_seed(0)
    module, x = build(), draw(rows)
    names = [n for n, _ in module.named_parameters()]
    params = {n: p.detach().numpy().copy() for n, p in module.named_parameters()}
    model = exported(module, draw(2))
    labels = torch.arange(rows) % 5 if loss == "cross_entropy" else torch.tensor(normal(9, rows, 2))
    each = one_by_one(module, x, labels.double() if loss == "mse" else labels, loss)
    norms = [float(torch.sqrt(sum((g**2).sum() for g in e.values()))) for e in each]
    clip = float(np.median(norms)) * 0.9  # some are clipped, some are not
    graph = per_example_gradients(model, params=names, trainable=names, loss=loss)
    feeds = {"x": x, "labels": labels.numpy(), "clip_norm": np.array(clip, np.float32), **params}
    found = run_model(graph, feeds)
    np.testing.assert_allclose(found["example@norms"], norms, rtol=1e-5)
    for param in names:
        wanted = sum(
            (e[param] * min(1.0, clip / n)).numpy() for e, n in zip(each, norms, strict=True)
        )
        error = np.linalg.norm(found[f"{param}@grad"] - wanted)
        assert error <= 1e-5 * max(float(np.linalg.norm(wanted)), clip), param


def test_frozen_params_count_for_no_norm(run_model: Run) -> None:
    torch.manual_seed(0)
    module, x = mlp(), normal(0, 4, 6)
    names = [n for n, _ in module.named_parameters()]
    params = {n: p.detach().numpy().copy() for n, p in module.named_parameters()}
    labels = torch.arange(4)
    each = one_by_one(module, x, labels, "cross_entropy")
    norms = [float(e["2.bias"].norm()) for e in each]
    graph = per_example_gradients(
        exported(module.float(), x), params=names, trainable=["2.bias"], loss="cross_entropy"
    )
    feeds = {"x": x, "labels": labels.numpy(), "clip_norm": np.array(0.1, np.float32), **params}
    found = run_model(graph, feeds)
    np.testing.assert_allclose(found["example@norms"], norms, rtol=1e-5)
    assert set(found) == {"loss", "example@norms", "2.bias@grad"}


W = "<float[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}>"
REFUSED = [
    (f"{W} {{h = MatMul(x, w) y = Softmax<axis=0>(h)}}", "works along the batch"),
    (f"{W} {{h = Transpose(x) g = MatMul(w, h) y = Transpose(g)}}", r"shape \[4, 'N'\]"),
    (f"{W} {{h = MatMul(x, w) y = MatMul(h, w)}}", "shares the param 'w'"),
    (f"{W} {{v = Tanh(w) y = MatMul(x, v)}}", "computes with params alone"),
    (
        f"{W} {{m = ReduceMean<axes=[0]>(x) h = MatMul(m, w) y = Add(x, h)}}",
        r"shape \[1, 4\]",
    ),
    (f'{W} {{y = Einsum<equation="ni,ij->nj">(x, w)}}', "reads the param 'w'"),
]


@pytest.mark.parametrize(("body", "reason"), REFUSED)
def test_models_whose_rows_mix_are_refused(body: str, reason: str) -> None:
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] y) {body}'
    with pytest.raises(UnsupportedOperatorError, match=reason):
        per_example_gradients(
            parser.parse_model(text), params=["w"], trainable=["w"], loss="cross_entropy"
        )


def test_losses_that_weigh_examples_are_refused() -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] y)'
        f"{W} {{y = MatMul(x, w)}}"
    )
    with pytest.raises(ConfigError, match="every example counts the same"):
        per_example_gradients(
            parser.parse_model(text),
            params=["w"],
            trainable=["w"],
            loss=CrossEntropy(ignore_index=-100),
        )
