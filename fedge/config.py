"""Settings as frozen dataclasses, validated once, and the one TOML reader."""

from __future__ import annotations

import sys
import tomllib
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from fedge.errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """How a client trains in one round.

    Attributes:
        lr: Learning rate of the local optimizer.
        batch_size: Rows per step; the last batch of an epoch may be smaller.
        epochs: Passes over the local rows. Exclusive with ``steps``.
        steps: Optimizer steps, reshuffling after each pass. Exclusive with ``epochs``.
        shuffle: Whether the row order is drawn anew for each pass.

    Raises:
        ConfigError: If a value is out of range, or both or neither of epochs and steps are given.
    """

    lr: float = 0.01
    batch_size: int = 32
    epochs: int | None = None
    steps: int | None = None
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 1)
        _require(
            self.epochs is None or self.steps is None,
            f"epochs={self.epochs} and steps={self.steps} are both set; give one of them",
        )
        _positive("lr", self.lr)
        _at_least("batch_size", self.batch_size, 1)
        for name in ("epochs", "steps"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)

    def replace(self, **changes: Any) -> TrainConfig:  # noqa: ANN401 - field values
        """A copy with some fields changed; setting ``steps`` clears ``epochs`` and the reverse."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if changes.get("steps") is not None and "epochs" not in changes:
            values["epochs"] = None
        if changes.get("epochs") is not None and "steps" not in changes:
            values["steps"] = None
        return from_mapping(TrainConfig, {**values, **changes}, "train")


@dataclass(frozen=True)
class RunConfig:
    """One training run over the federation.

    Attributes:
        rounds: How many rounds to run.
        min_clients: Quorum: a round starts with at least this many connected clients, and
            commits with at least this many accepted updates.
        cohort_size: Clients drawn per round; None draws all that are there.
        deadline_s: Seconds after which a round closes with the updates it has.
        evaluate: Whether clients score the new model on held-out rows after each round.
        seed: Fixes cohorts and row order.
        max_norm: Largest accepted ‖delta‖₂ of an update; a guard against a client gone wild, not
            a privacy bound.
    """

    rounds: int = 10
    min_clients: int = 2
    cohort_size: int | None = None
    deadline_s: float = 600.0
    evaluate: bool = True
    seed: int = 0
    max_norm: float = 1e6

    def __post_init__(self) -> None:
        _at_least("rounds", self.rounds, 1)
        _at_least("min_clients", self.min_clients, 1)
        _positive("deadline_s", self.deadline_s)
        _positive("max_norm", self.max_norm)
        if self.cohort_size is not None:
            _at_least("cohort_size", self.cohort_size, self.min_clients)


T = TypeVar("T")


def from_mapping(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Build the dataclass ``cls`` from plain values, refusing what it does not know.

    Args:
        cls: A frozen dataclass of plain fields.
        values: Field name -> value; None means "not given" where the default is not None.
        where: What to call this table in an error, such as ``run`` or ``client.toml [data]``.

    Raises:
        ConfigError: For an unknown name, a missing one without default, or a wrong type.
    """
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    values = {n: v for n, v in values.items() if v is not None or _optional(known.get(n))}
    unknown = sorted(set(values) - set(known))
    _require(
        not unknown, f"[{where}] has no setting {', '.join(unknown)}; it has {', '.join(known)}"
    )
    for name, f in known.items():
        needed = f.default is MISSING and f.default_factory is MISSING
        _require(not needed or name in values, f"[{where}] needs a value for {name}")
        if name in values and values[name] is not None:
            _check_type(where, name, values[name], str(f.type))
    try:
        return cls(**values)
    except TypeError as exc:
        raise ConfigError(f"[{where}] {exc}") from exc


def read_toml(path: Path, max_bytes: int = 1 << 20) -> dict[str, Any]:
    """Read a TOML file of settings.

    Raises:
        ConfigError: If it is missing, larger than ``max_bytes`` or not TOML.
    """
    try:
        raw = path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"cannot read settings {path}: {exc.strerror}") from exc
    _require(len(raw) <= max_bytes, f"settings {path} have {len(raw)} bytes; at most {max_bytes}")
    try:
        return tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not valid TOML: {exc}") from exc


def _optional(f: Field[Any] | None) -> bool:
    return f is None or "None" in str(f.type)


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
}


def _check_type(where: str, name: str, value: object, annotation: str) -> None:
    wanted = annotation.split("|")[0].strip()
    _require(
        _fits(value, wanted),
        f"[{where}] {name} = {value!r} is {type(value).__name__}; wanted {wanted}",
    )


def _fits(value: object, wanted: str) -> bool:
    """Whether a value from TOML or JSON fits an annotation; annotations not known here fit all."""
    if wanted.startswith("dict[str, "):
        inner = wanted.removeprefix("dict[str, ").removesuffix("]")
        return isinstance(value, dict) and all(
            isinstance(k, str) and _fits(v, inner) for k, v in value.items()
        )
    if wanted not in _TYPES:
        return True
    return isinstance(value, _TYPES[wanted]) and isinstance(value, bool) == (wanted == "bool")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _positive(name: str, value: float) -> None:
    ok = 0 < value <= sys.float_info.max
    _require(ok, f"{name} is {value}; it must be above 0 and finite")


def _at_least(name: str, value: int, least: int) -> None:
    _require(value >= least, f"{name} is {value}; it must be at least {least}")
