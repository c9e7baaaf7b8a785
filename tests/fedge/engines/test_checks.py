from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedge.artifacts.manifest import LabelSpec, Manifest, TensorSpec
from fedge.engines.checks import check_examples, check_inputs, check_labels, check_params
from fedge.errors import ArtifactError, DataError
from fedge.types import Examples


@pytest.fixture(scope="module")
def manifest(mlp: Any) -> Manifest:
    return mlp.bundle("sgd").manifest  # type: ignore[no-any-return]


def x(rows: int = 2, columns: int = 64, dtype: str = "float32") -> np.ndarray:
    return np.ones((rows, columns), dtype)


@pytest.mark.parametrize("dtype", ["float64", "int8", "bool", "float16", ">f4"])
def test_numbers_are_cast_to_the_manifests_dtype(manifest: Manifest, dtype: str) -> None:
    ready = check_examples(manifest, Examples({"x": x(dtype=dtype)}, np.array([1.0, 9.0])))
    assert ready.inputs["x"].dtype == np.float32
    assert ready.labels.dtype == np.int64


def test_rows_are_laid_out_in_c_order_and_right_ones_are_not_copied(manifest: Manifest) -> None:
    backwards = x(4)[::-2]
    ready = check_inputs(manifest.inputs, {"x": backwards})["x"]
    assert ready.flags.c_contiguous
    right = x()
    assert np.shares_memory(check_inputs(manifest.inputs, {"x": right})["x"], right)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Examples({"x": x(0)}, np.zeros(0, int)), "x has no rows"),
        (lambda: Examples({"x": x(2, 63)}, np.zeros(2, int)), r"shape \[2, 63\]; wanted \[N, 64\]"),
        (lambda: Examples({"x": x()[0]}, np.zeros(64, int)), r"shape \[64\]; wanted \[N, 64\]"),
        (lambda: Examples({"x": x() * np.nan}, np.zeros(2, int)), "x holds NaN"),
        (lambda: Examples({"x": x() * np.inf}, np.zeros(2, int)), "infinity"),
        (lambda: Examples({"x": x(dtype="f8") * 1e300}, np.zeros(2, int)), "too large"),
        (lambda: Examples({"x": x().astype(str)}, np.zeros(2, int)), "wanted numbers"),
        (lambda: Examples({"y": x()}, np.zeros(2, int)), r"inputs are \['y'\].*wants \['x'\]"),
        (
            lambda: Examples({"x": x()}, np.array([0, 10])),
            "run from 0 to 10; the model knows 0 … 9",
        ),
        (lambda: Examples({"x": x()}, np.array([-1, 1])), "run from -1"),
        (lambda: Examples({"x": x()}, np.array([0.5, 1])), "whole numbers"),
        (lambda: Examples({"x": x()}, np.array([np.nan, 1])), "labels holds NaN"),
        (lambda: Examples({"x": x()}, np.array(["a", "b"])), "labels has dtype"),
        (lambda: Examples({"x": x()}, np.zeros((2, 2), int)), r"labels has shape \[2, 2\]"),
        (lambda: Examples({"x": x()}, np.array([2**63, 1], np.uint64)), "labels"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_name(
    manifest: Manifest, make: Callable[[], Examples], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        check_examples(manifest, make())


def test_inputs_must_agree_in_rows() -> None:
    specs = [TensorSpec("a", "float32", ("N", 1)), TensorSpec("b", "int64", ("N",))]
    with pytest.raises(DataError, match="differ in rows"):
        check_inputs(specs, {"a": np.ones((2, 1)), "b": np.ones(3)})


def test_labels_may_be_a_column_or_a_row() -> None:
    column = LabelSpec("labels", "float32", ("N", 1), 0, 1)
    assert check_labels(column, np.array([0, 1, 1])).shape == (3, 1)
    row = LabelSpec("labels", "int64", ("N",), 0, 9)
    assert check_labels(row, np.array([[3], [4]])).shape == (2,)
    wide = LabelSpec("labels", "float32", ("N", 3))
    assert check_labels(wide, np.ones((2, 3))).shape == (2, 3)


def test_params_must_be_known_and_fit(manifest: Manifest) -> None:
    good = {p.name: np.zeros(p.shape) for p in manifest.params}
    assert all(v.dtype == np.float32 for v in check_params(manifest, good).values())
    name = manifest.params[0].name
    for bad in ({"w": np.zeros(1)}, {name: np.zeros(3)}, {name: np.zeros((64, 64), complex)}):
        with pytest.raises(ArtifactError, match="param"):
            check_params(replace(manifest), bad)
