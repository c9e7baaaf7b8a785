"""Whole models: ten steps of each graph against torch, with the last batch smaller."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, parser
from torch import nn
from torch.nn import functional as F

from fedge.artifacts.manifest import LabelSpec, Optimizer, TensorSpec
from fedge.autodiff import TrainingGraphs, training_graphs
from fedge.errors import ArtifactError, ConfigError, FedgeError, UnsupportedOperatorError
from fedge.types import Array, Params

TOLERANCE = 1e-5  # ‖ours − torch's‖ / ‖torch's‖ per tensor


class SmallNet(nn.Module):
    """Residual, strided, padded and pooled by means; overlapping max pooling; no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.block = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        x = F.gelu(x + self.block(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def logistic() -> nn.Module:
    return nn.Linear(13, 1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def regression() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


@dataclass(frozen=True)
class Case:
    """A model, the shape of one row, its loss and the number of classes (0: real targets)."""

    build: Callable[[], nn.Module]
    row: tuple[int, ...]
    loss: str
    classes: int


CASES = {
    "logistic": Case(logistic, (13,), "bce_with_logits", 2),
    "mlp": Case(mlp, (64,), "cross_entropy", 10),
    "regression": Case(regression, (5,), "mse", 0),
    "lenet": Case(lenet, (1, 28, 28), "cross_entropy", 10),
    "smallnet": Case(SmallNet, (3, 16, 16), "cross_entropy", 4),
}
OPTIMIZERS: dict[str, tuple[Optimizer, float, Callable[..., torch.optim.Optimizer]]] = {
    "sgd": (Optimizer("sgd"), 0.05, lambda p: torch.optim.SGD(p, 0.05)),
    "sgd decay": (
        Optimizer("sgd", {"weight_decay": 0.1}),
        0.05,
        lambda p: torch.optim.SGD(p, 0.05, weight_decay=0.1),
    ),
    "momentum": (
        Optimizer("sgd", {"momentum": 0.9, "weight_decay": 0.1}),
        0.02,
        lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=0.1),
    ),
    "nesterov": (
        Optimizer("sgd", {"momentum": 0.9, "nesterov": 1.0}),
        0.02,
        lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True),
    ),
    "adamw": (Optimizer("adamw"), 0.001, lambda p: torch.optim.AdamW(p, 0.001)),
    "adamw set": (
        Optimizer("adamw", {"beta1": 0.8, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.2}),
        0.01,
        lambda p: torch.optim.AdamW(p, 0.01, (0.8, 0.95), 1e-5, 0.2),
    ),
}
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "mse": F.mse_loss,
}


def fresh(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.build()


@cache
def exported(name: str) -> onnx.ModelProto:
    """The model as fedge's torch front exports it."""
    case, file = CASES[name], io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            fresh(case),
            (torch.zeros(2, *case.row),),
            file,
            dynamo=False,
            training=torch.onnx.TrainingMode.TRAINING,
            do_constant_folding=False,
            opset_version=17,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
        )
    return onnx.load_from_string(file.getvalue())


def weights(module: nn.Module) -> Params:
    return {n: p.detach().numpy().astype(np.float32) for n, p in module.named_parameters()}


def graphs_of(
    name: str, optimizer: Optimizer, trainable: list[str] | None = None
) -> TrainingGraphs:
    names = list(weights(fresh(CASES[name])))
    return training_graphs(
        exported(name),
        params=names,
        trainable=trainable or names,
        loss=CASES[name].loss,
        optimizer=optimizer,
    )


def batches(case: Case, count: int) -> Iterator[tuple[Array, Array]]:
    """Batches of 8 rows, the last of 3."""
    rng = np.random.default_rng(5)
    for i in range(count):
        rows = 3 if i == count - 1 else 8
        x = rng.standard_normal((rows, *case.row)).astype(np.float32)
        if case.loss == "cross_entropy":
            yield x, rng.integers(0, case.classes, rows)
        elif case.loss == "bce_with_logits":
            yield x, rng.integers(0, 2, (rows, 1)).astype(np.float32)
        else:
            yield x, rng.standard_normal((rows, 3)).astype(np.float32)


def torch_loss(case: Case, module: nn.Module, x: Array, y: Array) -> torch.Tensor:
    target = torch.tensor(y)
    out = module(torch.tensor(x).double())
    return LOSSES[case.loss](out, target if target.dtype == torch.int64 else target.double())


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options)


