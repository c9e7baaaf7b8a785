"""A site's own rows, read where they lie and checked against what the bundle asks for.

Runs in the worker. Messages name files, columns and lines, never a value: they may be shown to
people who must not see the data.
"""

from __future__ import annotations

import csv
import math
import tokenize
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedge.artifacts.manifest import LabelSpec, Manifest, TensorSpec
from fedge.errors import DataError
from fedge.seeds import derive_seed
from fedge.types import Array, Examples, Params
from fedge_client.config import DataConfig

_SHOWN = 12  # column names in a message
_CSV_FIELD_BYTES = 1 << 20


@dataclass(frozen=True)
class SiteData:
    """A site's raw rows: what it trains on, and what it holds out."""

    train: Examples
    test: Examples | None


def load(config: DataConfig, manifest: Manifest) -> SiteData:
    """Read the data source, whole.

    Args:
        config: Where it is and what its columns mean.
        manifest: What the model takes: raw inputs and labels.

    Raises:
        DataError: In one line, what was found and what was wanted: missing file, wrong columns,
            no rows, something that is no number, NaN, or labels out of range.
    """
    config.require_file()
    read = _read_csv if config.format == "csv" else _read_npz
    inputs, labels, parts = read(config, manifest)
    examples = Examples(inputs, labels)
    test = _test_rows(config, len(examples), parts)
    train = examples.take(np.flatnonzero(~test))
    _want(len(train) > 0, config, f"leaves no row for training out of {len(examples)}")
    return SiteData(train, examples.take(np.flatnonzero(test)) if test.any() else None)


def load_inputs(config: DataConfig, manifest: Manifest) -> Params:
    """Only the raw inputs of every row, for predictions; label and split may be absent.

    Raises:
        DataError: As :func:`load`.
    """
    config.require_file()
    if config.format == "npz":
        arrays = _npz_arrays(config)
        return _npz_inputs(config, manifest, arrays)
    return _csv_inputs(config, manifest, _Table.read(config))


@dataclass(frozen=True)
class _Table:
    """A CSV file's cells as text, and the line each row began on."""

    names: list[str]
    rows: list[list[str]]
    lines: list[int]

    @classmethod
    def read(cls, config: DataConfig) -> _Table:
        rows, lines = [], []
        csv.field_size_limit(_CSV_FIELD_BYTES)
        try:
            with Path(config.path).open(newline="", encoding="utf-8-sig") as handle:
                reader = csv.reader(handle)
                names = [name.strip() for name in next(reader, [])]
                for row in reader:
                    if row:
                        rows.append(row)
                        lines.append(reader.line_num)
        except (OSError, UnicodeDecodeError, csv.Error) as exc:
            raise DataError(f"{_name(config)} cannot be read as CSV: {_reason(exc)}") from exc
        _want(bool(names), config, "is empty; wanted a header line and rows")
        _want(bool(rows), config, "has no rows; wanted at least one")
        twice = sorted(n for n, times in Counter(names).items() if times > 1)
        _want(not twice, config, f"names the column {', '.join(twice[:_SHOWN])} twice")
        for row, line in zip(rows, lines, strict=True):
            _want(
                len(row) == len(names),
                config,
                f"line {line} has {len(row)} cells, the header {len(names)}",
            )
        return cls(names, rows, lines)

    def text(self, name: str) -> list[str]:
        """One column."""
        at = self.names.index(name)
        return [row[at].strip() for row in self.rows]

    def numbers(self, config: DataConfig, names: Sequence[str]) -> Array:
        """Columns as float64 [rows, len(names)], finite."""
        position = {n: i for i, n in enumerate(self.names)}
        where = [position[n] for n in names]
        out = np.empty((len(self.rows), len(names)))
        for i, row in enumerate(self.rows):
            for j, at in enumerate(where):
                out[i, j] = self._number(config, i, row[at], names[j])
        return out

    def _number(self, config: DataConfig, row: int, cell: str, name: str) -> float:
        try:
            value = float(cell)
        except ValueError:
            what = "is not a number" if cell.strip() else "is empty"
            value, reason = math.nan, what
        else:
            reason = "is NaN or infinite"
        if not math.isfinite(value):
            raise DataError(
                f"{_name(config)} line {self.lines[row]}, column {name!r} {reason}; "
                "fill it in or drop the row"
            )
        return value


