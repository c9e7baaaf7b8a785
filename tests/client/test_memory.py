"""A client adapts to its memory, or refuses in one line before anything is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from fedge.artifacts.bundle import Bundle
from fedge.artifacts.estimate import AS_USUAL, MB, estimate
from fedge.artifacts.manifest import Manifest
from fedge.errors import ConfigError, EngineError
from fedge_client import memory
from fedge_client.config import ClientConfig, DataConfig, EngineConfig
from fedge_client.outbox import Outbox
from fedge_client.state import Identity, State
from fedge_client.tasks import Desk, Readiness

FEDERATED = Identity("pi", "f" * 16, "10.0.0.5", 8443, "federated", "ab" * 32)


@pytest.fixture
def heavy(bundle: Callable[..., Bundle]) -> Manifest:
    """A manifest whose steps hold a megabyte per row."""
    manifest = bundle().manifest
    costs = tuple(dataclasses.replace(c, peaks=((MB, 0),)) for c in manifest.costs)
    return dataclasses.replace(manifest, costs=costs)


def budget(memory_mb: int) -> memory.Budget:
    return memory.Budget(EngineConfig("ort", memory_mb=memory_mb))


def test_with_memory_enough_nothing_changes(heavy: Manifest) -> None:
    assert budget(4096).plan(heavy, 32, 100) == AS_USUAL


def test_with_less_a_batch_is_cut_and_few_rows_are_scored(heavy: Manifest) -> None:
    frugal = budget(90).plan(heavy, 32, 100)
    assert frugal.pieces in (2, 4, 8)
    assert frugal.score_rows < 32
    assert estimate(heavy, 32, frugal).peak_bytes <= 90 * MB


def test_what_fits_in_no_way_is_refused_in_one_line(heavy: Manifest) -> None:
    with pytest.raises(EngineError, match=r"takes about \d+ MB.*this device gives 64 MB") as found:
        budget(64).plan(heavy, 32, 100)
    assert "\n" not in str(found.value)
    assert budget(64).scoring(heavy, 32, 100).score_rows == 16


def test_running_statistics_are_never_cut(heavy: Manifest) -> None:
    params = (dataclasses.replace(heavy.params[0], trainable=False, running=True), heavy.params[1])
    with pytest.raises(EngineError, match="use batch size"):
        budget(90).plan(dataclasses.replace(heavy, params=params), 32, 100)


def test_the_task_fails_before_a_worker_is_started(
    heavy: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    state = State(tmp_path / "state", create=True)
    config = ClientConfig(DataConfig("r.csv", "y"), EngineConfig("ort", memory_mb=64))
    desk = Desk(state, FEDERATED, config, Outbox(state, FEDERATED))
    desk.ready = Readiness(heavy.digest, "ort", "", 100, 0)
    monkeypatch.setattr("fedge_client.tasks.read_manifest", lambda *_: heavy)
    with pytest.raises(EngineError, match="this device gives 64 MB"):
        asyncio.run(desk.call("train", heavy.digest, {"config": {"batch_size": 32}}))
    assert desk._workers.pid is None


def test_the_limit_on_a_worker_follows_the_setting() -> None:
    one, four = (EngineConfig("ort", threads=t, memory_mb=256) for t in (1, 4))
    assert memory.budget(one) == 256 * MB
    assert 256 * MB < (memory.address_limit(one) or 0) < (memory.address_limit(four) or 0)
    with pytest.raises(ConfigError, match="memory_mb"):
        EngineConfig("ort", memory_mb=-1)