def run(model: ort.InferenceSession, feeds: Params) -> Params:
    names = [o.name for o in model.get_outputs()]
    return dict(zip(names, model.run(names, feeds), strict=True))


def error(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("chosen", OPTIMIZERS)
@pytest.mark.parametrize("name", CASES)
def test_ten_steps_agree_with_torch(name: str, chosen: str) -> None:
    case, (optimizer, lr, torch_optimizer) = CASES[name], OPTIMIZERS[chosen]
    graphs = graphs_of(name, optimizer)
    module = fresh(case).double()
    stepper = torch_optimizer(module.parameters())
    state = weights(module) | {s.name: np.zeros(s.shape, s.dtype) for s in graphs.state}
    step = session(graphs.step)
    for x, y in batches(case, 10):
        found = run(step, {"x": x, "labels": y, "lr": np.array(lr, np.float32), **state})
        state = {n: found[f"{n}@next"] for n in state}
        loss = torch_loss(case, module, x, y)
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        assert abs(found["loss"] - loss.item()) <= TOLERANCE * abs(loss.item())
    for param, value in module.named_parameters():
        assert error(state[param], value.detach().numpy()) <= TOLERANCE, param


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_evaluation_agree_with_torch(name: str) -> None:
    case, graphs = CASES[name], graphs_of(name, Optimizer("sgd"))
    module = fresh(case).double()
    params = weights(module)
    for x, y in batches(case, 2):
        loss = torch_loss(case, module, x, y)
        wanted = torch.autograd.grad(loss, list(module.parameters()))
        found = run(session(graphs.grad), {"x": x, "labels": y, **params})
        assert list(found) == ["loss", *(f"{n}@grad" for n in params)]
        for param, grad in zip(params, wanted, strict=True):
            assert error(found[f"{param}@grad"], grad.numpy()) <= TOLERANCE, param
        scored = run(session(graphs.evaluate), {"x": x, "labels": y, **params})
        assert abs(scored["loss"] - loss.item()) <= TOLERANCE * loss.item()
        outputs = run(session(graphs.infer), {"x": x, **params})
        np.testing.assert_array_equal(outputs["y"], scored["y"])
        out = module(torch.tensor(x).double()).detach().numpy()
        assert error(outputs["y"], out) <= TOLERANCE


def test_what_the_graphs_take_and_give() -> None:
    graphs = graphs_of("mlp", Optimizer("adamw"), ["2.weight", "2.bias"])
    params = ["0.weight", "0.bias", "2.weight", "2.bias"]
    slots = [f"2.{p}@{s}" for p in ("weight", "bias") for s in ("exp_avg", "exp_avg_sq")]
    state = ["optimizer@steps", *slots]
    changed = ["optimizer@steps", *slots[:2], "2.weight", *slots[2:], "2.bias"]
    assert [i.name for i in graphs.step.graph.input] == ["x", "labels", "lr", *params, *state]
    assert graphs.step.graph.output[0].name == "loss"
    assert {o.name for o in graphs.step.graph.output} == {"loss", *(f"{n}@next" for n in changed)}
    assert [i.name for i in graphs.grad.graph.input] == ["x", "labels", *params]
    assert [o.name for o in graphs.grad.graph.output] == ["loss", "2.weight@grad", "2.bias@grad"]
    assert [i.name for i in graphs.evaluate.graph.input] == ["x", "labels", *params]
    assert [o.name for o in graphs.evaluate.graph.output] == ["loss", "y"]
    assert [i.name for i in graphs.infer.graph.input] == ["x", *params]
    assert [o.name for o in graphs.infer.graph.output] == ["y"]
    assert [s.name for s in graphs.state] == state
    assert graphs.state[0] == TensorSpec("optimizer@steps", "float32", ())
    assert graphs.inputs == (TensorSpec("x", "float32", ("N", 64)),)
    assert graphs.outputs == (TensorSpec("y", "float32", ("N", 10)),)
    assert graphs.labels == LabelSpec("labels", "int64", ("N",), 0, 9)


def test_params_that_are_not_trainable_cost_no_backward_nodes() -> None:
    whole, head = (graphs_of("lenet", Optimizer("sgd"), t) for t in (None, ["11.weight"]))
    assert len(head.step.graph.node) < len(whole.step.graph.node) / 3
    assert "ConvTranspose" not in {n.op_type for n in head.step.graph.node}


def test_plain_sgd_folds_the_update_into_the_weight_gradient() -> None:
    """What makes a small model's step fast: no node between dY, X and the new W."""
    nodes = graphs_of("mlp", Optimizer("sgd")).step.graph.node
    folded = [n for n in nodes if n.op_type == "Gemm" and n.output[0].endswith("weight@next")]
    assert len(folded) == 2
    assert len(nodes) <= 23


def test_building_is_deterministic() -> None:
    first, second = (graphs_of("smallnet", Optimizer("adamw")) for _ in range(2))
    assert first == second


def model_of(text: str, **initializers: Array) -> onnx.ModelProto:
    found = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    found.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in initializers.items())
    return found


