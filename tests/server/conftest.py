"""A real server on a free loopback port, and a device that can misbehave."""

from __future__ import annotations

import asyncio
import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from fedge.artifacts.build import build
from fedge.artifacts.bundle import Bundle
from fedge.update import Update
from fedge.wire import serde
from fedge.wire.token import SERVER_NAME, Token, private_pem, token_identity
from fedge.wire.v1 import link_pb2 as pb
from fedge.wire.v1.link_pb2_grpc import LinkStub
from fedge_server import example
from fedge_server import state as states
from fedge_server.grid import LinkGrid
from fedge_server.inbox import Inbox
from fedge_server.link import Link, listen
from fedge_server.state import ServerState

TIMEOUT_S = 10.0


class Channel:
    """One TLS connection as some identity."""

    def __init__(self, port: int, ca_pem: bytes, identity: tuple[bytes, bytes] | None) -> None:
        key, cert = identity or (None, None)
        self._channel = grpc.secure_channel(
            f"127.0.0.1:{port}",
            grpc.ssl_channel_credentials(ca_pem, key, cert),
            [
                ("grpc.ssl_target_name_override", SERVER_NAME),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.enable_retries", 0),
                ("grpc.max_send_message_length", -1),
            ],
        )
        self._stub = LinkStub(self._channel)

    def enroll(self, request: pb.EnrollRequest) -> pb.EnrollReply:
        return self._stub.Enroll(request, timeout=TIMEOUT_S)

    def download(self, digest: str, offset: int = 0) -> bytes:
        request = pb.DownloadRequest(digest=digest, offset=offset)
        return b"".join(c.data for c in self._stub.Download(request, timeout=TIMEOUT_S))

    def upload(self, *parts: pb.UploadPart) -> pb.UploadReply:
        return self._stub.Upload(iter(parts), timeout=TIMEOUT_S)

    def session(self, hello: pb.Hello | None = None) -> Conversation:
        return Conversation(self._stub, hello or hello_of())

    def close(self) -> None:
        self._channel.close()


class Conversation:
    """An open session: events out, events in."""

    def __init__(self, stub: LinkStub, hello: pb.Hello) -> None:
        self._out: queue.Queue[pb.DeviceEvent | None] = queue.Queue()
        self.send(pb.DeviceEvent(hello=hello))
        self._call = stub.Session(iter(self._out.get, None))

    def send(self, event: pb.DeviceEvent) -> None:
        self._out.put(event)

    def next(self, kind: str = "") -> Any:
        """The next event, or the next of a kind."""
        for event in self._call:
            found = event.WhichOneof("event")
            if not kind or found == kind:
                return getattr(event, found)
        raise AssertionError("the stream ended")

    def ended(self) -> grpc.StatusCode:
        """Drain the stream; how it ended."""
        try:
            for _ in self._call:
                pass
        except grpc.RpcError as exc:
            return exc.code()
        return self._call.code()

    def close(self) -> None:
        self._out.put(None)
        self._call.cancel()


@dataclass
class Device:
    """Keys of one device, and what it is called once admitted."""

    port: int
    ca_pem: bytes
    name: str = "clinic-1"
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )
    signer: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    cert_pem: bytes = b""
    open: list[Any] = field(default_factory=list)

    def request(self, mode: int = pb.MODE_FEDERATED) -> pb.EnrollRequest:
        raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
        return pb.EnrollRequest(
            csr_der=csr(self.key),
            client_id=self.name,
            mode=mode,
            fedge_version="0.1.0",
            update_public_key=self.signer.public_key().public_bytes(*raw),
        )

    def join(self, token: Token, mode: int = pb.MODE_FEDERATED) -> pb.EnrollReply:
        reply = self.channel(token_identity(token.secret)).enroll(self.request(mode))
        cert = x509.load_der_x509_certificate(reply.certificate_der)
        self.cert_pem = cert.public_bytes(serialization.Encoding.PEM)
        return reply

    def channel(self, identity: tuple[bytes, bytes] | None) -> Channel:
        channel = Channel(self.port, self.ca_pem, identity)
        self.open.append(channel)
        return channel

    def link(self) -> Channel:
        """A connection with the device's own certificate."""
        return self.channel((private_pem(self.key), self.cert_pem))

    def update(self, task: pb.Task, **changes: Any) -> bytes:
        delta = {
            "weight": np.full((1, example.COLUMNS), 0.5, np.float32),
            "bias": np.ones(1, np.float32),
        }
        values = {"client_id": self.name, "round_num": task.round_num, "num_examples": 10}
        metrics = {"train_loss": 0.5}
        return Update(**{"delta": delta, "metrics": metrics, **values, **changes}).to_bytes()

    def header(self, task_id: str, data: bytes) -> pb.UploadHeader:
        digest = hashlib.sha256(data).hexdigest()
        signed = serde.update_id(task_id, self.name, digest)
        return pb.UploadHeader(
            task_id=task_id,
            update_id=signed.hex(),
            digest=digest,
            total_bytes=len(data),
            signature=self.signer.sign(signed),
        )

    def parts(self, task_id: str, data: bytes) -> list[pb.UploadPart]:
        return [pb.UploadPart(header=self.header(task_id, data)), chunk_part(data)]


