"""client.toml: what may stand in it, and that flags survive a round trip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.errors import ConfigError, DataError
from fedge_client.config import ClientConfig, DataConfig, EngineConfig, from_json, load, save
from fedge_client.config import as_json as to_json

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


def test_a_missing_file_is_all_defaults(tmp_path: Path) -> None:
    assert load(tmp_path) == ClientConfig()


def test_relative_paths_start_at_the_state_folder(tmp_path: Path) -> None:
    (tmp_path / "client.toml").write_text('[data]\npath = "rows.csv"\nlabel = "y"\n')
    data = load(tmp_path).data
    assert data is not None
    assert data.path == str(tmp_path / "rows.csv")
    assert data.format == "csv"


@given(label=NAMES, columns=st.lists(NAMES, max_size=4), fraction=st.floats(0, 0.9))
def test_what_is_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, label: str, columns: list[str], fraction: float
) -> None:
    folder = tmp_path_factory.mktemp("state")
    data = DataConfig(
        str(folder / "näme.npz"), label, columns=tuple(columns), test_fraction=fraction
    )
    config = ClientConfig(data, EngineConfig("ort", threads=2))
    save(folder, config)
    assert load(folder) == config
    assert from_json(to_json(data)) == data
    assert (folder / "client.toml").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[dta]\npath = 'a.csv'", "no table dta; it has data, engine"),
        ("[data]\npath = 'a.csv'\nlabel = 'y'\nsep = ','", "no setting sep"),
        ("[data]\npath = 'a.csv'", "needs a value for label"),
        ("[data]\npath = 'a.parquet'\nlabel = 'y'", "wanted csv or npz"),
        ("[data]\npath = 'a.csv'\nlabel = 'y'\ntest_fraction = 1.0", "test_fraction 1.0"),
        ("[data]\npath = 'a.csv'\nlabel = 3", "label = 3 is int; wanted str"),
        ("[engine]\nname = 'tpu'", "engine 'tpu'; wanted auto, ort, ort-training"),
        ("[engine]\nthreads = 0", "threads is 0"),
        ("[data", "not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "client.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_environment_overrides_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGE_ENGINE", "ort-training")
    assert load(tmp_path).engine.name == "ort-training"


def test_a_missing_data_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        DataConfig(str(tmp_path / "none.csv"), "y").require_file()
    with pytest.raises(DataError, match="is a folder"):
        DataConfig(str(tmp_path), "y", format="csv").require_file()


def test_execution_providers_are_named_in_toml(tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    path.write_text('[engine]\nproviders = ["CUDAExecutionProvider", "cpu"]\n')
    config = load(tmp_path)
    assert config.engine.providers == ("cuda", "cpu")
    save(tmp_path, config)
    assert load(tmp_path) == config


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('providers = ["azure"]', "web service"),
        ('providers = ["cudda"]', "known: cpu, cuda"),
        ('name = "ort-training"\nproviders = ["cuda"]', "has no execution providers"),
    ],
)
def test_providers_that_cannot_be_are_refused(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "client.toml").write_text(f"[engine]\n{line}\n")
    with pytest.raises(ConfigError, match=says):
        load(tmp_path)


def test_columns_are_looked_for_in_the_header_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("\ufeffa, b ,time,event\nnot,read\n", encoding="utf-8")
    DataConfig(str(path), "b", columns=("a",)).require_columns()
    DataConfig(str(path), "time,event").require_columns()
    with pytest.raises(DataError, match="lacks the column c; it has a, b, time, event"):
        DataConfig(str(path), "b", columns=("a", "c")).require_columns()
    np.savez(tmp_path / "rows.npz", x=np.zeros((2, 2)), y=np.zeros(2))
    DataConfig(str(tmp_path / "rows.npz"), "y").require_columns()
    with pytest.raises(DataError, match="lacks the array z; it has x, y"):
        DataConfig(str(tmp_path / "rows.npz"), "z").require_columns()
    (tmp_path / "bad.npz").write_bytes(b"text")
    with pytest.raises(DataError, match="cannot be read as NPZ"):
        DataConfig(str(tmp_path / "bad.npz"), "z").require_columns()
