"""Flower's own grid as a fleet grid: the same rounds over a stock SuperLink."""

from __future__ import annotations

import time
from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from fedge.errors import LinkError
from fedge.flower.grid import FleetGrid
from fedge.types import ClientId

POLL_S = 0.2  # Flower's own loop asks every 3 s


class StockGrid(FleetGrid):
    """A fleet of SuperNodes. A client is called by its node id, in decimal.

    Flower hands a reply over once, so replies are held here until their round closes: memory
    grows with the cohort, and tasks end with the process.

    Args:
        grid: What a ServerApp was given.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._pushed: dict[tuple[str, int], str] = {}
        self._open: set[str] = set()
        self._replies: dict[str, Message] = {}

    def clients(self) -> dict[int, ClientId]:
        """Every SuperNode that is connected."""
        return {int(node): str(node) for node in self._grid.get_node_ids()}

    def node_id(self, client_id: ClientId) -> int:
        """Flower's number."""
        return int(client_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push what was not pushed before.

        Raises:
            LinkError: If the SuperLink refuses a message.
        """
        wanted = [((m.metadata.group_id, m.metadata.dst_node_id), m) for m in messages]
        new = [(key, m) for key, m in wanted if key not in self._pushed]
        ids = list(self._grid.push_messages([m for _, m in new]))
        if len(ids) != len(new) or not all(ids):
            raise LinkError(f"the SuperLink took {len(ids)} of {len(new)} messages; see its log")
        self._pushed.update(
            (key, message_id) for (key, _), message_id in zip(new, ids, strict=True)
        )
        self._open.update(ids)
        return [self._pushed[key] for key, _ in wanted]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there."""
        for message_id in message_ids:
            if message_id in self._replies:
                yield self._replies[message_id]

    def ready(self, ids: Iterable[str]) -> set[str]:
        """Ask the SuperLink for news."""
        if self._open:
            for reply in self._grid.pull_messages(sorted(self._open)):
                self._replies[reply.metadata.reply_to_message_id] = reply
            self._open -= self._replies.keys()
        return self._replies.keys() & set(ids)

    def wait(self, ids: Iterable[str], timeout_s: float) -> set[str]:
        """Poll until all are there."""
        wanted, end = set(ids), time.monotonic() + timeout_s
        while (there := self.ready(wanted)) != wanted and (left := end - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left))
        return there

    def cancel(self, ids: Iterable[str]) -> None:
        """Forget; Flower cannot withdraw a task, its reply will be ignored."""
        for message_id in ids:
            self._open.discard(message_id)
            self._replies.pop(message_id, None)
