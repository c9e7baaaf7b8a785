"""The device link: one mutual-TLS port, the only module of the server that knows gRPC.

What may be asked is decided in :mod:`fedge_server.fleet`, what a message may hold in
:mod:`fedge.wire.serde`; what a device answers goes to the store before it is acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, TypeAlias

import grpc

from fedge.errors import FedgeError, LinkError, RefusedError, UpdateError
from fedge.wire import serde
from fedge.wire.v1 import link_pb2 as pb
from fedge.wire.v1 import link_pb2_grpc as rpc
from fedge_server.fleet import Fleet, Peer, TakenError
from fedge_server.inbox import ForeignError, Inbox, UnknownError
from fedge_server.pki import Pki
from fedge_server.registry import Registry
from fedge_server.store import NodeRow, Store, TaskRow

log = logging.getLogger(__name__)
HELLO_TIMEOUT_S = 30.0
CHUNK_TIMEOUT_S = 60.0  # between two parts of an upload
MAX_UPLOADS = 4  # of one device at a time; one, and what broken connections have left
REVOCATION_POLL_S = 0.5
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ReplacedError(FedgeError):
    """The same device opened another session."""


class ClosingError(FedgeError):
    """The server is shutting down."""


class BusyError(FedgeError):
    """The device asks for too much at a time."""


_CODES: tuple[tuple[type[FedgeError], grpc.StatusCode], ...] = (
    (ClosingError, grpc.StatusCode.UNAVAILABLE),
    (BusyError, grpc.StatusCode.UNAVAILABLE),
    (TakenError, grpc.StatusCode.ALREADY_EXISTS),
    (ForeignError, grpc.StatusCode.PERMISSION_DENIED),
    (UnknownError, grpc.StatusCode.NOT_FOUND),
    (RefusedError, grpc.StatusCode.UNAUTHENTICATED),
    (LinkError, grpc.StatusCode.INVALID_ARGUMENT),
)


class _Session:
    """One device's open stream."""

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id
        self.wake = asyncio.Event()
        self.sent: set[str] = set()
        self.model = ""
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def close(self, reason: FedgeError) -> None:
        """End the stream with this error."""
        if not self._end.done():
            self._end.set_exception(reason)

    async def ended(self) -> None:
        """Wait for :meth:`close` and raise its reason."""
        await asyncio.shield(self._end)


