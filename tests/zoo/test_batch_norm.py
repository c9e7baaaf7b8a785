"""BatchNorm's modes and running statistics, as torch has them, alone and through rounds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import fedge
from fedge import TrainConfig
from fedge.artifacts.bundle import Bundle
from fedge.engines import find_training_python, open_engine, open_in_process
from fedge.params import gradient_distance, relative_distance
from fedge.types import ClientData, Examples, Params

ENGINES = ["ort"] if find_training_python() is None else ["ort", "ort-training"]
RUNNING = ("n1.running_mean", "n1.running_var", "n2.running_mean", "n2.running_var")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=0.3)
        self.c2, self.n2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, eps=1e-3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.n1(self.c1(x)))
        y: torch.Tensor = self.head(torch.tanh(self.n2(self.c2(x))).mean((2, 3)))
        return y


def net(mode: str = "train") -> Net:
    torch.manual_seed(0)
    model = Net()
    model(2 + 3 * torch.randn(64, 2, 6, 6))  # statistics that are not the initial ones
    if mode == "frozen":
        model.n1.eval()
    return model.eval() if mode == "eval" else model


def rows(count: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    x = 2 + 3 * rng.standard_normal((count, 2, 6, 6))
    return Examples({"x": x.astype(np.float32)}, rng.integers(0, 3, count))


def build(mode: str = "train", **options: Any) -> Bundle:
    train = TrainConfig(lr=0.1, batch_size=32, epochs=1, shuffle=False)
    sample = rows(2, 0).inputs
    return fedge.build(net(mode), loss="cross_entropy", sample=sample, train=train, **options)


def train_torch(model: Net, steps: list[Examples]) -> Params:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for data in steps:
        optimizer.zero_grad()
        output = model(torch.from_numpy(data.inputs["x"]))
        nn.functional.cross_entropy(output, torch.from_numpy(data.labels)).backward()
        optimizer.step()
    return {n: v.detach().numpy().copy() for n, v in model.state_dict().items() if v.ndim}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["train", "frozen", "eval"])
def test_each_mode_trains_as_torch_s(mode: str, engine: str) -> None:
    bundle = build(mode)
    count = {"train": 4, "frozen": 2, "eval": 0}[mode]
    assert bundle.manifest.running == (RUNNING[4 - count :] if count else ())
    assert bundle.manifest.engines["ort-training"] == "" or len(ENGINES) == 1
    steps = [rows(size, seed) for seed, size in enumerate((8, 8, 5, 1))]
    wanted = train_torch(net(mode), steps)
    opened = open_engine(bundle, engine)
    try:
        _, before = opened.gradients(steps[0])
        assert max(gradient_distance(opened.gradients(steps[0])[1], before).values()) == 0
        for data in steps:
            opened.train_step(data, 0.1)
        found = opened.get_params()
    finally:
        opened.close()
    assert max(relative_distance(found, wanted).values()) < 1e-4
    moved = {n for n, v in found.items() if not np.array_equal(v, bundle.initial_params()[n])}
    assert moved.issuperset(bundle.manifest.running)
    assert not moved.intersection(set(RUNNING) - set(bundle.manifest.running))


def test_scores_and_exports_use_the_running_statistics(tmp_path: Path) -> None:
    bundle, model = build(), net()
    engine = open_in_process(bundle, "ort")
    data = rows(8, 3)
    engine.train_step(data, 0.1)
    train_torch(model, [data])
    with torch.no_grad():
        wanted = model.eval()(torch.from_numpy(data.inputs["x"])).numpy()
    np.testing.assert_allclose(engine.predict(data.inputs)["output"], wanted, atol=2e-5)
    path = fedge.export(bundle, engine.get_params(), tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (8, 1):  # one row: nothing of it is taken from the batch
        got = session.run(["output"], {"x": data.inputs["x"][:count]})[0]
        np.testing.assert_allclose(got, wanted[:count], atol=2e-5)


def test_accumulated_pieces_each_move_the_statistics() -> None:
    bundle, model, data = build(), net(), rows(8, 4)
    engine = open_in_process(bundle, "ort")
    config = TrainConfig(lr=0.1, batch_size=8, steps=1, accumulate=2, shuffle=False)
    engine.train(data, config, seed=0)
    with torch.no_grad():
        for piece in (data.inputs["x"][:4], data.inputs["x"][4:]):
            model(torch.from_numpy(piece))
    found = engine.get_params()
    for name in RUNNING:
        np.testing.assert_allclose(found[name], model.state_dict()[name].numpy(), rtol=1e-5)


def hospitals() -> list[ClientData]:
    return [ClientData(f"h{i}", rows(8 + 8 * i, 10 + i), rows(6, 20 + i)) for i in range(2)]


def after_one_round(**options: Any) -> tuple[Bundle, Any, list[Params]]:
    """A round of two hospitals with one batch each, and what torch makes of each alone."""
    bundle = build(**options)
    run = fedge.Federation(bundle, hospitals(), seed=0).run(rounds=1)
    alone = [train_torch(copy.deepcopy(net()), [c.train]) for c in hospitals()]
    return bundle, run, alone


def test_statistics_are_averaged_like_the_other_params() -> None:
    bundle, run, alone = after_one_round()
    mean = {n: (8 * alone[0][n] + 16 * alone[1][n]) / 24 for n in alone[0]}
    assert set(run.params) >= set(bundle.manifest.shared) >= set(RUNNING)
    assert max(relative_distance({n: run.params[n] for n in mean}, mean).values()) < 1e-4


def test_a_site_may_keep_its_normalization_to_itself() -> None:
    """Local batch normalization (FedBN, Li et al. 2021): all of n1 and n2 stays."""
    bundle, run, alone = after_one_round(personal=["n1.*", "n2.*"])
    assert not any(n.startswith("n") for n in bundle.manifest.shared)
    for hospital, local in zip(("h0", "h1"), alone, strict=True):
        kept = run.personal[hospital]
        assert set(kept) == {n for n in local if n.startswith("n")}
        assert max(relative_distance(kept, {n: local[n] for n in kept}).values()) < 1e-4


def test_statistics_alone_may_stay() -> None:
    bundle = build(personal="*.running_*")
    assert bundle.manifest.personal == RUNNING
    assert set(bundle.manifest.shared) == set(bundle.manifest.trainable)
