from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.config import RunConfig, TrainConfig, from_mapping, read_toml
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
        ({"min_clients": 5, "cohort_size": 4}, "cohort_size is 4; it must be at least 5"),
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
