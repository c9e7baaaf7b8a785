from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge import tensors
from fedge.errors import ArtifactError, UpdateError
from fedge.types import Params
from fedge.update import MAX_EXAMPLES, Update, apply_delta, check_update, compute_delta

SHAPES = {"fc.weight": (2, 3), "fc.bias": (2,)}


def _update(**changes: Any) -> Update:
    delta = {n: np.full(s, 0.5, np.float32) for n, s in SHAPES.items()}
    whole = Update(
        client_id="hospital-a",
        round_num=3,
        delta=delta,
        num_examples=120,
        metrics={"train_loss": 0.25},
        provenance={"engine": "ort"},
    )
    return replace(whole, **changes)


def _with(name: str, value: Any) -> Update:
    return _update(delta={**_update().delta, name: value})


def test_an_update_survives_its_bytes() -> None:
    sent = _update()
    got = Update.from_bytes(sent.to_bytes())
    assert replace(got, delta={}) == replace(sent, delta={})
    assert list(got.delta) == list(sent.delta)
    for name in SHAPES:
        np.testing.assert_array_equal(got.delta[name], sent.delta[name])
    assert got.to_bytes() == sent.to_bytes()


META: dict[str, Any] = {
    "kind": "update",
    "client_id": "a",
    "round_num": 1,
    "num_examples": 5,
    "metrics": {},
    "provenance": {},
}


def test_the_recorded_fields_are_enough() -> None:
    assert Update.from_bytes(tensors.dump({}, META)).client_id == "a"


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "params"},
        {"kind": None},
        {"client_id": 3},
        {"round_num": True},
        {"round_num": 1.0},
        {"num_examples": "5"},
        {"num_examples": None},
        {"metrics": []},
        {"metrics": {"loss": "low"}},
        {"metrics": {"loss": True}},
        {"provenance": {"engine": 3}},
        {"code": "import os"},
    ],
    ids=str,
)
def test_foreign_metadata_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="not an update file"):
        Update.from_bytes(tensors.dump({}, {**META, **changes}))


@pytest.mark.parametrize("missing", META)
def test_missing_metadata_is_refused(missing: str) -> None:
    meta = {k: v for k, v in META.items() if k != missing}
    with pytest.raises(ArtifactError, match="not an update file"):
        Update.from_bytes(tensors.dump({}, meta))


_RAW = _update().to_bytes()


@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(0, len(_RAW) - 1), st.integers(0, 255)), max_size=4))
def test_changed_bytes_give_an_update_or_an_error_of_ours(edits: list[tuple[int, int]]) -> None:
    data = bytearray(_RAW)
    for at, value in edits:
        data[at] = value
    try:
        check_update(Update.from_bytes(bytes(data)), SHAPES, max_norm=1e3)
    except (ArtifactError, UpdateError):
        return


@given(st.integers(0, 2**32 - 1))
def test_a_delta_applied_to_its_base_gives_local(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    local: Params = {n: v + rng.normal(size=v.shape).astype(np.float32) for n, v in base.items()}
    delta = compute_delta({**local, "head": np.ones(9)}, base)
    assert delta.keys() == base.keys()
    for name, value in apply_delta(base, delta).items():
        np.testing.assert_allclose(value, local[name], rtol=1e-6, atol=1e-6)


def test_applying_keeps_dtypes_and_leaves_names_without_delta() -> None:
    base = {"half": np.ones(2, np.float16), "head": np.ones(2, np.float32)}
    out = apply_delta(base, {"half": np.full(2, 0.5, np.float32)})
    assert out["half"].dtype == np.float16
    assert out["half"].tolist() == [1.5, 1.5]
    assert out["head"] is base["head"]


def test_a_delta_is_float32_whatever_the_params_are() -> None:
    wide = {"w": np.array([1.0, 2.0])}
    assert compute_delta(wide, {"w": np.array([0.5, 0.5])})["w"].dtype == np.float32


def test_a_good_update_passes_the_gate() -> None:
    check_update(_update(), SHAPES, max_norm=10.0)
    check_update(_update(num_examples=1), SHAPES, max_norm=10.0)
    check_update(_update(num_examples=MAX_EXAMPLES), SHAPES, max_norm=10.0)


@pytest.mark.parametrize(
    ("update", "said"),
    [
        (_update(delta={}), r"lacks \['fc.bias', 'fc.weight'\]"),
        (_with("head", np.zeros(1, np.float32)), r"holds \['head'\], which may not leave"),
        (_with("fc.bias", np.zeros(2)), "fc.bias is float64, wanted float32"),
        (_with("fc.bias", np.zeros(3, np.float32)), r"fc.bias has shape \(3,\), wanted \(2,\)"),
        (_with("fc.bias", np.zeros((2, 1), np.float32)), "has shape"),
        (_with("fc.bias", np.array([0, math.nan], np.float32)), "NaN or infinity"),
        (_with("fc.bias", np.array([0, math.inf], np.float32)), "NaN or infinity"),
        (_with("fc.bias", np.full(2, 100, np.float32)), "has norm 141.4, above 10"),
        (_with("fc.bias", np.full(2, 3e38, np.float32)), "has norm"),
        (_update(num_examples=0), "claims 0 examples"),
        (_update(num_examples=-5), "claims -5 examples"),
        (_update(num_examples=MAX_EXAMPLES + 1), "claims"),
        (_update(metrics={"loss": math.nan}), "a metric that is not finite"),
        (_update(metrics={"loss": math.inf}), "a metric that is not finite"),
        (_update(metrics={"loss": 10**400}), "a metric that is not finite"),
    ],
)
def test_the_gate_refuses_and_says_why(update: Update, said: str) -> None:
    with pytest.raises(UpdateError, match=said):
        check_update(update, SHAPES, max_norm=10.0)
