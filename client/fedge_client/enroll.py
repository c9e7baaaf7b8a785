"""Joining: keys made on the device, a signing request, a certificate; and its renewal."""

from __future__ import annotations

import datetime
import platform
import time

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

import fedge
from fedge.artifacts import signing
from fedge.errors import ConfigError, LinkError, RefusedError
from fedge.wire import serde
from fedge.wire.token import Token, private_pem, token_identity
from fedge.wire.v1 import link_pb2 as pb
from fedge_client.link import Link
from fedge_client.state import PERSONAL, Identity, State

DEVICE_KEY, DEVICE_CERT, CA_CERT, UPDATE_KEY = (
    "device.key",
    "device.crt",
    "ca.crt",
    "update.key",
)


async def enroll(state: State, token: Token, mode: str, client_id: str = "") -> Identity:
    """Become a client of the token's federation; the private keys never leave the device.

    The keys are durable before the server is asked, so that a crash in between costs nothing:
    asking again with the same key is the same admission.

    Args:
        state: Where keys and identity go.
        token: From the server's operator.
        mode: ``federated`` or ``personal``.
        client_id: Wished name; empty lets the server choose.

    Raises:
        ConfigError: If the name cannot be one.
        RefusedError: If the token is spent, or the name is taken.
        LinkError: If the server cannot be reached.
    """
    _check_name(client_id)
    _make_keys(state)
    key_pem, cert_pem = token_identity(token.secret)
    link = Link(token.address, token.ca_pem, key_pem, cert_pem)
    try:
        reply = await link.enroll(_request(state, mode, client_id))
    finally:
        await link.close()
    identity = Identity(
        client_id=reply.client_id,
        federation_id=reply.federation_id,
        host=token.host,
        port=token.port,
        mode=mode,
        signer=reply.signer_public_key.hex(),
    )
    serde.check_enrolled(reply)
    state.write_key(CA_CERT, token.ca_pem)
    _store_certificate(state, reply.certificate_der)
    state.save_identity(identity)
    return identity


def open_link(state: State, identity: Identity) -> Link:
    """A channel with the device's own certificate."""
    return Link(
        identity.address,
        state.read_key(CA_CERT),
        state.read_key(DEVICE_KEY),
        state.read_key(DEVICE_CERT),
    )


def needs_renewal(state: State, server_time_s: float) -> bool:
    """Whether two thirds of the certificate's life are over, by the server's clock."""
    cert = x509.load_pem_x509_certificate(state.read_key(DEVICE_CERT))
    start, end = cert.not_valid_before_utc.timestamp(), cert.not_valid_after_utc.timestamp()
    return server_time_s > start + 2 / 3 * (end - start)


async def renew(state: State, link: Link, identity: Identity) -> None:
    """Have the certificate replaced over a link that the present one still opens.

    Raises:
        LinkError: If the server does not do it; the present one stays.
    """
    reply = await link.enroll(_request(state, identity.mode, identity.client_id))
    _store_certificate(state, reply.certificate_der)


def update_key(state: State) -> Ed25519PrivateKey:
    """The key that signs this device's updates."""
    return signing.load_key(state.keys / UPDATE_KEY)


def facts() -> dict[str, str]:
    """What the server may show in its list of nodes: operating system, machine, Python."""
    found = {
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    return {name: serde.one_line(value, serde.MAX_FACT_BYTES) for name, value in found.items()}


def certificate_days_left(state: State) -> float:
    """Days until the device certificate ends, by this device's clock."""
    cert = x509.load_pem_x509_certificate(state.read_key(DEVICE_CERT))
    now = datetime.datetime.fromtimestamp(time.time(), datetime.UTC)
    return (cert.not_valid_after_utc - now).total_seconds() / 86400


def _check_name(client_id: str) -> None:
    try:
        if client_id:
            serde.check_client_id(client_id)
    except LinkError as exc:
        raise ConfigError(f"--name {client_id[:80]!r}; use 1 to 64 letters, digits, . _ -") from exc


def _make_keys(state: State) -> None:
    if not (state.keys / DEVICE_KEY).exists():
        state.write_key(DEVICE_KEY, private_pem(ec.generate_private_key(ec.SECP256R1())))
    if not (state.keys / UPDATE_KEY).exists():
        signing.save_key(signing.generate_signing_key(), state.keys / UPDATE_KEY)


def _request(state: State, mode: str, client_id: str) -> pb.EnrollRequest:
    return pb.EnrollRequest(
        csr_der=_csr(_device_key(state.read_key(DEVICE_KEY))),
        client_id=client_id,
        mode=wire_mode(mode),
        fedge_version=fedge.__version__,
        update_public_key=bytes.fromhex(signing.public_hex(update_key(state))),
    )


def wire_mode(mode: str) -> pb.Mode:
    """The mode as the wire names it."""
    return pb.MODE_PERSONAL if mode == PERSONAL else pb.MODE_FEDERATED


def _device_key(key_pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(key_pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RefusedError("keys/device.key holds no P-256 key; remove keys/ and join again")
    return key


def _csr(key: ec.EllipticCurvePrivateKey) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedge-client")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def _store_certificate(state: State, der: bytes) -> None:
    """Keep a certificate that fits our key; one that does not would lock this device out."""
    key = _device_key(state.read_key(DEVICE_KEY))
    try:
        cert = x509.load_der_x509_certificate(der)
        fits = cert.public_key() == key.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise LinkError(f"broken message: certificate_der: {exc}") from exc
    if not fits:
        raise LinkError("broken message: certificate_der is of another key than this device's")
    state.write_key(DEVICE_CERT, cert.public_bytes(serialization.Encoding.PEM))
