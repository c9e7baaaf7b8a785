"""Helpers for tests of code that uses fedge: a tiny model and engine without ONNX Runtime.

The engine is a real one, multinomial logistic regression in numpy, so rounds, strategies and
grids can be tested in milliseconds and without a bundle on disk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedge.artifacts.manifest import BATCH, LabelSpec, Manifest, Optimizer, ParamSpec, TensorSpec
from fedge.config import TrainConfig
from fedge.engines.base import EvalResult, TrainResult
from fedge.engines.batches import batch_indices, learning_rates
from fedge.engines.checks import check_examples, check_params
from fedge.engines.stepping import Shaper, run_steps
from fedge.types import Array, ClientData, Examples, Indices, Params

WEIGHT, BIAS = "weight", "bias"


def logistic_manifest(
    columns: int = 4,
    classes: int = 3,
    *,
    personal: Sequence[str] = (),
    train: TrainConfig | None = None,
) -> Manifest:
    """The manifest of ``logits = x @ weight.T + bias`` with cross-entropy and plain SGD.

    It names no files: only :class:`LogisticEngine` can run it.
    """
    inputs = (TensorSpec("x", "float32", (BATCH, columns)),)
    shapes = {WEIGHT: (classes, columns), BIAS: (classes,)}
    return Manifest(
        name="logistic",
        loss="cross_entropy",
        optimizer=Optimizer("sgd"),
        train=train or TrainConfig(lr=0.5, batch_size=8, epochs=2),
        raw_inputs=inputs,
        inputs=inputs,
        outputs=(TensorSpec("logits", "float32", (BATCH, classes)),),
        labels=LabelSpec("labels", "int64", (BATCH,), 0, classes - 1),
        params=tuple(
            ParamSpec(n, "float32", shape, shared=n not in personal) for n, shape in shapes.items()
        ),
        state=(),
        engines={},
        scaling="none",
        files={},
        signer="",
    )


def logistic_params(manifest: Manifest, seed: int = 0) -> Params:
    """Initial params: small normal weights."""
    rng = np.random.default_rng(seed)
    return {
        p.name: (0.1 * rng.standard_normal(p.shape)).astype(np.float32) for p in manifest.params
    }


def logistic_clients(
    clients: int = 3, columns: int = 4, classes: int = 3, seed: int = 0
) -> list[ClientData]:
    """Clients whose sizes differ (20, 30, 40 … rows), labelled by one hidden linear model."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((columns, classes))
    out = []
    for k in range(clients):
        x = rng.standard_normal((20 + 10 * k, columns)).astype(np.float32)
        data = Examples({"x": x}, np.argmax(x @ truth, axis=1))
        held_out = max(2, len(x) // 5)
        rows = slice(held_out, None), slice(None, held_out)
        out.append(ClientData(f"site-{k}", data.take(rows[0]), data.take(rows[1])))
    return out


class LogisticEngine:
    """A :class:`~fedge.engines.base.TrainingEngine` for :func:`logistic_manifest`, in numpy."""

    name = "numpy"

    def __init__(self, manifest: Manifest, params: Params) -> None:
        self._manifest = manifest
        self._params = {n: np.array(v) for n, v in params.items()}

    def preprocess(self, raw: Examples, site: Params | None = None) -> Examples:  # noqa: ARG002
        """Rows as they are, checked."""
        return check_examples(self._manifest, raw)

    def get_params(self) -> Params:
        """Copies of the params."""
        return {n: v.copy() for n, v in self._params.items()}

    def set_params(self, params: Params) -> None:
        """Overwrite the named params."""
        checked = check_params(self._manifest, params)
        self._params.update({n: v.copy() for n, v in checked.items()})

    def train_step(self, batch: Examples, lr: float) -> float:
        """One SGD step; returns the loss before it."""
        loss, grads = self.gradients(batch)
        for name, grad in grads.items():
            self._params[name] -= np.float32(lr) * grad
        return loss

    def train(self, data: Examples, config: TrainConfig, seed: int) -> TrainResult:
        """Steps in the order every engine uses."""
        data = check_examples(self._manifest, data)
        shape = {n: np.zeros_like(v) for n, v in self._params.items()}
        shared = self._manifest.shared
        shaper = Shaper(config, shape, self._params, shared)

        def piece(rows: Indices) -> float:
            loss, found = self.gradients(data.take(rows))
            for name, grad in found.items():
                shape[name][...] = grad
            return loss

        def step(rows: Indices, lr: float) -> float:
            loss = shaper.gather(piece, rows)
            for name, grad in shape.items():
                self._params[name] -= np.float32(lr) * grad
            return loss

        batches = batch_indices(len(data), config, seed)
        return run_steps(step, batches, learning_rates(len(data), config), config.lr)

    def gradients(self, batch: Examples) -> tuple[float, Params]:
        """Loss and gradients: (softmax − onehot)ᵀ x / N."""
        batch = check_examples(self._manifest, batch)
        x, rows = batch.inputs["x"], np.arange(len(batch))
        logs = self._log_softmax(x)
        loss = float(-np.mean(logs[rows, batch.labels]))
        errors = np.exp(logs)
        errors[rows, batch.labels] -= 1
        errors /= np.float32(len(batch))
        return loss, {WEIGHT: errors.T @ x, BIAS: errors.sum(axis=0)}

    def evaluate(self, data: Examples, batch_size: int = 256) -> EvalResult:  # noqa: ARG002
        """Loss and logits."""
        data = check_examples(self._manifest, data)
        return EvalResult(self.gradients(data)[0], self.predict(data.inputs))

    def predict(self, inputs: Params, batch_size: int = 256) -> Params:  # noqa: ARG002
        """Logits."""
        return {"logits": inputs["x"] @ self._params[WEIGHT].T + self._params[BIAS]}

    def close(self) -> None:
        """Nothing to free."""

    def _log_softmax(self, x: Array) -> Array:
        logits = self.predict({"x": x})["logits"]
        logits = logits - logits.max(axis=1, keepdims=True)
        return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), np.float32)
