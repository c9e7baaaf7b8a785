"""Run a command in a namespace of its own and report every host it looked for.

Started as ``unshare --user --map-root-user --net --mount python quiet_probe.py LEAST MOST CAUGHT
HOME COMMAND…``. The namespace has a loopback device, a resolver that points at a listener in here,
and no way out. The command runs until it ends, with none of the variables set that switch telemetry
off; for LEAST seconds at least, and no longer than until the file CAUGHT says that some probe has
seen a name, or MOST seconds have gone.
Prints one JSON object: ``names`` asked for, ``addresses`` of other machines that packets were sent
to, and the command's ``exit`` code (None: it was still running) and last ``errors``.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

KEPT = ("PATH", "PYTHONDONTWRITEBYTECODE", "TMPDIR")  # CI=true alone keeps ONNX Runtime quiet
ETH_P_ALL = 3


def main() -> None:
    """Set the namespace up, run the command, print what was seen."""
    least, most, caught, home = *map(float, sys.argv[1:3]), *map(Path, sys.argv[3:5])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "route", "add", "default", "dev", "lo"], check=True)
    resolver = home.parent / "resolv.conf"
    resolver.write_text("nameserver 127.0.0.1\n")
    subprocess.run(["mount", "--bind", str(resolver), "/etc/resolv.conf"], check=True)

    names: set[str] = set()
    addresses: set[str] = set()
    dns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    dns.bind(("127.0.0.1", 53))
    threading.Thread(target=_answer, args=(dns, names), daemon=True).start()
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
    threading.Thread(target=_watch, args=(wire, addresses), daemon=True).start()

    def over(elapsed: float) -> bool:
        if names:
            caught.touch()
        return elapsed >= most or (elapsed >= least and caught.exists())

    code, errors = _run(sys.argv[5:], home, over)
    seen = {"names": sorted(names), "addresses": sorted(addresses), "exit": code}
    print(json.dumps({**seen, "errors": errors[-2000:]}))


def _run(command: list[str], home: Path, over: Callable[[float], bool]) -> tuple[int | None, str]:
    env = {name: os.environ[name] for name in KEPT if name in os.environ}
    began = time.monotonic()
    with (home.parent / "errors").open("w+") as errors:
        process = subprocess.Popen(
            command, env={**env, "HOME": str(home)}, stdout=errors, stderr=errors
        )
        while (code := process.poll()) is None and not over(time.monotonic() - began):
            time.sleep(0.1)
        process.kill()
        process.wait()
        errors.seek(0)
        return code, errors.read()


def _answer(dns: socket.socket, names: set[str]) -> None:
    """Note every name asked for, and say that it lives at 192.0.2.1 (RFC 5737: nobody's)."""
    while True:
        query, sender = dns.recvfrom(4096)
        labels, at = [], 12
        while query[at]:
            labels.append(query[at + 1 : at + 1 + query[at]].decode(errors="replace"))
            at += 1 + query[at]
        names.add(".".join(labels))
        question = query[12 : at + 5]
        is_a = question[-4:-2] == b"\0\1"
        head = query[:2] + struct.pack("!HHHHH", 0x8180, 1, int(is_a), 0, 0)
        record = b"\xc0\x0c\0\1\0\1" + struct.pack("!LH", 60, 4) + bytes([192, 0, 2, 1])
        dns.sendto(head + question + (record if is_a else b""), sender)


def _watch(wire: socket.socket, addresses: set[str]) -> None:
    """Note where every IPv4 packet that is not for this machine goes."""
    while True:
        packet = wire.recv(65535)
        if packet[0] >> 4 == 4 and packet[16] != 127:
            addresses.add(socket.inet_ntoa(packet[16:20]))


if __name__ == "__main__":
    main()
