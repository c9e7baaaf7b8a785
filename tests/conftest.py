"""Shared settings of the test suite; fixtures live beside the tests that use them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from fedge.platform import silence_telemetry

silence_telemetry()
# Two busy cores: no deadline per example, and the same examples every time.
settings.register_profile(
    "fedge",
    deadline=None,
    max_examples=60,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fedge")


@pytest.fixture(scope="session", autouse=True)
def _matplotlib_stays_out_of_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ.setdefault("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))


@pytest.fixture(scope="session")
def fedge_data() -> Path:
    """The folder of recorded public data sets, named by FEDGE_DATA."""
    named = os.environ.get("FEDGE_DATA")
    if not named or not Path(named).is_dir():
        pytest.skip("FEDGE_DATA names no folder with the public data sets")
    return Path(named)