W = np.ones((4, 2), np.float32)
LINEAR = "g (float[N,4] x) => (float[N,2] y) {y = MatMul(x, w)}"


def make(model: onnx.ModelProto, **changes: object) -> TrainingGraphs:
    settings = {
        "params": ["w"],
        "trainable": ["w"],
        "loss": "mse",
        "optimizer": Optimizer("sgd"),
        **changes,
    }
    return training_graphs(model, **settings)  # type: ignore[arg-type]


def test_a_param_used_twice_is_updated_once() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) {h = MatMul(x, w) y = MatMul(h, w)}"
    w = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32) / 2
    x = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    feeds = {"x": x, "labels": np.zeros((3, 4), np.float32), "w": w}
    found = run(session(make(model_of(text, w=w)).step), {**feeds, "lr": np.array(0.1, np.float32)})
    tied = torch.tensor(w, requires_grad=True)
    ((torch.tensor(x) @ tied @ tied) ** 2).mean().backward()
    assert tied.grad is not None
    np.testing.assert_allclose(found["w@next"], w - 0.1 * tied.grad.numpy(), rtol=1e-5)


def test_a_param_that_does_not_matter_stays() -> None:
    graphs = make(model_of(LINEAR, w=W, v=W), params=["w", "v"], trainable=["w", "v"])
    x = np.ones((1, 4), np.float32)
    feeds = {"x": x, "labels": np.zeros((1, 2), np.float32), "w": W, "v": 3 * W}
    found = run(session(graphs.step), {**feeds, "lr": np.array(0.1, np.float32)})
    np.testing.assert_array_equal(found["v@next"], 3 * W)
    assert not run(session(graphs.grad), feeds)["v@grad"].any()


def test_dropout_is_off_where_outputs_are_asked_and_takes_noise_in_training() -> None:
    text = (
        "g (float[N,4] x) => (float[N,2] y) {r = Constant<value_float=0.5>()"
        " t = Constant<value=bool {1}>() d = Dropout<seed=3>(x, r, t) y = MatMul(d, w)}"
    )
    graphs = make(model_of(text, w=W))
    assert graphs.noise == (TensorSpec("noise/1", "float32", ("N", 4)),)
    for graph in (graphs.step, graphs.grad):
        assert "Dropout" not in {n.op_type for n in graph.graph.node}
        assert "noise/1" in {i.name for i in graph.graph.input}
    x = np.ones((2, 4), np.float32)
    out = run(session(graphs.infer), {"x": x, "w": W})
    np.testing.assert_array_equal(out["y"], np.full((2, 2), 4, np.float32))
    noise = np.array([[0, 0.5, 0.9, 0.1], [0.6, 0.7, 0.49, 0.5]], np.float32)
    labels = np.zeros((2, 2), np.float32)
    got = run(session(graphs.grad), {"x": x, "w": W, "labels": labels, "noise/1": noise})
    kept = 2 * (noise >= 0.5).astype(np.float32)
    np.testing.assert_allclose(got["w@grad"], kept.T @ (kept @ W) / 2, rtol=1e-6)


def test_several_outputs_are_kept_and_the_first_is_trained() -> None:
    text = "g (float[N,4] x) => (float[N,2] y, float[N,2] p) {y = MatMul(x, w) p = Sigmoid(y)}"
    graphs = make(model_of(text, w=W), loss="bce_with_logits")
    assert [o.name for o in graphs.outputs] == ["y", "p"]
    assert [o.name for o in graphs.evaluate.graph.output] == ["loss", "y", "p"]


