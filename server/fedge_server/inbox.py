"""What devices send, checked and recorded once; the rules of the link without the network."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np

from fedge import rounds, tensors
from fedge.errors import ArtifactError, LinkError, RefusedError, UpdateError
from fedge.flower.grid import Group
from fedge.update import Update, check_update
from fedge.wire import serde
from fedge.wire.v1 import link_pb2 as pb
from fedge_server import pki
from fedge_server.blobs import Blobs
from fedge_server.fleet import MODES
from fedge_server.registry import Registry
from fedge_server.store import NodeRow, ResultRow, Store, TaskRow

MAX_MEAN_SQUARE = 1e36  # of a column: mean and deviation stay within float32
MAX_GATES = 2  # updates checked at a time: each is in memory once
_LOCKS = 64


class ForeignError(RefusedError):
    """What was asked for belongs to somebody else."""


class UnknownError(LinkError):
    """There is no such content or task."""


class Inbox:
    """Checks and records answers.

    Args:
        store: Tasks and results.
        blobs: Where updates are kept until their round is reduced.
        registry: Says how large and of what shape an update may be.
        max_norm: Largest ‖delta‖₂ the gate lets pass.
    """

    def __init__(self, store: Store, blobs: Blobs, registry: Registry, max_norm: float) -> None:
        self._store, self._blobs, self._registry = store, blobs, registry
        self._max_norm = max_norm
        self._gates = threading.BoundedSemaphore(MAX_GATES)
        self._finishing = [threading.Lock() for _ in range(_LOCKS)]  # a task has one of them

    def hello(self, node: NodeRow, hello: pb.Hello, now_s: float) -> None:
        """Remember what a device says of itself."""
        serde.check_hello(hello)
        if MODES[hello.mode] != node.mode:
            raise LinkError(f"device {node.client_id} joined as {node.mode}; join anew to change")
        self._store.update_node(
            node.client_id,
            engine=hello.engine,
            has_data=hello.has_data,
            num_examples=min(hello.num_examples, 1 << 40),
            facts_json=json.dumps({**hello.facts, "fedge": hello.fedge_version}, sort_keys=True),
            seen_s=now_s,
        )

    def readable(self, node: NodeRow, digest: str) -> Path:
        """The file with this content, if the device may see it.

        Raises:
            UnknownError: If there is none, or it is none of the device's business.
        """
        serde.check_digest("digest", digest)
        path = self._registry.find(digest)
        if path is None and self._store.may_download(node.client_id, digest):
            path = self._blobs.path(digest)
        if path is None or not path.is_file():
            raise UnknownError(f"no content {digest[:12]}… for {node.client_id}")
        return path

    def result(self, node: NodeRow, result: pb.TaskResult) -> str:
        """Record a small answer."""
        serde.check_result(result)
        task = self._task(node, result.task_id)
        if task.kind == pb.TASK_KIND_TRAIN:
            raise LinkError("broken message: a train task is answered by an upload")
        try:
            self._check_answer(task, result)
        except (UpdateError, ArtifactError) as exc:
            return self._store.add_result(self._refusal(task, serde.one_line(str(exc))))
        row = ResultRow(
            task_id=task.task_id,
            client_id=node.client_id,
            received_s=time.time(),
            num_examples=min(result.num_examples, 1 << 40),
            metrics_json=json.dumps(dict(result.metrics)),
            tensors=result.tensors,
            size_bytes=result.ByteSize(),
        )
        return self._store.add_result(row)

    def failed(self, node: NodeRow, failed: pb.TaskFailed) -> str:
        """Record that a device could not do a task."""
        serde.check_failed(failed)
        task = self._task(node, failed.task_id)
        text = serde.one_line(f"{failed.error}: {failed.message}")
        return self._store.add_result(self._refusal(task, text))

    def known(self, node: NodeRow, header: pb.UploadHeader) -> pb.UploadReply | None:
        """The answer to an upload whose task is over already, without reading it."""
        task = self._task(node, header.task_id)
        if task.kind != pb.TASK_KIND_TRAIN:
            raise LinkError("broken message: only a train task takes an upload")
        return None if task.state == "open" else self._verdict(task)

    def begin(self, node: NodeRow, header: pb.UploadHeader) -> serde.Receiver:
        """Check an upload's header and its signature; returns where its chunks go."""
        task = self._task(node, header.task_id)
        limit = self._registry.max_update_bytes(task.bundle_digest)
        serde.check_upload(header, node.client_id, limit)
        signed = serde.update_id(header.task_id, node.client_id, header.digest)
        if not pki.signed_by(node.update_key, header.signature, signed):
            raise ForeignError(f"the update is not signed by {node.client_id}'s key")
        return self._blobs.receiver(header.digest, header.total_bytes)

    def finish(
        self, node: NodeRow, header: pb.UploadHeader, receiver: serde.Receiver
    ) -> pb.UploadReply:
        """Make an update durable, let it through the gate, record it once."""
        try:
            with self._finishing[hash(header.task_id) % len(self._finishing)]:
                return self._finish(node, header, receiver)
        finally:
            receiver.discard()

    def forget_orphans(self) -> None:
        """Remove the updates no round waits for: what a crash left. At start, before the link."""
        waiting = {self._waiting_group(run.run_id) for run in self._store.runs()}
        for task_id, digest in self._blobs.updates():
            task, result = self._store.task(task_id), self._store.result(task_id)
            recorded = result is not None and result.digest == digest
            if task is None or task.group_id not in waiting or not recorded:
                self._blobs.remove_update(task_id, digest)

    def _waiting_group(self, run_id: str) -> str:
        """The group whose updates a run has not reduced yet."""
        run = rounds.replay([rounds.from_json(e) for e in self._store.events(run_id)])
        if run.phase is not rounds.Phase.TRAINING:
            return ""
        return str(Group(run_id, run.round_num, "train", run.attempt))

    def _finish(
        self, node: NodeRow, header: pb.UploadHeader, receiver: serde.Receiver
    ) -> pb.UploadReply:
        task = self._task(node, header.task_id)
        if task.state != "open":  # answered, or its round closed, while this was arriving
            return self._verdict(task)
        path = self._blobs.update_path(task.task_id, header.digest)
        receiver.commit(path)
        try:
            with self._gates:
                update = self._gate(node, task, path)
        except (UpdateError, ArtifactError) as exc:
            path.unlink(missing_ok=True)
            self._store.add_result(self._refusal(task, serde.one_line(str(exc))))
            return self._verdict(task)
        row = ResultRow(
            task_id=task.task_id,
            client_id=node.client_id,
            received_s=time.time(),
            update_id=header.update_id,
            digest=header.digest,
            num_examples=update.num_examples,
            metrics_json=json.dumps(update.metrics),
            size_bytes=header.total_bytes,
        )
        if self._store.add_result(row) == "accepted":
            return pb.UploadReply(verdict=pb.VERDICT_ACCEPTED)
        path.unlink(missing_ok=True)  # its round closed meanwhile
        return self._verdict(task)

    def _check_answer(self, task: TaskRow, result: pb.TaskResult) -> None:
        """Refuse statistics that could not be added to the others'; scores carry no tensors."""
        if task.kind != pb.TASK_KIND_STATISTICS:
            _want(not result.tensors, "scores carry no tensors")
            return
        (spec, *_) = self._registry.manifest(task.bundle_digest).raw_inputs
        told = tensors.load(result.tensors)[0]
        _want(told.keys() == {"sum", "sumsq"}, f"statistics hold {sorted(told)[:5]}")
        for name, values in told.items():
            _want(values.dtype == np.float64, f"{name} is {values.dtype}, wanted float64")
            _want(values.shape == spec.shape[1:], f"{name} has shape {values.shape}")
            bound = MAX_MEAN_SQUARE * max(1, result.num_examples)
            _want(bool((np.abs(values) <= bound).all()), f"{name} is not finite or too large")

    def _gate(self, node: NodeRow, task: TaskRow, path: Path) -> Update:
        update = Update.from_bytes(path.read_bytes())
        if (update.client_id, update.round_num) != (node.client_id, task.round_num):
            raise UpdateError(
                f"update refused: it is {update.client_id}'s of round {update.round_num}, "
                f"wanted {node.client_id}'s of round {task.round_num}"
            )
        shapes = self._registry.manifest(task.bundle_digest).shared_shapes()
        check_update(update, shapes, self._max_norm)
        return update

    def _verdict(self, task: TaskRow) -> pb.UploadReply:
        result = self._store.result(task.task_id)
        if result is None:
            return pb.UploadReply(verdict=pb.VERDICT_LATE, message="the round has closed")
        if result.error:
            return pb.UploadReply(verdict=pb.VERDICT_REFUSED, message=result.error)
        return pb.UploadReply(verdict=pb.VERDICT_DUPLICATE, message="accepted before")

    def _refusal(self, task: TaskRow, error: str) -> ResultRow:
        return ResultRow(task.task_id, task.client_id, time.time(), error=error)

    def _task(self, node: NodeRow, task_id: str) -> TaskRow:
        serde.check_task_id(task_id)
        task = self._store.task(task_id)
        if task is None:
            raise UnknownError(f"no task {task_id}")
        if task.client_id != node.client_id:
            raise ForeignError(f"task {task_id} is not {node.client_id}'s")
        return task


def _want(ok: bool, message: str) -> None:
    if not ok:
        raise UpdateError(f"answer refused: {message}")
