from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler as lr

from fedge.config import RunConfig, Schedule, TrainConfig, from_mapping, read_toml
from fedge.errors import ConfigError

JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def test_one_pass_over_the_rows_is_the_default() -> None:
    assert (TrainConfig().epochs, TrainConfig().steps) == (1, None)
    assert (TrainConfig(steps=5).epochs, TrainConfig(steps=5).steps) == (None, 5)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"epochs": 1, "steps": 1}, "give one of them"),
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": 10**400}, "must be above 0 and finite"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"steps": -3}, "steps is -3"),
    ],
)
def test_train_settings_out_of_range_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig(**values)


def test_replace_swaps_epochs_and_steps_and_checks_again() -> None:
    config = TrainConfig(lr=0.5, epochs=3)
    assert config.replace(steps=7) == TrainConfig(lr=0.5, steps=7)
    assert config.replace(steps=7).replace(epochs=2) == TrainConfig(lr=0.5, epochs=2)
    assert config.replace(lr=0.1) == TrainConfig(lr=0.1, epochs=3)
    with pytest.raises(ConfigError, match="both set"):
        config.replace(epochs=1, steps=1)
    with pytest.raises(ConfigError, match="has no setting momentum"):
        config.replace(momentum=0.9)
    with pytest.raises(ConfigError, match="wanted int"):
        config.replace(batch_size="8")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"min_clients": 0}, "min_clients is 0"),
        ({"deadline_s": 0.0}, "deadline_s"),
        (
            {"min_clients": 5, "cohort_size": 4},
            "cohort_size is 4; it must be at least min_clients, which is 5",
        ),
    ],
)
def test_run_settings_out_of_range_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RunConfig(**values)


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        RunConfig().rounds = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"round": 3}, r"\[run\] has no setting round; it has rounds, min_clients"),
        ({"rounds": "3"}, r"rounds = '3' is str; wanted int"),
        ({"rounds": True}, r"rounds = True is bool; wanted int"),
        ({"rounds": 3.0}, r"wanted int"),
        ({"evaluate": 1}, r"wanted bool"),
        ({"deadline_s": True}, r"wanted float"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_by_name(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_mapping(RunConfig, values, "run")


def test_a_missing_value_without_default_is_named() -> None:
    from fedge.artifacts.manifest import FileEntry

    for values in ({"bytes": 3}, {"bytes": 3, "sha256": None}):
        with pytest.raises(ConfigError, match=r"\[files\] needs a value for sha256"):
            from_mapping(FileEntry, values, "files")


def test_none_means_not_given_except_where_none_is_a_value() -> None:
    assert from_mapping(RunConfig, {"rounds": None, "seed": None}, "run") == RunConfig()
    assert from_mapping(RunConfig, {"cohort_size": None}, "run").cohort_size is None
    with pytest.raises(ConfigError, match="has no setting x"):
        from_mapping(RunConfig, {"x": None}, "run")


def test_a_whole_number_serves_as_a_float() -> None:
    assert from_mapping(TrainConfig, {"lr": 1}, "train").lr == 1


@given(
    st.dictionaries(
        st.sampled_from(["lr", "batch_size", "epochs", "steps", "shuffle", "x"]), JSONISH
    )
)
def test_any_table_gives_valid_settings_or_a_config_error(values: dict[str, Any]) -> None:
    try:
        config = from_mapping(TrainConfig, values, "train")
    except ConfigError:
        return
    assert config.lr > 0
    assert type(config.batch_size) is int
    assert type(config.shuffle) is bool
    assert (config.epochs is None) != (config.steps is None)


def test_toml_is_read(tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    path.write_text('[run]\nrounds = 3\nname = "é"\n')
    assert read_toml(path) == {"run": {"rounds": 3, "name": "é"}}


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"[run", "not valid TOML"), (b"\xff\xfe", "not valid TOML"), (b"#" * 99, "at most 50")],
)
def test_a_broken_settings_file_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "federation.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_toml(path, max_bytes=50)


def test_a_missing_settings_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: No such file"):
        read_toml(tmp_path / "nowhere.toml")


# --- Steps that do more, and schedules -----------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"accumulate": 0}, "accumulate is 0; it must be at least 1"),
        ({"proximal_mu": -1.0}, "proximal_mu is -1.0"),
        ({"proximal_mu": math.nan}, "proximal_mu is nan"),
        ({"schedule": "linaer"}, "schedule 'linaer'; known: constant, linear, cosine, step"),
        ({"schedule": 3}, "schedule is 3; wanted a name or a table"),
        ({"schedule": {"name": "step", "evry": 2}}, "has no setting evry"),
        ({"schedule": {"floor": 2.0}}, "floor is 2.0"),
        ({"schedule": {"gamma": 0.0}}, "gamma is 0.0"),
        ({"schedule": {"warmup": -1}}, "warmup is -1"),
        ({"schedule": {"length": 0}}, "length is 0"),
        ({"schedule": {"length": 5, "warmup": 5}}, "length is 5; it must be at least 6"),
        ({"round_schedule": "cosine"}, "round_schedule cosine needs its length in rounds"),
    ],
)
def test_wrong_steps_and_schedules_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_mapping(TrainConfig, values, "train")


