"""Who may connect: tokens, enrolment, revocation. Every request passes :meth:`Fleet.admit`."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedge.errors import ConfigError, LinkError, RefusedError
from fedge.wire import serde
from fedge.wire.token import Token, hash_secret, new_secret, token_identity
from fedge.wire.v1 import link_pb2 as pb
from fedge_server import pki
from fedge_server.store import NodeRow, Store, TokenRow

TOKEN_GRACE_S = 3600.0
"""How long a spent or expired token still passes the TLS handshake.

In that time its holder is only told why it is refused, or, where the reply to its enrolment got
lost, is given the same admission again. Afterwards the handshake itself fails.
"""
MAX_CACHED = 4096
MODES = {pb.MODE_FEDERATED: "federated", pb.MODE_PERSONAL: "personal"}


class TakenError(LinkError):
    """The wished name belongs to another device."""


@dataclass(frozen=True)
class Peer:
    """Who is on the other side of a connection: the holder of a token, or an enrolled device."""

    client_id: str = ""
    token: TokenRow | None = None
    expires_s: float = 0.0


class Fleet:
    """The rules of admission over the store and the keys."""

    def __init__(self, store: Store, keys: pki.Pki) -> None:
        self._store, self._keys = store, keys
        self._devices: dict[bytes, Peer] = {}  # by certificate: what was verified stays so

    def create_token(
        self, host: str, port: int, *, uses: int, ttl_s: float, tag: str, now_s: float
    ) -> Token:
        """Make a token for ``uses`` devices, valid ``ttl_s`` seconds from ``now_s``."""
        if uses < 1 or ttl_s <= 0:
            raise ConfigError(f"uses is {uses} and ttl {ttl_s} s; both must be above 0")
        secret = new_secret()
        cert_pem = token_identity(secret)[1]
        row = TokenRow(
            token_id=secrets.token_hex(4),
            secret_hash=hash_secret(secret),
            fingerprint=pki.fingerprint(cert_pem),
            cert_pem=cert_pem.decode(),
            tag=tag,
            uses=uses,
            uses_left=uses,
            created_s=now_s,
            expires_s=now_s + ttl_s,
        )
        self._store.add_token(row)
        return Token(row.token_id, host, port, self._keys.ca_der, secret, row.expires_s)

    def trusted_pem(self, now_s: float) -> bytes:
        """The certificates a TLS client may present or be signed by: the CA and living tokens."""
        tokens = (t for t in self._store.tokens() if _handshakes(t, now_s))
        return b"".join([self._keys.ca_pem, *(t.cert_pem.encode() for t in tokens)])

    def identify(self, cert_pem: bytes) -> Peer:
        """Who presented this certificate.

        TLS trusts the tokens' certificates besides the CA, so it is checked here once more that a
        device's certificate was signed by the CA itself and not by the holder of a token.

        Raises:
            RefusedError: If it is neither a known token's nor a device's.
        """
        token = self._store.token(pki.fingerprint(cert_pem))
        if token is not None:
            return Peer(token=token)
        if cert_pem not in self._devices:
            if len(self._devices) >= MAX_CACHED:
                self._devices.clear()
            self._devices[cert_pem] = self._device(x509.load_pem_x509_certificate(cert_pem))
        return self._devices[cert_pem]

    def _device(self, cert: x509.Certificate) -> Peer:
        client_id = pki.client_of(cert)
        if client_id is None or not pki.issued_by(cert, self._keys.ca):
            raise RefusedError("this certificate or token is not of this federation; join again")
        return Peer(client_id, expires_s=cert.not_valid_after_utc.timestamp())

    def admit(self, peer: Peer, now_s: float) -> NodeRow:
        """The enrolled, living device behind ``peer``, as the store has it now.

        Raises:
            RefusedError: If it is a token, was revoked, or its certificate has ended.
        """
        if peer.token is not None:
            raise RefusedError(
                "a join token may only enroll; enroll first, then use the device key"
            )
        node = self._store.node(peer.client_id)
        if node is None:
            raise RefusedError(f"no device {peer.client_id} is enrolled here; join again")
        if node.status != "active":
            raise RefusedError(f"device {peer.client_id} was revoked by the operator")
        if now_s > peer.expires_s:
            raise RefusedError(f"the certificate of {peer.client_id} has expired; join again")
        return node

    def enroll(self, peer: Peer, request: pb.EnrollRequest, now_s: float) -> pb.EnrollReply:
        """Admit a device, or renew an admitted one's certificate.

        The same key asking again gets the same answer and spends nothing, so that a lost reply
        does no harm.

        Raises:
            RefusedError: If the token is spent or expired, or the device revoked.
            TakenError: If another device has the wished name.
            LinkError: If the request is malformed.
        """
        serde.check_enroll(request)
        key = pki.parse_csr(request.csr_der)
        if peer.token is None:
            client_id = self.admit(peer, now_s).client_id
        else:
            client_id = self._join(peer.token, request, pki.key_hash(key), now_s)
        return pb.EnrollReply(
            client_id=client_id,
            certificate_der=self._keys.issue(key, client_id, now_s),
            signer_public_key=self.signer_public_key,
            federation_id=self.federation_id,
        )

    @property
    def signer_public_key(self) -> bytes:
        """The Ed25519 key (32 bytes) that signs this federation's bundles."""
        raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
        return self._keys.signing_key.public_key().public_bytes(*raw)

    @property
    def federation_id(self) -> str:
        """A short name for this federation: part of its CA's fingerprint."""
        return pki.fingerprint(self._keys.ca_pem)[:16]

    def _join(self, token: TokenRow, request: pb.EnrollRequest, key_hash: str, now_s: float) -> str:
        client_id = request.client_id or f"client-{key_hash[:8]}"
        known = self._store.node(client_id)
        if known is not None:
            return _same_device(known, token, request, key_hash)
        if now_s > token.expires_s:
            raise RefusedError("this token has expired; ask for a new one")
        node = NodeRow(
            client_id=client_id,
            mode=MODES[request.mode],
            tag=token.tag,
            token_id=token.token_id,
            key_hash=key_hash,
            update_key=request.update_public_key,
            status="active",
            created_s=now_s,
        )
        outcome = self._store.add_node(node, now_s)
        if outcome == "taken":  # by another call, since we looked
            return self._join(token, request, key_hash, now_s)
        if outcome == "spent":
            raise RefusedError("this token is spent; ask for a new one")
        return client_id


def _same_device(known: NodeRow, token: TokenRow, request: pb.EnrollRequest, key_hash: str) -> str:
    if known.status != "active":
        raise RefusedError(f"device {known.client_id} was revoked by the operator")
    same_keys = known.key_hash == key_hash and known.update_key == request.update_public_key
    if not same_keys or known.token_id != token.token_id or known.mode != MODES[request.mode]:
        raise TakenError(f"the name {known.client_id} belongs to another device; use --name")
    return known.client_id


def _handshakes(token: TokenRow, now_s: float) -> bool:
    ended = min(token.expires_s, token.spent_s or token.expires_s)
    return now_s < ended + TOKEN_GRACE_S
