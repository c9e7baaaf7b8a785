"""Everything somebody without the right to may try at the port."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import replace
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from fedge.wire.token import VALID_FROM, VALID_TO, new_secret, private_pem, token_identity
from fedge.wire.v1 import link_pb2 as pb
from fedge_server import fleet, pki

HANDSHAKE = grpc.StatusCode.UNAVAILABLE
NO = grpc.StatusCode.UNAUTHENTICATED
FOREIGN = grpc.StatusCode.PERMISSION_DENIED
PEM = serialization.Encoding.PEM


def code_of(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as failure:
        call()
    return failure.value.code()


def session_code(link: Any) -> grpc.StatusCode:
    return link.session().ended()


def key_and_cert(
    issuer_key: ec.EllipticCurvePrivateKey | None = None,
    issuer: x509.Name | None = None,
    uri: str = "fedge:client:clinic-1",
) -> tuple[bytes, bytes]:
    """A P-256 certificate from anybody."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "clinic-1")])
    san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer or name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(VALID_FROM)
        .not_valid_after(VALID_TO)
        .add_extension(san, critical=False)
        .sign(issuer_key or key, hashes.SHA256())
    )
    return private_pem(key), cert.public_bytes(PEM)


def test_no_certificate(device: Any) -> None:
    assert session_code(device().channel(None)) == HANDSHAKE


def test_self_signed_certificate(device: Any) -> None:
    assert session_code(device().channel(key_and_cert())) == HANDSHAKE


def test_certificate_of_another_authority(device: Any, served: Any, tmp_path: Any) -> None:
    other = pki.create(tmp_path / "other", [])
    key = ec.generate_private_key(ec.SECP256R1())
    cert = x509.load_der_x509_certificate(other.issue(key.public_key(), "clinic-1", time.time()))
    identity = private_pem(key), cert.public_bytes(PEM)
    assert session_code(device().channel(identity)) == HANDSHAKE


def test_certificate_in_the_authority_s_name_but_not_signed_by_it(device: Any, served: Any) -> None:
    stranger = ec.generate_private_key(ec.SECP256R1())
    identity = key_and_cert(stranger, served.state.keys.ca.subject)
    assert session_code(device().channel(identity)) == HANDSHAKE


def test_certificate_signed_by_an_enrolled_device(device: Any) -> None:
    one = device()
    issuer = x509.load_pem_x509_certificate(one.cert_pem).subject
    assert session_code(one.channel(key_and_cert(one.key, issuer))) == HANDSHAKE


def test_certificate_signed_by_a_token(device: Any, served: Any) -> None:
    key_pem, cert_pem = token_identity(served.token().secret)
    key = serialization.load_pem_private_key(key_pem, None)
    issuer = x509.load_pem_x509_certificate(cert_pem).subject
    forged = key_and_cert(key, issuer)
    assert session_code(device().channel(forged)) in (HANDSHAKE, NO)
    with pytest.raises(fleet.RefusedError, match="not of this federation"):
        served.state.fleet.identify(forged[1])