@dataclass
class Served:
    """A listening server."""

    state: ServerState
    grid: LinkGrid
    link: Link
    port: int
    loop: asyncio.AbstractEventLoop

    def loop_tasks(self) -> int:
        """Tasks of our own code that live on the server's loop."""
        return sum("fedge" in repr(t) for t in asyncio.all_tasks(self.loop))

    def token(self, uses: int = 1, ttl_s: float = 3600.0) -> Token:
        now_s = time.time()
        return self.state.fleet.create_token(
            "127.0.0.1", self.port, uses=uses, ttl_s=ttl_s, tag="test", now_s=now_s
        )


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The built-in example, built once."""
    out = tmp_path_factory.mktemp("bundle") / "example"
    return build(example.model(), loss="bce_with_logits", name=example.NAME, out=out)


@pytest.fixture(scope="session")
def _federation(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("federation")
    states.create(path)
    with states.opened(path) as state:
        state.registry.add(bundle, time.time())
    return path


@pytest.fixture
def state(_federation: Path, tmp_path: Path) -> Iterator[ServerState]:
    """A fresh copy of a federation with one bundle."""
    import shutil

    path = tmp_path / "state"
    shutil.copytree(_federation, path)
    with states.opened(path) as opened:
        yield opened


@pytest.fixture
def served(state: ServerState) -> Iterator[Served]:
    """The federation, listening."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    stopping: Future[None]
    ready: Future[Served] = asyncio.run_coroutine_threadsafe(_listen(state), loop)
    try:
        found = ready.result(TIMEOUT_S)
        yield found
        stopping = asyncio.run_coroutine_threadsafe(_close(found), loop)
        stopping.result(TIMEOUT_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _listen(state: ServerState) -> Served:
    grid = LinkGrid(state.store, state.blobs)
    grid.bundle_digest = state.registry.newest() or ""
    inbox = Inbox(state.store, state.blobs, state.registry, max_norm=1e6)
    link = Link(state.fleet, state.store, state.registry, inbox, grid.on_answer)
    grid.notify = link.wake
    server, port = await listen(link, state.fleet, state.keys, "127.0.0.1:0")
    served = Served(state, grid, link, port, asyncio.get_running_loop())
    served._server = server  # type: ignore[attr-defined]
    served._watcher = asyncio.create_task(link.watch_revocations())  # type: ignore[attr-defined]
    return served


async def _close(served: Any) -> None:
    served._watcher.cancel()
    await served._server.stop(0)
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    if rest:
        await asyncio.wait(rest, timeout=5)


@pytest.fixture
def device(served: Served) -> Iterator[Callable[..., Device]]:
    """Makes devices; all their connections are closed afterwards."""
    made: list[Device] = []

    def make(name: str = "clinic-1", join: bool = True, mode: int = pb.MODE_FEDERATED) -> Device:
        new = Device(served.port, served.state.keys.ca_pem, name)
        made.append(new)
        if join:
            new.join(served.token(), mode)
        return new

    yield make
    for one in made:
        for channel in one.open:
            channel.close()


def hello_of(**changes: Any) -> pb.Hello:
    values: dict[str, Any] = {
        "fedge_version": "0.1.0",
        "wire_version": serde.WIRE_VERSION,
        "mode": pb.MODE_FEDERATED,
        "has_data": True,
        "num_examples": 10,
    }
    return pb.Hello(**{**values, **changes})


def csr(key: ec.EllipticCurvePrivateKey | Any) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "device")])
    built = x509.CertificateSigningRequestBuilder().subject_name(name)
    return built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def chunk_part(data: bytes, offset: int = 0, total: int | None = None) -> pb.UploadPart:
    size = len(data) if total is None else total
    return pb.UploadPart(chunk=pb.Chunk(offset=offset, total_bytes=size, data=data))


@pytest.fixture
def task(served: Served) -> Callable[..., pb.Task]:
    """Records a train task for a device, as the grid would."""
    from fedge_server.store import TaskRow

    def make(client_id: str, round_num: int = 1, kind: int = pb.TASK_KIND_TRAIN) -> pb.Task:
        params = served.state.blobs.put(f"params of {client_id} {round_num}".encode())
        row = TaskRow(
            task_id=hashlib.sha256(f"{client_id}{round_num}{kind}".encode()).hexdigest()[:32],
            run_id="run-1",
            group_id=f"run-1/{round_num}/train",
            round_num=round_num,
            kind=kind,
            client_id=client_id,
            bundle_digest=served.state.registry.newest() or "",
            params_digest=params,
            config_json="{}",
        )
        served.state.store.add_tasks([row])
        served.link.wake()
        return pb.Task(task_id=row.task_id, round_num=round_num, params_digest=params)

    return make
