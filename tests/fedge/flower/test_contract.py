"""What fedge uses of Flower, so that a new minor version is judged by a test, not by a user."""

from __future__ import annotations

import ast
from pathlib import Path

import flwr.app
import flwr.clientapp
import flwr.serverapp
from flwr.app import Message, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity

import fedge
from fedge.flower.identity import ensure_identity, set_message_id

PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}
PRIVATE = {"flwr.supercore.task_identity": {"identity.py"}}


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import of Flower in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
            found += [(str(node.module), alias.name) for alias in node.names]
        if isinstance(node, ast.Import):
            found += [(a.name, "") for a in node.names if a.name.split(".")[0] == "flwr"]
    return found


def test_only_public_names_of_flower_are_used_but_for_one() -> None:
    root = Path(fedge.__file__).parent
    files = [*root.rglob("*.py"), *(root.parent / "server").rglob("*.py")]
    used = {(module, name, f.name) for f in files for module, name in imports(f)}
    assert used
    for module, name, file in used:
        assert module in PUBLIC or file in PRIVATE.get(module, ()), (module, name, file)
        if module in PUBLIC and module != "flwr.serverapp.strategy" and name != "strategy":
            public = __import__(module, fromlist=["__all__"]).__all__
            assert name in public, (module, name)


def test_the_grid_has_the_members_we_implement() -> None:
    assert flwr.serverapp.Grid.__abstractmethods__ == {
        "create_message",
        "get_node_ids",
        "pull_messages",
        "push_messages",
        "run",
        "send_and_receive",
        "set_run",
    }


def test_the_task_identity_and_the_message_id_are_where_we_set_them() -> None:
    ensure_identity()
    assert (TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id) != (None,) * 3
    message = Message(RecordDict(), 7, "train", group_id="g")
    set_message_id(message, "abc")
    assert message.metadata.message_id == "abc"
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "abc"


def test_stateful_strategies_keep_their_memory_where_the_adapters_look() -> None:
    for cls in (flower.FedAdam, flower.FedAdagrad, flower.FedYogi):
        strategy = cls()
        assert (strategy.m_t, strategy.v_t) == (None, None)
    momentum = flower.FedAvgM()
    assert (momentum.current_arrays, momentum.momentum_vector) == (None, None)