def test_token_holder_cannot_make_an_authority_of_the_same_name(device: Any, served: Any) -> None:
    """leaf ← "fedge federation", made by the holder ← token: the names fit, the signature not."""
    one = device()
    key_pem, cert_pem = token_identity(served.token().secret)
    token_key = serialization.load_pem_private_key(key_pem, None)
    false_ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = served.state.keys.ca.subject
    false_ca = (
        x509.CertificateBuilder()
        .subject_name(ca_name)
        .issuer_name(x509.load_pem_x509_certificate(cert_pem).subject)
        .public_key(false_ca_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(VALID_FROM)
        .not_valid_after(VALID_TO)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(token_key, hashes.SHA256())
    )
    leaf_key, leaf = key_and_cert(false_ca_key, ca_name)
    chain = leaf + false_ca.public_bytes(PEM) + cert_pem
    assert session_code(one.channel((leaf_key, chain))) in (HANDSHAKE, NO)
    with pytest.raises(fleet.RefusedError, match="not of this federation"):
        served.state.fleet.identify(leaf)


def test_expired_device_certificate(device: Any, served: Any) -> None:
    one = device()
    past = time.time() - (pki.CLIENT_DAYS + 1) * 86400
    der = served.state.keys.issue(one.key.public_key(), "clinic-1", past)
    one.cert_pem = x509.load_der_x509_certificate(der).public_bytes(PEM)
    assert session_code(one.link()) == HANDSHAKE


def test_certificate_that_ends_during_a_connection(device: Any, served: Any) -> None:
    one = device()
    peer = served.state.fleet.identify(one.cert_pem)
    assert served.state.fleet.admit(peer, time.time()).client_id == "clinic-1"
    with pytest.raises(fleet.RefusedError, match="expired"):
        served.state.fleet.admit(peer, time.time() + (pki.CLIENT_DAYS + 1) * 86400)


def test_device_that_is_not_enrolled(device: Any, served: Any) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    der = served.state.keys.issue(key.public_key(), "ghost", time.time())
    identity = private_pem(key), x509.load_der_x509_certificate(der).public_bytes(PEM)
    assert session_code(device().channel(identity)) == NO


def test_secret_nobody_made(device: Any) -> None:
    stranger = device(join=False)
    channel = stranger.channel(token_identity(new_secret()))
    assert code_of(lambda: channel.enroll(stranger.request())) == HANDSHAKE


def test_spent_token(device: Any, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    token = served.token(uses=1)
    device("first", join=False).join(token)
    second = device("second", join=False)
    assert code_of(lambda: second.join(token)) == NO
    monkeypatch.setattr(fleet, "TOKEN_GRACE_S", -1.0)
    assert code_of(lambda: second.join(token)) == HANDSHAKE
    assert [n.client_id for n in served.state.store.nodes()] == ["first"]


def test_expired_token(device: Any, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    token = served.token(ttl_s=0.001)
    late = device(join=False)
    time.sleep(0.01)
    assert code_of(lambda: late.join(token)) == NO
    monkeypatch.setattr(fleet, "TOKEN_GRACE_S", 0.0)
    assert code_of(lambda: late.join(token)) == HANDSHAKE


def test_withdrawn_token(device: Any, served: Any) -> None:
    token = served.token()
    served.state.store.drop_token(token.token_id)
    assert code_of(lambda: device(join=False).join(token)) == HANDSHAKE


def test_token_may_do_nothing_but_enroll(device: Any, served: Any, task: Any) -> None:
    one = device()
    work = task("clinic-1")
    channel = one.channel(token_identity(served.token().secret))
    assert session_code(channel) == NO
    assert code_of(lambda: channel.download(work.params_digest)) == NO
    assert code_of(lambda: channel.upload(*one.parts(work.task_id, one.update(work)))) == NO


def test_name_of_another_device(device: Any, served: Any) -> None:
    device("clinic-1")
    thief = device("clinic-1", join=False)
    assert code_of(lambda: thief.join(served.token())) == grpc.StatusCode.ALREADY_EXISTS
    again = device("clinic-2")  # right keys, but another token than it joined with
    assert code_of(lambda: again.join(served.token())) == grpc.StatusCode.ALREADY_EXISTS


def test_lost_reply_is_given_again_and_costs_nothing(device: Any, served: Any) -> None:
    token = served.token(uses=1)
    one = device(join=False)
    assert one.join(token).client_id == one.join(token).client_id == "clinic-1"
    assert [t.uses_left for t in served.state.store.tokens()] == [0]
    assert one.link().session().next("welcome").client_id == "clinic-1"


def test_certificate_can_be_renewed_with_the_old_one(device: Any, served: Any) -> None:
    one = device()
    reply = one.link().enroll(one.request())
    renewed = x509.load_der_x509_certificate(reply.certificate_der)
    assert reply.client_id == "clinic-1"
    left = renewed.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=29) < left <= datetime.timedelta(days=30)
    served.state.store.update_node("clinic-1", status="revoked")
    assert code_of(lambda: one.link().enroll(one.request())) == NO


def test_revoked_device_is_out_within_a_second(device: Any, served: Any, task: Any) -> None:
    one = device()
    work, link = task("clinic-1"), one.link()
    session = link.session()
    session.next("welcome")
    served.state.store.update_node("clinic-1", status="revoked")
    began = time.monotonic()
    assert session.ended() == NO
    assert time.monotonic() - began < 1.5
    assert code_of(lambda: link.download(work.params_digest)) == NO
    assert code_of(lambda: link.upload(*one.parts(work.task_id, one.update(work)))) == NO
    assert session_code(one.link()) == NO
    assert code_of(lambda: one.join(served.token())) == NO


def test_task_of_another_device(device: Any, served: Any, task: Any) -> None:
    device("victim")
    thief = device("thief")
    work = task("victim")
    link = thief.link()
    assert code_of(lambda: link.upload(*thief.parts(work.task_id, thief.update(work)))) == FOREIGN
    for event in (
        pb.DeviceEvent(result=pb.TaskResult(task_id=work.task_id, num_examples=1)),
        pb.DeviceEvent(failed=pb.TaskFailed(task_id=work.task_id, error="X")),
    ):
        session = link.session()
        session.send(event)
        assert session.ended() == FOREIGN
    assert served.grid.ready([work.task_id]) == set()


def test_update_replayed_by_another_device(device: Any, task: Any) -> None:
    victim, thief = device("victim"), device("thief")
    theirs, mine = task("victim"), task("thief")
    recorded = victim.parts(theirs.task_id, victim.update(theirs))
    assert code_of(lambda: thief.link().upload(*recorded)) == FOREIGN
    copied = thief.parts(mine.task_id, victim.update(theirs))
    assert thief.link().upload(*copied).verdict == pb.VERDICT_REFUSED  # it names the victim


def test_update_replayed_in_another_round(device: Any, task: Any) -> None:
    one = device()
    first, second = task("clinic-1", 1), task("clinic-1", 2)
    recorded = one.parts(first.task_id, one.update(first))
    recorded[0].header.task_id = second.task_id
    assert code_of(lambda: one.link().upload(*recorded)) == grpc.StatusCode.INVALID_ARGUMENT


def test_update_signed_by_another_key(device: Any, task: Any) -> None:
    one = device()
    work = task("clinic-1")
    forger = replace(one, signer=Ed25519PrivateKey.generate())
    parts = forger.parts(work.task_id, forger.update(work))
    assert code_of(lambda: one.link().upload(*parts)) == FOREIGN


def test_altered_update_id(device: Any, task: Any) -> None:
    one = device()
    work = task("clinic-1")
    parts = one.parts(work.task_id, one.update(work))
    parts[0].header.update_id = "0" * 64
    assert code_of(lambda: one.link().upload(*parts)) == grpc.StatusCode.INVALID_ARGUMENT


def test_personal_device_cannot_upload(device: Any, task: Any) -> None:
    one = device(mode=pb.MODE_PERSONAL)
    work = task("clinic-1")
    parts = one.parts(work.task_id, one.update(work))
    assert code_of(lambda: one.link().upload(*parts)) == FOREIGN


@pytest.mark.parametrize(
    "change",
    [
        {"csr_der": b""},
        {"csr_der": b"\x30\x82garbage"},
        {"csr_der": bytes(5000)},
        {"client_id": "../x"},
        {"client_id": "fedge-server"},
        {"client_id": "x" * 65},
        {"mode": 0},
        {"mode": 7},
        {"update_public_key": b"short"},
        {"fedge_version": "1\n2"},
    ],
)
def test_malformed_enrolment(device: Any, served: Any, change: dict[str, Any]) -> None:
    one = device(join=False)
    request = one.request()
    for name, value in change.items():
        setattr(request, name, value)
    channel = one.channel(token_identity(served.token().secret))
    assert code_of(lambda: channel.enroll(request)) == grpc.StatusCode.INVALID_ARGUMENT
    assert served.state.store.nodes() == []


def test_request_for_a_key_tls_cannot_use(device: Any, served: Any) -> None:
    one = device(join=False)
    channel = one.channel(token_identity(served.token().secret))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "device")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    ed25519 = builder.sign(Ed25519PrivateKey.generate(), None)
    p384 = builder.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256())
    for wrong in (ed25519, p384):
        request = one.request()
        request.csr_der = wrong.public_bytes(serialization.Encoding.DER)
        assert code_of(lambda r=request: channel.enroll(r)) == grpc.StatusCode.INVALID_ARGUMENT


