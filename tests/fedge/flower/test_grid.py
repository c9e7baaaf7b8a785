from __future__ import annotations

from collections.abc import Callable

import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedge.errors import ConfigError, WorkerDiedError
from fedge.flower import FleetGrid, FrozenGrid, messages
from fedge.flower.grid import Group, message_id_of, node_id_of
from fedge.simulation.grid import LocalGrid
from fedge.testing import LogisticEngine, logistic_clients, logistic_manifest, logistic_params
from fedge.types import Examples, Params

MANIFEST = logistic_manifest()
INITIAL = logistic_params(MANIFEST)


@pytest.mark.parametrize("group", [Group("r-1", 2, "train"), Group("r", 1, "evaluate", 3)])
def test_group_ids_are_read_back(group: Group) -> None:
    assert Group.parse(str(group)) == group
    assert str(Group("r", 1, "train")) == "r/1/train"
    assert str(Group("r", 1, "train", 2)) == "r/1/train/2"


@pytest.mark.parametrize("text", ["", "r", "r/x/train", "r/1", "r/1/dance", "r/1/train/x"])
def test_other_group_ids_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="group id"):
        Group.parse(text)


def test_ids_are_stable() -> None:
    assert 0 <= node_id_of("site-0") < 1 << 63
    assert node_id_of("site-0") == node_id_of("site-0") != node_id_of("site-1")
    assert message_id_of("r/1/train", 7) != message_id_of("r/1/train", 8)


def test_a_strategy_sees_the_cohort_and_nothing_else() -> None:
    grid = FrozenGrid([3, 1])
    assert isinstance(grid, Grid)
    assert list(grid.get_node_ids()) == [3, 1]
    assert [n.node_id for n in grid.get_nodes()] == [3, 1]
    assert grid.create_message(RecordDict(), "train", 3, "g").metadata.dst_node_id == 3
    attempts: list[Callable[[], object]] = [
        lambda: grid.push_messages([]),
        lambda: grid.pull_messages([]),
        lambda: grid.send_and_receive([], timeout=1),
        lambda: grid.set_run(None),
        lambda: grid.run,
    ]
    for attempt in attempts:
        with pytest.raises(ConfigError, match="the strategy called grid"):
            attempt()


def local_grid(engine: type[LogisticEngine] = LogisticEngine) -> LocalGrid:
    return LocalGrid(MANIFEST, INITIAL, logistic_clients(2), lambda: engine(MANIFEST, INITIAL))


def instruction(grid: FleetGrid, client: str, group: str = "run/1/train") -> Message:
    content = RecordDict(
        {"arrays": messages.array_record(INITIAL), "config": messages.instruction_config(0)}
    )
    return grid.create_message(content, "train", node_id_of(client), group)


def test_pushing_again_changes_nothing_and_pulling_takes_nothing_away() -> None:
    with local_grid() as grid:
        (first,) = grid.push_messages([instruction(grid, "site-0")])
        (second,) = grid.push_messages([instruction(grid, "site-0")])
        assert first == second == message_id_of("run/1/train", node_id_of("site-0"))
        assert grid.wait([first], 10) == {first} == grid.ready([first, "other"])
        once, twice = list(grid.pull_messages([first, first]))
        assert once is twice
        grid.cancel([first, "unknown"])
        assert grid.ready([first]) == set()
        assert list(grid.pull_messages([first])) == []


def test_send_and_receive_is_flowers() -> None:
    with local_grid() as grid:
        sent = [instruction(grid, "site-1"), instruction(grid, "site-0")]
        replies = list(grid.send_and_receive(sent))
        assert [m.metadata.src_node_id for m in replies] == [
            node_id_of("site-1"),
            node_id_of("site-0"),
        ]
        assert list(grid.get_node_ids()) == [node_id_of("site-0"), node_id_of("site-1")]
        with pytest.raises(ConfigError, match="no Flower run"):
            _ = grid.run


def test_a_dead_worker_is_an_answer_and_the_next_task_has_a_new_one() -> None:
    opened = []

    class Mortal(LogisticEngine):
        def __init__(self, *args: object) -> None:
            super().__init__(MANIFEST, INITIAL)
            opened.append(self)

        def set_params(self, params: Params) -> None:
            if len(opened) == 1:
                raise WorkerDiedError("killed by SIGSEGV")
            super().set_params(params)

    with local_grid(Mortal) as grid:
        dead, alive = grid.send_and_receive(
            [instruction(grid, "site-0"), instruction(grid, "site-1")]
        )
    assert dead.has_error()
    assert dead.error.reason == "killed by SIGSEGV"
    assert alive.has_content()
    assert len(opened) == 2


def test_clients_need_ids_of_their_own() -> None:
    clients = logistic_clients(1) * 2
    for wrong in ([], clients):
        with pytest.raises(ConfigError, match="an id of its own"):
            LocalGrid(MANIFEST, INITIAL, wrong, lambda: LogisticEngine(MANIFEST, INITIAL))
    with pytest.raises(ConfigError, match="workers is 0"):
        LocalGrid(
            MANIFEST,
            INITIAL,
            clients[:1],
            lambda: LogisticEngine(MANIFEST, INITIAL),
            workers=0,
        )
    with local_grid() as grid, pytest.raises(ConfigError, match="which is no client here"):
        grid.push_messages([instruction(grid, "nobody")])


def test_rows_are_preprocessed_once() -> None:
    calls = []

    class Counting(LogisticEngine):
        def preprocess(self, raw: Examples, site: Params | None = None) -> Examples:
            calls.append(raw)
            return super().preprocess(raw, site)

    with local_grid(Counting) as grid:
        for number in (1, 2, 3):
            list(grid.send_and_receive([instruction(grid, "site-0", f"run/{number}/train")]))
    assert len(calls) == 2
