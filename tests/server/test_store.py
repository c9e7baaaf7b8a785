"""The database: exactly once, across threads and after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedge.errors import StateError
from fedge_server.store import ModelRow, NodeRow, ResultRow, RunRow, Store, TaskRow, TokenRow


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "fedge.db")
    yield made
    made.close()


def token(uses: int = 1) -> TokenRow:
    return TokenRow("t1", "hash", "print", "pem", "", uses, uses, 1.0, 1e12)


def node(name: str) -> NodeRow:
    return NodeRow(name, "federated", "", "t1", "key", b"update-key", "active", 1.0)


def task(task_id: str, client_id: str = "a", round_num: int = 1) -> TaskRow:
    return TaskRow(task_id, "run-1", "run-1/1/train", round_num, 1, client_id, "b", "p", "{}")


def test_file_is_private_and_survives_reopening(tmp_path: Path) -> None:
    first = Store(tmp_path / "fedge.db")
    first.set_meta("key", "old")
    first.set_meta("key", "new")
    first.close()
    assert (tmp_path / "fedge.db").stat().st_mode & 0o777 == 0o600
    again = Store(tmp_path / "fedge.db")
    assert again.get_meta("key") == "new"
    assert again.get_meta("nothing") is None
    again.close()


def test_foreign_and_newer_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database at all, " * 100)
    with pytest.raises(StateError, match="not a fedge database"):
        Store(tmp_path / "text")
    newer = Store(tmp_path / "newer")
    newer.set_meta("schema", "2")
    newer.close()
    with pytest.raises(StateError, match="upgrade"):
        Store(tmp_path / "newer")


def test_a_token_admits_as_many_as_it_has_uses(store: Store) -> None:
    store.add_token(token(uses=3))
    admitted: list[str] = []

    def join(i: int) -> None:
        admitted.append(store.add_node(node(f"n{i}"), 5.0))

    threads = [threading.Thread(target=join, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(admitted) == ["admitted"] * 3 + ["spent"] * 5
    assert store.add_node(store.nodes()[0], 5.0) == "taken"
    assert len(store.nodes()) == 3
    (left,) = store.tokens()
    assert (left.uses_left, left.spent_s) == (0, 5.0)


def test_a_task_has_one_answer_whoever_is_first(store: Store) -> None:
    store.add_tasks([task("t")])
    verdicts: list[str] = []

    def answer(i: int) -> None:
        verdicts.append(store.add_result(ResultRow("t", "a", 1.0, digest=str(i))))

    threads = [threading.Thread(target=answer, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(verdicts) == ["accepted"] + ["duplicate"] * 7
    assert store.closed(["t", "other"]) == {"t"}


def test_pushing_again_changes_nothing(store: Store) -> None:
    store.add_tasks([task("t1"), task("t2"), task("t3", "b")])
    store.add_result(ResultRow("t1", "a", 1.0))
    assert [t.task_id for t in store.cancel_tasks(["t1", "t2"])] == ["t2"]
    store.add_tasks([task("t1"), task("t2")])
    assert store.open_tasks("a") == []
    assert [t.task_id for t in store.open_tasks("b")] == ["t3"]
    assert store.add_result(ResultRow("t2", "a", 1.0)) == "late"
    assert store.add_result(ResultRow("t1", "a", 1.0)) == "duplicate"
    assert store.closed(["t1", "t2", "t3"]) == {"t1", "t2"}


def test_downloads_are_for_models_and_own_tasks(store: Store) -> None:
    store.add_tasks([task("t1")])
    store.add_run(RunRow("run-1", "running", "{}", 1.0))
    store.append_event("run-1", {"event": "x"}, ModelRow("run-1", 1, "b", "model"))
    assert store.may_download("a", "p")
    assert not store.may_download("b", "p")
    assert store.may_download("b", "model")
    assert not store.may_download("b", "nothing")


def test_models_are_ordered_by_run_and_round(store: Store) -> None:
    assert store.newest_model() is None
    for run, created in (("run-1", 1.0), ("run-2", 2.0)):
        store.add_run(RunRow(run, "running", "{}", created))
        for number in (1, 2, 10):
            store.append_event(run, {"n": number}, ModelRow(run, number, "b", f"{run}-{number}"))
    assert store.newest_model() == ModelRow("run-2", 10, "b", "run-2-10")
    assert [m.round_num for m in store.models("run-1")] == [1, 2, 10]
    store.set_run_status("run-1", "finished")
    assert [r.status for r in store.runs()] == ["finished", "running"]


def test_bundles_are_kept_in_order_and_a_repeated_one_is_newest(store: Store) -> None:
    for digest in ("a", "b", "a"):
        store.add_bundle(digest, 1.0)
    assert store.bundles() == ["b", "a"]


_WRITER = """
import sys
from pathlib import Path
from fedge_server.store import Store
store = Store(Path(sys.argv[1]))
for n in range(int(sys.argv[2]), 10**6):
    store.append_event("run-1", {"n": n})
    print(n, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    path, acknowledged = tmp_path / "fedge.db", -1
    Store(path).close()
    for _ in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), str(acknowledged + 1)],
            stdout=subprocess.PIPE,
        )
        assert writer.stdout is not None
        acknowledged = int(writer.stdout.readline())
        time.sleep(0.05)
        writer.send_signal(signal.SIGKILL)
        acknowledged = max(acknowledged, *map(int, writer.stdout.read().split()[:-1] or [0]))
        writer.stdout.close()
        writer.wait()
        store = Store(path)
        found = [e["n"] for e in store.events("run-1")]
        store.close()
        assert found == list(range(len(found)))
        assert len(found) > acknowledged
        acknowledged = len(found) - 1
