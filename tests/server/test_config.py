"""Settings: three layers, and errors that list the choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedge.config import RunConfig, Schedule
from fedge.errors import ConfigError
from fedge_server.config import StrategyConfig, load
from fedge_server.training import make_strategy

TOML = """
[server]
port = 9000
[model]
path = "model.onnx"
loss = "mse"
[train]
lr = 0.5
epochs = 3
[run]
rounds = 7
[strategy]
name = "fedadam"
eta = 0.25
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "federation.toml"
    path.write_text(TOML)
    return path


def test_file_then_environment_then_flags(file: Path) -> None:
    environ = {"FEDGE_PORT": "9001", "FEDGE_ROUNDS": "8", "FEDGE_EVALUATE": "false"}
    found = load(file, {"run.rounds": 9, "run.seed": None}, environ)
    assert (found.server.port, found.run.rounds, found.run.evaluate) == (9001, 9, False)
    assert (found.train.lr, found.train.epochs, found.model.loss) == (0.5, 3, "mse")
    assert found.strategy == StrategyConfig("fedadam", {"eta": 0.25})
    assert found.model.path == str(file.parent / "model.onnx")
    assert "run.rounds" in found.given
    assert "run.seed" not in found.given


def test_defaults_need_nothing() -> None:
    found = load(None, {}, {})
    assert (found.server.port, found.run.rounds, found.strategy.name) == (8443, 10, "fedavg")
    assert found.given == frozenset()


def test_steps_on_the_command_line_replace_epochs_of_the_file(file: Path) -> None:
    found = load(file, {"train.steps": 5}, {})
    assert (found.train.steps, found.train.epochs) == (5, None)
    with pytest.raises(ConfigError, match="both set"):
        load(file, {"train.steps": 5, "train.epochs": 1}, {})


@pytest.mark.parametrize(
    ("flags", "environ", "wanted"),
    [
        ({"model.loss": "hinge"}, {}, "bce_with_logits, cox, cross_entropy, distillation"),
        ({"model.optimizer": "lion"}, {}, "sgd, adamw"),
        ({"model.scaling": "local"}, {}, "none, site, global"),
        ({"strategy.name": "best"}, {}, "fedavg, fedavgm, fedadam"),
        ({"server.port": 70000}, {}, "0 to 65535"),
        ({"run.rounds": 0}, {}, "at least 1"),
        ({}, {"FEDGE_PORT": "x"}, "FEDGE_PORT='x' is not of type int"),
        ({}, {"FEDGE_EVALUATE": "maybe"}, "bool"),
    ],
)
def test_errors_say_what_was_wanted(
    flags: dict[str, Any], environ: dict[str, str], wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load(None, flags, environ)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[servers]\nport = 1", r"\[server\]"),
        ("[server]\nprot = 1", "has no setting prot"),
        ("[run]\nrounds = 'ten'", "wanted int"),
        ("[strategy]\neta = 'big'", "wanted a number"),
        ("server = 1", "server"),
        ("[server", "not valid TOML"),
    ],
)
def test_errors_in_the_file(tmp_path: Path, text: str, wanted: str) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=wanted):
        load(path, {}, {})


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_every_strategy_can_be_made(name: str) -> None:
    assert make_strategy(StrategyConfig(name), RunConfig(min_clients=1))


def test_a_setting_the_strategy_does_not_have_is_named() -> None:
    with pytest.raises(ConfigError, match="beta_9"):
        make_strategy(StrategyConfig("fedadam", {"beta_9": 0.1}), RunConfig())


def test_losses_and_schedules_from_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "federation.toml"
    file.write_text(
        '[model]\nloss = "cross_entropy"\nloss_settings = { label_smoothing = 0.1 }\n'
        "[train]\nclip_norm = 1.0\nround_schedule = { name = 'cosine', length = 9 }\n"
    )
    settings = load(file, {}, {"FEDGE_SCHEDULE": "linear", "FEDGE_PROXIMAL_MU": "0.5"})
    assert settings.model.loss_settings == {"label_smoothing": 0.1}
    assert settings.train.schedule == Schedule("linear")
    assert settings.train.round_schedule == Schedule("cosine", length=9)
    assert (settings.train.clip_norm, settings.train.proximal_mu) == (1.0, 0.5)
    for wrong in ('loss = "huber"\nloss_settings = { beta = 1 }', "loss_settings = { delta = 1 }"):
        file.write_text(f"[model]\n{wrong}\n")
        with pytest.raises(ConfigError, match=r"has no setting beta|without a loss"):
            load(file, {}, {})
