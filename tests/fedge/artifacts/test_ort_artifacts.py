"""ONNX Runtime's artifacts: the repairs, judged by torch and by stock ONNX Runtime."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from fedge.artifacts.build import build
from fedge.artifacts.bundle import Reference
from fedge.artifacts.manifest import Optimizer, ParamSpec
from fedge.artifacts.model import normalize
from fedge.artifacts.ort_build import OrtFiles, OrtRequest, build_ort_files
from fedge.artifacts.ort_import import find_training_python
from fedge.artifacts.torch_export import export_module
from fedge.autodiff import TrainingGraphs, training_graphs
from fedge.errors import EngineUnavailableError
from fedge.losses import find_loss
from fedge.types import Examples, Params

ADAMW = Optimizer("adamw", {"beta1": 0.8, "beta2": 0.99, "eps": 1e-7, "weight_decay": 0.1})
SGD = Optimizer("sgd", {"momentum": 0.0, "nesterov": 0.0, "weight_decay": 0.0})

needs_training = pytest.mark.skipif(
    find_training_python() is None, reason="no interpreter with onnxruntime-training is installed"
)


def _torch_step(module: nn.Module, loss: str, x: Any, y: Any) -> Reference:
    """Loss and gradients by torch."""
    function = {
        "cross_entropy": nn.functional.cross_entropy,
        "bce_with_logits": nn.functional.binary_cross_entropy_with_logits,
        "mse": nn.functional.mse_loss,
    }[loss]
    value = function(module(torch.tensor(x)), torch.tensor(y))
    value.backward()
    grads = {n: p.grad.numpy() for n, p in module.named_parameters() if p.grad is not None}
    return Reference(Examples({"x": x}, y), value.item(), grads)


def _request(
    module: nn.Module, x: Any, loss: str, optimizer: Optimizer = SGD
) -> tuple[OrtRequest, Params]:
    exported = export_module(module, x[:1])
    specs = tuple(
        ParamSpec(n, "float32", tuple(t.shape), trainable=t.requires_grad)
        for n, t in module.named_parameters()
    )
    values = {n: t.detach().numpy() for n, t in module.named_parameters()}
    return OrtRequest(normalize(exported.model), find_loss(loss), specs, optimizer), values


def _build(module: nn.Module, loss: str, x: Any, y: Any, optimizer: Optimizer = SGD) -> OrtFiles:
    request, values = _request(module, x, loss, optimizer)
    return build_ort_files(request, _graphs(request), _torch_step(module, loss, x, y), values)


def _graphs(request: OrtRequest) -> TrainingGraphs:
    return training_graphs(
        request.model,
        params=[p.name for p in request.params],
        trainable=[p.name for p in request.params if p.trainable],
        loss=request.loss,
        optimizer=request.optimizer,
    )


def _data(columns: int, rows: int = 5) -> tuple[Any, Any]:
    rng = np.random.default_rng(4)
    return rng.standard_normal((rows, columns)).astype(np.float32), rng.integers(0, 3, rows)


@needs_training
@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm(8), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.LeakyReLU(), nn.Dropout(0.0)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_need_repairs_give_torch_s_gradients(layer: nn.Module) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3))
    made = _build(module, "cross_entropy", *_data(6))
    assert made.reason == ""
    assert made.provenance == {"onnxruntime-training": "1.19.2"}


@needs_training
@pytest.mark.parametrize("scale", [0.0, 1.0, 17.0, 200.0])
def test_bce_is_stable_at_any_logit(scale: float) -> None:
    module = nn.Linear(4, 1)
    with torch.no_grad():
        module.weight.mul_(scale)
        module.bias.mul_(scale)
    x, _ = _data(4)
    y = np.array([[0], [1], [1], [0], [1]], np.float32)
    assert _build(module, "bce_with_logits", x, y).reason == ""


@needs_training
def test_adamw_s_settings_and_torch_s_variant_are_in_the_optimizer_model() -> None:
    made = _build(nn.Linear(4, 3), "cross_entropy", *_data(4), ADAMW)
    model = onnx.load_model_from_string(made.files["optimizer_model.onnx"])
    (node,) = [n for n in model.graph.node if n.op_type == "AdamWOptimizer"]
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert found == pytest.approx(
        {
            "adam_mode": 0,
            "alpha": 0.8,
            "beta": 0.99,
            "epsilon": 1e-7,
            "weight_decay": 0.1,
            "correct_bias": 1,
        }
    )
    assert model.ir_version <= 10


@needs_training
def test_training_and_evaluation_models_give_loss_and_outputs_of_one_graph() -> None:
    made = _build(nn.Linear(4, 3), "cross_entropy", *_data(4))
    for name in ("training_model.onnx", "eval_model.onnx"):
        graph = onnx.load_model_from_string(made.files[name]).graph
        assert [o.name for o in graph.output][:2] == ["loss", "output"]
        assert [i.name for i in graph.input][:4] == ["x", "labels", "weight", "bias"]
        assert not [i.name for i in graph.initializer if i.name in ("weight", "bias")]


@needs_training
def test_frozen_params_are_inputs_without_gradient() -> None:
    module = nn.Linear(4, 3)
    module.bias.requires_grad_(False)
    made = _build(module, "cross_entropy", *_data(4))
    graph = onnx.load_model_from_string(made.files["training_model.onnx"]).graph
    assert "bias" in [i.name for i in graph.input]
    assert not [o.name for o in graph.output if o.name.startswith("bias")]


@needs_training
def test_batch_normalization_in_inference_mode_is_not_trained() -> None:
    """Exported models carry it; ONNX Runtime would differentiate it as if in training mode."""
    rng = np.random.default_rng(0)
    weights = {
        "W": rng.standard_normal((4, 3)).astype(np.float32),
        "scale": rng.random(3).astype(np.float32) + 0.5,
        "bias": rng.standard_normal(3).astype(np.float32),
        "mean": rng.standard_normal(3).astype(np.float32),
        "var": rng.random(3).astype(np.float32) + 0.5,
    }
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "W"], ["h"]),
            helper.make_node("BatchNormalization", ["h", *list(weights)[1:]], ["y"], epsilon=0.01),
        ],
        "bn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    model = normalize(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    specs = tuple(
        ParamSpec(n, "float32", a.shape, trainable=n in ("W", "scale", "bias"))
        for n, a in weights.items()
    )
    x, y = _data(4)
    tensors = {
        n: torch.tensor(a, requires_grad=n not in ("mean", "var")) for n, a in weights.items()
    }
    output = nn.functional.batch_norm(
        torch.tensor(x) @ tensors["W"],
        tensors["mean"],
        tensors["var"],
        tensors["scale"],
        tensors["bias"],
        training=False,
        eps=0.01,
    )
    loss = nn.functional.cross_entropy(output, torch.tensor(y))
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {n: t.grad.numpy() for n, t in tensors.items() if t.grad is not None}
    recorded = Reference(Examples({"x": x}, y), loss.item(), grads)
    request = OrtRequest(model, find_loss("cross_entropy"), specs, SGD)
    assert build_ort_files(request, _graphs(request), recorded, weights).reason == ""


@needs_training
def test_a_gradient_that_differs_is_a_reason_that_names_it() -> None:
    x, y = _data(4)
    module = nn.Linear(4, 3)
    request, values = _request(module, x, "cross_entropy")
    recorded = _torch_step(module, "cross_entropy", x, y)
    wrong = {**recorded.grads, "bias": recorded.grads["bias"] * np.float32(1.001)}
    graphs = _graphs(request)
    made = build_ort_files(request, graphs, replace(recorded, grads=wrong), values)
    assert "the gradient of 'bias'" in made.reason
    assert "1.0e-03 off" in made.reason
    assert made.files == {}
    made = build_ort_files(request, graphs, replace(recorded, loss=recorded.loss + 1e-3), values)
    assert made.reason.startswith("the engines disagree: loss")


@pytest.mark.parametrize("setting", ["momentum", "weight_decay"])
def test_sgd_with_more_than_a_learning_rate_is_a_reason(setting: str) -> None:
    x, y = _data(4)
    optimizer = Optimizer("sgd", {**SGD.settings, setting: 0.5})
    made = _build(nn.Linear(4, 3), "cross_entropy", x, y, optimizer)
    assert made == OrtFiles(reason=f"ONNX Runtime's SGD has no {setting}")


def test_a_configured_interpreter_that_is_missing_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDGE_ORT_TRAINING_PYTHON", str(tmp_path / "python"))
    with pytest.raises(EngineUnavailableError, match="does not exist or cannot be run"):
        _build(nn.Linear(4, 3), "cross_entropy", *_data(4))


def test_an_interpreter_without_the_wheel_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setenv("FEDGE_ORT_TRAINING_PYTHON", sys.executable)
    made = _build(nn.Linear(4, 3), "cross_entropy", *_data(4))
    assert "has stock onnxruntime, which cannot train" in made.reason
    assert made.files == {}


def test_a_training_interpreter_that_lacks_packages_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("FEDGE_ORT_TRAINING_PYTHON", str(python))
    made = build(nn.Linear(3, 1), sample=torch.zeros(2, 3), loss="mse")
    assert "ModuleNotFoundError: No module named" in made.manifest.engines["ort-training"]
    assert "\n" not in made.manifest.engines["ort-training"]
    assert "Traceback" not in capfd.readouterr().err
