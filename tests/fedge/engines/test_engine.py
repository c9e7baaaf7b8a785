"""What both engines promise, on either of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedge.artifacts.bundle import Bundle
from fedge.config import TrainConfig
from fedge.engines import TrainingEngine
from fedge.engines.batches import batch_indices
from fedge.errors import ArtifactError, DataError, EngineError
from fedge.params import relative_distance
from fedge.types import Examples, Params

Open = Callable[[Bundle], TrainingEngine]
CONFIG = TrainConfig(lr=0.01, batch_size=8, epochs=2)


def equal(a: Params, b: Params) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_same_seed_gives_the_same_bits(mlp: Any, opened: Open, optimizer: str) -> None:
    data, runs = mlp.data(83), []
    for _ in range(2):
        engine = opened(mlp.bundle(optimizer))
        result = engine.train(data, CONFIG, 5)
        runs.append((result, engine.get_params()))
    assert runs[0][0] == runs[1][0]
    assert equal(runs[0][1], runs[1][1])
    other = opened(mlp.bundle(optimizer))
    other.train(data, CONFIG, 6)
    assert not equal(other.get_params(), runs[0][1])


def test_training_is_its_steps_one_after_another(mlp: Any, opened: Open) -> None:
    bundle, data = mlp.bundle("adamw"), mlp.data(20)
    whole, steps = opened(bundle), opened(bundle)
    result = whole.train(data, CONFIG, 5)
    chosen = list(batch_indices(20, CONFIG, 5))
    losses = [steps.train_step(data.take(c), CONFIG.lr) * len(c) for c in chosen]
    assert equal(whole.get_params(), steps.get_params())
    assert (result.steps, result.examples) == (6, 40)
    assert result.loss == pytest.approx(sum(losses) / 40)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_setting_params_empties_the_optimizer(mlp: Any, opened: Open, optimizer: str) -> None:
    bundle, data = mlp.bundle(optimizer), mlp.data(40)
    engine = opened(bundle)
    engine.train(data, CONFIG, 1)
    first = engine.get_params()
    engine.set_params(bundle.initial_params())
    assert equal(engine.get_params(), bundle.initial_params())
    engine.train(data, CONFIG, 1)
    assert equal(engine.get_params(), first)


def test_a_subset_of_params_can_be_set_and_what_is_got_is_a_copy(mlp: Any, opened: Open) -> None:
    bundle = mlp.bundle("adamw")
    engine = opened(bundle)
    engine.train(mlp.data(10), CONFIG, 1)
    before = engine.get_params()
    assert list(before) == [p.name for p in bundle.manifest.params]
    name = bundle.manifest.params[1].name
    engine.set_params({name: np.full_like(before[name], 0.5)})
    after = engine.get_params()
    assert (after[name] == 0.5).all()
    assert all(np.array_equal(after[n], before[n]) for n in before if n != name)
    after[name][...] = 7
    assert (engine.get_params()[name] == 0.5).all()


def test_gradients_take_no_step_and_leave_no_trace(mlp: Any, opened: Open) -> None:
    bundle, data = mlp.bundle("sgd"), mlp.data(16)
    engine, other = opened(bundle), opened(bundle)
    loss, grads = engine.gradients(data)
    assert equal(engine.gradients(data)[1], grads)
    assert loss == pytest.approx(engine.evaluate(data).loss, rel=1e-6)
    assert equal(engine.get_params(), bundle.initial_params())
    engine.train(data, CONFIG, 3)
    other.train(data, CONFIG, 3)
    assert equal(engine.get_params(), other.get_params())


def test_many_batch_sizes_in_turn(mlp: Any, opened: Open) -> None:
    engine = opened(mlp.bundle("sgd"))
    for rows in (1, 2, 3, 4, 5, 6, 3, 1, 300):
        assert np.isfinite(engine.train_step(mlp.data(rows), 0.01))


@pytest.mark.parametrize(
    "bad",
    [
        Examples({"x": np.zeros((0, 64), np.float32)}, np.zeros(0, int)),
        Examples({"x": np.zeros((2, 64), np.float32)}, np.array([1, 10])),
        Examples({"x": np.zeros((2, 64), np.float32)}, np.array([1, 2**40])),
        Examples({"x": np.zeros((2, 64), np.float32)}, np.array([-100, 1])),
        Examples({"x": np.full((2, 64), np.nan, np.float32)}, np.array([1, 1])),
        Examples({"x": np.zeros((2, 65), np.float32)}, np.array([1, 1])),
        Examples({"x": np.zeros((2, 64), object)}, np.array([1, 1])),
        Examples({"y": np.zeros((2, 64), np.float32)}, np.array([1, 1])),
    ],
    ids=["empty", "label", "far label", "negative", "nan", "shape", "dtype", "name"],
)
def test_bad_rows_are_refused_and_the_engine_goes_on(mlp: Any, opened: Open, bad: Examples) -> None:
    engine, good = opened(mlp.bundle("sgd")), mlp.data(8)
    for attempt in (
        lambda: engine.train_step(bad, 0.1),
        lambda: engine.train(bad, CONFIG, 1),
        lambda: engine.gradients(bad),
        lambda: engine.evaluate(bad),
    ):
        with pytest.raises(DataError):
            attempt()
    assert np.isfinite(engine.train_step(good, 0.1))


def test_divergence_is_an_error_and_not_a_model(mlp: Any, opened: Open) -> None:
    bundle = mlp.bundle("sgd")
    engine = opened(bundle)
    with pytest.raises(EngineError, match=r"diverged.*lower lr"):
        engine.train(mlp.data(64), TrainConfig(lr=1e30, batch_size=8, epochs=3), 1)
    engine.set_params(bundle.initial_params())
    assert np.isfinite(engine.train(mlp.data(64), CONFIG, 1).loss)


def test_params_that_do_not_fit_are_refused(mlp: Any, opened: Open) -> None:
    engine = opened(mlp.bundle("sgd"))
    with pytest.raises(ArtifactError, match="unknown"):
        engine.set_params({"nobody": np.zeros(3)})


def test_training_lowers_the_loss(mlp: Any, opened: Open) -> None:
    engine, data = opened(mlp.bundle("adamw")), mlp.data(64)
    before = engine.evaluate(data).loss
    engine.train(data, TrainConfig(lr=0.01, batch_size=16, epochs=20), 1)
    assert engine.evaluate(data).loss < before / 2


def test_more_threads_give_nearly_the_same(mlp: Any, engine_name: str) -> None:
    from fedge.engines import open_engine

    found = []
    for threads in (1, 2):
        engine = open_engine(mlp.bundle("sgd"), engine_name, threads=threads)
        engine.train(mlp.data(64), CONFIG, 1)
        found.append(engine.get_params())
        engine.close()
    assert max(relative_distance(found[1], found[0]).values()) <= 1e-5
