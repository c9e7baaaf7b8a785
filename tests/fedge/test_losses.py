from __future__ import annotations

import json
from typing import Any

import pytest

from fedge import losses
from fedge.errors import ConfigError
from fedge.losses import (
    L1,
    BceWithLogits,
    Cox,
    CrossEntropy,
    Distillation,
    Huber,
    Mse,
    Onnx,
    find_loss,
    settings_of,
)

EVERY = [
    CrossEntropy(),
    CrossEntropy(ignore_index=-100, class_weights=(1, 0.5), label_smoothing=0.1),
    BceWithLogits(),
    BceWithLogits(2),
    BceWithLogits((1, 2.5)),
    Mse(),
    L1(),
    Huber(0.5),
    Cox(),
    Distillation(),
    Distillation(CrossEntropy(label_smoothing=0.1), 4, 0.9),
    Distillation("bce_with_logits", alpha=1),
    Onnx(like="cross_entropy", low=0, high=9, sha256="ab" * 32),
]


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_a_loss_survives_plain_json(loss: losses.Loss) -> None:
    kept = json.loads(json.dumps(settings_of(loss)))
    assert find_loss({"name": loss.name, **kept}) == loss
    assert find_loss(loss) is loss


@pytest.mark.parametrize("name", losses.NAMES)
def test_a_name_means_the_defaults(name: str) -> None:
    loss = find_loss(name)
    assert loss.name == name
    assert settings_of(loss) == {}
    assert loss.scored_as in ("", "cross_entropy", "bce_with_logits", "mse", "cox")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("hinge", "loss 'hinge' is unknown; known: bce_with_logits, cox, cross_entropy"),
        ({"delta": 1.0}, "loss None is unknown"),
        ({"name": ["huber"]}, "is unknown"),
        (7, "7; wanted a name or one of fedge.losses"),
        (CrossEntropy, "wanted a name or one of fedge.losses"),
        ({"name": "huber", "beta": 1}, "has no setting beta; it has delta"),
        ({"name": "huber", "delta": 0}, "delta is 0.0; it must be above 0"),
        ({"name": "huber", "delta": "1"}, "delta = '1' is str; wanted float"),
        ({"name": "huber", "delta": float("nan")}, "delta is nan; wanted a finite number"),
        ({"name": "huber", "delta": 1e39}, "wanted a finite number"),
        ({"name": "cross_entropy", "label_smoothing": 1.5}, "label_smoothing is 1.5; wanted 0 to"),
        ({"name": "cross_entropy", "class_weights": [1, -1]}, "wanted none below 0"),
        ({"name": "cross_entropy", "class_weights": [0, 0]}, "one above"),
        ({"name": "cross_entropy", "class_weights": ["a"]}, "class_weights is 'a'; wanted a"),
        ({"name": "cross_entropy", "class_weights": 3}, "class_weights is 3; wanted numbers"),
        ({"name": "cross_entropy", "ignore_index": 1.5}, "wanted int"),
        ({"name": "bce_with_logits", "pos_weight": 0}, "wanted numbers above 0"),
        ({"name": "bce_with_logits", "pos_weight": []}, "wanted numbers above 0"),
        ({"name": "distillation", "temperature": 0}, "temperature is 0.0"),
        ({"name": "distillation", "alpha": 2}, "alpha is 2.0; wanted 0 to 1"),
        ({"name": "distillation", "hard": "mse"}, "hard is mse; distillation wants"),
        ({"name": "distillation", "hard": {"name": "mse", "x": 1}}, "has no setting x"),
        ({"name": "onnx", "like": "mae"}, "like is 'mae'; known: cross_entropy"),
        ({"name": "onnx", "low": "0"}, "low = '0' is str"),
    ],
)
def test_wrong_settings_are_refused(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        find_loss(given)


def test_wrong_settings_are_refused_in_python_too() -> None:
    with pytest.raises(ConfigError, match="ignore_index is 'x'"):
        CrossEntropy(ignore_index="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="delta is True"):
        Huber(delta=True)
