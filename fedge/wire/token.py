"""The join token: where a federation is, how to recognise it, and the right to ask for admission.

``fedge1.`` followed by base64url of a JSON object: ``v`` (1), ``id``, ``host``, ``port``, ``ca``
(the CA certificate, DER, base64), ``secret`` and, where it ends, ``exp`` (Unix time, informative:
the server's own clock decides). From the secret both sides derive the same short-lived
certificate: the joining device presents it, the server trusts it while the token lives.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import json
import secrets
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedge.errors import ConfigError

PREFIX = "fedge1."
MAX_TOKEN_CHARS = 4096
SERVER_NAME = "fedge-server"
"""The DNS name in every server certificate.

Clients set it as gRPC's ``ssl_target_name_override``, so that a federation may be reached by any
address; what is trusted is its CA. No client may have this name.
"""
VALID_FROM = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
VALID_TO = datetime.datetime(2121, 1, 1, tzinfo=datetime.UTC)
_SIGNS_NO_CERTIFICATES = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


@dataclass(frozen=True)
class Token:
    """What a device needs to join.

    Attributes:
        token_id: Public name of the token, shown in lists.
        host: Address the server is advertised at.
        port: TCP port of the device link.
        ca_der: The federation's CA certificate, DER.
        secret: 32 random bytes, base64url; whoever holds it may join.
        expires_s: Unix time after which the server refuses it, or None.
    """

    token_id: str
    host: str
    port: int
    ca_der: bytes
    secret: str
    expires_s: float | None = None

    @property
    def address(self) -> str:
        """``host:port`` as gRPC wants it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def ca_pem(self) -> bytes:
        """The CA certificate as PEM, for ``grpc.ssl_channel_credentials``."""
        cert = x509.load_der_x509_certificate(self.ca_der)
        return cert.public_bytes(serialization.Encoding.PEM)

    def encode(self) -> str:
        """The text a user copies."""
        body: dict[str, object] = {
            "v": 1,
            "id": self.token_id,
            "host": self.host,
            "port": self.port,
            "ca": base64.b64encode(self.ca_der).decode(),
            "secret": self.secret,
        }
        if self.expires_s is not None:
            body["exp"] = int(self.expires_s)
        raw = json.dumps(body, separators=(",", ":")).encode()
        return PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Token:
        """Read what :meth:`encode` wrote.

        Raises:
            ConfigError: If the text is not a whole token of this version.
        """
        text = text.strip()
        _want(text.startswith(PREFIX), f"it does not begin with {PREFIX!r}")
        _want(len(text) <= MAX_TOKEN_CHARS, f"it has {len(text)} characters")
        try:
            body = json.loads(_unbase64(text.removeprefix(PREFIX)))
            _want(isinstance(body, dict) and body["v"] == 1, "it is of another version")
            token = cls(
                token_id=_text(body, "id", 64),
                host=_text(body, "host", 253),
                port=_port(body["port"]),
                ca_der=base64.b64decode(_text(body, "ca", 2048), validate=True),
                secret=_text(body, "secret", 128),
                expires_s=float(body["exp"]) if "exp" in body else None,
            )
            x509.load_der_x509_certificate(token.ca_der)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as exc:
            raise ConfigError(
                "the token is damaged: copy the whole line the server printed"
            ) from exc
        return token


def new_secret() -> str:
    """A fresh token secret."""
    return secrets.token_urlsafe(32)


def token_identity(secret: str) -> tuple[bytes, bytes]:
    """The key and certificate that stand for a token, the same wherever they are derived.

    Args:
        secret: The token's secret.

    Returns:
        The P-256 private key and its self-signed certificate, both PEM. Deterministic: the key is
        derived from the secret and the signature's nonce from key and message (RFC 6979).
    """
    scalar = int.from_bytes(_derive(secret, "key", 64), "big") % (_P256_ORDER - 1) + 1
    key = ec.derive_private_key(scalar, ec.SECP256R1())
    # TLS finds a trusted certificate by its subject, so no two tokens may share one.
    text = f"fedge-token-{_derive(secret, 'name', 16).hex()}"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(int.from_bytes(_derive(secret, "serial", 16), "big") | 1)
        .not_valid_before(VALID_FROM)
        .not_valid_after(VALID_TO)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_SIGNS_NO_CERTIFICATES, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=True)
        .sign(key, hashes.SHA256(), ecdsa_deterministic=True)
    )
    return private_pem(key), cert.public_bytes(serialization.Encoding.PEM)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as unencrypted PKCS#8 PEM; the file it goes to is 0600."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def hash_secret(secret: str) -> str:
    """What a server stores instead of the secret: SHA-256, hex (the secret has 256 bits)."""
    return hashlib.sha256(b"fedge-token-hash\0" + secret.encode()).hexdigest()


def _derive(secret: str, purpose: str, size: int) -> bytes:
    return hashlib.sha512(f"fedge-token-{purpose}\0{secret}".encode()).digest()[:size]


def _unbase64(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as exc:
        raise ValueError(str(exc)) from exc


def _text(body: dict[str, object], name: str, max_chars: int) -> str:
    value = body[name]
    if not isinstance(value, str) or not 0 < len(value) <= max_chars:
        raise ValueError(name)
    return value


def _port(value: object) -> int:
    if type(value) is not int or not 0 < value < 65536:
        raise ValueError("port")
    return value


def _want(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(f"this is not a join token: {message}")
