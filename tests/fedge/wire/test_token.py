"""The join token and the certificate derived from it."""

from __future__ import annotations

import base64
import json

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from hypothesis import given
from hypothesis import strategies as st

from fedge.errors import ConfigError
from fedge.wire import token as tokens
from fedge.wire.token import Token, hash_secret, new_secret, token_identity

SECRET = "a-secret-of-a-test"
CA = x509.load_pem_x509_certificate(token_identity("some authority")[1]).public_bytes(
    serialization.Encoding.DER
)
TOKEN = Token("1f2e3d4c", "fedge.example.org", 8443, CA, SECRET, 1_800_000_000.0)


@pytest.mark.parametrize("host", ["10.0.0.5", "fedge.example.org", "fe80::1"])
@pytest.mark.parametrize("expires_s", [None, 1_800_000_000.0])
def test_round_trip(host: str, expires_s: float | None) -> None:
    token = Token("1f2e3d4c", host, 443, CA, SECRET, expires_s)
    assert Token.decode(f"  {token.encode()}\n") == token


def test_address_brackets_ipv6() -> None:
    assert Token("a", "fe80::1", 443, CA, SECRET).address == "[fe80::1]:443"
    assert TOKEN.address == "fedge.example.org:8443"


def test_encoding_is_golden() -> None:
    """What older devices were given must be read for ever."""
    body = {"v": 1, "id": "1", "host": "h", "port": 1, "ca": base64.b64encode(CA).decode()}
    body |= {"secret": "s", "exp": 5}
    text = base64.urlsafe_b64encode(json.dumps(body).encode()).decode().rstrip("=")
    assert Token.decode(f"fedge1.{text}") == Token("1", "h", 1, CA, "s", 5.0)


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"port": 0},
        {"port": True},
        {"port": "1"},
        {"host": ""},
        {"ca": "AAAA"},
        {"secret": None},
        {"ca": "%"},
        {"exp": "soon"},
        {"id": "x" * 65},
    ],
)
def test_damaged_tokens_are_named_as_such(change: dict[str, object]) -> None:
    body = {"v": 1, "id": "1", "host": "h", "port": 1, "ca": base64.b64encode(CA).decode()}
    raw = json.dumps({**body, "secret": "s", **change}).encode()
    with pytest.raises(ConfigError, match="token"):
        Token.decode("fedge1." + base64.urlsafe_b64encode(raw).decode().rstrip("="))


@given(st.text(max_size=60))
def test_anything_else_is_refused(text: str) -> None:
    for candidate in (text, f"fedge1.{text}", TOKEN.encode()[: len(text)]):
        with pytest.raises(ConfigError, match="token"):
            Token.decode(candidate)


def test_both_sides_derive_the_same_certificate() -> None:
    assert token_identity(SECRET) == token_identity(SECRET)
    assert token_identity(SECRET)[1] != token_identity(new_secret())[1]
    golden = x509.load_pem_x509_certificate(token_identity("golden")[1])
    assert golden.fingerprint(hashes.SHA256()).hex() == (
        "199a2576014fffe8a24d822d9abe80bde16c8ef6a97de74a2c57fda7218b718c"
    )


def test_certificate_may_sign_no_others_and_has_a_name_of_its_own() -> None:
    cert = x509.load_pem_x509_certificate(token_identity(SECRET)[1])
    other = x509.load_pem_x509_certificate(token_identity("another")[1])
    assert cert.subject != other.subject  # TLS looks trusted certificates up by subject
    assert not cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not cert.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    assert cert.not_valid_before_utc == tokens.VALID_FROM


def test_hash_hides_the_secret() -> None:
    assert SECRET not in hash_secret(SECRET)
    assert hash_secret(SECRET) != hash_secret("another")
