"""Losses and their gradients against torch in float64, at ordinary and extreme values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper, parser
from torch.nn import functional as F

from fedge.artifacts.manifest import Optimizer
from fedge.autodiff import TrainingGraphs, training_graphs
from fedge.errors import ArtifactError, ConfigError
from fedge.losses import BceWithLogits, CrossEntropy, Distillation, Huber, LossLike, Onnx
from fedge.types import Array, Params

Run = Callable[[onnx.ModelProto, Params], Params]
seeds = st.integers(0, 99)


def shifted(loss: LossLike, *row: int, opset: int = 17) -> TrainingGraphs:
    """y = x + b: the gradient by b, of a row's shape, shows the loss's own gradient summed."""
    node = helper.make_node("Add", ["x", "b"], ["y"])
    value = [helper.make_tensor_value_info(n, 1, ["N", *row]) for n in "xy"]
    bias = numpy_helper.from_array(np.zeros((1, *row), np.float32), "b")
    graph = helper.make_graph([node], "g", value[:1], value[1:], [bias])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return training_graphs(
        model, params=["b"], trainable=["b"], loss=loss, optimizer=Optimizer("sgd")
    )


def compare(
    run: Run,
    loss: LossLike,
    reference: Callable[..., torch.Tensor],
    x: Array,
    labels: Array,
    opset: int = 17,
    **extras: Array,
) -> None:
    graphs = shifted(loss, *x.shape[1:], opset=opset)
    bias = torch.zeros((1, *x.shape[1:]), dtype=torch.float64, requires_grad=True)
    target = torch.tensor(labels)
    wanted = reference(
        torch.tensor(x).double() + bias, target if target.dtype == torch.int64 else target.double()
    )
    (grad,) = torch.autograd.grad(wanted, bias)
    given = {"x": x, "labels": labels, "b": np.zeros((1, *x.shape[1:]), np.float32)}
    feeds = {**given, **extras}
    found = run(graphs.grad, feeds)
    assert found["loss"].shape == ()
    np.testing.assert_allclose(found["loss"], wanted.item(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found["b@grad"], grad.numpy(), rtol=1e-5, atol=3e-7)
    if not extras:
        np.testing.assert_array_equal(run(graphs.evaluate, given)["loss"], found["loss"])
    names = {i.name for i in graphs.loss.graph.input}
    alone = {n: v for n, v in {"y": x, **feeds}.items() if n in names}
    np.testing.assert_array_equal(run(graphs.loss, alone)["loss"], found["loss"])


@settings(max_examples=12)
@given(n=st.integers(1, 9), classes=st.integers(2, 7), seed=seeds)
def test_cross_entropy(run_model: Run, n: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, classes)).astype(np.float32) * 5
    compare(run_model, "cross_entropy", F.cross_entropy, x, rng.integers(0, classes, n))


def test_cross_entropy_per_position(run_model: Run) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    compare(run_model, "cross_entropy", F.cross_entropy, x, rng.integers(0, 3, (2, 4, 5)))


def test_cross_entropy_of_certain_and_wrong_rows(run_model: Run) -> None:
    x = np.array([[1e4, -1e4, 0], [1e4, -1e4, 0], [88, 0, -88]], np.float32)
    compare(run_model, "cross_entropy", F.cross_entropy, x, np.array([0, 1, 2]))


@settings(max_examples=12)
@given(n=st.integers(1, 9), width=st.integers(1, 3), seed=seeds)
def test_bce_with_logits(run_model: Run, n: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, width)).astype(np.float32) * 5
    labels = rng.integers(0, 2, (n, width)).astype(np.float32)
    compare(run_model, "bce_with_logits", F.binary_cross_entropy_with_logits, x, labels)


@pytest.mark.parametrize("logit", [0.0, 17.0, 30.0, 88.0, 1e4])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("label", [0.0, 1.0, 0.3])
def test_bce_is_stable(run_model: Run, logit: float, sign: int, label: float) -> None:
    x, y = (np.full((2, 1), v, np.float32) for v in (sign * logit, label))
    compare(run_model, "bce_with_logits", F.binary_cross_entropy_with_logits, x, y)


@settings(max_examples=12)
@given(n=st.integers(1, 9), width=st.integers(1, 3), seed=seeds)
def test_mse(run_model: Run, n: int, width: int, seed: int) -> None:
    x, y = np.random.default_rng(seed).standard_normal((2, n, width)).astype(np.float32)
    compare(run_model, "mse", F.mse_loss, x, y)


# --- Cross-entropy with settings -----------------------------------------------------------------


@settings(max_examples=25)
@given(
    n=st.integers(1, 9),
    classes=st.integers(2, 6),
    positions=st.sampled_from([(), (3,), (2, 2)]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    weighted=st.booleans(),
    ignore=st.sampled_from([None, -100, -1, 0, 1]),
    seed=seeds,
)
def test_cross_entropy_with_settings(
    run_model: Run,
    n: int,
    classes: int,
    positions: tuple[int, ...],
    smoothing: float,
    weighted: bool,
    ignore: int | None,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    weights = tuple(rng.uniform(0.1, 3, classes)) if weighted else ()
    x = rng.standard_normal((n, classes, *positions)).astype(np.float32) * 5
    labels = rng.integers(0, classes, (n, *positions))
    if ignore is not None:
        labels[rng.random(labels.shape) < 0.3] = ignore
        labels.ravel()[0] = (ignore + 1) % classes if ignore >= 0 else 0  # one that counts

    def torchs(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            z,
            y,
            torch.tensor(weights).double() if weighted else None,
            ignore_index=-100 if ignore is None else ignore,
            label_smoothing=smoothing,
        )

    loss = CrossEntropy(ignore, weights, smoothing)
    compare(run_model, loss, torchs, x, labels)


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(ignore_index=-100),
        CrossEntropy(ignore_index=-100, class_weights=(1, 2, 3), label_smoothing=0.2),
        CrossEntropy(class_weights=(1, 2, 0), ignore_index=-100),
    ],
)
def test_rows_that_do_not_count_give_zero_where_torch_gives_nan(
    run_model: Run, loss: CrossEntropy
) -> None:
    graphs = shifted(loss, 3)
    labels = np.array([2 if loss.class_weights[2:] == (0,) else -100, -100])
    x = np.array([[5, -5, 0], [1e4, 0, 0]], np.float32)
    feeds = {"x": x, "labels": labels, "b": np.zeros((1, 3), np.float32)}
    found = run_model(graphs.grad, feeds)
    assert found["loss"] == 0
    assert not found["b@grad"].any()
    assert torch.isnan(F.cross_entropy(torch.zeros(2, 3), torch.tensor([-100, -100])))


def test_extreme_logits_with_settings(run_model: Run) -> None:
    x = np.array([[1e4, -1e4, 0], [1e4, -1e4, 0], [88, 0, -88]], np.float32)
    loss = CrossEntropy(label_smoothing=0.1, class_weights=(1, 2, 0.5))
    compare(
        run_model,
        loss,
        lambda z, y: F.cross_entropy(z, y, torch.tensor([1, 2, 0.5]).double(), label_smoothing=0.1),
        x,
        np.array([0, 1, 2]),
    )


def test_a_class_nobody_has_changes_nothing_but_its_own_logit(run_model: Run) -> None:
    x = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    compare(run_model, "cross_entropy", F.cross_entropy, x, np.array([1, 1, 1, 1]))


# --- The others ----------------------------------------------------------------------------------


@settings(max_examples=12)
@given(n=st.integers(1, 9), width=st.integers(1, 3), single=st.booleans(), seed=seeds)
def test_bce_with_pos_weight(run_model: Run, n: int, width: int, single: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, width)).astype(np.float32) * 5
    weight = rng.uniform(0.2, 5, 1 if single else width)
    labels = rng.integers(0, 2, (n, width)).astype(np.float32)
    loss = BceWithLogits(float(weight[0]) if single else tuple(weight))

    def torchs(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(z, y, pos_weight=torch.tensor(weight))

    compare(run_model, loss, torchs, x, labels)


@pytest.mark.parametrize("logit", [0.0, 17.0, 30.0, 88.0, 1e4])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("label", [0.0, 1.0, 0.3])
def test_weighted_bce_is_stable(run_model: Run, logit: float, sign: int, label: float) -> None:
    x, y = (np.full((2, 1), v, np.float32) for v in (sign * logit, label))

    def torchs(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(z, t, pos_weight=torch.tensor(3.0))

    compare(run_model, BceWithLogits(3), torchs, x, y)


@settings(max_examples=12)
@given(n=st.integers(1, 9), width=st.integers(1, 3), scale=st.sampled_from([1, 1e3]), seed=seeds)
def test_l1_and_huber(run_model: Run, n: int, width: int, scale: float, seed: int) -> None:
    x, y = (np.random.default_rng(seed).standard_normal((2, n, width)) * scale).astype(np.float32)
    x[0] = y[0]  # an error of 0
    compare(run_model, "l1", F.l1_loss, x, y)
    for delta in (0.3, 1.0, 50.0):
        compare(run_model, Huber(delta), partial(F.huber_loss, delta=delta), x, y)


def breslow(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The formula as it is printed, one event after another."""
    z, time, event = z.flatten(), labels[:, 0], labels[:, 1]
    terms = [torch.logsumexp(z[time >= time[i]], 0) - z[i] for i in range(len(z)) if event[i] == 1]
    return torch.stack(terms).mean() if terms else z.sum() * 0


