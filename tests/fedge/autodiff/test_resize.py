"""Resize against torch's interpolate, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import parser
from torch.nn import functional as F

from fedge.autodiff import vjp
from fedge.errors import UnsupportedOperatorError
from fedge.types import Array

Check = Callable[..., None]
few = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def scales(*values: float) -> Array:
    return np.array(values, np.float32)


MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nearest": (
        {"mode": "nearest"},
        {
            "mode": "nearest",
            "nearest_mode": "floor",
            "coordinate_transformation_mode": "asymmetric",
        },
    ),
    "linear": (
        {"mode": "bilinear", "align_corners": False},
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    ),
    "linear corners": (
        {"mode": "bilinear", "align_corners": True},
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    ),
    "cubic": (
        {"mode": "bicubic", "align_corners": False},
        {"mode": "cubic", "coordinate_transformation_mode": "pytorch_half_pixel"},
    ),
}


@pytest.mark.parametrize("mode", MODES)
@given(
    n=st.integers(1, 3),
    size=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    out=st.tuples(st.integers(2, 10), st.integers(2, 10)),
    seed=st.integers(0, 99),
)
@few
def test_resize_to_a_size(
    check: Check, mode: str, n: int, size: tuple[int, int], out: tuple[int, int], seed: int
) -> None:
    settings_of_torch, attributes = MODES[mode]
    check(
        "Resize",
        lambda x, *_: F.interpolate(x, out, **settings_of_torch),
        [normal(seed, n, 2, *size), None, None, np.array(out, np.int64)],
        18,
        axes=[2, 3],
        **attributes,
    )


@pytest.mark.parametrize("opset", [13, 19])
@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0])
def test_repeating_every_element(check: Check, opset: int, factor: float) -> None:
    check(
        "Resize",
        lambda x, *_: F.interpolate(x, scale_factor=(factor, 2)),
        [normal(0, 2, 3, 4, 5), None, scales(1, 1, factor, 2)],
        opset,
        constant=[2],
        **MODES["nearest"][1],
    )


def test_other_ranks(check: Check) -> None:
    x, y = normal(0, 2, 3, 4), normal(1, 2, 3, 2, 3, 4)
    linear = MODES["linear"][1]
    nearest = MODES["nearest"][1]
    check(
        "Resize",
        lambda x, *_: F.interpolate(x, scale_factor=1.5, mode="linear"),
        [x, None, scales(1, 1, 1.5)],
        constant=[2],
        **linear,
    )
    check(
        "Resize",
        lambda x, *_: F.interpolate(x, scale_factor=(1, 2, 3)),
        [y, None, scales(1, 1, 1, 2, 3)],
        constant=[2],
        **nearest,
    )


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ("antialias=1, mode='linear'", "antialiasing"),
        ("coordinate_transformation_mode='tf_crop_and_resize'", "tf_crop_and_resize"),
    ],
)
def test_forms_that_are_refused(attributes: str, reason: str) -> None:
    roi = "r" if "crop" in attributes else ""
    text = (
        '<ir_version: 8, opset_import: ["" : 18]>'
        "g (float[N,1,4,4] x) => (float[N,1,8,8] y)"
        "<float[4] s = {1,1,2,2}, float[8] r = {0,0,0,0,1,1,1,1}>"
        f"{{y = Resize<{attributes}>(x, {roi}, s)}}"
    ).replace("'", '"')
    with pytest.raises(UnsupportedOperatorError, match=reason):
        vjp(parser.parse_model(text), outputs=["y"], wrt=["x"])
