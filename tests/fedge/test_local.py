from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedge import local
from fedge.errors import DataError
from fedge.seeds import derive_seed
from fedge.testing import (
    BIAS,
    WEIGHT,
    LogisticEngine,
    logistic_clients,
    logistic_manifest,
    logistic_params,
)
from fedge.types import ClientData, Examples

MANIFEST = logistic_manifest(personal=[BIAS])
INITIAL = logistic_params(MANIFEST)
CLIENT = logistic_clients(1)[0]
TASK = local.TrainTask(3, MANIFEST.train, seed=11)
SHARED = {WEIGHT: INITIAL[WEIGHT] + np.float32(0.25)}


@pytest.fixture
def engine() -> LogisticEngine:
    return LogisticEngine(MANIFEST, INITIAL)


def test_an_update_holds_the_shared_delta_and_nothing_else(engine: LogisticEngine) -> None:
    site = local.prepare(engine, MANIFEST, CLIENT)
    update, personal = local.train(engine, MANIFEST, INITIAL, site, SHARED, TASK)
    oracle = LogisticEngine(MANIFEST, {**INITIAL, **SHARED})
    seed = derive_seed(11, 3, CLIENT.client_id, "batches")
    result = oracle.train(CLIENT.train, MANIFEST.train, seed)
    after = oracle.get_params()
    assert update.delta.keys() == {WEIGHT}
    assert update.delta[WEIGHT].tobytes() == (after[WEIGHT] - SHARED[WEIGHT]).tobytes()
    assert personal.keys() == {BIAS}
    assert personal[BIAS].tobytes() == after[BIAS].tobytes()
    assert (update.client_id, update.round_num) == (CLIENT.client_id, 3)
    assert update.num_examples == len(CLIENT.train)
    assert update.metrics == {"train_loss": result.loss}
    assert update.provenance == {"bundle": MANIFEST.digest, "engine": "numpy"}


def test_personal_params_are_taken_from_the_site(engine: LogisticEngine) -> None:
    mine = {BIAS: np.array([5, -5, 0], np.float32)}
    site = local.prepare(engine, MANIFEST, CLIENT, mine)
    _, personal = local.train(engine, MANIFEST, INITIAL, site, SHARED, TASK)
    _, fresh = local.train(engine, MANIFEST, INITIAL, replace(site, personal={}), SHARED, TASK)
    assert abs(personal[BIAS] - mine[BIAS]).max() < abs(fresh[BIAS] - mine[BIAS]).max()


def test_what_the_engine_did_before_changes_nothing(engine: LogisticEngine) -> None:
    site = local.prepare(engine, MANIFEST, CLIENT)
    first, _ = local.train(engine, MANIFEST, INITIAL, site, SHARED, TASK)
    local.train(engine, MANIFEST, INITIAL, site, {WEIGHT: SHARED[WEIGHT] * 3}, TASK)
    again, _ = local.train(engine, MANIFEST, INITIAL, site, SHARED, TASK)
    assert first.to_bytes() == again.to_bytes()


@pytest.mark.parametrize("change", [{"seed": 12}, {"round_num": 4}])
def test_seed_and_round_change_the_row_order(
    engine: LogisticEngine, change: dict[str, int]
) -> None:
    site = local.prepare(engine, MANIFEST, CLIENT)
    first, _ = local.train(engine, MANIFEST, INITIAL, site, SHARED, TASK)
    other, _ = local.train(engine, MANIFEST, INITIAL, site, SHARED, replace(TASK, **change))
    assert first.delta[WEIGHT].tobytes() != other.delta[WEIGHT].tobytes()


def test_scores_are_of_the_held_out_rows(engine: LogisticEngine) -> None:
    assert CLIENT.test is not None
    site = local.prepare(engine, MANIFEST, CLIENT)
    rows, metrics = local.evaluate(engine, MANIFEST, INITIAL, site, SHARED)
    params = {**INITIAL, **SHARED}
    logits = CLIENT.test.inputs["x"] @ params[WEIGHT].T + params[BIAS]
    assert rows == len(CLIENT.test)
    assert metrics["accuracy"] == np.mean(logits.argmax(1) == CLIENT.test.labels)
    assert metrics.keys() == {"loss", "accuracy"}


def test_without_held_out_rows_there_is_no_score(engine: LogisticEngine) -> None:
    for test in (None, CLIENT.train.take(slice(0, 0))):
        site = local.prepare(engine, MANIFEST, replace(CLIENT, test=test))
        assert site.test is None
        with pytest.raises(DataError, match="site-0 holds out no rows"):
            local.evaluate(engine, MANIFEST, INITIAL, site, SHARED)
        with pytest.raises(DataError, match="holds out no rows"):
            local.personalize(engine, MANIFEST, INITIAL, site, SHARED, MANIFEST.train)


def test_the_single_input_may_have_any_name(engine: LogisticEngine) -> None:
    renamed = Examples({"features": CLIENT.train.inputs["x"]}, CLIENT.train.labels)
    site = local.prepare(engine, MANIFEST, ClientData("c", renamed))
    assert site.train.inputs.keys() == {"x"}


def test_rows_that_do_not_fit_are_refused(engine: LogisticEngine) -> None:
    wide = Examples({"x": np.zeros((3, 9), np.float32)}, np.zeros(3, np.int64))
    with pytest.raises(DataError, match="shape"):
        local.prepare(engine, MANIFEST, ClientData("c", wide))


def test_site_scaling_takes_the_training_rows_alone() -> None:
    class Recording(LogisticEngine):
        given: list[dict[str, object] | None]

        def preprocess(self, raw: Examples, site: dict[str, object] | None = None) -> Examples:
            self.given.append(site)
            return super().preprocess(raw)

    engine = Recording(MANIFEST, INITIAL)
    engine.given = []
    local.prepare(engine, replace(MANIFEST, scaling="site"), CLIENT)
    rows = CLIENT.train.inputs["x"].astype(np.float64)
    assert len(engine.given) == 2
    for stats in engine.given:
        assert stats is not None
        np.testing.assert_allclose(stats["site_mean"], rows.mean(0), rtol=1e-6)
        np.testing.assert_allclose(stats["site_std"], rows.std(0, ddof=1), rtol=1e-6)


def test_personalization_compares_three_models(engine: LogisticEngine) -> None:
    site = local.prepare(engine, MANIFEST, CLIENT)
    config = MANIFEST.train.replace(epochs=5)
    done = local.personalize(engine, MANIFEST, INITIAL, site, SHARED, config)
    assert set(done.report) == {"local_only", "global", "personal"}
    assert done.num_examples == len(site.test or ())
    assert done.params.keys() == INITIAL.keys()
    assert done.report["personal"]["loss"] < done.report["global"]["loss"]
    assert done.report["personal"] == local.score(engine, MANIFEST, site, done.params)[1]
    assert done.report["global"] == local.evaluate(engine, MANIFEST, INITIAL, site, SHARED)[1]
    from_start = local.personalize(engine, MANIFEST, INITIAL, site, INITIAL, config)
    assert from_start.report["local_only"] == done.report["local_only"]
    assert from_start.report["personal"] == from_start.report["local_only"]
