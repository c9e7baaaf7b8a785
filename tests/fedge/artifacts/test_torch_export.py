from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from fedge.artifacts.torch_export import ExportOptions, export_module
from fedge.errors import ArtifactError, ConfigError


class Two(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left(a) + self.right(b), self.left(a)


class Views(nn.Module):
    """The batch size taken from the input, as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(72, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(image)).view(image.size(0), -1))


def _run(model: onnx.ModelProto, *inputs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [i.name for i in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))


def test_parameters_keep_their_names_and_values() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    exported = export_module(module, np.zeros((1, 4)))
    assert exported.params == exported.trainable == ("0.weight", "0.bias", "2.weight", "2.bias")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in exported.model.graph.initializer}
    for name, tensor in module.named_parameters():
        np.testing.assert_array_equal(stored[name], tensor.detach().numpy())


def _modes(module: nn.Module, sample: torch.Tensor) -> list[str]:
    """Operators of an export that do something else in training."""
    nodes = export_module(module, sample).model.graph.node
    training = [any(a.name == "training_mode" and a.i for a in n.attribute) for n in nodes]
    return [n.op_type for n, t in zip(nodes, training, strict=True) if t or n.op_type == "Dropout"]


def test_the_mode_of_each_layer_is_kept() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5))
    sample = torch.zeros(2, 1, 8, 8)
    assert _modes(module, sample) == ["BatchNormalization", "Dropout"]
    module[1].eval()
    assert _modes(module, sample) == ["Dropout"]
    assert _modes(module.eval(), sample) == []
    exported = export_module(module, sample)
    assert exported.trainable == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert exported.params[4:] == ("1.running_mean", "1.running_var")
    assert not module.training


def test_params_of_equal_value_stay_apart_and_tied_ones_together() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    for layer in module[:2]:
        nn.init.ones_(layer.weight)
    module[2].weight = module[0].weight
    exported = export_module(module, torch.zeros(2, 4))
    assert exported.params == ("0.weight", "0.bias", "1.weight", "1.bias", "2.bias")
    used = [n.input[1] for n in exported.model.graph.node if n.op_type == "Gemm"]
    assert used == ["0.weight", "1.weight", "0.weight"]
    assert [i.name for i in exported.model.graph.input] == ["x"]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_any_batch_runs_whatever_the_sample_had(rows: int) -> None:
    module = Views()
    exported = export_module(module, torch.zeros(rows, 1, 8, 8))
    x = np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32)
    (found,) = _run(exported.model, x)
    np.testing.assert_allclose(
        found, module(torch.tensor(x)).detach().numpy(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "sample",
    [
        (torch.zeros(1, 4), torch.zeros(1, 2)),
        [np.zeros((2, 4)), np.zeros((2, 2))],
        {"b": np.zeros((1, 2)), "a": np.zeros((1, 4))},
    ],
)
def test_several_inputs_keep_the_names_of_forward(sample: Any) -> None:
    exported = export_module(Two(), sample)
    assert [i.name for i in exported.model.graph.input] == ["a", "b"]
    assert [o.name for o in exported.model.graph.output] == ["output_0", "output_1"]
    assert exported.sample["a"].shape == (2, 4)


def test_one_input_is_x_and_one_output_is_output() -> None:
    exported = export_module(Views(), np.zeros((1, 1, 8, 8)))
    assert [i.name for i in exported.model.graph.input] == ["x"]
    assert [o.name for o in exported.model.graph.output] == ["output"]


def test_the_user_s_module_is_not_changed() -> None:
    module = nn.Sequential(nn.Linear(4, 2)).double().eval()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    exported = export_module(module, np.zeros((1, 4)))
    assert not module.training
    assert {t.data_type for t in exported.model.graph.initializer} == {onnx.TensorProto.FLOAT}
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == torch.float64
        assert torch.equal(tensor, before[name])


def test_parameters_without_gradient_stay_frozen() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    module[0].requires_grad_(False)
    exported = export_module(module, np.zeros((1, 4)))
    assert exported.params == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert exported.trainable == ("1.weight", "1.bias")


def test_equal_initializers_stay_two() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for tensor in module.parameters():
        nn.init.ones_(tensor)
    exported = export_module(module, np.zeros((1, 4)))
    assert len(exported.trainable) == 4


def test_a_parameter_that_is_not_used_is_named() -> None:
    module = Views()
    module.spare = nn.Linear(2, 2)
    with pytest.raises(ArtifactError, match=r"'spare.weight' \(2, 2\) is missing"):
        export_module(module, np.zeros((1, 1, 8, 8)))


@pytest.mark.parametrize(
    ("module", "sample", "message"),
    [
        (nn.Linear(4, 2), None, "needs sample="),
        (nn.Linear(4, 2), np.zeros((1, 5)), r"forward\(sample\) failed: RuntimeError"),
        (nn.Linear(4, 2), np.zeros((0, 4)), r"sample has shape \(0, 4\)"),
        (nn.Linear(4, 2), np.float32(3), "wanted rows × features"),
        (nn.Linear(4, 2), {"y": np.zeros((1, 4))}, "sample names 'y'; forward takes input"),
        (nn.Linear(4, 2), [np.zeros((1, 4))] * 2, "sample has 2 inputs; forward takes input"),
        ("model.pt", np.zeros((1, 4)), "cannot build from a str"),
    ],
)
def test_what_does_not_fit_is_refused(module: Any, sample: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export_module(module, sample)


def test_what_torch_cannot_export_is_refused_in_its_words() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
    with pytest.raises(ArtifactError, match=r"this module \(torchscript\): .*rms_norm"):
        export_module(module, np.zeros((1, 4)), ExportOptions("torchscript"))


def test_what_torchscript_cannot_export_the_other_exporter_does() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
    exported = export_module(module, np.zeros((1, 4)))
    assert exported.exporter == "dynamo"
    assert exported.params == ("0.weight", "0.bias", "1.weight")
    assert exported.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_statistics_are_the_module_s_own_not_what_tracing_makes_of_them() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    exported = export_module(module, np.ones((2, 4)))
    found = {t.name: onnx.numpy_helper.to_array(t) for t in exported.model.graph.initializer}
    np.testing.assert_array_equal(found["1.running_mean"], np.zeros(3))
    np.testing.assert_array_equal(found["1.running_var"], np.ones(3))


def test_normalization_that_trains_is_exported_so_and_frozen_one_frozen() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=0.3), nn.BatchNorm1d(3))
    module[2].eval()
    for exporter in ("torchscript", "dynamo"):
        graph = export_module(module, np.ones((2, 4)), ExportOptions(exporter)).model.graph
        first, second = (n for n in graph.node if n.op_type == "BatchNormalization")
        settings = {a.name: onnx.helper.get_attribute_value(a) for a in first.attribute}
        assert settings["training_mode"] == 1, exporter
        assert settings["momentum"] == pytest.approx(0.7)
        assert len(first.output) == 3
        assert not any(a.name == "training_mode" and a.i for a in second.attribute)
    module[1].momentum = None
    with pytest.raises(ArtifactError, match="BatchNorm '1' keeps its statistics in a way"):
        export_module(module, np.ones((2, 4)))


def test_sizes_that_may_vary_have_names() -> None:
    module = nn.Conv1d(1, 2, 3, padding=1)
    options = ExportOptions("torchscript", {"x": {2: "T"}})
    (info,) = export_module(module, np.zeros((1, 1, 8)), options).model.graph.input
    dims = [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim]
    assert dims == ["N", 1, "T"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions("fx"), "exporter 'fx' is unknown; known: auto, torchscript, dynamo"),
        (ExportOptions(dynamic={"y": {1: "T"}}), "dynamic names 'y'; the model takes x"),
        (ExportOptions(dynamic={"x": {0: "T"}}), "x has axis 1 to 1 but the batch, not 0"),
        (ExportOptions(dynamic={"x": {1: "N"}}), "'N' cannot name a size"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: ExportOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export_module(nn.Linear(4, 2), np.zeros((1, 4)), options)


def test_without_torch_the_advice_is_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match=r"fedge\[torch\].*without it, give an ONNX model"):
        export_module(object(), None)


def test_a_parameter_forward_does_not_use_may_be_frozen_instead_of_removed() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    module = Spare()
    with pytest.raises(ArtifactError, match=r"requires_grad_\(False\)") as caught:
        export_module(module, torch.zeros(2, 3))
    assert str(caught.value).count("forward does not use it, or") == 1
    module.spare.requires_grad_(False)
    exported = export_module(module, torch.zeros(2, 3))
    assert set(exported.params) == set(exported.trainable) == {"used.weight", "used.bias"}
