"""scikit-learn's networks, through skl2onnx."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from skl2onnx import to_onnx
from sklearn.neural_network import MLPClassifier, MLPRegressor

import fedge
from fedge.artifacts.bundle import Bundle
from fedge.engines import open_in_process
from fedge.errors import ArtifactError
from fedge.types import Examples

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4)).astype(np.float32)
CLASSES = (X[:, 0] > 0).astype(np.int64) + (X[:, 1] > 0)


def fitted(estimator: Any, y: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, and need not
        return estimator.fit(X, y)


def converted(estimator: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return to_onnx(estimator, X[:1], target_opset=17, **options)


def test_a_classifier_goes_on_learning_from_where_it_was() -> None:
    estimator = fitted(MLPClassifier((8,), max_iter=5, random_state=0), CLASSES)
    model = converted(estimator, options={"zipmap": False})
    bundle = fedge.build(model, loss="cross_entropy", output="add_result1", sample=X[:2])
    assert [p.shape for p in bundle.manifest.params] == [(4, 8), (1, 8), (8, 3), (1, 3)]
    engine = open_in_process(bundle, "ort")
    logits = engine.predict({"X": X})["add_result1"]
    odds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(odds, estimator.predict_proba(X), atol=1e-5)
    data = Examples({"X": X}, CLASSES)
    before = engine.evaluate(data).loss
    engine.train(data, fedge.TrainConfig(lr=0.5, batch_size=20, epochs=20), seed=0)
    assert engine.evaluate(data).loss < 0.6 * before


def test_a_regressor_s_gradient_is_scikit_learn_s() -> None:
    estimator = fitted(MLPRegressor(hidden_layer_sizes=(8, 6), max_iter=5, random_state=0), X[:, 0])
    bundle = fedge.build(converted(estimator), loss="mse", sample=X[:2])
    assert _moves_like_sklearn(bundle, estimator)


def _moves_like_sklearn(bundle: Bundle, estimator: MLPRegressor) -> bool:
    """Central differences of scikit-learn's own prediction, along our gradient."""
    engine = open_in_process(bundle, "ort")
    y = X[:, :1]
    _, grads = engine.gradients(Examples({"X": X}, y))
    step = 1e-3

    def loss(sign: int) -> float:
        weights = [*estimator.coefs_, *estimator.intercepts_]
        named = [f"coefficient{i or ''}" for i in range(3)] + [
            f"intercepts{i or ''}" for i in range(3)
        ]
        for weight, name in zip(weights, named, strict=True):
            weight += sign * step * grads[name].reshape(weight.shape)
        found = float(np.mean((estimator.predict(X.astype(np.float64)) - y[:, 0]) ** 2))
        for weight, name in zip(weights, named, strict=True):
            weight -= sign * step * grads[name].reshape(weight.shape)
        return found

    slope = (loss(1) - loss(-1)) / (2 * step)
    squared = sum(float(np.sum(np.square(g, dtype=np.float64))) for g in grads.values())
    return slope == pytest.approx(squared, rel=1e-3)


def test_a_value_that_is_not_there_is_said_so() -> None:
    model = converted(fitted(MLPRegressor(max_iter=2), X[:, 0]))
    with pytest.raises(ArtifactError, match=r"no node of the model gives 'logits'; .*variable"):
        fedge.build(model, loss="mse", output="logits")
