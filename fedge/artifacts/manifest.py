"""What a bundle is, as data: files and digests, tensors and who may see them.

A manifest is canonical JSON (sorted keys, no spaces, UTF-8); its SHA-256 is the bundle's digest
and its Ed25519 signature lies beside it. This module imports neither numpy nor onnx.

Names in the training graphs follow one rule, so that no table is needed: a graph input ``X`` that
a step changes has an output ``X@next``; the gradient of ``X`` is ``X@grad``; the loss is ``loss``,
the learning rate ``lr`` (float32, rank 0) and the optimizer's memory of ``X`` is ``X@<slot>``.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, fields
from typing import Any

from fedge.config import TrainConfig, from_mapping
from fedge.errors import ArtifactError, ConfigError
from fedge.losses import NAMES as LOSSES
from fedge.losses import Loss, find_loss

SCHEMA = 1
MAX_MANIFEST_BYTES = 4 << 20
BATCH = "N"  # the symbolic first dimension of every input and output
DTYPE_BYTES = {
    **{"float32": 4, "float64": 8, "float16": 2, "int64": 8, "int32": 4},
    **{"int16": 2, "int8": 1, "uint8": 1, "bool": 1},
}
DTYPES = tuple(DTYPE_BYTES)

SYMBOL = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}")  # name of a size that may vary

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HEX = re.compile(r"[0-9a-f]{64}")

# The files of a bundle. A device fetches only what its engine needs.
STEP, GRAD, UPDATE, EVALUATE, INFER, PREPROCESS = (
    "step.onnx",
    "grad.onnx",
    "update.onnx",
    "evaluate.onnx",
    "infer.onnx",
    "preprocess.onnx",
)
PARAMS, REFERENCE = "params.safetensors", "reference.safetensors"
ORT_FILES = ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx", "checkpoint")
# In a bundle that carries both, the same steps with recomputation: slower, in less memory.
RECOMPUTED = {STEP: "step.recompute.onnx", GRAD: "grad.recompute.onnx"}
COMMON_FILES = (EVALUATE, INFER, PREPROCESS, PARAMS, REFERENCE)
ENGINE_FILES = {"ort": (STEP, GRAD, UPDATE), "ort-training": ORT_FILES}


@dataclass(frozen=True)
class FileEntry:
    """One file: its size in bytes and its SHA-256, lower-case hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output.

    ``shape`` holds ints, the batch ``"N"`` first, and names of other sizes that may vary.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ParamSpec:
    """A model tensor and its fate.

    Attributes:
        name: As in the model it was built from.
        dtype: One of ``DTYPES``.
        shape: Fixed sizes.
        trainable: Whether a step changes it by gradient.
        shared: Whether it takes part in aggregation. Personal tensors (False) never leave.
        running: Whether a step changes it without a gradient: BatchNormalization's statistics.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    trainable: bool = True
    shared: bool = True
    running: bool = False

    @property
    def leaves(self) -> bool:
        """Whether its changes may leave a device."""
        return self.shared and (self.trainable or self.running)


@dataclass(frozen=True)
class LabelSpec:
    """The label input.

    ``low``/``high`` bound valid values (both inclusive; None = no bound); a label ``ignore`` is
    valid whatever the bounds and does not count.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    low: float | None = None
    high: float | None = None
    ignore: int | None = None


@dataclass(frozen=True)
class Optimizer:
    """The optimizer inside ``step.onnx``: ``sgd`` or ``adamw`` and its settings."""

    name: str
    settings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphCost:
    """What one run of a graph takes, found when the bundle was built; N is the number of rows.

    Sizes that may vary beside N were the sample's.

    Attributes:
        file: Of the graph.
        peaks: (a, b): results take max(a·N + b) bytes at the worst moment.
        flops: (a, b): a·N + b multiplications and additions.
        moved: (a, b): a·N + b bytes of results written.
        nodes: Operators run.
    """

    file: str
    peaks: tuple[tuple[int, int], ...]
    flops: tuple[int, int]
    moved: tuple[int, int]
    nodes: int

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> GraphCost:
        """The cost that was written as plain values.

        Raises:
            ArtifactError: If a number is none, or below zero.
        """
        peaks = tuple(_line(p) for p in row["peaks"])
        values = {**row, "peaks": peaks, "flops": _line(row["flops"]), "moved": _line(row["moved"])}
        made = from_mapping(cls, values, "costs")
        _want(bool(peaks) and type(made.nodes) is int and made.nodes >= 0, "costs make no sense")
        return made


