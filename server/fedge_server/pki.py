"""The federation's own certificate authority: P-256 for TLS, Ed25519 for signatures.

CA and server certificates are valid from 1970 to 2121, so that a device without a clock battery
can connect; trust in them ends by pinning. A device's certificate lasts ``CLIENT_DAYS`` by the
server's clock. gRPC's TLS does not take Ed25519 certificates.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedge.artifacts import signing
from fedge.errors import LinkError, StateError
from fedge.platform import atomic_write, private_dir
from fedge.wire.token import SERVER_NAME, VALID_FROM, VALID_TO, private_pem

CLIENT_DAYS = 30
_DER = serialization.Encoding.DER
_PEM = serialization.Encoding.PEM


@dataclass(frozen=True)
class Pki:
    """The keys of one federation, as kept in ``STATE/keys`` (every file 0600).

    Attributes:
        ca: The authority's certificate.
        server_key_pem: The server's TLS key.
        server_cert_pem: The server's TLS certificate.
        signing_key: Signs bundles.
    """

    ca: x509.Certificate
    ca_key: ec.EllipticCurvePrivateKey
    server_key_pem: bytes
    server_cert_pem: bytes
    signing_key: Ed25519PrivateKey

    @property
    def ca_der(self) -> bytes:
        """The authority's certificate, DER: what a token carries."""
        return self.ca.public_bytes(_DER)

    @property
    def ca_pem(self) -> bytes:
        """The authority's certificate, PEM."""
        return self.ca.public_bytes(_PEM)

    def issue(self, public_key: ec.EllipticCurvePublicKey, client_id: str, now_s: float) -> bytes:
        """A device's certificate (DER), for TLS clients only, ``CLIENT_DAYS`` long."""
        now = datetime.datetime.fromtimestamp(now_s, datetime.UTC)
        builder = (
            _builder(_name(client_id), self.ca.subject, public_key)
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=CLIENT_DAYS))
            .add_extension(_usage(ExtendedKeyUsageOID.CLIENT_AUTH), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(_uri(client_id))]),
                critical=False,
            )
        )
        return builder.sign(self.ca_key, hashes.SHA256()).public_bytes(_DER)


def create(folder: Path, hosts: Sequence[str]) -> Pki:
    """Make all keys of a new federation and store them.

    Args:
        folder: Created 0700.
        hosts: Names and addresses put in the server's certificate beside ``SERVER_NAME``.
    """
    private_dir(folder)
    ca_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    name = _name("fedge federation")
    ca = (
        _builder(name, name, ca_key.public_key(), ca=True)
        .not_valid_before(VALID_FROM)
        .not_valid_after(VALID_TO)
        .sign(ca_key, hashes.SHA256())
    )
    server = (
        _builder(_name(SERVER_NAME), name, server_key.public_key())
        .not_valid_before(VALID_FROM)
        .not_valid_after(VALID_TO)
        .add_extension(_usage(ExtendedKeyUsageOID.SERVER_AUTH), critical=True)
        .add_extension(x509.SubjectAlternativeName(_sans(hosts)), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    atomic_write(folder / "ca.crt", ca.public_bytes(_PEM))
    atomic_write(folder / "server.crt", server.public_bytes(_PEM))
    atomic_write(folder / "server.key", private_pem(server_key))
    signing.save_key(signing.generate_signing_key(), folder / "signing.key")
    atomic_write(folder / "ca.key", private_pem(ca_key))  # last: its presence means complete
    return load(folder)


def load(folder: Path) -> Pki:
    """Read the keys :func:`create` stored.

    Raises:
        StateError: If a file is missing, damaged, or readable by others.
    """
    try:
        files = {n: _private(folder / n) for n in ("ca.crt", "ca.key", "server.crt", "server.key")}
        ca_key = serialization.load_pem_private_key(files["ca.key"], None)
        if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
            raise ValueError("ca.key is not an elliptic-curve key")
        ca = x509.load_pem_x509_certificate(files["ca.crt"])
        signing_key = signing.load_key(folder / "signing.key")
    except (OSError, ValueError, UnsupportedAlgorithm) as exc:
        raise StateError(f"the keys in {folder} are damaged ({exc}): restore a backup") from exc
    return Pki(ca, ca_key, files["server.key"], files["server.crt"], signing_key)


def parse_csr(csr_der: bytes) -> ec.EllipticCurvePublicKey:
    """The P-256 public key of a certificate request that its key signed.

    Raises:
        LinkError: If it is not such a request.
    """
    try:
        csr = x509.load_der_x509_csr(csr_der)
        key = csr.public_key()
        signed = csr.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as exc:
        raise LinkError(f"broken message: csr_der: {exc}") from exc
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise LinkError("broken message: csr_der holds another key than P-256")
    if not signed:
        raise LinkError("broken message: csr_der is not signed by its own key")
    return key


def key_hash(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key (SubjectPublicKeyInfo, DER), hex."""
    spki = key.public_bytes(_DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def fingerprint(cert_pem: bytes) -> str:
    """SHA-256 of a certificate (DER), hex."""
    return hashlib.sha256(x509.load_pem_x509_certificate(cert_pem).public_bytes(_DER)).hexdigest()


def client_of(cert: x509.Certificate) -> str | None:
    """The client id in a device's certificate; None if it is no device's."""
    try:
        san = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    prefix = _uri("")
    uris = san.get_values_for_type(x509.UniformResourceIdentifier)
    return next((u.removeprefix(prefix) for u in uris if u.startswith(prefix)), None)


def issued_by(cert: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether the CA's key signed this certificate."""
    try:
        cert.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def signed_by(update_key: bytes, signature: bytes, data: bytes) -> bool:
    """Whether the Ed25519 key (32 raw bytes) signed ``data``."""
    try:
        Ed25519PublicKey.from_public_bytes(update_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, ca: bool = False
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _uri(client_id: str) -> str:
    return f"fedge:client:{client_id}"


def _usage(oid: x509.ObjectIdentifier) -> x509.ExtendedKeyUsage:
    return x509.ExtendedKeyUsage([oid])


def _sans(hosts: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = [x509.DNSName(SERVER_NAME)]
    for host in dict.fromkeys(("localhost", "127.0.0.1", "::1", *hosts)):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return names


def _private(path: Path) -> bytes:
    mode = path.stat().st_mode & 0o077
    if mode:
        raise StateError(f"{path} can be read by others: chmod 600 {path}")
    return path.read_bytes()
