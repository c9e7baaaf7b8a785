"""Emulated Raspberry Pi systems in a cache: ``python tools/aarch64/roots.py bookworm trixie``.

A root is Debian's packages unpacked (nothing runs), the client's dependencies from aarch64 wheels,
and the files a Pi tells about itself by. ``armhf`` is 32-bit Raspberry Pi OS, without wheels: there
are none. Prints one folder per name. ``emulate.sh`` runs a command in one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import board

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache" / "aarch64"
EMULATE = Path(__file__).with_name("emulate.sh")
PACKAGES = "base-files,python3,libstdc++6,libgcc-s1,dash,coreutils"
# Tags a Raspberry Pi's pip takes: onnxruntime is built for glibc 2.28, others for older ones.
GLIBC_TAGS = ("_2_28", "_2_27", "_2_26", "_2_24", "_2_17", "2014")
SOURCES = ("fedge", "client/fedge_client", "server/fedge_server", "pyproject.toml")


@dataclass(frozen=True)
class System:
    """One system image: Debian's suite and architecture, and the Python in it."""

    suite: str
    architecture: str
    python: str


SYSTEMS = {
    "bookworm": System("bookworm", "arm64", "3.11"),
    "trixie": System("trixie", "arm64", "3.13"),
    "armhf": System("bookworm", "armhf", "3.11"),
}


def make(name: str) -> Path:
    """The root of this name, made unless it is in the cache, with the present fedge in it.

    Raises:
        CalledProcessError: If a package cannot be had.
    """
    system = SYSTEMS[name]
    root = CACHE / f"{name}-{_key(system)}"
    if not root.is_dir():
        print(f"making {root}", file=sys.stderr)
        for old in CACHE.glob(f"{name}-*"):
            shutil.rmtree(old)
        part = CACHE / f"part-{name}"
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        _debian(system, part)
        if system.architecture == "arm64":
            _wheels(system, _site(part, system))
        board.write(part, min(4, os.cpu_count() or 1))
        _compile(system, part, "usr/lib", "usr/local/lib")
        part.rename(root)
    _fedge(root, system)
    return root


def _key(system: System) -> str:
    made_by = b"".join(p.read_bytes() for p in (Path(__file__), Path(board.__file__)))
    what = f"{system} {_dependencies()} {os.cpu_count()}".encode()
    return hashlib.sha256(made_by + what).hexdigest()[:12]


def _dependencies() -> list[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return [str(d) for d in project["dependencies"]]


def _debian(system: System, root: Path) -> None:
    options = ["--quiet", "--variant=extract", "--mode=root", f"--include={PACKAGES}"]
    options += [f"--architectures={system.architecture}"]
    options += ["--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"]
    _run(["mmdebstrap", *options, system.suite, str(root), *_archive(system.suite)])
    for folder in ("root", "proc", "sys", "dev", "tmp", "opt/fedge"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    site = _site(root, system)
    site.mkdir(parents=True, exist_ok=True)
    (site / "fedge.pth").write_text("/opt/fedge\n")


def _archive(suite: str) -> list[str]:
    """This machine's Debian archive without its security half, whose mirrors lag for old boards."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    sources = [line.split() for line in listed.splitlines() if "debian" in line]
    main = sorted({uri for uri, release in sources if "security" not in release + uri})
    return [f"deb {main[0]} {suite} main"] if main else []


def _wheels(system: System, site: Path) -> None:
    digits = system.python.replace(".", "")
    tags = [f"--platform=manylinux{t}_aarch64" for t in GLIBC_TAGS]
    tags += [f"--abi={abi}" for abi in (f"cp{digits}", "abi3", "none")]
    which = ["--only-binary=:all:", "--implementation=cp", f"--python-version={system.python}"]
    _pip(site, *which, *tags, *_dependencies())


def _fedge(root: Path, system: System) -> None:
    """Install the present fedge from its wheel, unless it is there."""
    files = sorted(p for s in SOURCES for p in _files(REPOSITORY / s))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()
    stamp, target = root / "opt/fedge.sha256", root / "opt/fedge"
    if stamp.exists() and stamp.read_text() == digest:
        return
    shutil.rmtree(target)
    _pip(target, "--no-deps", str(REPOSITORY))
    _compile(system, root, "opt/fedge")
    stamp.write_text(digest)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else list(path.rglob("*.py"))


def _compile(system: System, root: Path, *folders: str) -> None:
    """Compile in advance: with a native Python of that version, or in emulation, which is slow."""
    find = [str(REPOSITORY / "tools/find_python.sh"), system.python]
    found = subprocess.run(find, capture_output=True, text=True, check=False).stdout.strip()
    python = [found] if found else [str(EMULATE), str(root), "/usr/bin/python3"]
    seen_from = str(root) if found else ""
    what = ["-m", "compileall", "-q", "-j", "2", *(f"{seen_from}/{f}" for f in folders)]
    as_there = ["-s", seen_from, "-p", "/"] if found else []
    subprocess.run([*python, *what, *as_there], check=False, stdout=subprocess.DEVNULL)


def _site(root: Path, system: System) -> Path:
    return root / f"usr/local/lib/python{system.python}/dist-packages"


def _pip(target: Path, *args: str) -> None:
    quiet = ["-qq", "--no-warn-conflicts", "--no-compile", "--disable-pip-version-check"]
    _run([sys.executable, "-m", "pip", "install", *quiet, "--target", str(target), *args])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    for wanted in sys.argv[1:] or SYSTEMS:
        print(make(wanted))