@settings(max_examples=20)
@given(
    n=st.integers(1, 12),
    shape=st.sampled_from([(), (1,)]),
    scale=st.sampled_from([1, 40]),
    opset=st.sampled_from([17, 18]),
    seed=seeds,
)
def test_cox(
    run_model: Run, n: int, shape: tuple[int, ...], scale: int, opset: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((n, *shape)) * scale).astype(np.float32)
    labels = np.stack([rng.integers(0, 5, n), rng.integers(0, 2, n)], 1).astype(np.float32)
    compare(run_model, "cox", breslow, x, labels, opset)


def test_cox_without_events_and_at_extremes(run_model: Run) -> None:
    x = np.array([[1e4], [-1e4], [3.0]], np.float32)
    for events in ([0, 0, 0], [1, 1, 1], [0, 1, 0]):
        labels = np.stack([[1, 2, 3], events], 1).astype(np.float32)
        compare(run_model, "cox", breslow, x, labels)


@settings(max_examples=15)
@given(
    n=st.integers(1, 9),
    classes=st.integers(2, 6),
    temperature=st.sampled_from([1.0, 2.0, 8.0]),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    seed=seeds,
)
def test_distillation(
    run_model: Run, n: int, classes: int, temperature: float, alpha: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x, teacher = (rng.standard_normal((2, n, classes)) * 5).astype(np.float32)
    labels = rng.integers(0, classes, n)
    target = torch.tensor(teacher).double()

    def hinton(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        log_p, q = (F.log_softmax(v / temperature, 1) for v in (z, target))
        soft = F.kl_div(log_p, q, reduction="batchmean", log_target=True) * temperature**2
        return alpha * soft + (1 - alpha) * F.cross_entropy(z, y, label_smoothing=0.1)

    loss = Distillation(CrossEntropy(label_smoothing=0.1), temperature, alpha)
    compare(run_model, loss, hinton, x, labels, teacher_logits=teacher)


def test_distillation_of_coins(run_model: Run) -> None:
    rng = np.random.default_rng(0)
    x, teacher = (rng.standard_normal((2, 6, 3)) * 5).astype(np.float32)
    x[0], teacher[1] = 1e4, -1e4
    labels = rng.integers(0, 2, (6, 3)).astype(np.float32)
    target = torch.tensor(teacher).double()

    def coins(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        t, p, q = 3.0, z / 3.0, target / 3.0
        soft = torch.sigmoid(q) * (F.logsigmoid(q) - F.logsigmoid(p))
        soft = soft + torch.sigmoid(-q) * (F.logsigmoid(-q) - F.logsigmoid(-p))
        hard = F.binary_cross_entropy_with_logits(z, y)
        return 0.7 * t**2 * soft.mean() + 0.3 * hard

    loss = Distillation("bce_with_logits", 3, 0.7)
    compare(run_model, loss, coins, x, labels, teacher_logits=teacher)


def test_scoring_a_distilled_model_needs_no_teacher(run_model: Run) -> None:
    graphs = shifted(Distillation(), 3)
    assert "teacher_logits" in {i.name for i in graphs.step.graph.input}
    assert [e.name for e in graphs.extras] == ["teacher_logits"]
    x, labels = np.eye(3, dtype=np.float32), np.arange(3)
    feeds = {"x": x, "labels": labels, "b": np.zeros((1, 3), np.float32)}
    wanted = F.cross_entropy(torch.tensor(x), torch.tensor(labels))
    np.testing.assert_allclose(run_model(graphs.evaluate, feeds)["loss"], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "row", "said"),
    [
        (CrossEntropy(class_weights=(1, 2)), (3,), "class_weights are 2; 'y' has 3 classes"),
        ("cross_entropy", (1,), "cross_entropy needs an output"),
        (BceWithLogits((1, 2)), (3,), "pos_weight holds 2; 'y' is"),
        ("cox", (2,), "cox needs one log hazard per row"),
        (Distillation(), (1,), "cross_entropy needs an output"),
        (Onnx(), (1,), "the loss model is missing"),
    ],
)
def test_a_loss_that_does_not_fit_the_output(
    loss: LossLike, row: tuple[int, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        shifted(loss, *row)


# --- A user's own loss ---------------------------------------------------------------------------


def own_loss(text: str, opset: int = 17, **constants: Array) -> onnx.ModelProto:
    graph = parser.parse_graph(text)
    graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in constants.items())
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


FOCAL = """focal (float[N,C] z, int64[N] labels) => (float loss) {
    log_p = LogSoftmax<axis=1>(z)
    hot = OneHot(labels, depth, values)
    picked = Mul(log_p, hot)
    row = ReduceSum<keepdims=0>(picked, one)
    p = Exp(row)
    rest = Sub(unit, p)
    weight = Mul(rest, rest)
    each = Mul(weight, row)
    mean = ReduceMean<keepdims=0>(each)
    loss = Neg(mean)
}"""
CONSTANTS: Params = {
    "depth": np.array(4),
    "values": np.array([0, 1], np.float32),
    "one": np.array([1]),
    "unit": np.array(1, np.float32),
}


@pytest.mark.parametrize(("opset", "model_opset"), [(17, 17), (17, 18), (18, 18)])
def test_a_loss_of_ones_own(run_model: Run, opset: int, model_opset: int) -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((6, 4)).astype(np.float32), rng.integers(0, 4, 6)

    def focal(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        row = F.log_softmax(z, 1).gather(1, y[:, None])[:, 0]
        return -((1 - row.exp()) ** 2 * row).mean()

    loss = Onnx(own_loss(FOCAL, opset, **CONSTANTS), like="cross_entropy", low=0, high=3)
    graphs = shifted(loss, 4, opset=model_opset)
    assert (graphs.labels.dtype, graphs.labels.shape) == ("int64", ("N",))
    assert (graphs.labels.low, graphs.labels.high) == (0, 3)
    bias = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    wanted = focal(torch.tensor(x).double() + bias, torch.tensor(labels))
    (grad,) = torch.autograd.grad(wanted, bias)
    feeds = {"x": x, "labels": labels, "b": np.zeros((1, 4), np.float32)}
    for graph in (graphs.grad, graphs.evaluate):
        np.testing.assert_allclose(run_model(graph, feeds)["loss"], wanted.item(), rtol=1e-5)
    found = run_model(graphs.grad, feeds)
    np.testing.assert_allclose(found["b@grad"], grad.numpy(), rtol=1e-5, atol=1e-7)


def test_a_loss_of_two_outputs(run_model: Run) -> None:
    """A value and its log-variance: the Gaussian negative log-likelihood."""
    text = """two (float[N,1] value, float[N,1] spread, float[N,1] labels) => (float loss) {
        error = Sub(value, labels)
        square = Mul(error, error)
        inverse = Neg(spread)
        precision = Exp(inverse)
        scaled = Mul(square, precision)
        each = Add(scaled, spread)
        loss = ReduceMean<keepdims=0>(each)
    }"""
    nodes = [
        helper.make_node("Add", ["x", "b"], ["value"]),
        helper.make_node("Mul", ["x", "c"], ["spread"]),
    ]
    values = [helper.make_tensor_value_info(n, 1, ["N", 1]) for n in ("x", "value", "spread")]
    start = [numpy_helper.from_array(np.full((1, 1), 0.5, np.float32), n) for n in "bc"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], start)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    graphs = training_graphs(
        model, params=["b", "c"], trainable=["b", "c"], loss=Onnx(own_loss(text)),
        optimizer=Optimizer("sgd"),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 5, 1)).astype(np.float32)
    b, c = (torch.full((1, 1), 0.5, dtype=torch.float64, requires_grad=True) for _ in "bc")
    value, spread = torch.tensor(x).double() + b, torch.tensor(x).double() * c
    wanted = ((value - torch.tensor(y)) ** 2 * torch.exp(-spread) + spread).mean()
    grads = torch.autograd.grad(wanted, [b, c])
    given = {n: np.full((1, 1), 0.5, np.float32) for n in "bc"}
    found = run_model(graphs.grad, {"x": x, "labels": y, **given})
    np.testing.assert_allclose(found["loss"], wanted.item(), rtol=1e-5)
    for name, grad in zip("bc", grads, strict=True):
        np.testing.assert_allclose(found[f"{name}@grad"], grad.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("l (float[N,4] z) => (float loss) {loss = ReduceMean<keepdims=0>(z)}", "loss model takes"),
        ("l (int64[N] labels) => (float loss) {f = Cast<to=1>(labels) loss = ReduceMean<keepdims=0>"
         "(f)}", "loss model takes"),
        ("l (float[N,4] z, float[N,4] labels) => (float[N,4] loss) {loss = Sub(z, labels)}",
         "output has shape"),
        ("l (float[N,4] z, float[N,4] w, float[N,4] labels) => (float loss) {d = Sub(z, labels) "
         "e = Mul(d, w) loss = ReduceMean<keepdims=0>(e)}", "takes 'z'; the model gives y"),
        ("l (float[N,4] z, float[3,4] labels) => (float loss) {d = Sub(z, labels) loss = "
         "ReduceMean<keepdims=0>(d)}", "the loss model's labels"),
        ("l (float[N,4] z, double[N,4] labels) => (float loss) {c = Cast<to=1>(labels) d = "
         "Sub(z, c) loss = ReduceMean<keepdims=0>(d)}", "the loss model's labels"),
        ("l (int64[N,4] z, float[N,4] labels) => (float loss) {c = Cast<to=1>(z) d = "
         "Sub(c, labels) loss = ReduceMean<keepdims=0>(d)}", "must be float32"),
        ("l (float[N,4] z, float[N,5] labels) => (float loss) {d = Sub(z, labels) loss = "
         "ReduceMean<keepdims=0>(d)}", "(?i)shape|dimension|broadcast|incompatible"),
    ],
)  # fmt: skip
def test_a_loss_of_ones_own_has_a_form(text: str, said: str) -> None:
    with pytest.raises((ConfigError, ArtifactError), match=said):
        shifted(Onnx(own_loss(text)), 4)
