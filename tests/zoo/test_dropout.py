"""Dropout: the numbers come from the seed, on both engines, and a run repeats to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

import fedge
from fedge import TrainConfig
from fedge.artifacts.bundle import Bundle
from fedge.engines import find_training_python, open_engine, open_in_process
from fedge.params import relative_distance
from fedge.types import ClientData, Examples, Params

RATIO = 0.25


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    module = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Dropout(RATIO), nn.Linear(64, 3))
    train = TrainConfig(lr=0.1, batch_size=4, epochs=1)
    return fedge.build(module, loss="cross_entropy", sample=rows(2, 0).inputs, train=train)


def rows(count: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 6)).astype(np.float32)
    return Examples({"x": x}, rng.integers(0, 3, count))


def trained(bundle: Bundle, seed: int, engine: str = "ort", **changes: object) -> Params:
    opened = open_engine(bundle, engine)
    try:
        config = TrainConfig(**{"lr": 0.1, "batch_size": 4, "epochs": 2, **changes})
        opened.train(rows(10, 1), config, seed)
        return opened.get_params()
    finally:
        opened.close()


def same(a: Params, b: Params) -> bool:
    return all(np.array_equal(a[n], b[n]) for n in a)


def test_a_seed_fixes_what_is_dropped(bundle: Bundle) -> None:
    fixed = {"shuffle": False}
    assert same(trained(bundle, 1, **fixed), trained(bundle, 1, **fixed))
    assert not same(trained(bundle, 1, **fixed), trained(bundle, 2, **fixed))


@pytest.mark.skipif(find_training_python() is None, reason="no interpreter with the training wheel")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_both_engines_drop_the_same(bundle: Bundle, accumulate: int) -> None:
    assert bundle.manifest.engines["ort-training"] == ""
    ours, theirs = (trained(bundle, 3, e, accumulate=accumulate) for e in ("ort", "ort-training"))
    assert max(relative_distance(theirs, ours).values()) < 1e-5


def test_so_much_is_dropped_and_the_rest_is_scaled(bundle: Bundle) -> None:
    """The gradient of the last layer shows the hidden layer after Dropout."""
    engine = open_in_process(bundle, "ort")
    data = rows(400, 5)
    hidden = np.tanh(data.inputs["x"] @ engine.get_params()["0.weight"].T)
    share, scale = [], []
    for start in range(0, 400, 1):
        row = data.take(np.array([start]))
        noise = {"noise/1": np.random.default_rng(start).random((1, 64), np.float32)}
        grad = engine.gradients(Examples({**row.inputs, **noise}, row.labels))[1]["3.weight"][0]
        share.append(np.mean(grad == 0))
        scale.append(grad != 0)
    assert np.mean(share) == pytest.approx(RATIO, abs=0.01)
    assert hidden.shape == np.array(scale).shape


def test_steps_one_by_one_draw_anew(bundle: Bundle) -> None:
    engine, data = open_in_process(bundle, "ort"), rows(4, 6)
    initial = engine.get_params()

    def moves() -> list[Params]:
        engine.set_params(initial)
        found = []
        for _ in range(2):
            before = engine.get_params()
            engine.train_step(data, 1e-3)
            found.append({n: v - before[n] for n, v in engine.get_params().items()})
        return found

    first, again = moves(), moves()
    assert same(first[0], again[0])
    assert same(first[1], again[1])
    close = relative_distance(first[1], first[0])
    assert close["3.weight"] > 0.1  # another mask, not only another place


def test_scores_and_gradients_do_not_depend_on_the_past(bundle: Bundle) -> None:
    engine, data = open_in_process(bundle, "ort"), rows(4, 7)
    before = engine.predict(data.inputs)["output"]
    first = engine.gradients(data)[1]
    assert same(first, engine.gradients(data)[1])
    np.testing.assert_array_equal(engine.predict(data.inputs)["output"], before)


def test_a_federation_repeats_to_the_bit(bundle: Bundle) -> None:
    clients = [ClientData(f"c{i}", rows(9, 30 + i), None) for i in range(2)]
    first, again = (fedge.Federation(bundle, clients, seed=4).run(rounds=2) for _ in "12")
    assert same(first.params, again.params)


def test_attention_s_dropout_is_drawn_per_head() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    bundle = fedge.build(
        nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 2)),
        loss="cross_entropy",
        sample={"x": np.zeros((2, 5, 8), np.float32)},
    )
    shapes = [s.shape for s in bundle.manifest.noise]
    assert len(shapes) == 4
    assert sorted(int(np.prod([d for d in s if d != "N"])) for s in shapes) == [40, 40, 50, 80]
