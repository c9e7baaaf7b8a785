"""The device link, client side: one mutual-TLS channel, outward only. grpc comes in here alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio

from fedge.errors import LinkError, RefusedError
from fedge.wire import serde
from fedge.wire.token import SERVER_NAME
from fedge.wire.v1 import link_pb2 as pb
from fedge.wire.v1.link_pb2_grpc import LinkStub

_CALL_S = 30.0  # a unary answer, or the next chunk
_REPLY_S = 300.0  # the server's verdict on a whole update
_REFUSALS = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.ABORTED,  # another connection with this identity took over
)
_FINAL = (
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
)
_UNREACHABLE = "failed to connect to all addresses"
T = TypeVar("T")


class NotRetryableError(LinkError):
    """The server answered, and will answer the same again."""


class Stream:
    """The open session: events to the server, events from it."""

    def __init__(self, call: Any) -> None:  # noqa: ANN401 - grpc's types are not exported
        self._call = call
        self._writing = asyncio.Lock()

    async def send(self, event: pb.DeviceEvent) -> None:
        """Tell the server something.

        Raises:
            LinkError: If the stream is gone.
        """
        with _mapped("session"):
            async with self._writing:
                await self._call.write(event)

    async def receive(self, timeout_s: float) -> pb.ServerEvent:
        """The next event.

        Raises:
            LinkError: If nothing came for ``timeout_s``, or the stream ended.
        """
        with _mapped("session"):
            async with asyncio.timeout(timeout_s):
                event = await self._call.read()
        if event is grpc.aio.EOF:
            with _mapped("session"):
                code, details = await self._call.code(), await self._call.details()
            raise _as_error("session", code, details or "the server closed it")
        received: pb.ServerEvent = event
        return received

    def close(self) -> None:
        """End the session."""
        self._call.cancel()


class Link:
    """A channel to one server.

    Args:
        address: ``host:port``.
        ca_pem: The federation's CA; nothing else is trusted, whatever name or address is used.
        key_pem: This side's private key.
        cert_pem: Its certificate: a token's, or the device's own.
    """

    def __init__(self, address: str, ca_pem: bytes, key_pem: bytes, cert_pem: bytes) -> None:
        self._address = address
        self._closed = asyncio.Event()
        credentials = grpc.ssl_channel_credentials(ca_pem, key_pem, cert_pem)
        options = [
            ("grpc.ssl_target_name_override", SERVER_NAME),
            ("grpc.max_send_message_length", serde.MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", serde.MAX_MESSAGE_BYTES),
            ("grpc.use_local_subchannel_pool", 1),  # our own back-off, not one shared by channels
            ("grpc.enable_retries", 0),
        ]
        self._channel = grpc.aio.secure_channel(address, credentials, options)
        self._stub = LinkStub(self._channel)  # type: ignore[no-untyped-call]

    async def enroll(self, request: pb.EnrollRequest) -> pb.EnrollReply:
        """Ask to be admitted, or for a new certificate.

        Raises:
            RefusedError: If the server says no, or closes the door on the certificate shown.
            LinkError: If it cannot be reached.
        """
        try:
            with _mapped("join"):
                reply: pb.EnrollReply = await self._stub.Enroll(request, timeout=_CALL_S)
        except NotRetryableError as exc:
            raise RefusedError(str(exc)) from exc
        except RefusedError:
            raise
        except LinkError as exc:
            if await _answers(self._address):
                raise RefusedError(
                    f"{self._address} is there but ended the handshake: the token is spent, "
                    "expired or of another federation; ask for a new one"
                ) from exc
            raise LinkError(
                f"{self._address} does not answer: check address and port, that fedge-server runs "
                f"there, and that no firewall is in between"
            ) from exc
        return reply

    async def session(self, hello: pb.Hello) -> Stream:
        """Open the long-lived stream and say hello."""
        with _mapped("session"):
            stream = Stream(self._stub.Session())
        await stream.send(pb.DeviceEvent(hello=hello))
        return stream

    async def download(self, digest: str, receiver: serde.Receiver) -> None:
        """Fetch what is still missing of some content; the receiver can be resumed later.

        Raises:
            NotRetryableError: If the server does not have it for us.
            LinkError: If the link broke on the way.
        """
        await self._while_open("download", self._download(digest, receiver))

    async def _download(self, digest: str, receiver: serde.Receiver) -> None:
        request = pb.DownloadRequest(digest=digest, offset=receiver.offset)
        with _mapped("download"):
            call = self._stub.Download(request)
        try:
            with _mapped("download"):
                while True:
                    async with asyncio.timeout(_CALL_S):
                        chunk = await call.read()
                    if chunk is grpc.aio.EOF:
                        break
                    _accept(receiver, chunk)
                code = await call.code()
            if code is not grpc.StatusCode.OK:
                raise _as_error("download", code, await call.details())
        finally:
            call.cancel()

    async def upload(
        self, header: pb.UploadHeader, path: Path, patience_s: float = 0.0
    ) -> pb.UploadReply:
        """Deliver one file as header and chunks.

        Args:
            header: What it is.
            path: The file.
            patience_s: How long to wait after the header for an answer. A server may know what to
                say from the header alone; grpc loses that answer if chunks are under way just
                then. Worth waiting for after an attempt that failed.

        Raises:
            NotRetryableError: If the server cannot take it, now or later.
            LinkError: If the link broke on the way; deliver again.
        """
        return await self._while_open("upload", self._upload(header, path, patience_s))

    async def _upload(
        self, header: pb.UploadHeader, path: Path, patience_s: float
    ) -> pb.UploadReply:
        with _mapped("upload"):
            call = self._stub.Upload()
        try:
            with _mapped("upload"):
                await _write(call, pb.UploadPart(header=header))
                if not await _ended(call, patience_s):
                    for chunk in serde.iter_chunks(path):
                        await _write(call, pb.UploadPart(chunk=chunk))
                    await call.done_writing()
                async with asyncio.timeout(_REPLY_S):
                    reply: pb.UploadReply = await call
        finally:
            call.cancel()
        return reply

    async def close(self) -> None:
        """Close the channel and everything on it."""
        self._closed.set()
        await self._channel.close()

    async def _while_open(self, what: str, work: Coroutine[Any, Any, T]) -> T:
        """Do it, but not longer than the channel lives.

        grpc.aio may leave a call waiting for ever that began just as its connection was lost.
        """
        job = asyncio.create_task(work)
        closed = asyncio.create_task(self._closed.wait())
        try:
            await asyncio.wait({job, closed}, return_when=asyncio.FIRST_COMPLETED)
            if not job.done():
                raise LinkError(f"{what}: the channel was closed")
            return job.result()
        finally:
            for task in (job, closed):
                task.cancel()
            await asyncio.gather(job, closed, return_exceptions=True)


async def _write(call: Any, part: pb.UploadPart) -> None:  # noqa: ANN401 - grpc's types are not exported
    async with asyncio.timeout(_CALL_S):
        await call.write(part)


async def _ended(call: Any, within_s: float) -> bool:  # noqa: ANN401 - grpc's types are not exported
    """Whether the server ends the call within that time."""
    if within_s <= 0:
        return False
    code = asyncio.create_task(call.code())
    try:
        done, _ = await asyncio.wait([code], timeout=within_s)
    finally:
        code.cancel()
    return bool(done)


def _accept(receiver: serde.Receiver, chunk: pb.Chunk) -> None:
    try:
        receiver.add(chunk)
    except LinkError as exc:  # what we hold is of no use; the next attempt starts anew
        receiver.discard()
        raise NotRetryableError(str(exc)) from exc


async def _answers(address: str) -> bool:
    """Whether somebody listens there at all."""
    host, port = address.rsplit(":", 1)
    try:
        _, writer = await asyncio.wait_for(
            asyncio.open_connection(host.strip("[]"), int(port)), timeout=5
        )
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


@contextlib.contextmanager
def _mapped(what: str) -> Iterator[None]:
    """Turn grpc's and asyncio's errors into ours."""
    try:
        yield
    except grpc.aio.AioRpcError as exc:
        raise _as_error(what, exc.code(), exc.details()) from exc
    except TimeoutError as exc:
        raise LinkError(f"{what}: the server was silent for too long") from exc
    except asyncio.CancelledError as exc:
        # grpc raises it too, when the channel is closed under a running call.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise LinkError(f"{what}: the channel was closed") from exc
    except (grpc.aio.UsageError, asyncio.InvalidStateError) as exc:
        raise LinkError(f"{what}: the channel is closed") from exc


def _as_error(what: str, code: Any, details: str | None) -> LinkError:  # noqa: ANN401 - a StatusCode
    if details and details.startswith(_UNREACHABLE):
        details = "the server does not answer; is it running, and is the network there?"
    text = serde.one_line(f"{what}: {details or code.name}")
    if code in _REFUSALS:
        return RefusedError(text)
    return NotRetryableError(text) if code in _FINAL else LinkError(text)
