from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

import fedge
from fedge.artifacts.admission import admit_model
from fedge.artifacts.manifest import TensorSpec
from fedge.artifacts.preprocessing import (
    Preprocessor,
    SiteStandardize,
    Standardize,
    build_preprocessor,
)
from fedge.errors import ArtifactError, ConfigError
from fedge.types import Array

X = TensorSpec("x", "float32", ("N", 3))
IDS = TensorSpec("ids", "int64", ("N", 2))
IMAGE = TensorSpec("image", "float32", ("N", 1, 2, 2))


def _run(built: Preprocessor, **feeds: Array) -> dict[str, Array]:
    data = admit_model(built.model.SerializeToString())
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _rows(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_nothing_to_do_passes_everything_on() -> None:
    built = build_preprocessor(None, (X, IDS))
    x, ids = _rows(5, 3), np.arange(10).reshape(5, 2)
    found = _run(built, x=x, ids=ids)
    assert (built.scaling, built.raw_inputs) == ("none", (X, IDS))
    np.testing.assert_array_equal(found["x@pre"], x)
    np.testing.assert_array_equal(found["ids@pre"], ids)


@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_constants_standardize(rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mean, std = rng.standard_normal(3) * 10, rng.random(3) + 0.01
    x = rng.standard_normal((rows, 3)).astype(np.float32)
    found = _run(build_preprocessor(Standardize(mean, std), (X,)), x=x)["x@pre"]
    np.testing.assert_allclose(found, (x - mean) / std, rtol=1e-4, atol=1e-4)


def test_a_constant_column_is_only_centred() -> None:
    built = build_preprocessor(Standardize([1, 2, 3], [1, 0, 2]), (X,))
    found = _run(built, x=np.array([[1, 5, 7]], np.float32))["x@pre"]
    np.testing.assert_array_equal(found, [[0, 3, 2]])
    assert built.scaling == "global"


def test_scalars_standardize_images_and_leave_other_inputs_alone() -> None:
    built = build_preprocessor(Standardize(0.5, 0.25), (IMAGE, IDS))
    image, ids = _rows(2, 1, 2, 2), np.zeros((2, 2), np.int64)
    found = _run(built, image=image, ids=ids)
    np.testing.assert_allclose(found["image@pre"], (image - 0.5) / 0.25, rtol=1e-5)
    np.testing.assert_array_equal(found["ids@pre"], ids)


@pytest.mark.parametrize("how", [SiteStandardize(), "site"])
def test_site_statistics_are_two_more_inputs(how: Any) -> None:
    built = build_preprocessor(how, (X,))
    x = _rows(6, 3)
    mean, std = x.mean(0), x.std(0, ddof=1)
    found = _run(built, x=x, site_mean=mean, site_std=std)["x@pre"]
    np.testing.assert_allclose(found, (x - mean) / (std + 1e-9), rtol=1e-5, atol=1e-6)
    assert (built.scaling, built.raw_inputs) == ("site", (X,))
    assert [i.name for i in built.model.graph.input] == ["x", "site_mean", "site_std"]


def test_two_float_inputs_need_a_name() -> None:
    with pytest.raises(ConfigError, match="float32 inputs: x, image; name one"):
        build_preprocessor(SiteStandardize(), (X, IMAGE))
    built = build_preprocessor(Standardize(0, 2, input="image"), (X, IMAGE))
    x, image = _rows(1, 3), _rows(1, 1, 2, 2)
    found = _run(built, x=x, image=image)
    np.testing.assert_array_equal(found["x@pre"], x)
    np.testing.assert_allclose(found["image@pre"], image / 2)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Standardize([0, 0], 1), r"mean has shape \(2,\); input 'x' wants \(3,\)"),
        (Standardize(0, [1, 1, 1, 1]), r"std has shape \(4,\)"),
        (Standardize(0, -1), "std not negative"),
        (Standardize(np.nan, 1), "must be finite"),
        (Standardize(0, 1, input="z"), "float32 inputs: x; name one"),
        ("zca", "'zca' is unknown; known: none, site"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(how: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_preprocessor(how, (X,))


def _custom(width: int = 3, op: str = "Concat") -> onnx.ModelProto:
    """Raw columns a (width − 1) and b (1), side by side."""
    info = helper.make_tensor_value_info
    node = helper.make_node(op, ["a", "b"], ["joined"], **({"axis": 1} if op == "Concat" else {}))
    graph = helper.make_graph(
        [node],
        "join",
        [
            info("a", TensorProto.FLOAT, [None, width - 1]),
            info("b", TensorProto.FLOAT, [None, 1]),
        ],
        [info("joined", TensorProto.FLOAT, [None, width])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_graph_of_one_s_own_changes_what_a_site_gives() -> None:
    built = build_preprocessor(_custom(), (X,))
    assert built.scaling == "custom"
    assert [(s.name, s.shape) for s in built.raw_inputs] == [("a", ("N", 2)), ("b", ("N", 1))]
    found = _run(built, a=np.ones((2, 2), np.float32), b=np.zeros((2, 1), np.float32))
    np.testing.assert_array_equal(found["x@pre"], [[1, 1, 0]] * 2)


def test_a_graph_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"preprocessing graph gives .* the model takes"):
        build_preprocessor(_custom(4), (X,))


def test_a_graph_with_a_forbidden_operator_is_refused() -> None:
    with pytest.raises(ArtifactError):
        build_preprocessor(_custom(op="StringConcat"), (X,))


def test_the_bundle_says_how_its_data_are_scaled(lr: onnx.ModelProto) -> None:
    manifest = fedge.build(lr, loss="mse", preprocessing="site").manifest
    assert manifest.scaling == "site"
    assert [s.name for s in manifest.raw_inputs] == ["x"]
