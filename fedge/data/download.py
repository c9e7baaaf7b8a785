"""Files of public data sets: a local folder, else a cache, else the publisher, always checked."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from fedge.errors import DataError
from fedge.platform import atomic_write, private_dir

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Source:
    """One pinned file.

    Attributes:
        path: Where it lies in a data folder, with forward slashes.
        url: Where its publisher offers it; HTTPS.
        sha256: Of its bytes, lower-case hex.
        max_bytes: More than this is not read.
    """

    path: str
    url: str
    sha256: str
    max_bytes: int = 1 << 20


def fetch(source: Source) -> Path:
    """The local path of a file that has the pinned digest.

    With ``FEDGE_DATA`` set, the file must lie in that folder. Otherwise it is taken from the cache
    (``FEDGE_CACHE``, else ``~/.cache/fedge``), and downloaded into it when it is not there.

    Raises:
        DataError: If it is missing, cannot be downloaded, or has another digest.
    """
    folder = os.environ.get("FEDGE_DATA")
    if folder:
        return _checked(Path(folder) / source.path, source, "FEDGE_DATA points there")
    path = _cache() / source.path
    if not path.is_file():
        data = _download(source)
        atomic_write(private_dir(path.parent) / path.name, data)
    return _checked(path, source, "delete it to have it downloaded again")


def _cache() -> Path:
    chosen = os.environ.get("FEDGE_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "fedge"


def _checked(path: Path, source: Source, advice: str) -> Path:
    try:
        with path.open("rb") as handle:
            data = handle.read(source.max_bytes + 1)
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror} ({advice})") from exc
    _check(data, source, str(path), advice)
    return path


def _download(source: Source) -> bytes:
    if not source.url.startswith("https://"):
        raise DataError(f"{source.url} is not an https address")
    try:
        with urllib.request.urlopen(source.url, timeout=TIMEOUT_S) as reply:  # noqa: S310 - https
            data: bytes = reply.read(source.max_bytes + 1)
    except (OSError, http.client.HTTPException) as exc:
        reason = exc.reason if isinstance(exc, urllib.error.URLError) else exc
        raise DataError(
            f"cannot download {source.url}: {reason}; on a machine without internet put the file "
            f"in a folder as {source.path} and set FEDGE_DATA to that folder"
        ) from exc
    _check(data, source, source.url, "the publisher may have changed it")
    return data


def _check(data: bytes, source: Source, where: str, advice: str) -> None:
    if len(data) > source.max_bytes:
        raise DataError(f"{where} is larger than {source.max_bytes} bytes ({advice})")
    digest = hashlib.sha256(data).hexdigest()
    if digest != source.sha256:
        raise DataError(f"{where} has sha256 {digest}, wanted {source.sha256} ({advice})")
