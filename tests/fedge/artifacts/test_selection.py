from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fedge.artifacts.selection import (
    Choice,
    Source,
    choose,
    param_names,
    running_statistics,
    untrained_statistics,
)
from fedge.errors import ArtifactError, ConfigError

NAMES = ("conv.weight", "conv.bias", "head.weight", "head.bias")


def _source(names: Sequence[str] = NAMES, trainable: Sequence[str] | None = None) -> Source:
    tensors = [
        numpy_helper.from_array(np.zeros((2, i + 1), np.float32), n) for i, n in enumerate(names)
    ]
    model = helper.make_model(helper.make_graph([], "g", [], [], tensors))
    chosen = tuple(names if trainable is None else trainable)
    return Source(model, tuple(names), chosen, {}, "m", {})


def _split(choice: Choice, source: Source | None = None) -> tuple[set[str], set[str]]:
    specs = choose(source or _source(), choice)
    return {p.name for p in specs if p.trainable}, {p.name for p in specs if not p.shared}


def test_everything_is_trained_and_shared_by_default() -> None:
    assert _split(Choice()) == (set(NAMES), set())


def test_order_and_shapes_are_the_model_s() -> None:
    specs = choose(_source(), Choice(trainable="*.bias"))
    assert [(p.name, p.shape) for p in specs] == [(n, (2, i + 1)) for i, n in enumerate(NAMES)]
    assert {p.dtype for p in specs} == {"float32"}


def test_patterns_choose_what_is_trained() -> None:
    assert _split(Choice(trainable="head.*"))[0] == {"head.weight", "head.bias"}
    assert _split(Choice(trainable=["*.bias", "head.weight"]))[0] == {
        "conv.bias",
        "head.weight",
        "head.bias",
    }


def test_personal_and_shared_are_two_ways_to_say_the_same() -> None:
    personal = _split(Choice(personal="head.*"))
    assert personal == _split(Choice(shared="conv.*")) == (set(NAMES), {"head.weight", "head.bias"})


def test_frozen_tensors_are_not_personal() -> None:
    trained, stay = _split(Choice(trainable="head.*", shared="head.weight"))
    assert (trained, stay) == ({"head.weight", "head.bias"}, {"head.bias"})


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(trainable="nope"), "trainable: 'nope' matches none of: conv.weight, conv.bias"),
        (Choice(trainable=["head.*", "nope"]), "trainable: 'nope'"),
        (Choice(shared="head.*", trainable="conv.*"), r"shared: 'head\.\*' matches none of"),
        (Choice(personal="CONV.*"), "personal: 'CONV"),
        (Choice(shared="*", personal="*"), "both given"),
        (Choice(trainable=[]), "no tensor is trained; choose some of: conv.weight"),
    ],
)
def test_wrong_choices_list_the_names(choice: Choice, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _split(choice)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose some of: none"):
        _split(Choice(), _source((), ()))


@given(st.sets(st.sampled_from(NAMES), min_size=1), st.sets(st.sampled_from(NAMES)))
def test_shared_and_personal_split_what_is_trained(trained: set[str], stay: set[str]) -> None:
    stay &= trained
    found, kept = _split(Choice(trainable=sorted(trained), personal=sorted(stay)))
    assert (found, kept) == (trained, stay)


def _graph(*tensors: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Sum", [t.name for t in tensors if t.name != "unused"], ["y"])
    return helper.make_model(helper.make_graph([node], "g", [], [], list(tensors)))


def test_params_are_float_tensors_of_rank_one_or_more_that_are_used() -> None:
    model = _graph(
        numpy_helper.from_array(np.zeros((2, 2), np.float32), "w"),
        numpy_helper.from_array(np.float32(1), "scalar"),
        numpy_helper.from_array(np.zeros(2, np.int64), "axes"),
        numpy_helper.from_array(np.zeros(2, np.float32), "unused"),
    )
    assert param_names(model) == ("w",)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_params_of_another_precision_are_refused(dtype: type[np.floating]) -> None:
    with pytest.raises(ArtifactError, match=f"'w' is {np.dtype(dtype)}; .* export the model in"):
        param_names(_graph(numpy_helper.from_array(np.zeros(2, dtype), "w")))


@pytest.mark.parametrize("training", [0, 1])
def test_statistics_run_only_where_batch_norm_trains(training: int) -> None:
    node = helper.make_node(
        "BatchNormalization", ["x", "s", "b", "mean", "var"], ["y"], training_mode=training
    )
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    assert running_statistics(model) == ({"mean", "var"} if training else set())
    assert untrained_statistics(model) == {"mean", "var"}
