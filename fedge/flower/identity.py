"""The one place that touches Flower beyond its public names.

A ``flwr.app.Message`` can only be created in a process with a task identity, which Flower's own
processes have and ours do not; and a message's id has no public setter.
"""

from __future__ import annotations

from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID = 1  # what SuperLink uses for the server's side, too


def ensure_identity() -> None:
    """Give this process a task identity unless Flower already did."""
    for name in ("run_id", "node_id", "task_id"):
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:
            setattr(TaskIdentity, name, SERVER_NODE_ID)


def set_message_id(message: Message, message_id: str) -> None:
    """Stamp a message the way SuperLink would."""
    message.metadata.__dict__["_message_id"] = message_id
