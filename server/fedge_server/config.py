"""The server's settings: ``federation.toml`` < environment ``FEDGE_*`` < flags."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fedge.config import RunConfig, TrainConfig, from_mapping, read_toml
from fedge.errors import ConfigError
from fedge.losses import NAMES as LOSSES
from fedge.losses import find_loss

OPTIMIZERS = ("sgd", "adamw")
SCALINGS = ("none", "site", "global")
RECOMPUTE: dict[str, bool | str] = {"no": False, "yes": True, "auto": "auto"}  # for fedge.build
STRATEGIES = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox")
PORT = 8443


@dataclass(frozen=True)
class ListenConfig:
    """Where the device link listens.

    Attributes:
        host: Address to bind; ``0.0.0.0`` is every IPv4 interface.
        port: TCP port; 0 takes a free one and keeps it.
        advertise: Name or address printed in the join line; found out if empty.
    """

    host: str = "0.0.0.0"  # noqa: S104 - devices come from other machines; mutual TLS guards it
    port: int = PORT
    advertise: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port is {self.port}; it must be 0 to 65535")


@dataclass(frozen=True)
class ModelConfig:
    """What is trained.

    Attributes:
        path: An ``.onnx`` model or a bundle folder; empty: the built-in example.
        loss: One of ``LOSSES``.
        loss_settings: Its settings (``[model.loss_settings]``), see :mod:`fedge.losses`.
        optimizer: The clients' optimizer.
        scaling: Who standardises the inputs, see the manifest.
        recompute: Whether steps make activations again to save memory; ``auto``: bundles carry
            both forms, and a device chooses.
    """

    path: str = ""
    loss: str = ""
    loss_settings: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "sgd"
    scaling: str = "none"
    recompute: str = "no"

    def __post_init__(self) -> None:
        if self.loss:
            _choice("loss", self.loss, LOSSES)
            find_loss({**self.loss_settings, "name": self.loss})
        elif self.loss_settings:
            raise ConfigError("loss_settings are given without a loss; name it in [model] loss")
        _choice("optimizer", self.optimizer, OPTIMIZERS)
        _choice("scaling", self.scaling, SCALINGS)
        _choice("recompute", self.recompute, tuple(RECOMPUTE))


@dataclass(frozen=True)
class StrategyConfig:
    """How updates become a model: a strategy's name and its own settings (``[strategy]``)."""

    name: str = "fedavg"
    settings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _choice("strategy", self.name, STRATEGIES)


@dataclass(frozen=True)
class Settings:
    """Everything ``start`` obeys; ``given`` names what was set rather than left at its default."""

    server: ListenConfig
    model: ModelConfig
    train: TrainConfig
    run: RunConfig
    strategy: StrategyConfig
    given: frozenset[str]


_TABLES: dict[str, type[Any]] = {
    "server": ListenConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "run": RunConfig,
}


def load(
    file: Path | None, flags: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> Settings:
    """Merge the three layers.

    Args:
        file: A ``federation.toml`` with tables ``[server] [model] [train] [run] [strategy]``.
        flags: ``"table.name"`` -> value; None means not given.
        environ: ``FEDGE_PORT``, ``FEDGE_ROUNDS`` … one per setting; the process's by default.

    Raises:
        ConfigError: For an unknown name, a wrong type or value, naming the choices.
    """
    tables = _from_file(file)
    for (table, name), text in _from_environment(os.environ if environ is None else environ):
        tables[table][name] = text
    for key, value in flags.items():
        if value is not None:
            table, name = key.split(".")
            tables[table][name] = value
    _one_length(tables["train"], flags)
    given = frozenset(f"{t}.{n}" for t, values in tables.items() for n in values)
    strategy = dict(tables["strategy"])
    name = strategy.pop("name", "fedavg")
    return Settings(
        **{t: from_mapping(cls, tables[t], t) for t, cls in _TABLES.items()},
        strategy=StrategyConfig(name, _numbers(strategy)),
        given=given,
    )


def _from_file(file: Path | None) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {t: {} for t in (*_TABLES, "strategy")}
    for table, values in (read_toml(file) if file else {}).items():
        if table not in tables or not isinstance(values, dict):
            raise ConfigError(
                f"{file} has [{table}]; it knows {', '.join(f'[{t}]' for t in tables)}"
            )
        tables[table].update(values)
    if file and tables["model"].get("path"):  # relative to the file, not to where we stand
        tables["model"]["path"] = str(file.parent / tables["model"]["path"])
    return tables


def _from_environment(environ: Mapping[str, str]) -> list[tuple[tuple[str, str], Any]]:
    found = []
    for table, cls in _TABLES.items():
        for f in fields(cls):
            variable = f"FEDGE_{f.name.upper()}"
            if f.name != "path" and variable in environ:
                found.append(((table, f.name), _parse(variable, environ[variable], str(f.type))))
    return found


def _parse(variable: str, text: str, kind: str) -> Any:  # noqa: ANN401 - one of four scalars
    kind = kind.split("|")[0].strip()
    try:
        if kind == "bool":
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        return {"int": int, "float": float}.get(kind, str)(text)
    except (ValueError, KeyError) as exc:
        raise ConfigError(f"{variable}={text!r} is not of type {kind}") from exc


def _one_length(train: dict[str, Any], flags: Mapping[str, Any]) -> None:
    """``--steps`` on the command line replaces ``epochs`` of the file, and the reverse."""
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if flags.get(f"train.{name}") is not None and flags.get(f"train.{other}") is None:
            train.pop(other, None)


def _numbers(settings: dict[str, Any]) -> dict[str, float]:
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"[strategy] {name} = {value!r}; wanted a number")
    return settings


def _choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{what} is {value!r}; choose one of {', '.join(choices)}")
