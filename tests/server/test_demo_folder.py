"""What ``fedge-server demo --out`` may delete: an earlier demo, and nothing else."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fedge.errors import ConfigError, EngineUnavailableError
from fedge_server import demo


def test_an_earlier_demo_is_replaced_and_other_files_are_not(tmp_path: Path) -> None:
    out = demo._fresh(tmp_path / "out")
    (out / "report.json").touch()
    assert [p.name for p in demo._fresh(out).iterdir()] == [demo.MARKER]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds other files"):
        demo._fresh(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_links_and_files_are_refused(tmp_path: Path) -> None:
    real = demo._fresh(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for name in ("link", "dangling", "file"):
        with pytest.raises(ConfigError, match="a link or a file"):
            demo._fresh(tmp_path / name)
    assert (real / demo.MARKER).exists()


def test_a_demo_that_cannot_run_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = demo._fresh(tmp_path / "out")
    (out / "report.json").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EngineUnavailableError):
        demo._fresh(out)
    assert (out / "report.json").exists()