def _line(pair: Any) -> tuple[int, int]:  # noqa: ANN401 - JSON
    _want(len(pair) == 2 and all(type(v) is int and v >= 0 for v in pair), f"cost {pair!r:.80}")
    return pair[0], pair[1]


@dataclass(frozen=True)
class Manifest:
    """A bundle's description.

    Attributes:
        name: Of the model; letters, digits, ``._-``.
        loss: One of ``LOSSES``.
        optimizer: What ``step.onnx`` applies.
        train: Default local training settings.
        raw_inputs: What a site's data must look like, before ``preprocess.onnx``.
        inputs: What the model takes, after it.
        outputs: What the model gives.
        labels: The label input of the training graphs.
        params: Every model tensor.
        state: Optimizer memory, all zero at the start of a round.
        engines: Engine name -> "" where the bundle has its files, else why not.
        scaling: "none", "site" (the device standardises by its own training rows), "global"
            (constants from a federated mean and variance, inside ``preprocess.onnx``) or "custom".
        files: File name -> size and digest.
        signer: Ed25519 public key, hex.
        provenance: Who built it with which versions from which model digest.
        loss_settings: What differs from the loss's defaults; see :mod:`fedge.losses`.
        extras: What training asks of rows beside inputs and labels: a teacher's logits.
        noise: What training graphs take beside rows: uniform random numbers of [0, 1), drawn by the
            engine for every step (Dropout's).
        costs: What runs of the training and evaluation graphs take.
        schema: Of this document.
    """

    name: str
    loss: str
    optimizer: Optimizer
    train: TrainConfig
    raw_inputs: tuple[TensorSpec, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: LabelSpec
    params: tuple[ParamSpec, ...]
    state: tuple[TensorSpec, ...]
    engines: dict[str, str]
    scaling: str
    files: dict[str, FileEntry]
    signer: str
    provenance: dict[str, str] = field(default_factory=dict)
    loss_settings: dict[str, Any] = field(default_factory=dict)
    extras: tuple[TensorSpec, ...] = ()
    noise: tuple[TensorSpec, ...] = ()
    costs: tuple[GraphCost, ...] = ()
    schema: int = SCHEMA

    @property
    def loss_function(self) -> Loss:
        """The loss with its settings."""
        return find_loss({**self.loss_settings, "name": self.loss})

    @property
    def scored_as(self) -> str:
        """The plain loss whose scores suit the outputs; "" where only the loss itself does."""
        return self.loss_function.scored_as

    @property
    def training_inputs(self) -> tuple[TensorSpec, ...]:
        """What rows to train on hold beside labels: the model's inputs and the extras."""
        return (*self.inputs, *self.extras)

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names a step changes by gradient, in order."""
        return tuple(p.name for p in self.params if p.trainable)

    @property
    def shared(self) -> tuple[str, ...]:
        """Names that may leave the device: what training changes and is not personal."""
        return tuple(p.name for p in self.params if p.leaves)

    @property
    def running(self) -> tuple[str, ...]:
        """Names a step changes without a gradient, in order."""
        return tuple(p.name for p in self.params if p.running)

    @property
    def personal(self) -> tuple[str, ...]:
        """Names that never leave the device."""
        return tuple(p.name for p in self.params if not p.shared)

    def cost(self, file: str) -> GraphCost | None:
        """What a run of one graph takes, if the bundle says."""
        return next((c for c in self.costs if c.file == file), None)

    def shared_shapes(self) -> dict[str, tuple[int, ...]]:
        """What an update must hold: name -> shape."""
        return {p.name: p.shape for p in self.params if p.leaves}

    def to_json(self) -> bytes:
        """The canonical bytes that are hashed and signed."""
        return json.dumps(
            _plain(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode()

    @property
    def digest(self) -> str:
        """SHA-256 of :meth:`to_json`, hex: the bundle's identity."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Parse and validate.

        Raises:
            ArtifactError: If the bytes are not a manifest of this schema, in canonical form.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise ArtifactError(f"manifest has {len(data)} bytes; at most {MAX_MANIFEST_BYTES}")
        try:
            raw = json.loads(data)
            _want(isinstance(raw, dict), "it is not an object")
            _want(raw.get("schema") == SCHEMA, f"schema {raw.get('schema')!r}, wanted {SCHEMA}")
            manifest = _parse(raw)
            _want(manifest.to_json() == data, "it is not in canonical form")
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            ConfigError,
        ) as exc:
            raise ArtifactError(f"broken manifest: {exc}") from exc
        return manifest


