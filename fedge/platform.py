"""The operating system behind one door: atomic files, private folders, locks."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fedge.errors import StateError

_CGROUP_2 = ("memory.max", "memory.current")  # "max" is no number: no limit

# Microsoft's and Flower's telemetry is decided by these before their packages are imported.
_QUIET = {
    "ORT_DISABLE_TELEMETRY": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}


def silence_telemetry(environ: dict[str, str] | None = None) -> None:
    """Assign the switches that keep our dependencies from phoning home.

    Call it before importing onnxruntime or flwr. It overrides what the user set: a value of
    ``ORT_DISABLE_TELEMETRY=0`` in the environment must not send a hospital's device id anywhere.
    """
    target = os.environ if environ is None else environ
    target.update(_QUIET)


def limit_process(
    *, memory_bytes: int | None = None, cpu_s: int | None = None, core_bytes: int = 0
) -> None:
    """Set limits this process cannot lift again, where the system has them.

    Args:
        memory_bytes: Address space; macOS does not enforce it.
        cpu_s: CPU time.
        core_bytes: Of a memory dump after a crash. None by default: it would hold the site's rows.
    """
    if sys.platform == "win32":
        return
    import resource

    limits = {
        resource.RLIMIT_CORE: core_bytes,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_s,
    }
    for what, most in limits.items():
        if most is not None:
            with contextlib.suppress(ValueError, OSError):  # a stricter one is in force
                resource.setrlimit(what, (most, most))


def available_memory() -> int | None:
    """Bytes this process may still take: what the system has free, or its cgroup leaves.

    None where the system does not say (it is no Linux).
    """
    found = [_meminfo("MemAvailable"), *_cgroup_free()]
    return min((f for f in found if f is not None), default=None)


def _meminfo(name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def _cgroup_free() -> Iterator[int]:
    """What each memory limit above this process leaves, of cgroup version 2 and 1."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup", kinds)
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else _CGROUP_2
        folder = root / path.lstrip("/")
        while folder.is_relative_to(root):
            with contextlib.suppress(OSError, ValueError):
                limit, usage = (int((folder / n).read_text()) for n in names)
                yield max(limit - usage + _cache_bytes(folder), 0)
            folder = folder.parent


def _cache_bytes(folder: Path) -> int:
    """What a cgroup holds of files' contents, and gives up when memory is asked for."""
    stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def die_first() -> None:
    """Where memory runs out, have the system end this process and none that waits for it.

    Linux only; elsewhere it does nothing.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def private_dir(path: Path) -> Path:
    """Create ``path`` readable by its owner alone (0700), parents included, and return it.

    A folder that is there and empty, such as a fresh mount, is taken over: it gets the same mode.
    One that holds something keeps its own.

    Raises:
        StateError: If it cannot be made, or is there and is not a folder.
    """
    if not path.parent.exists():
        private_dir(path.parent)
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        if path.stat().st_mode & 0o077 and not any(path.iterdir()):
            with contextlib.suppress(PermissionError):  # another's, lent to us
                path.chmod(0o700)
    except OSError as exc:
        raise StateError(f"cannot make the folder {path}: {exc.strerror}; name another") from exc
    return path


def atomic_write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data`` so that a power cut leaves the old file or the new one.

    Temporary file in the same folder, fsync, rename, fsync of the folder.
    """
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as handle:
            handle.write(data)
            handle.flush()
            commit_file(handle.fileno(), Path(tmp), path, mode)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(tmp).unlink()
        raise


def commit_file(fd: int, tmp: Path, path: Path, mode: int = 0o600) -> None:
    """Make the fully written and flushed ``tmp``, open as ``fd``, durable under ``path``."""
    os.fchmod(fd, mode)
    os.fsync(fd)
    os.replace(tmp, path)  # noqa: PTH105 - the rename is the point
    fsync_dir(path.parent)


def fsync_dir(path: Path) -> None:
    """Make the names in a folder durable."""
    if sys.platform == "win32":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``path`` while the block runs.

    Args:
        path: Lock file; created 0600.
        what: Who holds it, for the error: "fedge-server on ./fedge-state".

    Raises:
        StateError: If another process holds it.
    """
    import fcntl

    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise StateError(f"{what} is already running; stop it or use another folder") from exc
        yield
    finally:
        os.close(fd)