def test_settings_survive_plain_values() -> None:
    config = TrainConfig(
        lr=0.1, clip_norm=1.0, accumulate=4, proximal_mu=0.5,
        schedule=Schedule("cosine", warmup=3), round_schedule=Schedule("step", every=5, gamma=0.5),
    )  # fmt: skip
    assert from_mapping(TrainConfig, json.loads(json.dumps(asdict(config))), "train") == config
    assert TrainConfig().is_plain
    assert TrainConfig(schedule="cosine").is_plain  # type: ignore[arg-type]
    assert not config.is_plain
    assert not TrainConfig(clip_norm=1.0).is_plain


def test_a_task_overrides_what_it_may() -> None:
    config = TrainConfig(epochs=2)
    asked = {"seed": "7", "lr": 0.5, "steps": 3, "proximal_mu": 0.1, "clip_norm": 2.0}
    wanted = TrainConfig(lr=0.5, steps=3, proximal_mu=0.1, clip_norm=2.0)
    assert config.override(asked) == wanted
    with pytest.raises(ConfigError, match="a task asks for shuffle; clients know seed, lr"):
        config.override({"shuffle": False})


SCHEDULES: list[tuple[Schedule, Any]] = [
    (Schedule("linear", floor=0.1), lambda o: lr.LinearLR(o, 1.0, 0.1, 12)),
    (Schedule("cosine"), lambda o: lr.CosineAnnealingLR(o, 12)),
    (Schedule("cosine", length=6, floor=0.25), lambda o: lr.CosineAnnealingLR(o, 6, 0.25)),
    (Schedule("step", every=3, gamma=0.5), lambda o: lr.StepLR(o, 3, 0.5)),
    (Schedule("constant", warmup=4), lambda o: lr.LinearLR(o, 0.25, 1.0, 3)),
    (
        Schedule("cosine", warmup=4),
        lambda o: lr.SequentialLR(
            o, [lr.LinearLR(o, 0.25, 1.0, 3), lr.CosineAnnealingLR(o, 8)], [4]
        ),
    ),
]


@pytest.mark.parametrize(("schedule", "oracle"), SCHEDULES, ids=lambda v: getattr(v, "name", ""))
@pytest.mark.filterwarnings("ignore")
def test_schedules_are_torchs(schedule: Schedule, oracle: Any) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    theirs = oracle(optimizer)
    for position in range(min(12, schedule.length or 12)):
        assert schedule.factor(position, 12) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-6
        )
        optimizer.step()
        theirs.step()


def test_after_its_length_a_schedule_stays() -> None:
    assert Schedule("cosine", length=5, floor=0.2).factor(99) == pytest.approx(0.2)
    assert Schedule("linear", length=5).factor(99) == 0.0


def test_a_round_has_its_own_learning_rate() -> None:
    config = TrainConfig(lr=0.8, round_schedule=Schedule("step", every=2, gamma=0.5))
    assert [config.for_round(r).lr for r in (1, 2, 3, 5)] == [0.8, 0.8, 0.4, 0.2]
    assert config.for_round(3).for_round(3).lr == 0.4
    assert TrainConfig(round_schedule=Schedule("linear", length=2)).for_round(9).lr > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": "0.1"}, r"lr = '0.1' is str; wanted float"),
        ({"epochs": 1.5}, r"epochs = 1.5 is float; wanted int"),
        ({"batch_size": 16.0}, r"batch_size = 16.0 is float; wanted int"),
        ({"lr": None}, r"lr = None is NoneType; wanted float"),
        ({"shuffle": 1}, r"shuffle = 1 is int; wanted bool"),
    ],
)
def test_settings_of_a_wrong_type_are_refused_by_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig(**settings)


def test_numbers_of_numpy_are_numbers() -> None:
    config = TrainConfig(lr=np.float32(0.5), batch_size=np.int64(8))  # type: ignore[arg-type]
    assert (type(config.lr), type(config.batch_size)) == (float, int)


@pytest.mark.parametrize("name", ["steps", "epochs"])
def test_a_task_cannot_ask_for_work_without_end(name: str) -> None:
    with pytest.raises(ConfigError, match=f"asks for {name} = 1000000000; at most 10000000"):
        TrainConfig().override({name: 10**9})
    assert getattr(TrainConfig().override({name: 10**6}), name) == 10**6