def _read_csv(config: DataConfig, manifest: Manifest) -> tuple[Params, Array, list[str] | None]:
    table = _Table.read(config)
    named = _label_columns(config, manifest.labels, table)
    _require(config, "column", [*named, *([config.split] if config.split else [])], table.names)
    extras = ", ".join(s.name for s in manifest.extras)
    _want(not extras, config, f"is CSV; the model also trains on {extras}: use NPZ")
    inputs = _csv_inputs(config, manifest, table)
    values = table.numbers(config, named)
    labels = _labels(config, manifest.labels, values, table.lines)
    return inputs, labels, table.text(config.split) if config.split else None


def _label_columns(config: DataConfig, spec: LabelSpec, table: _Table) -> list[str]:
    """One column, or two parted by a comma where a row has two label values (time, event)."""
    if config.label in table.names or spec.shape[1:] != (2,):
        return [config.label]
    return [name.strip() for name in config.label.split(",")]


def _csv_inputs(config: DataConfig, manifest: Manifest, table: _Table) -> Params:
    _want(
        len(manifest.raw_inputs) == 1,
        config,
        f"is CSV, which feeds one input; the model takes {len(manifest.raw_inputs)}: use NPZ",
    )
    spec = manifest.raw_inputs[0]
    others = {*_label_columns(config, manifest.labels, table), config.split}
    columns = list(config.columns) or [n for n in table.names if n not in others]
    _require(config, "column", columns, table.names)
    sizes = [str(d) for d in spec.shape[1:] if not isinstance(d, int)]
    _want(not sizes, config, f"is CSV; {spec.name!r} varies in {', '.join(sizes)}: use NPZ")
    shape = [int(d) for d in spec.shape[1:]]
    width = math.prod(shape)
    _want(
        len(columns) == width,
        config,
        f"gives {len(columns)} input columns ({_show(columns)}); the model takes {width}: "
        "name them in client.toml [data] columns",
    )
    values = table.numbers(config, columns).reshape(-1, *shape)
    return {spec.name: _cast(config, spec, values, table.lines)}


def _read_npz(config: DataConfig, manifest: Manifest) -> tuple[Params, Array, list[str] | None]:
    arrays = _npz_arrays(config)
    wanted = [config.label, *([config.split] if config.split else [])]
    _require(config, "array", wanted, list(arrays))
    inputs = _npz_inputs(config, manifest, arrays)
    _require(config, "array", [s.name for s in manifest.extras], list(arrays))
    inputs |= {s.name: _cast(config, s, arrays[s.name], None) for s in manifest.extras}
    labels = arrays[config.label]
    _want(labels.dtype.kind in "biuf", config, f"array {config.label!r} is {labels.dtype}")
    rows = {n: len(a) for n, a in [*inputs.items(), (config.label, np.atleast_1d(labels))]}
    if config.split:
        rows[config.split] = len(np.atleast_1d(arrays[config.split]))
    _want(len(set(rows.values())) == 1, config, f"has arrays of different lengths: {rows}")
    _want(next(iter(rows.values())) > 0, config, "has no rows; wanted at least one")
    checked = _labels(config, manifest.labels, labels, None)
    return inputs, checked, _texts(arrays[config.split]) if config.split else None


def _npz_arrays(config: DataConfig) -> Params:
    broken = (OSError, ValueError, EOFError, MemoryError, SyntaxError, tokenize.TokenError)
    try:
        # The site's own file; pickled members are refused, and whatever a header breaks is caught.
        with np.load(config.path, allow_pickle=False) as file:  # noqa: TID251
            return {name: file[name] for name in file.files}
    except (*broken, zipfile.BadZipFile, AttributeError, TypeError) as exc:
        raise DataError(f"{_name(config)} cannot be read as NPZ: {_reason(exc)}") from exc


def _npz_inputs(config: DataConfig, manifest: Manifest, arrays: Params) -> Params:
    specs = manifest.raw_inputs
    names = list(config.columns) or [s.name for s in specs]
    _want(
        len(names) == len(specs),
        config,
        f"columns names {len(names)} arrays; the model takes {len(specs)}: {_specs(specs)}",
    )
    _require(config, "array", names, list(arrays))
    return {s.name: _cast(config, s, arrays[n], None) for s, n in zip(specs, names, strict=True)}


