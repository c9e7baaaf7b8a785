"""Every loss on both engines, and what a step may do to a gradient: ten steps against torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper, parser
from torch import nn
from torch.nn import functional as F

import fedge
from fedge import losses
from fedge.artifacts.bundle import Bundle
from fedge.config import Schedule, TrainConfig
from fedge.engines import TrainingEngine, find_training_python, open_in_process
from fedge.engines.batches import batch_indices
from fedge.errors import DataError
from fedge.losses import LossLike
from fedge.params import gradient_distance, relative_distance
from fedge.types import Array, Examples, Params

Open = Callable[[Bundle], TrainingEngine]
Torchs = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
TOLERANCE = 1e-5
WIDTH = 3

FOCAL = """focal (float[N,C] z, int64[N] labels) => (float loss)
<int64 depth = {3}, float[2] values = {0, 1}, int64[1] one = {1}, float unit = {1}> {
    log_p = LogSoftmax<axis=1>(z)
    hot = OneHot(labels, depth, values)
    picked = Mul(log_p, hot)
    row = ReduceSum<keepdims=0>(picked, one)
    p = Exp(row)
    rest = Sub(unit, p)
    each = Mul(rest, row)
    mean = ReduceMean<keepdims=0>(each)
    loss = Neg(mean)
}"""


def focal_model() -> Any:
    imports = [helper.make_opsetid("", 17)]
    return helper.make_model(parser.parse_graph(FOCAL), opset_imports=imports, ir_version=8)


@dataclass(frozen=True)
class Case:
    """A loss, torch's word for it, and labels."""

    loss: LossLike | Any
    torchs: Torchs
    labels: Callable[[np.random.Generator, int], Array]
    width: int = WIDTH


def classes(rng: np.random.Generator, rows: int) -> Array:
    return rng.integers(0, WIDTH, rows)


def some_ignored(rng: np.random.Generator, rows: int) -> Array:
    return np.where(rng.random(rows) < 0.3, -100, classes(rng, rows))


def coins(rng: np.random.Generator, rows: int) -> Array:
    return rng.integers(0, 2, (rows, WIDTH)).astype(np.float32)


def reals(rng: np.random.Generator, rows: int) -> Array:
    return rng.standard_normal((rows, WIDTH)).astype(np.float32) * 2


def times(rng: np.random.Generator, rows: int) -> Array:
    found = np.stack([rng.integers(0, 5, rows), rng.integers(0, 2, rows)], 1)
    found[0, 1] = 1
    return found.astype(np.float32)


def breslow(z: torch.Tensor, y: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    z = z.flatten()
    behind = [torch.logsumexp(z[y[:, 0] >= t], 0) - z[i] for i, t in enumerate(y[:, 0])]
    return (torch.stack(behind) * y[:, 1]).sum() / y[:, 1].sum()


def hinton(z: torch.Tensor, y: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    soft = F.kl_div(F.log_softmax(z / 3, 1), F.softmax(teacher / 3, 1), reduction="batchmean")
    return 0.7 * 9 * soft + 0.3 * F.cross_entropy(z, y)


def focal(z: torch.Tensor, y: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    row = F.log_softmax(z, 1).gather(1, y[:, None])[:, 0]
    return -((1 - row.exp()) * row).mean()


WEIGHTS = (0.5, 1.0, 3.0)
CASES: dict[str, Case] = {
    "cross_entropy": Case("cross_entropy", lambda z, y, _: F.cross_entropy(z, y), classes),
    "cross_entropy set": Case(
        losses.CrossEntropy(ignore_index=-100, class_weights=WEIGHTS, label_smoothing=0.1),
        lambda z, y, _: F.cross_entropy(z, y, torch.tensor(WEIGHTS).double(), label_smoothing=0.1),
        some_ignored,
    ),
    "bce set": Case(
        losses.BceWithLogits(WEIGHTS),
        lambda z, y, _: F.binary_cross_entropy_with_logits(z, y, pos_weight=torch.tensor(WEIGHTS)),
        coins,
    ),
    "l1": Case("l1", lambda z, y, _: F.l1_loss(z, y), reals),
    "huber": Case(losses.Huber(0.7), lambda z, y, _: F.huber_loss(z, y, delta=0.7), reals),
    "cox": Case("cox", breslow, times, 1),
    "distillation": Case(losses.Distillation(temperature=3, alpha=0.7), hinton, classes),
    "onnx": Case(losses.Onnx(focal_model(), like="cross_entropy", low=0, high=2), focal, classes),
}  # fmt: skip


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, width))


@cache
def built(name: str) -> Bundle:
    case = CASES[name]
    return fedge.build(network(case.width), loss=case.loss, sample=torch.zeros(1, 5))


def rows_of(case: Case, rows: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 5)).astype(np.float32)
    teacher = (rng.standard_normal((rows, case.width)) * 3).astype(np.float32)
    given = {"x": x, "teacher_logits": teacher} if "Distil" in repr(case.loss) else {"x": x}
    return Examples(given, case.labels(rng, rows))


