"""The resident client: stays connected, takes work, delivers results. Imports nothing numeric.

Three loops run side by side: one keeps the connection (see :mod:`fedge_client.phases`), one does
the work, one job after another, and one delivers the outbox. Work goes on while the connection
is down; what it needs from the server waits for the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import fedge
from fedge.errors import EngineError, FedgeError, LinkError, RefusedError, StateError
from fedge.wire import serde
from fedge.wire.v1 import link_pb2 as pb
from fedge_client import enroll
from fedge_client.link import Link, NotRetryableError, Stream
from fedge_client.outbox import Entry
from fedge_client.phases import Phase, step
from fedge_client.state import Identity, State
from fedge_client.tasks import Desk, Readiness

BACKOFF_S, BACKOFF_MAX_S = 0.5, 30.0
STEADY = 10  # a connection that held this many waits begins with the shortest one again
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
PATIENCE_S = 2.0  # see Link.upload; only after an attempt that failed
_KEPT_ANSWERS = 32  # small answers a server that crashed may ask for again
_MAX_WAITING = 256  # jobs
_VERDICTS = {
    pb.VERDICT_ACCEPTED: "accepted",
    pb.VERDICT_DUPLICATE: "had been accepted before",
    pb.VERDICT_LATE: "came too late",
    pb.VERDICT_REFUSED: "was refused",
}
Report = Callable[[str], None]
T = TypeVar("T")


class Backoff:
    """Waits that double, a little random so that devices do not come all at once."""

    def __init__(self) -> None:
        self.wait_s = BACKOFF_S

    async def wait(self) -> None:
        """Wait once."""
        await asyncio.sleep(self.wait_s * random.uniform(0.5, 1.0))
        self.wait_s = min(2 * self.wait_s, BACKOFF_MAX_S)


class Session:
    """One client, running.

    Args:
        state: Its folder; the caller holds its lock.
        identity: Who it is.
        desk: Does the tasks.
        report: Takes one line of progress.
    """

    def __init__(self, state: State, identity: Identity, desk: Desk, report: Report) -> None:
        self._state, self._identity, self._desk, self._report = state, identity, desk, report
        self._phase = Phase.OFFLINE
        self._link: Link | None = None
        self._stream: Stream | None = None
        self._online = asyncio.Event()
        self._undelivered = asyncio.Event()
        self._jobs: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._tasks: dict[str, pb.Task] = {}  # waiting or being done
        self._answers: OrderedDict[str, pb.DeviceEvent] = OrderedDict()
        self._current: tuple[str, asyncio.Task[None]] | None = None
        before = state.read_note("session.json")
        self._status: dict[str, Any] = {
            "pid": os.getpid(),
            "updates_sent": int(before.get("updates_sent", 0)),
            "bytes_sent": int(before.get("bytes_sent", 0)),
        }
        desk.fetch = self._fetch
        if desk.outbox is not None and any(True for _ in desk.outbox):
            self._undelivered.set()

    async def run(self) -> None:
        """Take part until cancelled.

        Raises:
            RefusedError: If the server does not admit this client any more.
            DataError: If the data source does not fit the bundle at the start.
            FedgeError: If the client cannot go on for another reason of its own.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._stay_connected())
                group.create_task(self._work())
                group.create_task(self._deliver())
        except ExceptionGroup as group_error:
            raise _first(group_error) from group_error
        finally:
            await self._desk.close()
            self._move("stop")

    async def _stay_connected(self) -> None:
        backoff = Backoff()
        while True:
            self._move("dial")
            began_s = time.monotonic()
            try:
                await self._talk()
            except (RefusedError, NotRetryableError) as exc:
                self._note(last_error=str(exc))
                self._move("refused")
                raise
            except LinkError as exc:
                held_s = time.monotonic() - began_s
                if self._phase is Phase.ONLINE and held_s > STEADY * backoff.wait_s:
                    backoff = Backoff()
                self._note(last_error=str(exc))
                self._move("lost")
                self._report(f"no connection ({exc}); trying again")
            await backoff.wait()

    async def _talk(self) -> None:
        """One connection, from hello to its end."""
        link = enroll.open_link(self._state, self._identity)
        beat: asyncio.Task[None] | None = None
        stream: Stream | None = None
        try:
            stream = await link.session(self._hello())
            self._move("opened")
            welcome = await self._greet(stream)
            self._link, self._stream = link, stream
            self._online.set()
            beat = asyncio.create_task(_beat(stream, welcome.heartbeat_s or serde.HEARTBEAT_S))
            await self._renew(link, welcome.server_time_s)
            silence_s = 3.0 * (welcome.heartbeat_s or serde.HEARTBEAT_S)
            while True:
                self._on_event(await stream.receive(silence_s))
        finally:
            self._online.clear()
            self._link = self._stream = None
            if beat is not None:
                beat.cancel()
            if stream is not None:
                stream.close()
            await link.close()

    async def _greet(self, stream: Stream) -> pb.Welcome:
        event = await stream.receive(3.0 * serde.HEARTBEAT_S)
        self._move(event.WhichOneof("event") or "nothing")
        welcome = event.welcome
        serde.check_welcome(welcome)
        self._report(f"connected to {self._identity.address} as {welcome.client_id}")
        self._note(last_error="", last_contact_s=time.time())
        if welcome.bundle_digest:
            self._jobs.put_nowait(lambda: self._prepare(welcome.bundle_digest))
        else:
            self._report("the server has no bundle yet")
        return welcome

    async def _renew(self, link: Link, server_time_s: float) -> None:
        if not enroll.needs_renewal(self._state, server_time_s):
            return
        try:
            await enroll.renew(self._state, link, self._identity)
            self._report("certificate renewed")
        except (LinkError, OSError) as exc:
            self._report(f"certificate not renewed: {exc}")

    def _on_event(self, event: pb.ServerEvent) -> None:
        kind = event.WhichOneof("event") or "nothing"
        self._phase = step(self._phase, kind)
        if self._jobs.qsize() >= _MAX_WAITING:
            raise LinkError(f"broken protocol: the server asks for more than {_MAX_WAITING} things")
        if kind == "task":
            self._on_task(event.task)
        elif kind == "cancel":
            self._on_cancel(event.cancel)
        elif kind == "model":
            model = event.model
            self._jobs.put_nowait(lambda: self._keep_model(model))

    def _on_task(self, task: pb.Task) -> None:
        serde.check_task(task)
        if task.task_id in self._tasks:
            return
        if task.task_id in self._answers:
            self._jobs.put_nowait(lambda: self._send(self._answers[task.task_id]))
            return
        self._tasks[task.task_id] = task
        self._jobs.put_nowait(lambda: self._run_task(task))

    def _on_cancel(self, cancel: pb.Cancel) -> None:
        self._tasks.pop(cancel.task_id, None)
        if self._current is not None and self._current[0] == cancel.task_id:
            self._desk.abort()
            self._current[1].cancel()

    async def _work(self) -> None:
        while True:
            job = await self._jobs.get()
            await job()

    async def _prepare(self, bundle_digest: str) -> None:
        first = self._desk.ready is None
        try:
            ready = await self._stored(lambda: self._desk.prepare(bundle_digest))
        except FedgeError as exc:
            if first and not isinstance(exc, LinkError):
                raise
            self._report(f"not ready: {exc}")
            self._note(last_error=str(exc))
            return
        self._note(engine=ready.engine, engine_reason=ready.reason, rows=ready.train_rows)
        if first:
            self._report(_describe(ready))
        await self._send(pb.DeviceEvent(hello=self._hello()))

    async def _keep_model(self, model: pb.ModelReady) -> None:
        try:
            tasks = list(self._tasks.values())
            await self._stored(lambda: self._desk.keep_model(model, tasks))
            self._note(model_round=model.round_num)
            self._report(f"model of round {model.round_num} is here")
        except FedgeError as exc:
            self._report(f"model of round {model.round_num} not fetched: {exc}")

    async def _run_task(self, task: pb.Task) -> None:
        if task.task_id not in self._tasks:
            return  # cancelled while it waited
        doing = asyncio.create_task(self._answer(task))
        self._current = (task.task_id, doing)
        try:
            await doing
        except asyncio.CancelledError:
            if (me := asyncio.current_task()) is not None and me.cancelling():
                doing.cancel()
                raise
            self._report(f"round {task.round_num}: cancelled by the server")
        finally:
            self._current = None
            self._tasks.pop(task.task_id, None)
            self._note(doing="")

    async def _answer(self, task: pb.Task) -> None:
        self._note(doing=pb.TaskKind.Name(task.kind), round_num=task.round_num)
        try:
            result, line = await self._stored(lambda: self._desk.do(task))
        except FedgeError as exc:
            self._note(last_error=str(exc))
            result, line = failure(task, exc), f"failed: {exc}"
        self._report(f"round {task.round_num}: {line}")
        if result is None:
            self._undelivered.set()
            return
        self._answers[task.task_id] = result
        if len(self._answers) > _KEPT_ANSWERS:
            self._answers.popitem(last=False)
        await self._send(result)

    async def _send(self, event: pb.DeviceEvent) -> None:
        """Say something if there is a connection; a server asks again for what it lacks."""
        try:
            if self._stream is not None:
                await self._stream.send(event)
        except LinkError as exc:
            self._report(f"not sent: {exc}")

    async def _deliver(self) -> None:
        while True:
            await self._undelivered.wait()
            self._undelivered.clear()
            for entry in [] if self._desk.outbox is None else list(self._desk.outbox):
                await self._deliver_one(entry)

    async def _deliver_one(self, entry: Entry) -> None:
        upload = self._desk.signed(entry)
        patience_s, backoff, tried = 0.0, Backoff(), self._link
        while True:
            await self._online.wait()
            try:
                link = self._link
                if link is None:
                    continue
                if link is not tried:
                    backoff, tried = Backoff(), link
                reply = await link.upload(upload.header, upload.path, patience_s)
            except RefusedError:
                raise  # not admitted any more; the update stays
            except NotRetryableError as exc:
                verdict = f"cannot be delivered: {exc}"
                break
            except LinkError as exc:
                self._report(f"round {entry.round_num}: update waits ({exc})")
                patience_s = PATIENCE_S
                await backoff.wait()
            else:
                verdict = _VERDICTS.get(reply.verdict, "got no verdict")
                verdict += f" ({reply.message})" if reply.message else ""
                break

        async def forget() -> None:
            self._desk.delivered(entry)

        await self._stored(forget)
        sent = self._status["updates_sent"] + 1, self._status["bytes_sent"] + entry.bytes
        self._note(updates_sent=sent[0], bytes_sent=sent[1], last_contact_s=time.time())
        self._report(f"round {entry.round_num}: update of {entry.bytes} bytes {verdict}")

    async def _fetch(self, digest: str, receiver: serde.Receiver) -> None:
        """Content by digest, however many connections it takes."""
        backoff, began = Backoff(), receiver.offset
        while True:
            await self._online.wait()
            try:
                if self._link is not None:
                    await self._link.download(digest, receiver)
                    return
            except (RefusedError, NotRetryableError):
                raise
            except LinkError as exc:
                self._report(f"download interrupted at byte {receiver.offset} ({exc})")
            if receiver.offset > began:
                backoff, began = Backoff(), receiver.offset
            await backoff.wait()

    async def _stored(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do what writes to the state folder; while the disk is full, say so and try again.

        Raises:
            StateError: If it cannot be written or read for another reason.
        """
        backoff = Backoff()
        while True:
            try:
                return await work()
            except OSError as exc:
                text = f"{self._state.root} cannot be used: {exc.strerror or exc}"
                if exc.errno not in _DISK_FULL:
                    raise StateError(text) from exc
            self._report(f"{text}; trying again")
            self._note(last_error=text)
            await backoff.wait()

    def _hello(self) -> pb.Hello:
        ready = self._desk.ready
        return pb.Hello(
            fedge_version=fedge.__version__,
            wire_version=serde.WIRE_VERSION,
            mode=enroll.wire_mode(self._identity.mode),
            engine="" if ready is None else ready.engine,
            has_data=self._desk.has_data,
            num_examples=0 if ready is None else ready.train_rows,
            facts=enroll.facts(),
        )

    def _move(self, event: str) -> None:
        self._phase = step(self._phase, event)
        self._note(phase=self._phase.value)

    def _note(self, **changes: object) -> None:
        self._status.update(changes)
        with contextlib.suppress(OSError):  # a full disk; what a note says may be lost
            self._state.note("session.json", self._status)


async def _beat(stream: Stream, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        try:
            await stream.send(pb.DeviceEvent(heartbeat=pb.Heartbeat()))
        except LinkError:
            return  # the reading side notices too


def failure(task: pb.Task, exc: FedgeError) -> pb.DeviceEvent:
    """The report of a failure; what ONNX Runtime said may quote a value, and stays here."""
    said = (
        str(exc) if type(exc) is not EngineError else "the engine failed; the client's log says how"
    )
    failed = pb.TaskFailed(
        task_id=task.task_id, error=type(exc).__name__, message=serde.one_line(said)
    )
    return pb.DeviceEvent(failed=failed)


def _describe(ready: Readiness) -> str:
    rows = f"{ready.train_rows} training rows" if ready.train_rows else "no data source configured"
    return f"ready: engine {ready.engine} ({ready.reason}); {rows}"


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The reason behind a group: our own error before anything else."""
    flat: list[BaseException] = []
    for exc in group.exceptions:
        flat += [_first(exc)] if isinstance(exc, BaseExceptionGroup) else [exc]
    return next((e for e in flat if isinstance(e, FedgeError)), flat[0])