def _cast(config: DataConfig, spec: TensorSpec, values: Array, lines: list[int] | None) -> Array:
    """The values in the input's dtype; shape, finiteness and wholeness checked."""
    wanted = [d if isinstance(d, int) else None for d in spec.shape]
    fits = values.ndim == len(wanted) and all(
        w is None or w == got for w, got in zip(wanted, values.shape, strict=True)
    )
    shape = "x".join(str(d) for d in values.shape)
    _want(fits, config, f"has {shape} values for {spec.name!r}; wanted {_specs([spec])}")
    _want(values.dtype.kind in "biuf", config, f"holds {values.dtype} for {spec.name!r}")
    with np.errstate(over="ignore", invalid="ignore"):
        ready = values.astype(spec.dtype)
    bad = ~np.isfinite(ready) if ready.dtype.kind == "f" else ready != values
    if bad.any():
        what = "NaN or infinite" if ready.dtype.kind == "f" else f"no {spec.dtype}"
        raise DataError(
            f"{_name(config)} {_where(np.argwhere(bad)[0], lines)} of {spec.name!r} is {what}; "
            "fill it in or drop the row"
        )
    return ready


def _labels(config: DataConfig, spec: LabelSpec, values: Array, lines: list[int] | None) -> Array:
    """Labels in the manifest's dtype and shape, inside its range."""
    whole = np.dtype(spec.dtype).kind in "iub"
    shaped = _shaped(values, spec)
    if shaped is None:
        shape, rows = "x".join(str(d) for d in spec.shape), len(values)
        raise DataError(
            f"{_name(config)} has {values.size} label values for {rows} rows; wanted [{shape}]"
        )
    flat = values.reshape(len(values), -1).astype(np.float64)
    bad = ~np.isfinite(flat)
    wanted = "a number"
    if whole:
        bad |= flat != np.floor(flat)
        wanted = "a whole number"
    if spec.low is not None or spec.high is not None:
        low = -math.inf if spec.low is None else spec.low
        high = math.inf if spec.high is None else spec.high
        bad |= ~((flat >= low) & (flat <= high) | (flat == spec.ignore))
        wanted += f" from {low:g} to {high:g}"
    if bad.any():
        count = int(bad.any(axis=1).sum())
        raise DataError(
            f"{_name(config)} {_where(np.argwhere(bad)[0, :1], lines)}: label {config.label!r} is "
            f"out of range in {count} of {len(flat)} rows; wanted {wanted}"
        )
    return flat.astype(spec.dtype).reshape(shaped)


def _shaped(values: Array, spec: LabelSpec) -> tuple[int, ...] | None:
    """The labels' own shape where it fits, or the one it fits in; None where neither does."""
    wanted = spec.shape[1:]
    if values.ndim == len(spec.shape) and all(
        not isinstance(w, int) or w == got for w, got in zip(wanted, values.shape[1:], strict=True)
    ):
        return values.shape
    fixed = [d for d in wanted if isinstance(d, int)]
    if len(fixed) == len(wanted) and values.size == len(values) * math.prod(fixed):
        return (len(values), *fixed)
    return None


def _test_rows(config: DataConfig, rows: int, parts: list[str] | None) -> Array:
    """Which rows are held out, [rows] bool."""
    if parts is not None:
        wrong = [i for i, part in enumerate(parts) if part not in ("train", "test")]
        _want(
            not wrong,
            config,
            f"{config.split!r} is neither train nor test in {len(wrong)} of {rows} rows",
        )
        return np.array([part == "test" for part in parts])
    held = round(rows * config.test_fraction)
    order = np.random.Generator(np.random.Philox(derive_seed(config.seed, "split"))).permutation(
        rows
    )
    test = np.zeros(rows, bool)
    test[order[:held]] = True
    return test


def _texts(array: Array) -> list[str]:
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8", "replace")
    return [str(v) for v in array.reshape(-1)]


def _require(config: DataConfig, what: str, wanted: Sequence[str], present: Sequence[str]) -> None:
    known = set(present)
    missing = [n for n in wanted if n not in known]
    _want(not missing, config, f"lacks the {what} {_show(missing)}; it has {_show(present)}")


def _where(index: Array, lines: list[int] | None) -> str:
    row = int(index[0])
    line = f"row {row + 1}" if lines is None else f"line {lines[row]}"
    return line if len(index) < 2 else f"{line}, value {int(index[-1]) + 1}"


def _specs(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{s.name} [{'x'.join(str(d) for d in s.shape)}]" for s in specs)


def _show(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more


def _reason(exc: BaseException) -> str:
    if isinstance(exc, UnicodeDecodeError):
        return f"byte {exc.start} is not UTF-8"
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return type(exc).__name__


def _name(config: DataConfig) -> str:
    return Path(config.path).name


def _want(ok: bool, config: DataConfig, message: str) -> None:
    if not ok:
        raise DataError(f"{_name(config)} {message}")
