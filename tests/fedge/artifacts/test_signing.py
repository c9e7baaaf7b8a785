from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from fedge.artifacts.signing import (
    generate_signing_key,
    load_key,
    public_hex,
    save_key,
    sign,
    verify,
)
from fedge.errors import ConfigError, SignatureError, StateError

KEY = generate_signing_key()


@given(st.binary(max_size=200))
def test_what_was_signed_verifies(data: bytes) -> None:
    verify(public_hex(KEY), data, sign(KEY, data))


@given(st.binary(min_size=1, max_size=50), st.data())
def test_any_flipped_bit_of_data_or_signature_is_refused(data: bytes, draw: st.DataObject) -> None:
    signature = sign(KEY, data)
    both = bytearray(data + signature)
    bit = draw.draw(st.integers(0, 8 * len(both) - 1))
    both[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(SignatureError, match="not signed by key"):
        verify(public_hex(KEY), bytes(both[: len(data)]), bytes(both[len(data) :]))


def test_another_key_is_refused() -> None:
    with pytest.raises(SignatureError):
        verify(public_hex(generate_signing_key()), b"data", sign(KEY, b"data"))


@pytest.mark.parametrize("signature", [b"", b"\0" * 63, b"\0" * 64, b"\0" * 65])
def test_a_signature_of_any_length_is_refused_cleanly(signature: bytes) -> None:
    with pytest.raises(SignatureError):
        verify(public_hex(KEY), b"data", signature)


@pytest.mark.parametrize("public", ["", "zz", "00" * 31, "é" * 64])
def test_what_is_no_key_is_said_so(public: str) -> None:
    with pytest.raises(SignatureError, match="is not an Ed25519 public key"):
        verify(public, b"data", b"\0" * 64)


def test_a_saved_key_is_private_and_loads(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    save_key(KEY, path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert public_hex(load_key(path)) == public_hex(KEY)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_key_others_can_reach_is_refused_with_the_fix(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key.pem"
    save_key(KEY, path)
    path.chmod(mode)
    with pytest.raises(StateError, match=f"mode {mode:04o}, wanted 0600; run: chmod 600"):
        load_key(path)


def test_a_missing_key_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="No such file"):
        load_key(tmp_path / "none.pem")


def test_a_file_without_key_and_a_key_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.touch(mode=0o600)
    path.write_bytes(b"hello")
    with pytest.raises(ConfigError, match="no unencrypted private key"):
        load_key(path)
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(pem)
    with pytest.raises(ConfigError, match="wanted an Ed25519 key"):
        load_key(path)
