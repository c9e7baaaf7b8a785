"""What is not trained costs no backward pass, and what is tied is one param."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from zoo import SMALL

import fedge
from fedge.artifacts.bundle import Bundle
from fedge.engines import find_training_python, open_in_process
from fedge.types import Examples


def operators(bundle: Bundle, name: str) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load_model_from_string(bundle.read(name)).graph.node)


@pytest.fixture(scope="module")
def head_only() -> Bundle:
    model = SMALL["resnet8"]
    return fedge.build(model.build(), loss=model.loss, sample=model.inputs(2), trainable="head.*")


def test_a_trained_head_costs_its_own_gradient_alone(head_only: Bundle) -> None:
    assert head_only.manifest.trainable == ("head.weight", "head.bias")
    forward, step = (operators(head_only, n) for n in ("evaluate.onnx", "step.onnx"))
    extra = step - forward
    for costly in ("Conv", "ConvTranspose", "MatMul", "Transpose"):
        assert extra[costly] == 0, costly
    assert step["Conv"] == forward["Conv"] == 9
    assert extra["Gemm"] == 1  # dW folded into the update; nothing flows below


def test_statistics_below_a_trained_head_move_as_torch_s_do(head_only: Bundle) -> None:
    model = SMALL["resnet8"]
    assert len(head_only.manifest.running) == 18
    engine = open_in_process(head_only, "ort")
    rows = Examples(model.inputs(6), model.targets(6))
    before = engine.get_params()
    engine.train_step(rows, 0.1)
    after = engine.get_params()
    moved = {n for n in after if not np.array_equal(after[n], before[n])}
    assert moved == {*head_only.manifest.running, *head_only.manifest.trainable}


@pytest.mark.skipif(find_training_python() is None, reason="no interpreter with the training wheel")
def test_ort_training_spares_it_too(head_only: Bundle) -> None:
    assert "ConvGrad" not in operators(head_only, "training_model.onnx")


def test_low_rank_additions_leave_out_the_frozen_weights_gradients() -> None:
    """dX still flows through frozen layers; their dW is not computed."""
    model = SMALL["lora"]
    sample = model.inputs(2)
    lora = fedge.build(model.build(), loss=model.loss, sample=sample)
    module = model.build().requires_grad_(True)
    whole = fedge.build(module, loss=model.loss, sample=sample)
    products = [
        sum(operators(b, "grad.onnx")[n] for n in ("MatMul", "Gemm", "FusedMatMul"))
        for b in (lora, whole)
    ]
    assert all("attention" in n for n in lora.manifest.trainable)
    assert products[0] <= products[1] - 4  # up, down, head and attention's own weights


def test_a_tied_weight_is_one_param_with_one_gradient() -> None:
    model = SMALL["gpt-tied"]
    bundle = fedge.build(model.build(), loss=model.loss, sample=model.inputs(2))
    tied = [p for p in bundle.manifest.params if p.shape == (64, 32)]
    assert [p.name for p in tied] == ["tokens.weight"]
    engine = open_in_process(bundle, "ort")
    rows = Examples(model.inputs(2), model.targets(2))
    grad = engine.gradients(rows)[1]["tokens.weight"]
    unseen = np.setdiff1d(np.arange(64), rows.inputs["x"])
    assert np.abs(grad[unseen]).max() > 0  # the head sees every word, the embedding some
