"""What a server may try with a device that trusts it: each attempt ends as an error of ours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedge.artifacts import signing
from fedge.artifacts.bundle import MANIFEST, SIGNATURE, Bundle
from fedge.errors import AdmissionError, LinkError
from fedge.wire import serde
from fedge.wire.v1 import link_pb2 as pb
from fedge_client import commands, enroll, updater
from fedge_client.config import ClientConfig
from fedge_client.outbox import Outbox
from fedge_client.phases import Phase
from fedge_client.session import Session
from fedge_client.state import Identity, State
from fedge_client.tasks import Desk

ME = Identity("clinic-a", "f" * 16, "10.0.0.5", 8443, "federated", "ab" * 32)
ESCAPE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e"


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state", create=True)


def signed_bundle(good: Bundle, out: Path, **files: bytes) -> Bundle:
    """The bundle with files replaced, and signed by its federation's key all the same."""
    content = {n: good.read(n) for n in good.manifest.files}
    content.update({n.replace("_onnx", ".onnx"): d for n, d in files.items()})
    return Bundle.write(good.manifest, content, signing.generate_signing_key(), out)


def deliver(state: State, bundle: Bundle) -> None:
    async def fetch(digest: str, receiver: serde.Receiver) -> None:
        names = {e.sha256: bundle.path / n for n, e in bundle.manifest.files.items()}
        if digest in names:
            chunks = serde.iter_chunks(names[digest])
        else:
            both = state.root / "signed"
            both.write_bytes(
                b"".join((bundle.path / n).read_bytes() for n in (MANIFEST, SIGNATURE))
            )
            chunks = serde.iter_chunks(both)
        for chunk in chunks:
            receiver.add(chunk)

    signer = bundle.manifest.signer
    asyncio.run(updater.fetch_bundle(state, bundle.digest, signer, ("ort",), fetch))


def test_a_model_that_grows_in_memory_is_refused_before_an_engine_sees_it(
    state: State, bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    nodes = b"\x0a\x00" * (1 << 19)  # two bytes each in the file, two hundred in memory
    bomb = b"\x08\x08\x3a" + varint(len(nodes)) + nodes
    hostile = signed_bundle(bundle(), tmp_path / "hostile", step_onnx=bomb)
    for _ in range(2):  # a second start must not find it good
        with pytest.raises(AdmissionError, match=r"step\.onnx"):
            deliver(state, hostile)
    deliver(state, signed_bundle(bundle(), tmp_path / "good"))


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def task(number: int) -> pb.ServerEvent:
    task_id = f"t{number}"
    kind = pb.TASK_KIND_TRAIN
    return pb.ServerEvent(
        task=pb.Task(task_id=task_id, kind=kind, bundle_digest="b" * 64, params_digest="c" * 64)
    )


@pytest.mark.parametrize("event", [task, lambda _: pb.ServerEvent(model=pb.ModelReady())])
def test_work_without_end_is_not_taken(state: State, event: Callable[[int], Any]) -> None:
    async def flood() -> int:
        desk = Desk(state, ME, ClientConfig(), Outbox(state, ME))
        session = Session(state, ME, desk, commands.report)
        session._phase = Phase.ONLINE
        for number in range(10_000):
            try:
                session._on_event(event(number))
            except LinkError:
                return number
        return -1

    assert 0 < asyncio.run(flood()) < 1000


@pytest.mark.parametrize(
    "welcome",
    [
        pb.Welcome(client_id=ESCAPE),
        pb.Welcome(client_id="../../etc"),
        pb.Welcome(client_id="a", bundle_digest="../keys/device.key"),
    ],
)
def test_a_greeting_is_checked(welcome: pb.Welcome) -> None:
    with pytest.raises(LinkError):
        serde.check_welcome(welcome)


@pytest.mark.parametrize(
    "change",
    [{"client_id": ""}, {"federation_id": ESCAPE}, {"signer_public_key": b"short"}],
)
def test_an_admission_is_checked(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {"client_id": "a", "federation_id": "f", "signer_public_key": bytes(32)}
    serde.check_enrolled(pb.EnrollReply(**good))
    with pytest.raises(LinkError):
        serde.check_enrolled(pb.EnrollReply(**{**good, **change}))


def test_a_certificate_that_is_none_or_not_ours_changes_nothing(state: State) -> None:
    from fedge.wire.token import private_pem, token_identity

    other = ec.generate_private_key(ec.SECP256R1())
    state.write_key(enroll.DEVICE_KEY, private_pem(other))
    state.write_key(enroll.DEVICE_CERT, b"the present one")
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    foreign = x509.load_pem_x509_certificate(token_identity("secret")[1])
    for der in (b"", b"garbage", foreign.public_bytes(Encoding.DER)):
        with pytest.raises(LinkError, match="certificate_der"):
            enroll._store_certificate(state, der)
    assert state.read_key(enroll.DEVICE_CERT) == b"the present one"


def test_nothing_a_server_says_commands_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands.report(f"update was refused ({ESCAPE})")
    commands._show({"last_error": ESCAPE}, as_json=False)
    shown = capsys.readouterr()
    for text in (shown.err, shown.out):
        assert "owned" in text
        assert text.replace("\n", "").isprintable()
