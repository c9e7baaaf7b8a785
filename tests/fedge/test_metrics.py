import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from fedge import metrics
from fedge.errors import DataError
from fedge.types import Array


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 60), st.integers(1, 8))
def test_auc_is_sklearns_with_and_without_ties(seed: int, rows: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, rows).astype(np.float32)
    labels = rng.integers(0, 2, rows)
    labels[:2] = [0, 1]
    assert metrics.auc(scores[:, None], labels) == pytest.approx(roc_auc_score(labels, scores))


def scored(loss: str, ignore: int | None = None) -> SimpleNamespace:
    """What the scores need of a manifest."""
    return SimpleNamespace(scored_as=loss, labels=SimpleNamespace(ignore=ignore))


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
def test_auc_of_one_class_is_nan(labels: list[int]) -> None:
    assert math.isnan(metrics.auc(np.arange(3.0), np.array(labels)))
    assert all(math.isnan(v) for v in metrics.auc_interval(np.arange(3.0), np.array(labels)))


def test_auc_of_nan_scores_is_nan() -> None:
    assert math.isnan(metrics.auc(np.array([np.nan, 1.0]), np.array([0, 1])))


def _delong_by_pairs(scores: Array, labels: Array) -> tuple[float, float]:
    pos, neg = scores[labels == 1], scores[labels == 0]
    wins = (pos[:, None] > neg) + 0.5 * (pos[:, None] == neg)
    v10, v01 = wins.mean(1), wins.mean(0)
    return wins.mean(), v10.var(ddof=1) / len(pos) + v01.var(ddof=1) / len(neg)


def test_auc_interval_is_delongs_on_the_logit_scale() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80)
    scores = np.round(rng.normal(labels * 0.8, 1.0), 1)
    area, variance = _delong_by_pairs(scores, labels)
    half = 1.959963984540054 * math.sqrt(variance) / (area * (1 - area))
    logit = math.log(area / (1 - area))
    want = [1 / (1 + math.exp(-(logit + s * half))) for s in (-1, 1)]
    assert metrics.auc_interval(scores, labels) == pytest.approx(want, abs=1e-12)


def test_auc_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    truth = 0.7602499389  # P(N(1,1) > N(0,1)) = Phi(1/sqrt 2)
    hits = 0
    for _ in range(400):
        scores = np.concatenate([rng.normal(1, 1, 25), rng.normal(0, 1, 40)])
        low, high = metrics.auc_interval(scores, np.repeat([1, 0], [25, 40]))
        hits += low <= truth <= high
    assert 0.92 <= hits / 400 <= 0.98


@pytest.mark.parametrize("sign", [1, -1])
def test_auc_interval_of_separated_classes_is_not_a_point(sign: int) -> None:
    low, high = metrics.auc_interval(sign * np.arange(10.0), np.repeat([0, 1], 5))
    assert (0.5 < low < 0.8 and high == 1.0) if sign == 1 else (low < 1e-12 and 0.2 < high < 0.5)


def test_accuracy_interval_is_wilsons() -> None:
    # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3
    assert metrics.accuracy_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert metrics.accuracy_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert metrics.accuracy_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert metrics.accuracy_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@pytest.mark.parametrize(("correct", "rows"), [(1, 0), (-1, 3), (4, 3)])
def test_accuracy_interval_refuses_impossible_counts(correct: int, rows: int) -> None:
    with pytest.raises(DataError, match=f"{correct} correct of {rows}"):
        metrics.accuracy_interval(correct, rows)


def test_a_confidence_level_out_of_range_is_refused() -> None:
    with pytest.raises(DataError, match="level is 95"):
        metrics.accuracy_interval(1, 2, level=95)


def test_unequal_or_no_rows_are_refused() -> None:
    for scorer in (metrics.accuracy, metrics.rmse, metrics.auc):
        with pytest.raises(DataError, match="3 predictions for 2 labels"):
            scorer(np.zeros(3), np.zeros(2))
        with pytest.raises(DataError, match="0 predictions"):
            scorer(np.zeros(0), np.zeros(0))


@pytest.mark.parametrize(
    ("loss", "output", "labels", "want"),
    [
        ("bce_with_logits", [[-1.0], [2.0], [0.5]], [0, 1, 0], {"accuracy": 2 / 3, "auc": 1.0}),
        ("bce_with_logits", [[-1.0], [2.0]], [[1], [1]], {"accuracy": 0.5}),
        ("cross_entropy", [[0.0, 3.0], [1.0, 0.5]], [1, 0], {"accuracy": 1.0, "auc": 1.0}),
        ("cross_entropy", [[0.0, 3.0, 1.0], [1.0, 0.5, 9.0]], [1, 0], {"accuracy": 0.5}),
        ("mse", [[1.0], [3.0]], [[0.0], [0.0]], {"rmse": math.sqrt(5.0)}),
    ],
)
def test_outputs_are_scored_as_the_loss_suggests(
    loss: str, output: list[list[float]], labels: list[int], want: dict[str, float]
) -> None:
    outputs = {"y": np.array(output, np.float32)}
    got = metrics.evaluate_outputs(scored(loss), outputs, np.array(labels))
    assert got == pytest.approx(want)


def test_predictions_are_what_accuracy_counts() -> None:
    logits = {"y": np.array([[-1.0], [2.0]], np.float32)}
    assert list(metrics.predictions(scored("bce_with_logits"), logits)) == [0, 1]
    assert list(metrics.predictions(scored("mse"), logits).ravel()) == [-1.0, 2.0]
    two = {"y": np.array([[0.0, 1.0], [1.0, 0.0]], np.float32)}
    assert list(metrics.predictions(scored("cross_entropy"), two)) == [1, 0]


def test_ignored_labels_and_positions_are_counted_as_the_loss_does() -> None:
    logits = {"y": np.zeros((2, 3, 2), np.float32)}
    logits["y"][0, 1, :] = 1
    labels = np.array([[1, -100], [0, 2]])
    got = metrics.evaluate_outputs(scored("cross_entropy", -100), logits, labels)
    assert got == pytest.approx({"accuracy": 2 / 3})
    nobody = np.full((2, 2), -100)
    assert metrics.evaluate_outputs(scored("cross_entropy", -100), logits, nobody) == {}
    assert metrics.evaluate_outputs(scored(""), logits, labels) == {}


def test_score_names() -> None:
    names = {"cross_entropy": "accuracy", "bce_with_logits": "accuracy", "mse": "rmse"}
    for kind in ("cross_entropy", "bce_with_logits", "mse", "cox", ""):
        assert metrics.score_name(kind) == names.get(kind, "")


@given(st.integers(1, 25), st.integers(0, 999))
def test_concordance_is_the_share_of_pairs_in_order(rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    risks, time, event = rng.integers(0, 6, (3, rows))
    event = event % 2
    won, pairs = 0.0, 0
    for i in range(rows):
        for j in range(rows):
            later = time[j] > time[i] or (time[j] == time[i] and not event[j])
            if event[i] and later:
                pairs += 1
                won += 1.0 if risks[i] > risks[j] else 0.5 * (risks[i] == risks[j])
    labels = np.stack([time, event], 1)
    found = metrics.concordance(risks[:, None], labels)
    assert math.isnan(found) if not pairs else found == pytest.approx(won / pairs)
    got = metrics.evaluate_outputs(scored("cox"), {"y": risks[:, None]}, labels)
    assert got == ({} if not pairs else {"concordance": pytest.approx(won / pairs)})


def test_concordance_wants_time_and_event() -> None:
    with pytest.raises(DataError, match="predictions for"):
        metrics.concordance(np.zeros(3), np.zeros((2, 2)))
