"""What a site configures: its data source and its engine, in ``client.toml`` of the state folder.

Precedence: ``client.toml`` < environment (``FEDGE_ENGINE``) < flags. Flags of ``join`` are
written to the file, so that ``run`` finds them again.
"""

from __future__ import annotations

import csv
import json
import os
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fedge.config import from_mapping, read_toml
from fedge.engines.providers import parse
from fedge.errors import ConfigError, DataError
from fedge.platform import atomic_write

FILE = "client.toml"
FORMATS = ("csv", "npz")
ENGINES = ("auto", "ort", "ort-training")
_MAX_HEADER_CHARS = 1 << 20


@dataclass(frozen=True)
class DataConfig:
    """Where a site's rows are and what they mean.

    Attributes:
        path: CSV (with a header line) or NPZ file; a relative path starts at the state folder.
        label: Column (CSV) or array (NPZ) that holds the label; of a survival model in CSV two
            columns, ``time,event``.
        format: One of ``FORMATS``; empty takes the file's suffix.
        columns: CSV: the model's input columns in order; empty takes every column but label and
            split. NPZ: one array per model input; empty takes the inputs' own names.
        split: Column or array that says ``train`` or ``test`` per row; empty draws the split.
        test_fraction: Share of rows held out where ``split`` is empty; 0 holds none out.
        seed: Fixes that draw.
    """

    path: str
    label: str
    format: str = ""
    columns: tuple[str, ...] = ()
    split: str = ""
    test_fraction: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        suffix = Path(self.path).suffix.lower().lstrip(".")
        object.__setattr__(self, "format", self.format or suffix)
        object.__setattr__(self, "columns", tuple(self.columns))
        _want(self.format in FORMATS, f"format {self.format!r}; wanted {' or '.join(FORMATS)}")
        _want(bool(self.label), "label is empty; name the column that holds the label")
        _want(all(isinstance(c, str) for c in self.columns), "columns must be names")
        _want(0 <= self.test_fraction < 1, f"test_fraction {self.test_fraction}; wanted 0 to <1")

    def require_file(self) -> None:
        """Check that the file is there and readable, without reading it.

        Raises:
            DataError: If it is missing, a folder, or not readable by this user.
        """
        path = Path(self.path)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise DataError(
                f"data file {path} {what}; check the path given or set in {FILE} [data]"
            )
        if not os.access(path, os.R_OK):
            raise DataError(f"data file {path} is not readable by this user; check its permissions")

    def require_columns(self) -> None:
        """Check that the file has the columns or arrays named, from its header alone.

        Raises:
            DataError: As :meth:`require_file`; and naming what is not there.
        """
        self.require_file()
        found = self._names()
        labels = [self.label] if self.label in found else self.label.split(",")
        wanted = [
            *(n.strip() for n in labels),
            *self.columns,
            *([self.split] if self.split else []),
        ]
        missing = [n for n in wanted if n not in found]
        if not found:
            raise DataError(f"{self.path} is empty; wanted a header line and rows")
        if missing:
            what = "column" if self.format == "csv" else "array"
            shown = ", ".join(found[:12]) + (", …" if len(found) > 12 else "")
            raise DataError(f"{self.path} lacks the {what} {', '.join(missing)}; it has {shown}")

    def _names(self) -> list[str]:
        """Columns of the header line, or arrays of the NPZ."""
        try:
            if self.format == "npz":
                with zipfile.ZipFile(self.path) as archive:
                    return [n.removesuffix(".npy") for n in archive.namelist()]
            with Path(self.path).open(newline="", encoding="utf-8-sig") as handle:
                first = handle.readline(_MAX_HEADER_CHARS)
            return [n.strip() for n in next(csv.reader([first]), [])]
        except (OSError, UnicodeDecodeError, csv.Error, zipfile.BadZipFile) as exc:
            raise DataError(f"{self.path} cannot be read as {self.format.upper()}: {exc}") from exc


