"""fedge.build end to end, torch as the oracle."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import nn

import fedge
from fedge.artifacts.build import build
from fedge.artifacts.manifest import ORT_FILES, Optimizer
from fedge.artifacts.ort_import import find_training_python
from fedge.artifacts.signing import generate_signing_key, public_hex
from fedge.errors import ArtifactError, ConfigError, UnsupportedOperatorError
from fedge.params import relative_distance

needs_training = pytest.mark.skipif(
    find_training_python() is None, reason="no interpreter with onnxruntime-training is installed"
)
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "bce_with_logits": nn.functional.binary_cross_entropy_with_logits,
    "cross_entropy": nn.functional.cross_entropy,
    "mse": nn.functional.mse_loss,
}


def _lr() -> nn.Module:
    return nn.Linear(13, 1)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5))


def _regression() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 2))


def _lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "lr": (_lr, "bce_with_logits", (13,)),
    "mlp": (_mlp, "cross_entropy", (20,)),
    "regression": (_regression, "mse", (6,)),
    "lenet": (_lenet, "cross_entropy", (1, 28, 28)),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", MODELS)
def test_torch_models_build_and_their_reference_is_torch_s(name: str, optimizer: str) -> None:
    make, loss, shape = MODELS[name]
    torch.manual_seed(3)
    module = make()
    bundle = build(module, loss=loss, optimizer=optimizer, sample=torch.zeros(1, *shape))
    again = fedge.Bundle.open(bundle.path, bundle.manifest.signer)

    reference = again.reference()
    labels = torch.tensor(reference.examples.labels)
    value = LOSSES[loss](module(torch.tensor(reference.examples.inputs["x"])), labels)
    value.backward()  # type: ignore[no-untyped-call]
    torch_grads = {n: p.grad.numpy() for n, p in module.named_parameters() if p.grad is not None}
    assert reference.loss == pytest.approx(value.item(), rel=1e-5)
    assert max(relative_distance(reference.grads, torch_grads).values()) <= 1e-5

    params = again.initial_params()
    assert list(params) == [n for n, _ in module.named_parameters()]
    for param, tensor in module.named_parameters():
        np.testing.assert_array_equal(params[param], tensor.detach().numpy())
    assert again.manifest.provenance["torch"] == torch.__version__

    if find_training_python() is not None:  # then build has compared ONNX Runtime's own step too
        assert again.engines == ("ort", "ort-training")
        assert all(again.manifest.files[n].bytes for n in ORT_FILES)
        assert again.manifest.files["checkpoint"].bytes < 2000  # nominal: it holds no params


@needs_training
def test_zero_initial_params_have_the_right_slope() -> None:
    """At logit 0 the parts of a stable BCE have no derivative; their sum has."""
    module = nn.Linear(4, 1)
    for tensor in module.parameters():
        nn.init.zeros_(tensor)
    bundle = build(module, loss="bce_with_logits", sample=np.zeros((1, 4)))
    assert bundle.manifest.engines["ort-training"] == ""
    assert bundle.reference().loss == pytest.approx(np.log(2), rel=1e-6)


def test_the_inference_and_evaluation_graphs_give_torch_s_outputs() -> None:
    module = _mlp()
    bundle = build(module, loss="cross_entropy", sample=np.zeros((1, 20)))
    x = np.random.default_rng(0).standard_normal((9, 20)).astype(np.float32)
    feeds: dict[str, Any] = {"x": x, **bundle.initial_params()}
    wanted = module(torch.tensor(x)).detach().numpy()
    (output,) = onnxruntime.InferenceSession(bundle.read("infer.onnx")).run(None, feeds)
    np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=1e-6)
    feeds["labels"] = np.arange(9) % 5
    evaluate = onnxruntime.InferenceSession(bundle.read("evaluate.onnx"))
    assert [o.name for o in evaluate.get_outputs()] == ["loss", "output"]
    loss, output = evaluate.run(None, feeds)
    np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=1e-6)
    torch_loss = nn.functional.cross_entropy(torch.tensor(wanted), torch.arange(9) % 5)
    assert float(loss) == pytest.approx(torch_loss.item(), rel=1e-5)


# --- ONNX in, no torch ------------------------------------------------------------------------


def test_onnx_models_build_from_object_bytes_and_path(lr: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "my model (1).onnx"
    onnx.save(lr, path)
    key = generate_signing_key()
    bundles = [
        build(source, loss="cross_entropy", signing_key=key, name="same")
        for source in (lr, lr.SerializeToString(), path, str(path))
    ]
    assert len({b.digest for b in bundles}) == 1  # building repeats, to the byte
    assert bundles[0].manifest.signer == public_hex(key)
    assert build(path, loss="cross_entropy").manifest.name == "my-model-1"


def _by_hand(layers: list[onnx.NodeProto], shape: list[int], tensors: dict[str, Any]) -> Any:
    """A chain of nodes from ``x`` to ``y`` over random tensors of the given shapes."""
    rng = np.random.default_rng(0)
    for before, after in itertools.pairwise(layers):
        before.output[:] = [f"{before.op_type}_{id(before)}"]
        after.input[0] = before.output[0]
    layers[0].input[0], layers[-1].output[:] = "x", ["y"]
    values = [
        onnx.numpy_helper.from_array((rng.standard_normal(s) * 0.2).astype(np.float32), n)
        for n, s in tensors.items()
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        layers,
        "by-hand",
        [info("x", onnx.TensorProto.FLOAT, [None, *shape])],
        [info("y", onnx.TensorProto.FLOAT, [None, 3])],
        values,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_a_hand_made_mlp_builds() -> None:
    make = helper.make_node
    layers = [
        make("Gemm", ["", "W1", "b1"], ["_"], transB=1),
        make("Relu", [""], ["_"]),
        make("Gemm", ["", "W2", "b2"], ["_"]),
    ]
    shapes = {"W1": (8, 5), "b1": (8,), "W2": (8, 3), "b2": (3,)}
    bundle = build(_by_hand(layers, [5], shapes), loss="cross_entropy", optimizer="adamw")
    assert bundle.manifest.shared_shapes() == shapes
    assert not any(bundle.manifest.engines.values()) or find_training_python() is None


def test_a_hand_made_lenet_builds() -> None:
    make = helper.make_node
    pool = {"kernel_shape": [2, 2], "strides": [2, 2]}
    layers = [
        make("Conv", ["", "C1", "c1"], ["_"], kernel_shape=[5, 5], pads=[2, 2, 2, 2]),
        make("Relu", [""], ["_"]),
        make("MaxPool", [""], ["_"], **pool),
        make("Conv", ["", "C2", "c2"], ["_"]),
        make("Relu", [""], ["_"]),
        make("MaxPool", [""], ["_"], **pool),
        make("Flatten", [""], ["_"]),
        make("Gemm", ["", "W", "b"], ["_"], transB=1),
    ]
    shapes = {
        "C1": (4, 1, 5, 5),
        "c1": (4,),
        "C2": (6, 4, 5, 5),
        "c2": (6,),
        "W": (3, 24),
        "b": (3,),
    }
    bundle = build(_by_hand(layers, [1, 16, 16], shapes), loss="cross_entropy")
    assert list(bundle.reference().grads) == list(shapes)
    assert not any(bundle.manifest.engines.values()) or find_training_python() is None


def test_building_from_onnx_needs_no_torch(lr: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(lr, tmp_path / "lr.onnx")
    program = (
        "import sys; sys.modules['torch'] = None; import fedge; "
        f"b = fedge.build({str(tmp_path / 'lr.onnx')!r}, loss='cross_entropy', out='b'); "
        "print('onnxruntime' in sys.modules, b.manifest.engines['ort'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["False"], done.stderr
    fedge.Bundle.open(tmp_path / "b")


def test_building_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(_lr(), loss="bce_with_logits", sample=np.zeros((1, 13)))
    assert capfd.readouterr() == ("", "")


def test_the_manifest_says_what_a_device_must_know(lr: onnx.ModelProto) -> None:
    train = fedge.TrainConfig(lr=0.5, batch_size=8, steps=3)
    manifest = build(lr, loss="cross_entropy", train=train, name="heart").manifest
    assert (manifest.name, manifest.loss, manifest.train) == ("heart", "cross_entropy", train)
    assert manifest.optimizer == Optimizer(
        "sgd", {"momentum": 0.0, "nesterov": 0.0, "weight_decay": 0.0}
    )
    assert manifest.inputs[0].shape == ("N", 4)
    assert manifest.outputs[0].shape == ("N", 3)
    assert (manifest.labels.dtype, manifest.labels.low, manifest.labels.high) == ("int64", 0, 2)
    assert manifest.shared_shapes() == {"W": (4, 3), "b": (3,)}
    assert set(manifest.provenance) >= {"fedge", "onnx", "model_sha256"}
    assert manifest.state == ()


def test_label_ranges_follow_the_loss(lr: onnx.ModelProto) -> None:
    bce = build(lr, loss="bce_with_logits").manifest.labels
    assert (bce.dtype, bce.shape, bce.low, bce.high) == ("float32", ("N", 3), 0, 1)
    mse = build(lr, loss="mse").manifest.labels
    assert (mse.dtype, mse.shape, mse.low, mse.high) == ("float32", ("N", 3), None, None)


def test_adamw_state_is_in_the_manifest(lr: onnx.ModelProto) -> None:
    manifest = build(lr, loss="mse", optimizer={"name": "adamw", "weight_decay": 0.1}).manifest
    assert manifest.optimizer.settings["weight_decay"] == 0.1
    assert "optimizer@steps" in [s.name for s in manifest.state]


def test_a_batch_baked_in_as_the_first_dimension_is_freed(
    lr_of: Callable[..., onnx.ModelProto],
) -> None:
    bundle = build(lr_of(rows=1), loss="cross_entropy")
    assert len(bundle.reference().examples) == 4


def test_personal_tensors_are_marked(lr: onnx.ModelProto) -> None:
    for options in ({"personal": "b"}, {"shared": ["W"]}):
        manifest = build(lr, loss="cross_entropy", **options).manifest
        assert (manifest.shared, manifest.personal) == (("W",), ("b",))
        assert manifest.trainable == ("W", "b")


def test_frozen_tensors_are_not_stepped(lr: onnx.ModelProto) -> None:
    bundle = build(lr, loss="cross_entropy", trainable=["W"])
    assert bundle.manifest.trainable == ("W",)
    assert list(bundle.reference().grads) == ["W"]
    assert list(bundle.initial_params()) == ["W", "b"]
    step = onnx.load_model_from_string(bundle.read("step.onnx"))
    assert [o.name for o in step.graph.output] == ["loss", "W@next"]


# --- refusals ---------------------------------------------------------------------------------


def test_what_has_no_gradient_in_onnx_runtime_is_named_in_the_manifest() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 2))
    bundle = build(module, loss="cross_entropy", sample=np.zeros((1, 4)))
    reason = bundle.manifest.engines["ort-training"]
    if find_training_python() is not None:
        assert reason == "ONNX Runtime has no gradient for Softplus"
    assert bundle.engines == ("ort",)
    fedge.Bundle.open(bundle.path, engine="ort")


@needs_training
def test_a_model_that_would_kill_onnx_runtime_s_training_is_a_reason_too() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(18, 2))
    bundle = build(module, loss="cross_entropy", sample=np.zeros((1, 1, 8, 8)))
    assert bundle.manifest.engines["ort-training"] == (
        "ONNX Runtime has no gradient for AveragePool with a symbolic batch"
    )


def test_an_optimizer_onnx_runtime_lacks_is_a_reason(lr: onnx.ModelProto) -> None:
    bundle = build(lr, loss="mse", optimizer={"name": "sgd", "momentum": 0.9})
    assert bundle.manifest.engines["ort-training"] == "ONNX Runtime's SGD has no momentum"


def test_a_host_without_training_interpreter_says_so(
    lr: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FEDGE_ORT_TRAINING_PYTHON", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "elsewhere" / ".venv"))
    bundle = build(lr, loss="mse")
    assert bundle.manifest.engines["ort-training"] == (
        "the builder's host has no training interpreter (FEDGE_ORT_TRAINING_PYTHON)"
    )
    assert bundle.engines == ("ort",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss 'hinge' is unknown; known: bce_with_logits, cox, cross_en"),
        ({"optimizer": "lamb"}, "optimizer 'lamb' is unknown; known: adamw, sgd"),
        ({"optimizer": {"name": "sgd", "moment": 1}}, "sgd has no setting 'moment'"),
        ({"trainable": "layer*"}, r"trainable: 'layer\*' matches none of: W, b"),
        ({"shared": ["W", "c"]}, "shared: 'c' matches none of: W, b"),
        ({"personal": "W", "trainable": "b"}, "personal: 'W' matches none of: b"),
        ({"shared": "W", "personal": "b"}, "both given"),
        ({"preprocessing": "global"}, "preprocessing 'global' is unknown"),
        ({"sample": {"z": np.zeros((1, 4))}}, "sample names 'z'; the model takes x"),
    ],
)
def test_wrong_options_are_refused_with_the_choices(
    lr: onnx.ModelProto, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(lr, **{"loss": "cross_entropy", **options})


def test_an_output_that_is_no_classification_is_refused(
    lr_of: Callable[..., onnx.ModelProto],
) -> None:
    with pytest.raises(ConfigError, match="cross_entropy needs an output"):
        build(lr_of(classes=1), loss="cross_entropy")


def test_an_operator_without_gradient_is_named(lr: onnx.ModelProto) -> None:
    lr.graph.node[1].output[0] = "z"
    node = helper.make_node("FastGelu", ["z"], ["y"], name="fast", domain="com.microsoft")
    lr.graph.node.append(node)
    lr.opset_import.add(domain="com.microsoft", version=1)
    with pytest.raises(UnsupportedOperatorError, match=r"'fast' is a com\.microsoft\.FastGelu"):
        build(lr, loss="cross_entropy")


def test_a_model_that_is_not_finite_at_the_start_is_refused(lr: onnx.ModelProto) -> None:
    lr.graph.initializer[0].raw_data = np.full((4, 3), np.inf, np.float32).tobytes()
    with pytest.raises(ArtifactError, match="not finite at the initial params"):
        build(lr, loss="cross_entropy")


def test_out_must_be_free(lr: onnx.ModelProto, tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    with pytest.raises(ConfigError, match="not empty"):
        build(lr, loss="cross_entropy", out=tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": torch.optim.SGD(_lr().parameters(), lr=0.1)}, r"\(SGD\); give 'sgd'"),
        ({"optimizer": {"momentum": "high"}}, r"momentum is 'high' \(str\); wanted a number"),
        ({"sample": "hello"}, "sample holds a str; wanted arrays of numbers"),
        ({"out": "/dev/null/foo"}, "cannot write a bundle to /dev/null/foo"),
        ({"out": 3}, r"out is 3 \(int\); wanted text"),
        ({"name": 3}, r"name is 3 \(int\); wanted text"),
        ({"train": 5}, r"train is 5 \(int\); give TrainConfig"),
        ({"train": {"lr": "0.1"}}, "lr = '0.1' is str; wanted float"),
        ({"trainable": 5}, "trainable is 5; wanted a pattern"),
        ({"preprocessing": 7}, "preprocessing is a int; give Standardize"),
        ({"recompute": None}, "recompute is None"),
        ({"signing_key": "key"}, "a str is no Ed25519 private key"),
    ],
)
def test_an_option_of_a_wrong_kind_is_named(options: dict[str, Any], said: str) -> None:
    given = {"sample": torch.zeros(2, 13), "loss": "bce_with_logits", **options}
    with pytest.raises(ConfigError, match=said):
        build(_lr(), **given)


def test_train_settings_may_be_a_table() -> None:
    made = build(_lr(), sample=torch.zeros(2, 13), loss="bce_with_logits", train={"lr": 0.25})
    assert made.manifest.train == fedge.TrainConfig(lr=0.25)


@pytest.mark.parametrize("data", [b"", b"xx"])
def test_bytes_that_are_no_model_are_called_that(data: bytes) -> None:
    with pytest.raises(ArtifactError, match=rf"{len(data)} bytes: not an ONNX model"):
        build(data, loss="mse")
