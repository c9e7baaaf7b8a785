"""Scores of a model's outputs, and how sure a few rows can make them."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple, Protocol

import numpy as np

from fedge.errors import DataError
from fedge.types import Array, Metrics, Params


class Interval(NamedTuple):
    """A two-sided confidence interval."""

    low: float
    high: float


class _Labels(Protocol):
    @property
    def ignore(self) -> int | None: ...


class _Scored(Protocol):
    @property
    def scored_as(self) -> str: ...

    @property
    def labels(self) -> _Labels: ...


def accuracy(predicted: Array, labels: Array) -> float:
    """The share of rows whose predicted class is the label.

    Args:
        predicted: Classes, [N] or [N, 1].
        labels: Classes, [N] or [N, 1].

    Raises:
        DataError: If there are no rows, or the two differ in rows.
    """
    predicted, labels = _pair(predicted, labels)
    return float(np.mean(predicted == labels))


def rmse(predicted: Array, labels: Array) -> float:
    """The root of the mean squared error over all rows and outputs.

    Raises:
        DataError: If there are no rows, or the two differ in size.
    """
    predicted, labels = _pair(predicted, labels)
    return float(np.sqrt(np.mean(np.square(predicted - labels, dtype=np.float64))))


def auc(scores: Array, labels: Array) -> float:
    """Area under the ROC curve: how often a positive row scores above a negative one.

    Args:
        scores: [N] or [N, 1]; higher means more likely positive. Ties count one half.
        labels: 0 or 1, [N] or [N, 1].

    Returns:
        A value in [0, 1]; NaN where only one class is there or a score is NaN.

    Raises:
        DataError: If there are no rows, or the two differ in rows.
    """
    positives, negatives = _by_class(scores, labels)
    if not len(positives) or not len(negatives):
        return math.nan
    return float(np.mean(_placements(positives, negatives)))


def accuracy_interval(correct: int, rows: int, level: float = 0.95) -> Interval:
    """Wilson's score interval for a share of ``correct`` out of ``rows``.

    Source: E. B. Wilson, "Probable inference", JASA 22 (1927) 209-212.

    Raises:
        DataError: If not 0 ≤ correct ≤ rows with rows ≥ 1.
    """
    if not (rows >= 1 and 0 <= correct <= rows):
        raise DataError(f"{correct} correct of {rows} rows; wanted 0 <= correct <= rows, rows >= 1")
    return _wilson(correct / rows, rows, _z(level))


def auc_interval(scores: Array, labels: Array, level: float = 0.95) -> Interval:
    """An interval for :func:`auc` by DeLong's variance on the logit scale.

    Where the classes are fully separated, DeLong's variance is zero whatever the number of rows;
    there Wilson's interval for as many rows as the smaller class has is given instead.

    Source: E. DeLong, D. DeLong, D. Clarke-Pearson, Biometrics 44 (1988) 837-845; the logit as in
    M. S. Pepe, "The Statistical Evaluation of Medical Tests" (2003), section 5.2.

    Returns:
        Bounds in [0, 1]; NaN where :func:`auc` is NaN or a class has a single row.
    """
    positives, negatives = _by_class(scores, labels)
    if min(len(positives), len(negatives)) < 2:
        return Interval(math.nan, math.nan)
    of_positives = _placements(positives, negatives)
    of_negatives = 1.0 - _placements(negatives, positives)
    area = float(np.mean(of_positives))
    if not 0.0 < area < 1.0:
        return _wilson(area, min(len(positives), len(negatives)), _z(level))
    variance = np.var(of_positives, ddof=1) / len(positives)
    variance += np.var(of_negatives, ddof=1) / len(negatives)
    half = _z(level) * math.sqrt(float(variance)) / (area * (1.0 - area))
    middle = math.log(area / (1.0 - area))
    return Interval(_sigmoid(middle - half), _sigmoid(middle + half))


def concordance(risks: Array, labels: Array) -> float:
    """Harrell's concordance index: how often the row that had its event first had the higher risk.

    A pair counts where the earlier time is an event; at equal times, where one is an event and the
    other censored. Ties of risk count one half.

    Source: F. Harrell et al., Statistics in Medicine 15 (1996) 361-387.

    Args:
        risks: Log hazards, [N] or [N, 1]; higher means sooner.
        labels: Time and event (1: it happened, 0: censored), [N, 2].

    Returns:
        A value in [0, 1]; NaN where no pair can be compared.

    Raises:
        DataError: If there are no rows, or the two differ in rows.
    """
    labels = np.asarray(labels, np.float64).reshape(-1, 2)
    risks, time = _pair(risks, labels[:, 0])
    event = labels[:, 1] > 0
    pairs, won = 0, 0.0
    for i in np.flatnonzero(event):
        later = (time > time[i]) | ((time == time[i]) & ~event)
        others = risks[later]
        pairs += len(others)
        won += float(np.sum(others < risks[i])) + 0.5 * float(np.sum(others == risks[i]))
    return won / pairs if pairs else math.nan


def score_name(scored_as: str) -> str:
    """The score every client gives for such a loss; "" where the loss itself is all there is."""
    names = {"cross_entropy": "accuracy", "bce_with_logits": "accuracy", "mse": "rmse"}
    return names.get(scored_as, "")


def evaluate_outputs(manifest: _Scored, outputs: Params, labels: Array) -> Metrics:
    """Score what a model gave, as its loss suggests.

    Args:
        manifest: Anything with ``scored_as`` (the plain loss: ``cross_entropy``,
            ``bce_with_logits``, ``mse``, ``cox`` or "") and ``labels.ignore``.
        outputs: Model output name -> array; the first is scored. Logits for the classifiers.
        labels: Classes [N] or [N, …] (0/1 also as [N, 1]), values of the output's shape, or time
            and event [N, 2]. Ignored ones do not count.

    Returns:
        ``accuracy`` for classifiers, and ``auc`` for two classes where both have rows; ``rmse``
        for values, ``concordance`` for hazards. A score that is not defined is left out, so every
        value is finite.
    """
    if manifest.scored_as == "cox":
        found = {"concordance": concordance(next(iter(outputs.values())), labels)}
        return {n: v for n, v in found.items() if not math.isnan(v)}
    outputs, labels = counted(manifest, outputs, labels)
    if not manifest.scored_as or not len(labels):
        return {}
    predicted = predictions(manifest, outputs)
    if manifest.scored_as == "mse":
        return {"rmse": rmse(predicted, labels)}
    scored = {"accuracy": accuracy(predicted, labels)}
    scores = positive_scores(manifest, outputs)
    area = math.nan if scores is None else auc(scores, labels)
    return scored if math.isnan(area) else {**scored, "auc": area}


def counted(manifest: _Scored, outputs: Params, labels: Array) -> tuple[Params, Array]:
    """The first output and the labels, one row per label that is not ignored.

    Classes of positions, [N, classes, …] with labels [N, …], become rows of their own.
    """
    name, output = next(iter(outputs.items()))
    labels = np.asarray(labels)
    if manifest.scored_as != "cross_entropy":
        return {name: output}, labels
    flat = np.moveaxis(output, 1, -1).reshape(-1, output.shape[1])
    keep = labels.ravel() != manifest.labels.ignore
    return {name: flat[keep]}, labels.ravel()[keep]


def positive_scores(manifest: _Scored, outputs: Params) -> Array | None:
    """Per row [N] how much the model leans to class 1 (log-odds); None where not two classes."""
    output = next(iter(outputs.values()))
    if manifest.scored_as == "bce_with_logits" and output.size == len(output):
        return output.ravel()
    if manifest.scored_as == "cross_entropy" and output.shape[1] == 2:
        return np.asarray(output[:, 1] - output[:, 0])
    return None


def predictions(manifest: _Scored, outputs: Params) -> Array:
    """The classes, [N] int64, that :func:`evaluate_outputs` counts; values [N, …] of others."""
    output = next(iter(outputs.values()))
    if manifest.scored_as == "cross_entropy":
        return np.asarray(np.argmax(output, axis=1))
    if manifest.scored_as == "bce_with_logits":
        return (output > 0).astype(np.int64).ravel()
    return output


def _pair(left: Array, right: Array) -> tuple[Array, Array]:
    left, right = np.asarray(left).ravel(), np.asarray(right).ravel()
    if len(left) != len(right) or not len(left):
        raise DataError(f"{len(left)} predictions for {len(right)} labels; wanted one for each")
    return left, right


def _by_class(scores: Array, labels: Array) -> tuple[Array, Array]:
    scores, labels = _pair(scores, labels)
    if np.isnan(scores).any():
        return scores[:0], scores[:0]
    return scores[labels > 0], scores[labels <= 0]


def _placements(these: Array, those: Array) -> Array:
    """Per value of ``these`` the share of ``those`` below it, ties one half; O((m + n) log n)."""
    ordered = np.sort(those)
    below = np.searchsorted(ordered, these, side="left")
    not_above = np.searchsorted(ordered, these, side="right")
    return np.asarray((below + not_above) / (2.0 * len(those)))


def _wilson(share: float, rows: int, z: float) -> Interval:
    centre = share + z * z / (2 * rows)
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return Interval(max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def _sigmoid(value: float) -> float:
    return 0.5 * (1.0 + math.tanh(value / 2.0))


def _z(level: float) -> float:
    if not 0.0 < level < 1.0:
        raise DataError(f"confidence level is {level}; it must be between 0 and 1")
    return NormalDist().inv_cdf(0.5 + level / 2.0)