class Link(rpc.LinkServicer):
    """The service behind the port.

    Args:
        fleet: Rules of admission.
        store: Tasks, results, models.
        registry: Bundles.
        inbox: Where results and updates are checked and recorded.
        on_answer: Called after a task got its answer or a device came or went.
    """

    def __init__(
        self,
        fleet: Fleet,
        store: Store,
        registry: Registry,
        inbox: Inbox,
        on_answer: Callable[[], None],
    ) -> None:
        self._fleet, self._store, self._registry = fleet, store, registry
        self._inbox, self._on_answer = inbox, on_answer
        self._sessions: dict[str, _Session] = {}
        self._uploads: Counter[str] = Counter()
        self._loop = asyncio.get_running_loop()

    def wake(self, client_ids: Iterable[str] | None = None) -> None:
        """Have sessions look for new work; all of them by default. Callable from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is connected
            self._loop.call_soon_threadsafe(
                self._wake, None if client_ids is None else [*client_ids]
            )

    def close(self) -> None:
        """End all sessions; their devices try again until a server is there."""
        for session in self._sessions.values():
            session.close(ClosingError("the server is shutting down; it will be back"))

    async def watch_revocations(self) -> None:
        """Close the sessions of devices that the operator revokes, until cancelled."""
        while True:
            await asyncio.sleep(REVOCATION_POLL_S)
            for client_id in self._store.revoked() & self._sessions.keys():
                reason = f"device {client_id} was revoked by the operator"
                self._sessions[client_id].close(RefusedError(reason))

    # -- the four calls -----------------------------------------------------------------------

    async def Enroll(self, request: pb.EnrollRequest, context: Context) -> pb.EnrollReply:
        """Admit a device or renew its certificate."""
        async with _answering(context):
            peer = self._peer(context)
            return await asyncio.to_thread(self._fleet.enroll, peer, request, time.time())

    async def Session(self, _: object, context: Context) -> None:
        """Talk to a device until it leaves, is silent, is replaced or is revoked."""
        async with _answering(context):
            peer = self._peer(context)
            node = self._fleet.admit(peer, time.time())
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                event = await context.read()
            if event is grpc.aio.EOF or event.WhichOneof("event") != "hello":
                raise LinkError("broken message: a session begins with hello")
            self._on_hello(node, event.hello)
            session = self._enter(node.client_id)
            try:
                await self._converse(session, peer, context)
            finally:
                self._leave(session)

    async def Download(
        self, request: pb.DownloadRequest, context: Context
    ) -> AsyncIterator[pb.Chunk]:
        """Send a bundle's file, a signed manifest, or params this device may see."""
        async with _answering(context):
            node = self._node(context)
            path = self._inbox.readable(node, request.digest)
            for chunk in serde.iter_chunks(path, request.offset):
                yield chunk

    async def Upload(self, _: object, context: Context) -> pb.UploadReply:
        """Take one update, exactly once."""
        async with _answering(context):
            peer = self._peer(context)
            node = self._fleet.admit(peer, time.time())
            if node.mode == "personal":
                raise ForeignError(
                    f"device {node.client_id} is in personal mode: it uploads nothing"
                )
            with self._uploading(node.client_id):
                part = await _next_part(context)
                if part is None or part.WhichOneof("part") != "header":
                    raise LinkError("broken message: an upload begins with its header")
                reply = self._inbox.known(node, part.header)
                return reply or await self._take(peer, node, part.header, context)

    # -- inside -------------------------------------------------------------------------------

    async def _take(
        self, peer: Peer, node: NodeRow, header: pb.UploadHeader, context: Context
    ) -> pb.UploadReply:
        receiver = self._inbox.begin(node, header)
        try:
            while (part := await _next_part(context)) is not None:
                if part.WhichOneof("part") != "chunk":
                    raise LinkError("broken message: chunks follow the header")
                receiver.add(part.chunk)
            self._fleet.admit(peer, time.time())  # may have been revoked meanwhile
        except BaseException:
            receiver.discard()
            raise
        # From here on the file is the inbox's: a device that hangs up must not close it.
        finish = asyncio.to_thread(self._inbox.finish, node, header, receiver)
        reply = await asyncio.shield(finish)
        self._on_answer()
        self._wake([node.client_id])
        return reply

    @contextlib.contextmanager
    def _uploading(self, client_id: str) -> Iterator[None]:
        """Count a device's uploads, so that one device cannot fill the disk with halves of them."""
        if self._uploads[client_id] >= MAX_UPLOADS:
            raise BusyError(f"{client_id} has {MAX_UPLOADS} uploads under way; try again")
        self._uploads[client_id] += 1
        try:
            yield
        finally:
            self._uploads[client_id] -= 1
            self._uploads += Counter()  # forgets those at 0

    async def _converse(self, session: _Session, peer: Peer, context: Context) -> None:
        jobs = {
            asyncio.create_task(self._receive(session, peer, context)),
            asyncio.create_task(self._send(session, peer, context)),
            asyncio.create_task(session.ended()),
        }
        try:
            done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
        for job in done:
            job.result()

    async def _receive(self, session: _Session, peer: Peer, context: Context) -> None:
        while True:
            async with asyncio.timeout(3 * serde.HEARTBEAT_S):
                event = await context.read()
            if event is grpc.aio.EOF:
                return
            node = self._fleet.admit(peer, time.time())
            await self._on_event(session, node, event)

    async def _on_event(self, session: _Session, node: NodeRow, event: pb.DeviceEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "hello":
            self._on_hello(node, event.hello)
        elif kind == "heartbeat":
            self._store.update_node(node.client_id, seen_s=time.time())
        elif kind == "result":
            await asyncio.to_thread(self._inbox.result, node, event.result)
            session.sent.discard(event.result.task_id)
        elif kind == "failed":
            await asyncio.to_thread(self._inbox.failed, node, event.failed)
            session.sent.discard(event.failed.task_id)
        else:
            raise LinkError("broken message: an event of an unknown kind; upgrade the older side")
        self._on_answer()

    async def _send(self, session: _Session, peer: Peer, context: Context) -> None:
        await context.write(self._welcome(session.client_id))
        while True:
            for event in self._news(session):
                await context.write(event)
            try:  # not wait_for: in Python 3.11 it may swallow a cancellation
                async with asyncio.timeout(serde.HEARTBEAT_S):
                    await session.wake.wait()
                session.wake.clear()
            except TimeoutError:
                self._fleet.admit(peer, time.time())
                await context.write(pb.ServerEvent(heartbeat=pb.Heartbeat()))

    def _welcome(self, client_id: str) -> pb.ServerEvent:
        digest = self._registry.newest()
        return pb.ServerEvent(
            welcome=pb.Welcome(
                client_id=client_id,
                wire_version=serde.WIRE_VERSION,
                bundle_digest=digest or "",
                server_time_s=time.time(),
                max_chunk_bytes=serde.MAX_CHUNK_BYTES,
                max_update_bytes=self._registry.max_update_bytes(digest),
                heartbeat_s=serde.HEARTBEAT_S,
            )
        )

    def _news(self, session: _Session) -> list[pb.ServerEvent]:
        """What this session has not been told yet."""
        news = []
        model = self._store.newest_model()
        if model is not None and session.model != f"{model.run_id}/{model.round_num}":
            session.model = f"{model.run_id}/{model.round_num}"
            ready = pb.ModelReady(
                bundle_digest=model.bundle_digest,
                params_digest=model.params_digest,
                round_num=model.round_num,
            )
            news.append(pb.ServerEvent(model=ready))
        tasks = {t.task_id: t for t in self._store.open_tasks(session.client_id)}
        for task_id in session.sent - tasks.keys():
            session.sent.discard(task_id)
            row = self._store.task(task_id)
            if row is not None and row.state == "cancelled":
                cancel = pb.Cancel(task_id=task_id, reason="the round has closed")
                news.append(pb.ServerEvent(cancel=cancel))
        news += [
            pb.ServerEvent(task=_task(t)) for t in tasks.values() if t.task_id not in session.sent
        ]
        session.sent |= tasks.keys()
        return news

    def _peer(self, context: Context) -> Peer:
        certs = context.auth_context().get("x509_pem_cert")
        if not certs:
            raise RefusedError("no certificate was presented")
        return self._fleet.identify(next(iter(certs)))

    def _node(self, context: Context) -> NodeRow:
        return self._fleet.admit(self._peer(context), time.time())

    def _on_hello(self, node: NodeRow, hello: pb.Hello) -> None:
        self._inbox.hello(node, hello, time.time())
        self._on_answer()

    def _enter(self, client_id: str) -> _Session:
        old = self._sessions.get(client_id)
        if old is not None:
            old.close(ReplacedError(f"{client_id} opened another session"))
        session = self._sessions[client_id] = _Session(client_id)
        self._store.update_node(client_id, connected=True, seen_s=time.time())
        self._on_answer()
        return session

    def _leave(self, session: _Session) -> None:
        if self._sessions.get(session.client_id) is session:
            del self._sessions[session.client_id]
            self._store.update_node(session.client_id, connected=False, seen_s=time.time())
            self._on_answer()

    def _wake(self, client_ids: list[str] | None) -> None:
        for client_id in self._sessions.keys() if client_ids is None else client_ids:
            if client_id in self._sessions:
                self._sessions[client_id].wake.set()


async def listen(link: Link, fleet: Fleet, keys: Pki, address: str) -> tuple[grpc.aio.Server, int]:
    """Open the port.

    Args:
        link: The service.
        fleet: Says which certificates may connect, anew at every handshake.
        keys: The server's own.
        address: ``host:port``; port 0 takes a free one.

    Returns:
        The started server and its port.

    Raises:
        LinkError: If the port cannot be had.
    """

    def certificates() -> grpc.ServerCertificateConfiguration:
        pair = (keys.server_key_pem, keys.server_cert_pem)
        return grpc.ssl_server_certificate_configuration([pair], fleet.trusted_pem(time.time()))

    credentials = grpc.dynamic_ssl_server_credentials(
        certificates(), certificates, require_client_authentication=True
    )
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", serde.MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", serde.MAX_MESSAGE_BYTES),
            ("grpc.max_metadata_size", serde.MAX_METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", serde.MAX_METADATA_BYTES),
            ("grpc.max_concurrent_streams", 32),
            ("grpc.so_reuseport", 0),
        ],
    )
    rpc.add_LinkServicer_to_server(link, server)  # type: ignore[no-untyped-call]
    try:
        port = server.add_secure_port(address, credentials)
        await server.start()
    except RuntimeError as exc:
        raise LinkError(f"cannot listen on {address}: is the port taken? use --port") from exc
    return server, port