def oracle_loss(case: Case, model: nn.Module, data: Examples) -> torch.Tensor:
    given = {n: torch.from_numpy(a).double() for n, a in data.inputs.items()}
    labels, out = torch.from_numpy(data.labels), model(given["x"])
    target = labels.double() if labels.is_floating_point() else labels
    return case.torchs(out, target, given.get("teacher_logits", out))


def params_of(model: nn.Module) -> Params:
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_of_a_loss(name: str, opened: Open, engine_name: str) -> None:
    case, bundle = CASES[name], built(name)
    assert engine_name == "ort" or bundle.manifest.engines["ort-training"] == ""
    engine, model = opened(bundle), network(case.width).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(10):
        batch = rows_of(case, 8 if step % 3 else 5, step)
        optimizer.zero_grad()
        loss = oracle_loss(case, model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if step == 0:
            found = engine.gradients(batch)
            assert found[0] == pytest.approx(loss.item(), rel=1e-5)
            grads = {n: p.grad.numpy() for n, p in model.named_parameters()}  # type: ignore[union-attr]
            assert max(gradient_distance(found[1], grads).values()) <= TOLERANCE
        optimizer.step()
        assert engine.train_step(batch, 0.1) == pytest.approx(loss.item(), rel=1e-5)
    assert max(relative_distance(engine.get_params(), params_of(model)).values()) <= TOLERANCE


def test_a_distilled_model_is_scored_without_a_teacher() -> None:
    case = CASES["distillation"]
    engine, data = open_in_process(built("distillation"), "ort"), rows_of(case, 20, 0)
    bare = Examples({"x": data.inputs["x"]}, data.labels)
    assert engine.evaluate(data).loss == engine.evaluate(bare).loss
    assert set(engine.preprocess(data).inputs) == {"x", "teacher_logits"}
    assert set(engine.preprocess(bare).inputs) == {"x"}
    with pytest.raises(DataError, match=r"the model wants .*teacher_logits"):
        engine.train(bare, TrainConfig(), 0)


def test_labels_that_are_no_times_are_refused() -> None:
    engine, data = open_in_process(built("cox"), "ort"), rows_of(CASES["cox"], 4, 0)
    for wrong in (data.labels[:, ::-1] + 2, -data.labels):
        with pytest.raises(DataError, match=r"neither 0|labels run from"):
            engine.train(Examples(data.inputs, wrong), TrainConfig(), 0)


def test_ignored_labels_pass_and_others_do_not() -> None:
    engine, data = open_in_process(built("cross_entropy set"), "ort"), rows_of(CASES["l1"], 2, 0)
    assert engine.evaluate(Examples(data.inputs, np.array([-100, -100]))).loss == 0
    with pytest.raises(DataError, match="labels run from -1 to 0"):
        engine.evaluate(Examples(data.inputs, np.array([0, -1])))


# --- Steps that do more --------------------------------------------------------------------------

SHAPES = {
    "clip": TrainConfig(lr=0.1, clip_norm=0.05),
    "pieces": TrainConfig(lr=0.1, accumulate=3),
    "proximal": TrainConfig(lr=0.1, proximal_mu=2.0),
    "schedule": TrainConfig(lr=0.1, schedule=Schedule("cosine", warmup=3)),
    "all": TrainConfig(
        lr=0.1, clip_norm=0.1, accumulate=4, proximal_mu=0.5, schedule=Schedule("linear")
    ),
}
OPTIMIZERS: dict[str, tuple[Any, Callable[..., torch.optim.Optimizer]]] = {
    "sgd": ("sgd", torch.optim.SGD),
    "adamw": ("adamw", torch.optim.AdamW),
    "nesterov": (
        {"name": "sgd", "momentum": 0.9, "nesterov": 1, "weight_decay": 0.1},
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
}


@cache
def classifier(optimizer: str) -> Bundle:
    return fedge.build(
        network(WIDTH),
        loss="cross_entropy",
        optimizer=OPTIMIZERS[optimizer][0],
        sample=torch.zeros(1, 5),
        personal="2.*",
    )


def torchs_training(
    config: TrainConfig, optimizer: str, data: Examples, batches: Sequence[Array]
) -> tuple[Params, list[float]]:
    """The same in torch, as its users write it; "2.*" is personal and not held back."""
    model = network(WIDTH).double()
    step = OPTIMIZERS[optimizer][1](model.parameters(), lr=config.lr)
    start = [p.detach().clone() for p in model.parameters()]
    seen = []
    for number, chosen in enumerate(batches):
        step.param_groups[0]["lr"] = config.lr * config.schedule.factor(number, len(batches))
        step.zero_grad()
        batch = data.take(chosen)
        loss = oracle_loss(CASES["cross_entropy"], model, batch)
        seen.append(loss.item())
        held = zip(model.named_parameters(), start, strict=True)
        pull = sum(((p - p0) ** 2).sum() for (n, p), p0 in held if not n.startswith("2."))
        (loss + config.proximal_mu / 2 * pull).backward()
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        step.step()
    return params_of(model), seen


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ten_steps_that_do_more(shape: str, optimizer: str, opened: Open, engine_name: str) -> None:
    if engine_name == "ort-training" and optimizer == "nesterov":
        pytest.skip("ONNX Runtime's SGD has no momentum")
    config = SHAPES[shape].replace(batch_size=7, epochs=2)
    if optimizer == "adamw":
        config = config.replace(lr=0.01)
    engine, data = opened(classifier(optimizer)), rows_of(CASES["cross_entropy"], 33, 0)
    batches = list(batch_indices(33, config, 5))
    assert len(batches) == 10
    wanted, seen = torchs_training(config, optimizer, data, batches)
    result = engine.train(data, config, 5)
    mean = np.average(seen, weights=[len(b) for b in batches])
    assert (result.steps, result.examples) == (10, 66)
    assert result.loss == pytest.approx(mean, rel=1e-5)
    assert max(relative_distance(engine.get_params(), wanted).values()) <= TOLERANCE
    first = engine.get_params()
    engine.set_params(classifier(optimizer).initial_params())
    engine.train(data, config, 5)
    assert all(np.array_equal(a, first[n]) for n, a in engine.get_params().items())


def test_plain_and_shaped_steps_may_follow_each_other() -> None:
    engine, data = open_in_process(classifier("nesterov"), "ort"), rows_of(CASES["onnx"], 32, 0)
    plain = TrainConfig(lr=0.05, batch_size=8)
    loose = plain.replace(clip_norm=1e9)
    for config in (plain, loose, plain, loose):
        engine.train(data, config, 0)
    mixed = engine.get_params()
    engine.set_params(classifier("nesterov").initial_params())
    for _ in range(4):
        engine.train(data, plain, 0)
    assert max(relative_distance(mixed, engine.get_params()).values()) <= TOLERANCE


def test_a_clipped_step_is_no_longer_than_its_bound() -> None:
    engine, data = open_in_process(classifier("sgd"), "ort"), rows_of(CASES["onnx"], 8, 0)
    before = engine.get_params()
    engine.train(data, TrainConfig(lr=1.0, batch_size=8, clip_norm=1e-3), 0)
    after = engine.get_params()
    moved = math.sqrt(sum(float(np.sum((after[n] - before[n]) ** 2)) for n in after))
    assert moved == pytest.approx(1e-3, rel=1e-2)


def test_reasons_name_what_ort_training_lacks() -> None:
    if find_training_python() is None:
        pytest.skip("no interpreter with onnxruntime-training-cpu is installed")
    reason = classifier("nesterov").manifest.engines["ort-training"]
    assert reason == "ONNX Runtime's SGD has no momentum, nesterov, weight_decay"
