"""Settings as frozen dataclasses, validated once, and the one TOML reader."""

from __future__ import annotations

import math
import numbers
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from fedge.errors import ConfigError

# What a task may set for one round of one client; everything else is the bundle's.
OVERRIDES = ("lr", "batch_size", "epochs", "steps", "clip_norm", "accumulate", "proximal_mu")
MAX_LENGTH = 10**7  # steps, or epochs, that a client does for one task
SCHEDULES = ("constant", "linear", "cosine", "step")


@dataclass(frozen=True)
class Schedule:
    """A factor on the learning rate that depends on the position: a step, or a round, from 0.

    First ``warmup`` positions rise evenly to 1: (t + 1)/warmup. What follows goes by ``name``,
    with u from 0 to 1 over the rest of ``length``: ``linear`` is 1 − (1 − floor)·u, ``cosine`` is
    floor + (1 − floor)·(1 + cos πu)/2 (Loshchilov & Hutter 2017, arXiv 1608.03983, no restarts),
    ``step`` multiplies by ``gamma`` after every ``every`` positions. After ``length`` it stays.

    Attributes:
        name: One of ``SCHEDULES``.
        warmup: Positions of the rise.
        length: Positions in all; None: the steps of the round.
        floor: The smallest factor of ``linear`` and ``cosine``.
        every: For ``step``: positions between two drops.
        gamma: For ``step``: factor of one drop.

    Raises:
        ConfigError: If a value is out of range.
    """

    name: str = "constant"
    warmup: int = 0
    length: int | None = None
    floor: float = 0.0
    every: int = 1
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _check_types(self, "schedule")
        _require(self.name in SCHEDULES, f"schedule {self.name!r}; known: {', '.join(SCHEDULES)}")
        _at_least("warmup", self.warmup, 0)
        _at_least("every", self.every, 1)
        _require(0 <= self.floor <= 1, f"floor is {self.floor}; wanted 0 to 1")
        _positive("gamma", self.gamma)
        if self.length is not None:
            _at_least("length", self.length, self.warmup + 1)

    @classmethod
    def of(cls, given: Schedule | str | Mapping[str, Any]) -> Schedule:
        """A schedule from its name, from plain values, or as it is.

        Raises:
            ConfigError: If it is none.
        """
        if isinstance(given, Schedule):
            return given
        if isinstance(given, str):
            given = {"name": given}
        _require(isinstance(given, Mapping), f"schedule is {given!r}; wanted a name or a table")
        return from_mapping(cls, dict(given), "schedule")

    @property
    def ends(self) -> bool:
        """Whether it knows its own length, or needs none."""
        return self.length is not None or self.name in ("constant", "step")

    def factor(self, position: int, total: int = 1) -> float:
        """The factor at a position.

        Args:
            position: From 0.
            total: Positions in all, where ``length`` does not say so.
        """
        if position < self.warmup:
            return (position + 1) / self.warmup
        after = position - self.warmup
        if self.name == "step":
            return float(self.gamma ** (after // self.every))
        length = max((self.length or total) - self.warmup, 1)
        done = min(after / length, 1.0)
        left = {"linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
        return self.floor + (1.0 - self.floor) * left.get(self.name, 1.0)


@dataclass(frozen=True)
class TrainConfig:
    """How a client trains in one round.

    Attributes:
        lr: Learning rate of the local optimizer.
        batch_size: Rows per step; the last batch of an epoch may be smaller.
        epochs: Passes over the local rows. Exclusive with ``steps``.
        steps: Optimizer steps, reshuffling after each pass. Exclusive with ``epochs``.
        shuffle: Whether the row order is drawn anew for each pass.
        clip_norm: Largest ‖gradient‖₂ over all trained tensors together; a longer one is scaled
            down to it, as ``torch.nn.utils.clip_grad_norm_`` does. None: as long as it is.
        accumulate: Pieces a batch is cut into, whose gradients are averaged by their rows: about
            the same step in less memory.
        proximal_mu: FedProx's μ: adds μ/2·‖w − w₀‖² to the loss, w₀ being the round's shared
            params (T. Li et al., MLSys 2020, arXiv 1812.06127). The reported loss is without it.
        schedule: Of the learning rate over the steps of one round.
        round_schedule: Of the learning rate over rounds; multiplies with ``schedule``.

    Raises:
        ConfigError: If a value is out of range, or both or neither of epochs and steps are given.
    """

    lr: float = 0.01
    batch_size: int = 32
    epochs: int | None = None
    steps: int | None = None
    shuffle: bool = True
    clip_norm: float | None = None
    accumulate: int = 1
    proximal_mu: float = 0.0
    schedule: Schedule = field(default_factory=Schedule)
    round_schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        _check_types(self, "train")
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
        self._check_step()

    def _check_step(self) -> None:
        if self.clip_norm is not None:
            _positive("clip_norm", self.clip_norm)
        _at_least("accumulate", self.accumulate, 1)
        _not_negative("proximal_mu", self.proximal_mu)
        for name in ("schedule", "round_schedule"):
            object.__setattr__(self, name, Schedule.of(getattr(self, name)))
        _require(
            self.round_schedule.ends,
            f"round_schedule {self.round_schedule.name} needs its length in rounds",
        )

    @property
    def is_plain(self) -> bool:
        """Whether a step is the optimizer's alone: no clipping, cutting or proximal term."""
        return self.clip_norm is None and self.accumulate == 1 and self.proximal_mu == 0

    def for_round(self, round_num: int) -> TrainConfig:
        """These settings as round ``round_num`` (from 1) has them: its own learning rate."""
        if self.round_schedule == Schedule():
            return self
        lr = max(self.lr * self.round_schedule.factor(round_num - 1), sys.float_info.min)
        return self.replace(lr=lr, round_schedule=Schedule())

    def override(self, task: Mapping[str, Any]) -> TrainConfig:
        """A copy with what a task asks for: the names in ``OVERRIDES``; ``seed`` is no setting.

        Raises:
            ConfigError: For another name, or a value out of range.
        """
        asked = {n: v for n, v in task.items() if n != "seed"}
        unknown = sorted(set(asked) - set(OVERRIDES))
        _require(
            not unknown,
            f"a task asks for {', '.join(unknown)}; clients know seed, {', '.join(OVERRIDES)}",
        )
        config = self.replace(**asked)
        for name in ("steps", "epochs"):
            length = getattr(config, name) or 0
            _require(
                length <= MAX_LENGTH, f"a task asks for {name} = {length}; at most {MAX_LENGTH}"
            )
        return config

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
        _check_types(self, "run")
        _at_least("rounds", self.rounds, 1)
        _at_least("min_clients", self.min_clients, 1)
        _positive("deadline_s", self.deadline_s)
        _positive("max_norm", self.max_norm)
        if self.cohort_size is not None:
            _require(
                self.cohort_size >= self.min_clients,
                f"cohort_size is {self.cohort_size}; it must be at least min_clients, "
                f"which is {self.min_clients}",
            )


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


def _check_types(settings: Any, where: str) -> None:  # noqa: ANN401 - one of the dataclasses above
    """Check every field's type, and make plain numbers of numpy's."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        if isinstance(value, numbers.Number) and hasattr(value, "item"):
            value = value.item()
            object.__setattr__(settings, f.name, value)
        if value is not None or not _optional(f):
            _check_type(where, f.name, value, str(f.type))


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


def _not_negative(name: str, value: float) -> None:
    ok = 0 <= value <= sys.float_info.max
    _require(ok, f"{name} is {value}; it must be finite and not below 0")


def _at_least(name: str, value: int, least: int) -> None:
    _require(value >= least, f"{name} is {value}; it must be at least {least}")
