"""Systems the client refuses; a real 32-bit one is in tests/integration/test_aarch64.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedge_client.start import System

PI = System("linux", "aarch64", 64, "glibc 2.36")


def test_this_system_is_supported() -> None:
    assert System.here().obstacle() == ""


@pytest.mark.parametrize(
    "system",
    [
        PI,
        System("linux", "x86_64", 64, "glibc 2.28"),
        System("darwin", "arm64", 64, ""),
    ],
)
def test_systems_with_wheels_are_taken(system: System) -> None:
    assert system.obstacle() == ""


@pytest.mark.parametrize(
    ("system", "says"),
    [
        (System("linux", "armv7l", 32, "glibc 2.36"), "64-bit Raspberry Pi OS"),
        (System("linux", "aarch64", 32, "glibc 2.36"), "32-bit Python"),  # 64-bit kernel
        (System("linux", "x86_64", 64, ""), "python:3.12-slim"),  # Alpine
        (System("linux", "aarch64", 64, "glibc 2.27"), "glibc 2.27"),  # Jetson Nano
        (System("win32", "AMD64", 64, ""), "WSL"),
    ],
)
def test_others_hear_why_and_what_to_do(system: System, says: str) -> None:
    assert says in system.obstacle()


def test_the_check_needs_no_package() -> None:
    code = "import sys, fedge_client.start; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert {"numpy", "grpc", "cryptography", "google", "psutil"}.isdisjoint(loaded.stdout.split())
