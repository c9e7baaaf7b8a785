"""The ``fedge-client`` command's first step: on a system where it cannot work, say so at once.

Imports nothing that a 32-bit or musl system lacks, so that the message comes instead of an
ImportError.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass

from fedge.errors import ConfigError

OLDEST_GLIBC = (2, 28)  # of onnxruntime's wheels


@dataclass(frozen=True)
class System:
    """What decides whether the wheels a client needs exist.

    Attributes:
        name: As ``sys.platform``.
        machine: As ``uname -m``.
        bits: Of this Python, which may be fewer than the machine's.
        libc: ``glibc 2.36``; empty where the C library is not GNU's.
    """

    name: str
    machine: str
    bits: int
    libc: str

    @classmethod
    def here(cls) -> System:
        """The one this runs on."""
        bits = 64 if sys.maxsize > 2**32 else 32
        return cls(sys.platform, platform.machine(), bits, _glibc())

    def obstacle(self) -> str:
        """Why fedge-client cannot run here and what to do; empty where it can."""
        if self.name == "win32":
            return "fedge-client runs on Linux and macOS; on Windows use it inside WSL"
        if self.bits == 32:
            return (
                f"this is a 32-bit Python ({self.machine}) and onnxruntime exists for 64-bit ones "
                "only; install the 64-bit Raspberry Pi OS (Pi 3, 4, 5 and Zero 2 W run it)"
            )
        if self.name != "linux":
            return ""
        name, _, version = self.libc.partition(" ")
        if name != "glibc":
            return (
                "this Python is not built for glibc (Alpine has musl) and onnxruntime has wheels "
                "for glibc only; use Debian, Ubuntu, or an image such as python:3.12-slim"
            )
        if tuple(int(n) for n in version.split(".")[:2]) < OLDEST_GLIBC:
            return (
                f"this system has glibc {version} and onnxruntime's wheels need 2.28; use a newer "
                "system, or a container with one (docs/devices.md)"
            )
        return ""


def main() -> int:
    """Run ``fedge-client``, or say why it cannot run here."""
    obstacle = System.here().obstacle()
    if obstacle:
        print(f"fedge-client: error: {obstacle}", file=sys.stderr)
        return ConfigError.exit_code
    from fedge_client import cli

    return cli.main()


def _glibc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, OSError, ValueError):  # macOS and musl know no such name
        return ""
