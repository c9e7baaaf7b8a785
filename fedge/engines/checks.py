"""Rows are checked against the manifest before ONNX Runtime sees them.

ORT's training library ends the process on an empty batch or a label out of range, and every
engine computes garbage from a NaN, so nothing reaches either unchecked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedge.artifacts.manifest import LabelSpec, Manifest, TensorSpec
from fedge.errors import ArtifactError, DataError
from fedge.types import Array, Examples, Params


def check_training(manifest: Manifest, data: Examples) -> Examples:
    """Preprocessed rows to train on, with the extras training asks for; as check_examples.

    Noise may come with them.
    """
    given = tuple(s for s in manifest.noise if s.name in data.inputs)
    inputs = check_inputs((*manifest.training_inputs, *given), data.inputs)
    return Examples(inputs, _checked_labels(manifest, data.labels))


def check_examples(manifest: Manifest, data: Examples) -> Examples:
    """Preprocessed rows and labels in the manifest's dtypes, C order; extras are left out.

    Raises:
        DataError: For no rows, missing or foreign inputs, a wrong shape or dtype, NaN or infinity,
            or a label outside the manifest's range.
    """
    inputs = check_inputs(manifest.inputs, without_extras(manifest, data.inputs))
    return Examples(inputs, _checked_labels(manifest, data.labels))


def without_extras(manifest: Manifest, inputs: Params) -> Params:
    """The inputs that are the model's own."""
    extras = {s.name for s in (*manifest.extras, *manifest.noise)}
    return {n: a for n, a in inputs.items() if n not in extras}


def _checked_labels(manifest: Manifest, labels: Array) -> Array:
    ready = check_labels(manifest.labels, labels)
    if manifest.loss == "cox" and not np.isin(ready[:, 1], (0, 1)).all():
        raise DataError("labels are [time, event]; an event is neither 0 (censored) nor 1")
    return ready


def sizes_of(manifest: Manifest, rows: Params) -> dict[str, int]:
    """The size of each symbol but the batch, in rows that have been checked.

    Raises:
        DataError: If one symbol has two sizes.
    """
    labels = manifest.labels
    found: dict[str, int] = {}
    for name, shape in [*((s.name, s.shape) for s in manifest.inputs), (labels.name, labels.shape)]:
        for symbol, size in zip(shape[1:], rows[name].shape[1:], strict=True):
            if isinstance(symbol, str) and found.setdefault(symbol, size) != size:
                raise DataError(
                    f"{name} has {symbol} = {size}; others have {found[symbol]}: make them fit"
                )
    return found


def check_inputs(specs: Sequence[TensorSpec], inputs: Params) -> Params:
    """Model inputs in the order and dtypes of ``specs``.

    Raises:
        DataError: As :func:`check_examples`, and if the inputs differ in their number of rows.
    """
    names = [s.name for s in specs]
    if set(inputs) != set(names):
        raise DataError(f"inputs are {sorted(inputs)}; the model wants {sorted(names)}")
    ready = {s.name: _check(s.name, inputs[s.name], s.dtype, s.shape) for s in specs}
    rows = {n: a.shape[0] for n, a in ready.items()}
    if len(set(rows.values())) > 1:
        raise DataError(f"inputs differ in rows: {rows}")
    return ready


def check_labels(spec: LabelSpec, labels: Array) -> Array:
    """Labels in the manifest's dtype, shape and range; ``[N]`` is taken for ``[N, 1]`` and back.

    Raises:
        DataError: If they do not fit.
    """
    raw = np.asarray(labels)
    if raw.ndim and (raw.ndim == 1) != (len(spec.shape) == 1) and raw.size == raw.shape[0]:
        raw = raw.reshape(-1, *[1] * (len(spec.shape) - 1))
    ready = _check("labels", raw, spec.dtype, spec.shape)
    counted = ready if spec.ignore is None else ready[ready != spec.ignore]
    if not counted.size:
        return ready
    low, high = counted.min(), counted.max()
    if (spec.low is not None and low < spec.low) or (spec.high is not None and high > spec.high):
        raise DataError(
            f"labels run from {low} to {high}; the model knows {spec.low} … {spec.high}"
        )
    return ready


def check_params(manifest: Manifest, params: Params) -> Params:
    """A subset of the params in the manifest's dtypes and shapes.

    Raises:
        ArtifactError: For a name the manifest does not have, a wrong shape or dtype.
    """
    specs = {p.name: p for p in manifest.params}
    ready = {}
    for name, value in params.items():
        if name not in specs:
            raise ArtifactError(f"param {name!r} is unknown; the bundle has {', '.join(specs)}")
        array, spec = np.asarray(value), specs[name]
        if array.shape != spec.shape or not np.can_cast(array.dtype, spec.dtype, "same_kind"):
            raise ArtifactError(
                f"param {name!r} is {array.dtype}{list(array.shape)}; "
                f"wanted {spec.dtype}{list(spec.shape)}"
            )
        ready[name] = np.ascontiguousarray(array, spec.dtype).reshape(spec.shape)
    return ready


def _check(name: str, values: Array, dtype: str, shape: tuple[int | str, ...]) -> Array:
    array = np.asarray(values)
    if array.ndim != len(shape) or any(
        isinstance(want, int) and want != got for want, got in zip(shape, array.shape, strict=True)
    ):
        raise DataError(f"{name} has shape {list(array.shape)}; wanted {_show(shape)}")
    if array.shape[0] == 0:
        raise DataError(f"{name} has no rows; give at least one")
    return np.ascontiguousarray(_cast(name, array, np.dtype(dtype)))


def _cast(name: str, array: Array, dtype: np.dtype[np.generic]) -> Array:
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name} has dtype {array.dtype}; wanted numbers ({dtype})")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{name} holds NaN or infinity; remove or fill those rows")
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    if dtype.kind in "iub" and not np.array_equal(cast, array):
        raise DataError(
            f"{name} holds values that are no {dtype}, such as 0.5; wanted whole numbers"
        )
    if dtype.kind == "f" and not np.isfinite(cast).all():
        raise DataError(f"{name} holds values too large for {dtype}")
    return cast


def _show(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(str(d) for d in shape) + "]"