def test_request_not_signed_by_its_key(device: Any, served: Any) -> None:
    one = device(join=False)
    request = one.request()
    request.csr_der = request.csr_der[:-1] + bytes([request.csr_der[-1] ^ 1])
    channel = one.channel(token_identity(served.token().secret))
    assert code_of(lambda: channel.enroll(request)) == grpc.StatusCode.INVALID_ARGUMENT


def test_device_cannot_pose_as_the_server(device: Any) -> None:
    one, victim = device("fedge"), device("victim")
    server = grpc.server(futures.ThreadPoolExecutor(1))
    pair = [(private_pem(one.key), one.cert_pem)]
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair))
    server.start()
    victim.port = port
    assert session_code(victim.link()) == HANDSHAKE
    server.stop(0)


def test_server_of_another_federation_is_refused_by_the_device(device: Any, tmp_path: Any) -> None:
    one = device()
    one.ca_pem = pki.create(tmp_path / "other", []).ca_pem
    assert session_code(one.link()) == HANDSHAKE


def test_two_devices_asking_for_one_name_at_the_same_moment(
    device: Any, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find the name free; the store lets one in and the other hears why not."""
    device("clinic-1")
    find, seen = served.state.store.node, []

    def not_yet(client_id: str) -> Any:
        seen.append(client_id)
        return None if len(seen) == 1 else find(client_id)

    token = served.token(uses=2)
    monkeypatch.setattr(served.state.store, "node", not_yet)
    with pytest.raises(grpc.RpcError) as failure:
        device("clinic-1", join=False).join(token)
    assert failure.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert "belongs to another device" in failure.value.details()
