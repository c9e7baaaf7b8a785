"""Small models by hand, and one bundle built from them, shared by the artifact tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import fedge
from fedge.artifacts.signing import generate_signing_key

KEY = generate_signing_key()


def make_lr(rows: int | str = "N", features: int = 4, classes: int = 3) -> onnx.ModelProto:
    """y = x·W + b, as somebody without torch would write it."""
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((features, classes)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "W"], ["xW"], name="multiply"),
            helper.make_node("Add", ["xW", "b"], ["y"], name="add"),
        ],
        "logistic",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, classes])],
        [
            numpy_helper.from_array(weights, "W"),
            numpy_helper.from_array(np.zeros(classes, np.float32), "b"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def lr() -> onnx.ModelProto:
    return make_lr()


@pytest.fixture
def lr_of() -> Callable[..., onnx.ModelProto]:
    return make_lr


@pytest.fixture(scope="session")
def _built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "bundle"
    fedge.build(make_lr(), loss="cross_entropy", out=out, signing_key=KEY)
    return out


@pytest.fixture
def folder(_built: Path, tmp_path: Path) -> Path:
    """A bundle folder of one's own, to damage."""
    copy = tmp_path / "bundle"
    shutil.copytree(_built, copy)
    return copy


@pytest.fixture(scope="session")
def manifest_bytes(_built: Path) -> bytes:
    return (_built / "manifest.json").read_bytes()
