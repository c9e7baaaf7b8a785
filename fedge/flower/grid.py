"""What fedge asks of a Flower grid, and the grid a strategy gets to see."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedge.errors import ConfigError
from fedge.flower.identity import ensure_identity
from fedge.types import ClientId, RoundNum

PHASES = ("train", "evaluate", "statistics")


@dataclass(frozen=True)
class Group:
    """Which messages belong together: one phase of one attempt at one round.

    As text ``run_id/round_num/phase``, with ``/attempt`` appended from the second attempt on.
    """

    run_id: str
    round_num: RoundNum
    phase: str
    attempt: int = 1

    def __str__(self) -> str:
        text = f"{self.run_id}/{self.round_num}/{self.phase}"
        return text if self.attempt == 1 else f"{text}/{self.attempt}"

    @classmethod
    def parse(cls, text: str) -> Group:
        """Read what ``str`` wrote.

        Raises:
            ConfigError: If it is no group id of ours.
        """
        run_id, *rest = text.split("/")
        try:
            round_num, phase, attempt = int(rest[0]), rest[1], int((rest[2:] or ["1"])[0])
        except (IndexError, ValueError):
            raise ConfigError(f"group id {text!r} is not run/round/phase") from None
        if phase not in PHASES:
            raise ConfigError(f"group id {text!r}: phase must be one of {', '.join(PHASES)}")
        return cls(run_id, round_num, phase, attempt)


def node_id_of(client_id: ClientId) -> int:
    """Flower's number for a client: 63 bits of SHA-256, the same on every grid and restart."""
    return int.from_bytes(hashlib.sha256(client_id.encode()).digest()[:8], "big") >> 1


def message_id_of(group_id: str, node_id: int) -> str:
    """The id of the one message a group has for a node: stable, so pushing again is harmless."""
    return hashlib.sha256(f"{group_id}\0{node_id}".encode()).hexdigest()[:32]


class FleetGrid(Grid):
    """Flower's grid, with the few things a durable round loop needs besides.

    Rules every implementation keeps:

    - ``push_messages``: the id of a message is ``message_id_of(group_id, dst_node_id)``; pushing
      the same pair again returns the same id and changes nothing, whatever state the task is in.
      So a resumed run simply pushes its round again. The destination need not be connected.
    - ``pull_messages``: one reply per ready id, in the order asked, created lazily (a caller that
      takes one at a time holds one at a time). A failed task is a reply with an ``Error``. Ids
      that are not ready are left out. Replies stay until :meth:`cancel`, so pulling twice works.
    - Replies have the shape described in :mod:`fedge.flower.messages`.

    Attributes:
        gates_updates: Whether the grid has run :func:`fedge.update.check_update` on every update
            it calls ready. The coordinator does it otherwise.
    """

    gates_updates: bool = False

    @abstractmethod
    def clients(self) -> dict[int, ClientId]:
        """Node id -> client_id of everybody connected and eligible for the next cohort now."""

    @abstractmethod
    def ready(self, ids: Iterable[str]) -> set[str]:
        """Those of the message ids that have an answer: an accepted reply or a failure."""

    @abstractmethod
    def wait(self, ids: Iterable[str], timeout_s: float) -> set[str]:
        """Block until all ids are ready or ``timeout_s`` passed; returns those that are."""

    @abstractmethod
    def cancel(self, ids: Iterable[str]) -> None:
        """Close tasks: unfinished ones are withdrawn, late replies refused, replies forgotten.

        Unknown ids are ignored.
        """

    def withdraw(self, ids: Iterable[str]) -> set[str]:
        """Close the tasks that have no answer, before replies are counted; those that have, stay.

        A grid that tells clients what became of their answers must do both in one step: a client
        that was told "accepted" is counted, one that is not counted is told it came too late.

        Returns:
            The tasks without an answer.
        """
        return set(ids) - self.ready(ids)

    def node_id(self, client_id: ClientId) -> int:
        """The node id of a client, connected or not."""
        return node_id_of(client_id)

    # Flower's abstract members that are the same for all our grids.

    def set_run(self, run: Any) -> None:  # noqa: ANN401 - Flower's Run is not public
        """Ignored: a run of fedge is named by the group id of its messages."""

    @property
    def run(self) -> Any:  # noqa: ANN401 - Flower's Run is not public
        """Not offered.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("a fedge grid has no Flower run; the run id is in a message's group id")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A new instruction message."""
        ensure_identity()
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of the connected, eligible clients, in client_id order."""
        clients = self.clients()
        return sorted(clients, key=clients.__getitem__)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, wait for all replies or ``timeout`` seconds, pull."""
        ids = list(self.push_messages(messages))
        while self.wait(ids, 3600.0 if timeout is None else timeout) != set(ids):
            if timeout is not None:
                break
        return self.pull_messages(ids)


class FrozenGrid(Grid):
    """The cohort of one phase, as a grid: all a strategy may ask is who takes part.

    Flower's strategies draw nodes from the grid they are given and wait until there are enough;
    here everybody drawn by fedge is there from the start, so they return at once.
    """

    def __init__(self, node_ids: Sequence[int]) -> None:
        self._node_ids = list(node_ids)

    def get_node_ids(self) -> Iterable[int]:
        """The cohort's node ids, in client_id order."""
        return list(self._node_ids)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A new instruction message; the coordinator sets its group."""
        ensure_identity()
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Any) -> None:  # noqa: ANN401, ARG002 - Flower's Run is not public
        """Refused."""
        raise self._refusal("set_run")

    @property
    def run(self) -> Any:  # noqa: ANN401 - Flower's Run is not public
        """Refused."""
        raise self._refusal("run")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:  # noqa: ARG002
        """Refused."""
        raise self._refusal("push_messages")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:  # noqa: ARG002
        """Refused."""
        raise self._refusal("pull_messages")

    def send_and_receive(
        self,
        messages: Iterable[Message],  # noqa: ARG002
        *,
        timeout: float | None = None,  # noqa: ARG002
    ) -> Iterable[Message]:
        """Refused."""
        raise self._refusal("send_and_receive")

    def _refusal(self, name: str) -> ConfigError:
        return ConfigError(
            f"the strategy called grid.{name}; return messages from configure_* instead, "
            "fedge sends them and collects the replies durably"
        )