@dataclass(frozen=True)
class EngineConfig:
    """Which engine computes, and how.

    Attributes:
        name: One of ``ENGINES``; ``auto`` measures what is there and takes the fastest that agrees.
        providers: Execution providers for engine ``ort``, such as ``["cuda"]``, in order of
            preference; the first that agrees with the CPU computes. Empty: with ``auto``, those
            that are found, where they are faster. ``["cpu"]``: none.
        threads: Threads inside one operator; 1 keeps runs bit-equal and the machine usable.
        training_python: Interpreter that holds onnxruntime-training; empty searches for it.
        memory_mb: Memory the worker may take, in MB; 0: what the system has free.
        worker_idle_s: Seconds without work after which the worker process is closed.
    """

    name: str = "auto"
    providers: tuple[str, ...] = ()
    threads: int = 1
    training_python: str = ""
    memory_mb: int = 0
    worker_idle_s: float = 10.0

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise ConfigError(f"engine {self.name!r}; wanted {', '.join(ENGINES)}")
        object.__setattr__(self, "providers", tuple(parse(p) for p in self.providers))
        if self.providers and self.name == "ort-training":
            raise ConfigError("engine ort-training has no execution providers; use ort or auto")
        if not 1 <= self.threads <= 1024:
            raise ConfigError(f"threads is {self.threads}; wanted 1 to 1024")
        if not 0 <= self.memory_mb < 1 << 30:
            raise ConfigError(f"memory_mb is {self.memory_mb}; wanted megabytes, or 0")
        if self.worker_idle_s < 0:
            raise ConfigError(f"worker_idle_s is {self.worker_idle_s}; it must be at least 0")


@dataclass(frozen=True)
class ClientConfig:
    """Everything in ``client.toml``."""

    data: DataConfig | None = None
    engine: EngineConfig = EngineConfig()


def load(state: Path) -> ClientConfig:
    """Read the state folder's ``client.toml``; a missing one is all defaults.

    Raises:
        ConfigError: If it is not valid TOML, or holds something unknown or out of range.
    """
    path = state / FILE
    raw = read_toml(path) if path.exists() else {}
    unknown = sorted(set(raw) - {"data", "engine"})
    if unknown:
        raise ConfigError(f"{path} has no table {', '.join(unknown)}; it has data, engine")
    data = None
    if "data" in raw:
        data = from_mapping(DataConfig, raw["data"], f"{FILE} [data]")
        data = replace(data, path=str((state / data.path).absolute()))
    engine = from_mapping(EngineConfig, raw.get("engine", {}), f"{FILE} [engine]")
    if name := os.environ.get("FEDGE_ENGINE"):
        engine = replace(engine, name=name)
    return ClientConfig(data, engine)


def save(state: Path, config: ClientConfig) -> None:
    """Write ``client.toml`` (0600), the tables that are set, defaults left out."""
    lines: list[str] = []
    for name, table in (("data", config.data), ("engine", config.engine)):
        values = _changed(table) if table is not None else {}
        if values:
            lines += [f"[{name}]", *(f"{k} = {_toml(v)}" for k, v in values.items()), ""]
    atomic_write(state / FILE, "\n".join(lines).encode())


def as_json(data: DataConfig) -> dict[str, Any]:
    """A data source as plain values, for the worker; :func:`from_json` reads it."""
    return {f.name: getattr(data, f.name) for f in fields(data)}


def from_json(values: dict[str, Any]) -> DataConfig:
    """The data source :func:`as_json` wrote."""
    return from_mapping(DataConfig, values, f"{FILE} [data]")


def _changed(table: Any) -> dict[str, Any]:  # noqa: ANN401 - one of the dataclasses above
    values = {f.name: getattr(table, f.name) for f in fields(table)}
    return {f.name: values[f.name] for f in fields(table) if values[f.name] != f.default}


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def _want(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(f"{FILE} [data] {message}")