def test_names_inside_the_model_may_be_ours() -> None:
    text = "g (float[N,4] x) => (float[N,2] y) {loss = MatMul(x, w) y = Identity(loss)}"
    assert [o.name for o in make(model_of(text, w=W)).evaluate.graph.output] == ["loss", "y"]


REFUSED: list[tuple[str, dict[str, object], type[FedgeError], str]] = [
    (LINEAR, {"params": ["v"], "trainable": ["v"]}, ArtifactError, "'v' is no initializer"),
    (LINEAR, {"trainable": []}, ArtifactError, "one or more of the params"),
    (LINEAR, {"trainable": ["u"]}, ArtifactError, r"trainable \['u'\]"),
    (LINEAR, {"loss": "hinge"}, ConfigError, "'hinge' is unknown; known: bce_with_logits"),
    (LINEAR, {"optimizer": Optimizer("lion")}, ConfigError, "'lion' is unknown; known: adamw"),
    (
        "g (float[N,4] x) => (float[N,1] y) {k = Constant<value_ints=[1]>() h = MatMul(x, w)"
        " y = ReduceSum(h, k)}",
        {"loss": "cross_entropy"},
        ConfigError,
        "use bce_with_logits",
    ),
    (
        "g (float[2,4] x) => (float[2,2] y) {y = MatMul(x, w)}",
        {},
        ArtifactError,
        "first dimension must be the batch",
    ),
    (
        "g (float[N,M] x) => (float[N,2] y) {y = MatMul(x, w)}",
        {},
        ArtifactError,
        "do not fit each other",
    ),
    (
        "g (float[N,5] x) => (float[N,2] y) {y = MatMul(x, w)}",
        {},
        ArtifactError,
        "do not fit each other",
    ),
    (
        "g (float[N,4] x) => (float[N,2] loss) {loss = MatMul(x, w)}",
        {},
        ArtifactError,
        "'loss'; fedge keeps",
    ),
    (
        "g (float[N,4] x) => (float[N,2] y) {h = MatMul(x, w) y = Unique<axis=0>(h)}",
        {},
        UnsupportedOperatorError,
        "is a Unique",
    ),
]


@pytest.mark.parametrize(("text", "changes", "kind", "message"), REFUSED)
def test_what_is_refused(
    text: str, changes: dict[str, object], kind: type[FedgeError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make(model_of(text, w=W), **changes)


@pytest.mark.parametrize("opset", [12, 25])
def test_opsets_out_of_range_are_refused(opset: int) -> None:
    model = model_of(LINEAR, w=W)
    model.opset_import[0].version = opset
    with pytest.raises(ArtifactError, match=f"opset {opset}; fedge reads 13 to 24"):
        make(model)


@pytest.mark.parametrize("opset", [13, 15, 18, 24])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_optimizers_in_every_opset(opset: int, loss: str) -> None:
    model = model_of(LINEAR, w=W)
    model.opset_import[0].version = opset
    graphs = make(model, loss=loss, optimizer=Optimizer("adamw"))
    assert graphs.step.opset_import[0].version == max(opset, 17)
    x, rows = np.ones((3, 4), np.float32), np.zeros(3, np.int64)
    labels = rows if loss == "cross_entropy" else np.zeros((3, 2), np.float32)
    state = {s.name: np.zeros(s.shape, np.float32) for s in graphs.state}
    feeds = {"x": x, "labels": labels, "lr": np.array(0.1, np.float32), "w": W, **state}
    found = run(session(graphs.step), feeds)
    assert found["optimizer@steps@next"] == 1
    assert np.isfinite(found["w@next"]).all()


def test_nothing_of_where_the_model_came_from_is_kept() -> None:
    model = model_of(LINEAR, w=W)
    model.producer_name, model.doc_string = "/home/someone/train.py", "written by someone"
    model.graph.node[0].doc_string = "File /home/someone/train.py, line 3"
    model.metadata_props.add(key="path", value="/home/someone")
    graphs = make(model)
    for graph in (graphs.step, graphs.grad, graphs.evaluate, graphs.infer):
        assert b"someone" not in graph.SerializeToString()


def test_initializers_that_are_listed_as_inputs_and_new_ir_versions() -> None:
    model = model_of(LINEAR, w=W)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 2]))
    model.ir_version = 13
    graphs = make(model)
    assert [s.name for s in graphs.inputs] == ["x"]
    assert graphs.step.ir_version == 10