async def _next_part(context: Context) -> pb.UploadPart | None:
    """The next part of an upload; None at its end."""
    async with asyncio.timeout(CHUNK_TIMEOUT_S):
        part = await context.read()
    return None if part is grpc.aio.EOF else part


def _task(row: TaskRow) -> pb.Task:
    return pb.Task(
        task_id=row.task_id,
        run_id=row.run_id,
        round_num=row.round_num,
        kind=row.kind,  # type: ignore[arg-type]
        bundle_digest=row.bundle_digest,
        params_digest=row.params_digest,
        config_json=row.config_json.encode(),
    )


@contextlib.asynccontextmanager
async def _answering(context: Context) -> AsyncIterator[None]:
    """Turn our errors into gRPC's status codes; whatever else happens stays in the log."""
    try:
        yield
    except ReplacedError as exc:
        await context.abort(grpc.StatusCode.ABORTED, f"replaced: {exc}")
    except UpdateError as exc:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, serde.one_line(str(exc)))
    except FedgeError as exc:
        code = next((c for kind, c in _CODES if isinstance(exc, kind)), grpc.StatusCode.INTERNAL)
        await context.abort(code, serde.one_line(str(exc)))
    except TimeoutError:
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the device was silent for too long")
    except OSError as exc:
        log.error("cannot store what a device sent: %s", exc)
        await context.abort(
            grpc.StatusCode.UNAVAILABLE, "the server cannot store it now; try again"
        )
    except grpc.aio.BaseError:
        raise
    except Exception:
        log.exception("a call of %s failed", context.peer())
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has it")
