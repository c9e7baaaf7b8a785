"""Losses a bundle can be trained with, as settings.

``fedge.build(model, loss=fedge.losses.CrossEntropy(label_smoothing=0.1))``, or by name where the
defaults will do: ``loss="huber"``. What they compute is in :mod:`fedge.autodiff.losses`; the
manifest keeps the settings that differ from the defaults, as plain JSON. This module imports
nothing large.

A proximal term (FedProx) is no loss of its own: it is ``TrainConfig(proximal_mu=…)`` on top of any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeAlias, cast

from fedge.config import from_mapping
from fedge.errors import ConfigError

FLOAT32_MAX = 3.4e38
TEACHER = "teacher_logits"  # the training input a distilled bundle asks for


@dataclass(frozen=True)
class CrossEntropy:
    """Mean of −log softmax(output)[label] over rows (and positions); classes are axis 1.

    As ``torch.nn.CrossEntropyLoss``: with class weights the mean is weighted by them; smoothing
    spreads ``label_smoothing`` evenly over all classes. Where every row is ignored, or has a class
    of weight 0, loss and gradients are 0 (torch gives NaN): a round goes on.

    Attributes:
        ignore_index: Label that does not count; None: all count.
        class_weights: One per class, not negative; empty: all 1.
        label_smoothing: Share in [0, 1] taken from the label.
    """

    name: ClassVar[str] = "cross_entropy"
    scored_as: ClassVar[str] = "cross_entropy"
    ignore_index: int | None = None
    class_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        index = self.ignore_index
        _want(index is None or type(index) is int, f"ignore_index is {index!r}; wanted an int")
        weights = _numbers(self, "class_weights")
        ok = all(w >= 0 for w in weights) and (not weights or sum(weights) > 0)
        _want(ok, f"class_weights are {list(weights)}; wanted none below 0 and one above")
        share = _number(self, "label_smoothing")
        _want(0 <= share <= 1, f"label_smoothing is {share}; wanted 0 to 1")


@dataclass(frozen=True)
class BceWithLogits:
    """Mean over elements of the binary cross-entropy of logits, without overflow at any logit.

    As ``torch.nn.BCEWithLogitsLoss``.

    Attributes:
        pos_weight: Factor of the positive class: one number, or one per output column.
    """

    name: ClassVar[str] = "bce_with_logits"
    scored_as: ClassVar[str] = "bce_with_logits"
    pos_weight: tuple[float, ...] | float = 1.0

    def __post_init__(self) -> None:
        several = hasattr(self.pos_weight, "__iter__")
        weights = _numbers(self, "pos_weight") if several else (_number(self, "pos_weight"),)
        ok = bool(weights) and all(w > 0 for w in weights)
        _want(ok, f"pos_weight is {self.pos_weight}; wanted numbers above 0")


@dataclass(frozen=True)
class Mse:
    """Mean of (output − label)² over all elements."""

    name: ClassVar[str] = "mse"
    scored_as: ClassVar[str] = "mse"


@dataclass(frozen=True)
class L1:
    """Mean of |output − label| over all elements."""

    name: ClassVar[str] = "l1"
    scored_as: ClassVar[str] = "mse"


@dataclass(frozen=True)
class Huber:
    """Mean of e²/2 where |e| ≤ delta, else delta·(|e| − delta/2); as ``torch.nn.HuberLoss``.

    Attributes:
        delta: Where the parabola ends, in units of the output.
    """

    name: ClassVar[str] = "huber"
    scored_as: ClassVar[str] = "mse"
    delta: float = 1.0

    def __post_init__(self) -> None:
        delta = _number(self, "delta")
        _want(delta > 0, f"delta is {delta}; it must be above 0")


@dataclass(frozen=True)
class Cox:
    """Cox's negative log partial likelihood, ties as Breslow, a mean over the batch's events.

    The output [N] or [N, 1] is the log hazard; labels [N, 2] are time (≥ 0) and event (1: it
    happened, 0: censored). Risk sets are those of the batch: a row is compared with the rows of
    its own batch that were still at risk, so larger batches say more and a batch of one row says
    nothing. Without an event, loss and gradients are 0.

    Sources: D. R. Cox, JRSS B 34 (1972) 187-220; N. Breslow, Biometrics 30 (1974) 89-99; within
    batches as in DeepSurv and pycox (H. Kvamme et al., JMLR 20 (2019) 129).
    """

    name: ClassVar[str] = "cox"
    scored_as: ClassVar[str] = "cox"


@dataclass(frozen=True)
class Onnx:
    """Any loss, as an ONNX model that fedge differentiates.

    Its inputs are ``labels`` and one or more of the model's outputs, by name (a single one may
    have any name and is the first output); its only output is the loss, float32 of rank 0: a mean
    over rows. It must hold no params.

    Attributes:
        model: Path, bytes or ``onnx.ModelProto``; the manifest keeps its SHA-256 alone.
        like: ``cross_entropy``, ``bce_with_logits`` or ``mse``: how outputs are scored and
            exported; "" where only the loss says how good they are.
        low: Smallest valid label; None: no bound.
        high: Largest valid label; None: no bound.
        sha256: Of the model; filled in by the builder.
    """

    name: ClassVar[str] = "onnx"
    model: Any = field(default=None, compare=False)
    like: str = ""
    low: float | None = None
    high: float | None = None
    sha256: str = ""

    @property
    def scored_as(self) -> str:
        """The loss whose scores suit the outputs; "" if none."""
        return self.like

    def __post_init__(self) -> None:
        known = ("", CrossEntropy.name, BceWithLogits.name, Mse.name)
        _want(self.like in known, f"like is {self.like!r}; known: {', '.join(known[1:])}")
        for bound in ("low", "high"):
            if getattr(self, bound) is not None:
                _number(self, bound)


HardLoss: TypeAlias = CrossEntropy | BceWithLogits


@dataclass(frozen=True)
class Distillation:
    """alpha · T² · KL(softmax(teacher/T) ‖ softmax(output/T)) + (1 − alpha) · hard loss.

    The teacher's logits are a training input ``teacher_logits`` of the output's shape, which rows
    to train on carry beside the model's own inputs. Scoring needs no teacher: the evaluation loss
    is the hard loss alone. With ``bce_with_logits`` as the hard loss, KL is that of two coins per
    output. KL is a mean over rows and positions (also ignored ones).

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network" (2015),
    arXiv 1503.02531, section 2 (T² keeps the two gradients' sizes apart from T).

    Attributes:
        hard: The loss of the labels: ``cross_entropy`` or ``bce_with_logits``, or its settings.
        temperature: T, above 0.
        alpha: Weight of the soft part, in [0, 1].
    """

    name: ClassVar[str] = "distillation"
    hard: HardLoss | str | Mapping[str, Any] = field(default_factory=CrossEntropy)
    temperature: float = 2.0
    alpha: float = 0.5

    @property
    def scored_as(self) -> str:
        """As the hard loss."""
        return self.hard_loss.name

    @property
    def hard_loss(self) -> HardLoss:
        """The loss of the labels."""
        return cast("HardLoss", self.hard)

    def __post_init__(self) -> None:
        hard = find_loss(self.hard)
        _want(
            isinstance(hard, (CrossEntropy, BceWithLogits)),
            f"hard is {hard.name}; distillation wants cross_entropy or bce_with_logits",
        )
        object.__setattr__(self, "hard", hard)
        temperature, alpha = _number(self, "temperature"), _number(self, "alpha")
        _want(temperature > 0, f"temperature is {temperature}; it must be above 0")
        _want(0 <= alpha <= 1, f"alpha is {alpha}; wanted 0 to 1")


Loss: TypeAlias = CrossEntropy | BceWithLogits | Mse | L1 | Huber | Cox | Onnx | Distillation
LossLike: TypeAlias = Loss | str | Mapping[str, Any]
_KNOWN: dict[str, type[Any]] = {
    c.name: c for c in (BceWithLogits, Cox, CrossEntropy, Distillation, Huber, L1, Mse, Onnx)
}
NAMES = tuple(_KNOWN)


def find_loss(given: LossLike) -> Loss:
    """A loss from its name, from ``{"name": …, setting: value}``, or as it is.

    Raises:
        ConfigError: If the name or a setting is unknown, or a value is out of range.
    """
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping):
        _want(type(given) in _KNOWN.values(), f"{given!r}; wanted a name or one of fedge.losses")
        return given
    settings = {k: v for k, v in given.items() if k != "name"}
    name = given.get("name")
    if name not in NAMES:
        raise ConfigError(f"loss {name!r} is unknown; known: {', '.join(NAMES)}")
    found: Loss = from_mapping(_KNOWN[str(name)], settings, f"loss {name}")
    return found


def settings_of(loss: Loss) -> dict[str, Any]:
    """What differs from the defaults, as plain JSON; :func:`find_loss` reads it back."""
    kept = {f.name: getattr(loss, f.name) for f in fields(loss) if f.compare}
    defaults = {f.name: CrossEntropy() if f.name == "hard" else f.default for f in fields(loss)}
    return {n: _plain(v) for n, v in kept.items() if v != defaults[n]}


def _plain(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, (CrossEntropy, BceWithLogits)):
        return {"name": value.name, **settings_of(value)}
    return value


def _number(loss: object, name: str) -> float:
    """A field as a finite float, which is put back."""
    object.__setattr__(loss, name, _float(name, getattr(loss, name)))
    return cast("float", getattr(loss, name))


def _numbers(loss: object, name: str) -> tuple[float, ...]:
    """A field as a tuple of finite floats, which is put back."""
    values = getattr(loss, name)
    _want(hasattr(values, "__iter__"), f"{name} is {values!r}; wanted numbers")
    object.__setattr__(loss, name, tuple(_float(name, v) for v in values))
    return cast("tuple[float, ...]", getattr(loss, name))


def _float(name: str, value: Any) -> float:  # noqa: ANN401 - what a user gives
    number = hasattr(value, "__float__") and not isinstance(value, bool)
    _want(number and abs(value) <= FLOAT32_MAX, f"{name} is {value!r}; wanted a finite number")
    return float(value)


def _want(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(f"loss: {message}")
