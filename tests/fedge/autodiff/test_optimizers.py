"""Settings of the optimizers; their arithmetic is tested in test_graphs.py against torch."""

from __future__ import annotations

import pytest

from fedge.artifacts.manifest import Optimizer
from fedge.autodiff.optimizers import settings_of
from fedge.errors import ConfigError


def test_defaults_are_torchs() -> None:
    assert settings_of(Optimizer("sgd")) == {"momentum": 0, "nesterov": 0, "weight_decay": 0}
    adamw = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    assert settings_of(Optimizer("adamw")) == adamw
    assert settings_of(Optimizer("adamw", {"beta1": 0.5}))["beta1"] == 0.5


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("adam", {}, "'adam' is unknown; known: adamw, sgd"),
        ("sgd", {"betas": 0.9}, "sgd has no setting 'betas'; known: momentum"),
        ("sgd", {"momentum": 1.0}, "momentum is 1.0; wanted 0 <= momentum < 1"),
        ("sgd", {"weight_decay": -0.1}, "weight_decay is -0.1"),
        ("sgd", {"weight_decay": float("nan")}, "weight_decay is nan"),
        ("sgd", {"weight_decay": float("inf")}, "weight_decay is inf"),
        ("sgd", {"nesterov": 1.0}, "momentum above 0"),
        ("adamw", {"beta2": 1.5}, "beta2 is 1.5"),
        ("adamw", {"eps": -1}, "eps is -1"),
    ],
)
def test_wrong_settings_are_refused(name: str, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of(Optimizer(name, settings))
