"""Admission, renewal and refusal against a real server, from inside one process."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from fedge.artifacts.bundle import Bundle
from fedge.errors import LinkError, RefusedError
from fedge.wire import serde
from fedge.wire.token import Token
from fedge.wire.v1 import link_pb2 as pb
from fedge_client import enroll
from fedge_client.link import Link, NotRetryableError
from fedge_client.state import State


@pytest.fixture
def token(world: Any, make_bundle: Callable[..., Bundle]) -> Token:
    """Of a server that waits for clients."""
    server = world.serve(str(make_bundle("mlp").path), "--min-clients", "2")
    return Token.decode(server.events[0]["token"])


def test_a_device_joins_renews_and_is_known_by_its_key(token: Token, tmp_path: Path) -> None:
    state = State(tmp_path / "clinic", create=True)
    identity = asyncio.run(enroll.enroll(state, token, "federated", "clinic"))
    assert identity.client_id == "clinic"
    first, key = state.read_key(enroll.DEVICE_CERT), state.read_key(enroll.DEVICE_KEY)
    cert = x509.load_pem_x509_certificate(first)
    start, end = cert.not_valid_before_utc.timestamp(), cert.not_valid_after_utc.timestamp()
    assert not enroll.needs_renewal(state, start + 0.6 * (end - start))
    assert enroll.needs_renewal(state, start + 0.7 * (end - start))
    assert 29 < enroll.certificate_days_left(state) <= 31

    async def renew() -> None:
        link = enroll.open_link(state, identity)
        await enroll.renew(state, link, identity)
        await link.close()
        again = enroll.open_link(state, identity)
        stream = await again.session(_hello())
        event = await stream.receive(10)
        assert event.welcome.client_id == "clinic"
        stream.close()
        await again.close()

    asyncio.run(renew())
    assert state.read_key(enroll.DEVICE_CERT) != first
    assert state.read_key(enroll.DEVICE_KEY) == key
    again = asyncio.run(enroll.enroll(state, token, "federated", "clinic"))
    assert again == identity  # the same key is the same device


def test_what_a_token_cannot_do(token: Token, tmp_path: Path) -> None:
    """A token's certificate is for joining only; a damaged secret is not even that."""
    from fedge.wire.token import new_secret, token_identity

    async def scenario() -> None:
        link = Link(token.address, token.ca_pem, *token_identity(token.secret))
        with pytest.raises(RefusedError, match="may only enroll"):
            await (await link.session(_hello())).receive(10)
        with pytest.raises(LinkError):
            await link.download("0" * 64, serde.Receiver(tmp_path / "part", "0" * 64, 10))
        await link.close()

    asyncio.run(scenario())
    stranger = dataclasses.replace(token, secret=new_secret())
    with pytest.raises(RefusedError, match="token"):
        asyncio.run(enroll.enroll(State(tmp_path / "s", create=True), stranger, "federated"))


def test_a_server_of_another_federation_is_not_trusted(
    token: Token, world: Any, make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    other = world.serve(str(make_bundle("mlp2").path), state="other")
    foreign = Token.decode(other.events[0]["token"])
    mixed = dataclasses.replace(token, ca_der=foreign.ca_der)
    with pytest.raises(LinkError):
        asyncio.run(enroll.enroll(State(tmp_path / "s", create=True), mixed, "federated"))
    assert not (tmp_path / "s" / "client.json").exists()


def test_unknown_content_is_final(token: Token, tmp_path: Path) -> None:
    state = State(tmp_path / "clinic", create=True)
    identity = asyncio.run(enroll.enroll(state, token, "federated", "clinic"))

    async def scenario() -> None:
        link = enroll.open_link(state, identity)
        with pytest.raises(NotRetryableError):
            await link.download("1" * 64, serde.Receiver(tmp_path / "part", "1" * 64, 10))
        header = pb.UploadHeader(task_id="no-such-task", digest="2" * 64, total_bytes=4)
        header.update_id = serde.update_id("no-such-task", "clinic", "2" * 64).hex()
        header.signature = enroll.update_key(state).sign(bytes.fromhex(header.update_id))
        (tmp_path / "update").write_bytes(b"1234")
        with pytest.raises(NotRetryableError, match="no-such-task"):
            await link.upload(header, tmp_path / "update", patience_s=5.0)
        await link.close()

    asyncio.run(scenario())


def _hello() -> pb.Hello:
    return pb.Hello(fedge_version="0.1.0", wire_version=serde.WIRE_VERSION, mode=pb.MODE_FEDERATED)