def _parse(raw: dict[str, Any]) -> Manifest:
    def specs(cls: type[Any], rows: list[dict[str, Any]]) -> tuple[Any, ...]:
        return tuple(_spec(cls, row) for row in rows)

    values = dict(raw)
    values["optimizer"] = from_mapping(Optimizer, raw["optimizer"], "optimizer")
    values["train"] = from_mapping(TrainConfig, raw["train"], "train")
    for key in ("raw_inputs", "inputs", "outputs", "state", "extras", "noise"):
        values[key] = specs(TensorSpec, raw[key])
    values["costs"] = tuple(GraphCost.from_json(row) for row in raw["costs"])
    values["params"] = specs(ParamSpec, raw["params"])
    values["labels"] = _spec(LabelSpec, raw["labels"])
    values["files"] = {
        _file_name(n): from_mapping(FileEntry, e, f"files {n}") for n, e in raw["files"].items()
    }
    manifest = from_mapping(Manifest, values, "manifest")
    _check(manifest)
    return manifest


def _spec(cls: type[Any], row: dict[str, Any]) -> Any:  # noqa: ANN401 - one of three dataclasses
    spec = from_mapping(cls, {**row, "shape": tuple(row["shape"])}, cls.__name__)
    _want(spec.dtype in DTYPES, f"{spec.name} has dtype {spec.dtype!r}")
    for dim in spec.shape:
        symbol = isinstance(dim, str) and SYMBOL.fullmatch(dim) is not None
        ok = symbol or (type(dim) is int and 0 <= dim < 1 << 40)
        _want(ok, f"{spec.name} has dimension {dim!r}")
    return spec


def _check(m: Manifest) -> None:
    _want(_NAME.fullmatch(m.name) is not None, f"name {m.name!r}; letters, digits and ._- only")
    _want(_HEX.fullmatch(m.signer) is not None, f"signer {m.signer!r} is not 64 hex digits")
    for name, entry in m.files.items():
        _want(entry.bytes >= 0, f"{name} has {entry.bytes} bytes")
        _want(_HEX.fullmatch(entry.sha256) is not None, f"{name} has sha256 {entry.sha256!r}")
    _want(m.loss in LOSSES, f"loss {m.loss!r}; known: {', '.join(LOSSES)}")
    _want(not {"name", "model"} & set(m.loss_settings), "loss_settings hold a name or a model")
    find_loss({**m.loss_settings, "name": m.loss})
    _want(m.scaling in ("none", "site", "global", "custom"), f"scaling {m.scaling!r}")
    names = [p.name for p in m.params]
    _want(len(set(names)) == len(names), "a param name occurs twice")
    _want(bool(m.trainable), "no param is trainable")
    _want(all(isinstance(d, int) for p in m.params for d in p.shape), "a param's shape is symbolic")
    missing = [f for f in COMMON_FILES if f not in m.files]
    for engine, reason in m.engines.items():
        _want(engine in ENGINE_FILES, f"engine {engine!r}; known: {', '.join(ENGINE_FILES)}")
        missing += [f for f in ENGINE_FILES[engine] if not reason and f not in m.files]
    _want(not missing, f"it lacks the files {', '.join(missing)}")


def _file_name(name: str) -> str:
    known = {
        *COMMON_FILES,
        *RECOMPUTED.values(),
        *(f for files in ENGINE_FILES.values() for f in files),
    }
    _want(name in known, f"file {name!r} is not part of a bundle")
    return name


def _plain(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _want(ok: bool, message: str) -> None:
    if not ok:
        raise ArtifactError(f"broken manifest: {message}")
