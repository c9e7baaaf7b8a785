"""Flower's grid over the device link: tasks and answers are rows of the store."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from flwr.app import ArrayRecord, Message

from fedge import tensors
from fedge.errors import FedgeError, StateError
from fedge.flower import messages
from fedge.flower.grid import FleetGrid, Group, message_id_of, node_id_of
from fedge.flower.identity import set_message_id
from fedge.types import ClientId, Params
from fedge.update import Update
from fedge.wire import serde
from fedge.wire.v1 import link_pb2 as pb
from fedge_server.blobs import Blobs
from fedge_server.store import ResultRow, Store, TaskRow

KINDS = {
    messages.TRAIN: pb.TASK_KIND_TRAIN,
    messages.EVALUATE: pb.TASK_KIND_EVALUATE,
    messages.STATISTICS: pb.TASK_KIND_STATISTICS,
}
POLL_S = 1.0


class StoppedError(FedgeError):
    """The server is shutting down; the run goes on at the next start."""


class LinkGrid(FleetGrid):
    """Pushes tasks to devices, and reads what they answered, through the store.

    Everything pushed survives a crash; the messages themselves do not, so a resumed run pushes
    its round again and gets the same ids.

    Attributes:
        bundle_digest: What the next tasks run.
        notify: Called with the clients that have new work or whose work was withdrawn.
    """

    gates_updates = True

    def __init__(self, store: Store, blobs: Blobs) -> None:
        self._store, self._blobs = store, blobs
        self.bundle_digest = ""
        self.notify: Callable[[Iterable[ClientId]], None] = _nobody
        self._messages: dict[str, Message] = {}
        self._changed = threading.Condition()
        self._stopped = False

    def on_answer(self) -> None:
        """Wake whoever waits: an answer was recorded, or a device came or went."""
        with self._changed:
            self._changed.notify_all()

    def stop(self) -> None:
        """Make every wait, now and later, raise :class:`StoppedError`."""
        self._stopped = True
        self.on_answer()

    def clients(self) -> dict[int, ClientId]:
        """Everybody connected, active, federated and with data."""
        return {
            node_id_of(n.client_id): n.client_id
            for n in self._store.nodes()
            if n.connected and n.status == "active" and n.mode == "federated" and n.has_data
        }

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Record tasks durably and tell their devices."""
        known = {node_id_of(n.client_id): n.client_id for n in self._store.nodes()}
        rows: list[TaskRow] = []
        digests: dict[int, str] = {}
        for message in messages:
            row = self._task(message, known, digests)
            set_message_id(message, row.task_id)
            self._messages[row.task_id] = message
            rows.append(row)
        self._store.add_tasks(rows)
        self.notify([row.client_id for row in rows])
        return [row.task_id for row in rows]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that are there, one at a time."""
        for task_id in list(message_ids):
            if task_id in self._messages and self.ready([task_id]):
                yield self._reply(self._messages[task_id], self._store.result(task_id))

    def ready(self, ids: Iterable[str]) -> set[str]:
        """Those of the tasks that are answered or withdrawn."""
        return self._store.closed(list(ids))

    def wait(self, ids: Iterable[str], timeout_s: float) -> set[str]:
        """Block until all are answered or the time is over."""
        wanted = set(ids)
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                if self._stopped:
                    raise StoppedError("the server is shutting down")
                found = self.ready(wanted)
                left_s = deadline - time.monotonic()
                if found == wanted or left_s <= 0:
                    return found
                self._changed.wait(min(left_s, POLL_S))

    def withdraw(self, ids: Iterable[str]) -> set[str]:
        """Close what is open, in one transaction: an upload is accepted before it or late."""
        withdrawn = self._store.cancel_tasks(list(ids))
        for row in withdrawn:
            self._messages.pop(row.task_id, None)
        self.notify([row.client_id for row in withdrawn])
        return {row.task_id for row in withdrawn}

    def cancel(self, ids: Iterable[str]) -> None:
        """Withdraw what is open and forget the updates of what is done."""
        task_ids = list(ids)
        withdrawn = self._store.cancel_tasks(task_ids)
        for task_id in task_ids:
            self._messages.pop(task_id, None)
            result = self._store.result(task_id)
            if result is not None and result.digest:
                self._blobs.remove_update(task_id, result.digest)
        self.notify([row.client_id for row in withdrawn])

    def _task(
        self, message: Message, known: dict[int, ClientId], digests: dict[int, str]
    ) -> TaskRow:
        meta = message.metadata
        group = Group.parse(meta.group_id)
        record = next(iter(message.content.array_records.values()), None)
        if meta.dst_node_id not in known:
            raise StateError(f"no enrolled device has node id {meta.dst_node_id}")
        config = messages.config_in(message)
        return TaskRow(
            task_id=message_id_of(meta.group_id, meta.dst_node_id),
            run_id=group.run_id,
            group_id=meta.group_id,
            round_num=group.round_num,
            kind=KINDS[meta.message_type],
            client_id=known[meta.dst_node_id],
            bundle_digest=self.bundle_digest,
            params_digest="" if record is None else self._params(record, digests),
            config_json=serde.encode_config(config).decode(),
        )

    def _params(self, record: ArrayRecord, digests: dict[int, str]) -> str:
        """Store the params of a message; a record that all of a cohort share is stored once."""
        if id(record) not in digests:
            data = tensors.dump(messages.params_of(record))
            digest = self._blobs.put(data)
            digests[id(record)] = digest
        return digests[id(record)]

    def _reply(self, message: Message, result: ResultRow | None) -> Message:
        if result is None:
            return messages.error_reply(message, "withdrawn before it was answered")
        if result.error:
            return messages.error_reply(message, result.error)
        extra = {"bytes_up": float(result.size_bytes)}
        if message.metadata.message_type == messages.TRAIN:
            update = Update.from_bytes(self._update_path(result).read_bytes())
            base = messages.params_of(messages.arrays_in(message))
            return messages.train_reply(message, update, base, extra)
        arrays: Params | None = tensors.load(result.tensors)[0] if result.tensors else None
        metrics = {**json.loads(result.metrics_json), **extra}
        return messages.metrics_reply(message, result.num_examples, metrics, arrays)

    def _update_path(self, result: ResultRow) -> Path:
        return self._blobs.update_path(result.task_id, result.digest)


def _nobody(clients: Iterable[ClientId]) -> None:
    """Told nobody: no link is open yet."""
