"""The worker process dies; the caller does not."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fedge.config import TrainConfig
from fedge.engines import WorkerEngine, find_training_python
from fedge.engines.interpreters import interpreter_for
from fedge.errors import EngineError, WorkerDiedError
from fedge.types import Examples

LONG = TrainConfig(lr=1e-4, batch_size=4, steps=50_000_000)
SHORT = TrainConfig(lr=0.01, batch_size=8, epochs=1)


@pytest.fixture
def engine(mlp: Any, engine_name: str) -> Iterator[WorkerEngine]:
    bundle = mlp.bundle("sgd")
    opened = WorkerEngine(bundle, engine_name, interpreter_for(engine_name))
    yield opened
    opened.close()


def test_kill_in_the_midst_of_training_is_an_error_and_a_new_worker_takes_over(
    engine: WorkerEngine, mlp: Any
) -> None:
    data, first = mlp.data(64), engine.pid
    killer = threading.Timer(0.5, os.kill, (first, signal.SIGKILL))
    killer.start()
    began = time.monotonic()
    with pytest.raises(WorkerDiedError, match="died during train: killed by SIGKILL"):
        engine.train(data, LONG, 1)
    assert time.monotonic() - began < 20
    with pytest.raises(WorkerDiedError):
        engine.get_params()
    engine.reopen()
    assert engine.pid != first
    initial = mlp.bundle("sgd").initial_params()
    assert all(np.array_equal(v, initial[n]) for n, v in engine.get_params().items())
    assert engine.train(data, SHORT, 1).steps == 8


def test_a_data_set_crosses_the_pipe_once(engine: WorkerEngine, mlp: Any) -> None:
    data = mlp.data(64)
    sent = _count_puts(engine)
    for seed in range(3):
        engine.train(data, SHORT, seed)
        engine.evaluate(data)
    ready = engine.preprocess(data)
    engine.train(ready, SHORT, 1)
    assert sent == ["put"]
    for seed in range(3):  # new objects, equal in value or not, are sent
        engine.evaluate(mlp.data(8, seed))
    assert sent == ["put"] * 4


def test_old_data_sets_make_room(
    engine: WorkerEngine, mlp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = mlp.data(64), mlp.data(64, 1)
    monkeypatch.setattr(engine._kept, "_limit", 20_000)
    sent = _count_puts(engine)
    wanted = [engine.evaluate(d).loss for d in (one, two)]
    assert [engine.evaluate(d).loss for d in (one, two, two)] == [*wanted, wanted[1]]
    assert sent == ["put"] * 4


def test_an_engine_may_be_shared_by_threads(engine: WorkerEngine, mlp: Any) -> None:
    sets = [mlp.data(16, seed) for seed in range(4)]
    wanted = [engine.evaluate(d).loss for d in sets]
    found: dict[int, list[float]] = {}

    def work(number: int) -> None:
        found[number] = [engine.evaluate(sets[number]).loss for _ in range(20)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [wanted[n]] * 20 for n in range(4)}


def test_the_worker_is_gone_after_closing(mlp: Any, engine_name: str) -> None:
    engine = WorkerEngine(mlp.bundle("sgd"), engine_name, interpreter_for(engine_name))
    pid = engine.pid
    engine.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_engine_in_the_wrong_interpreter_is_refused(mlp: Any) -> None:
    if find_training_python() is None:
        pytest.skip("no interpreter with onnxruntime-training-cpu is installed")
    with pytest.raises(EngineError, match=r"ort-training.*interpreter that has 'ort'"):
        WorkerEngine(mlp.bundle("sgd"), "ort-training", sys.executable)


def test_a_foreign_array_type_is_a_data_error(engine: WorkerEngine) -> None:
    from fedge.errors import DataError

    with pytest.raises(DataError, match="cannot be sent"):
        engine.evaluate(Examples({"x": np.zeros((1, 64), complex)}, np.zeros(1)))


def _count_puts(engine: WorkerEngine) -> list[str]:
    sent: list[str] = []
    plain = engine._call

    def counted(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "put":
            sent.append(name)
        return plain(name, *args, **kwargs)

    engine._call = counted  # type: ignore[method-assign]
    return sent
