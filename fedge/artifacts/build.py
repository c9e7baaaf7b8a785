"""``fedge.build``: from a model to a signed bundle that devices train."""

from __future__ import annotations

import hashlib
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
from onnx import numpy_helper

import fedge
from fedge import tensors
from fedge.artifacts import manifest as form
from fedge.artifacts import reference
from fedge.artifacts.admission import admit_model
from fedge.artifacts.bundle import Bundle, Reference
from fedge.artifacts.costs import measure
from fedge.artifacts.manifest import GraphCost, Manifest, Optimizer, ParamSpec
from fedge.artifacts.model import graph_inputs, keep_output, normalize, read_model
from fedge.artifacts.ort_build import OrtRequest, build_ort_files
from fedge.artifacts.preprocessing import Preprocessing, build_preprocessor
from fedge.artifacts.selection import (
    Choice,
    Patterns,
    Source,
    choose,
    param_names,
    untrained_statistics,
)
from fedge.artifacts.signing import generate_signing_key
from fedge.artifacts.strip import strip
from fedge.artifacts.torch_export import ExportOptions, export_module
from fedge.autodiff import TrainingGraphs, training_graphs
from fedge.autodiff.optimizers import settings_of
from fedge.config import TrainConfig, from_mapping
from fedge.errors import ConfigError
from fedge.losses import Loss, LossLike, Onnx, find_loss
from fedge.losses import settings_of as settings_of_loss
from fedge.types import Array, Examples, Params

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

OptimizerLike: TypeAlias = str | Optimizer | Mapping[str, Any]


def build(
    model: Any,  # noqa: ANN401 - naming torch's type would import torch
    *,
    loss: LossLike | Path | bytes | onnx.ModelProto,
    optimizer: OptimizerLike = "sgd",
    sample: Any = None,  # noqa: ANN401 - arrays, tensors, or collections of them
    output: str | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    exporter: str = "auto",
    trainable: Patterns = None,
    shared: Patterns = None,
    personal: Patterns = None,
    preprocessing: Preprocessing = None,
    train: TrainConfig | Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    name: str | None = None,
    signing_key: Ed25519PrivateKey | None = None,
    recompute: bool | int | str = False,
) -> Bundle:
    """Make a bundle: training, gradient, evaluation and inference graphs, params, manifest.

    Args:
        model: An ONNX model (path, bytes or ModelProto; no torch needed) or ``torch.nn.Module``,
            taken in the mode it is in: ``.eval()`` turns Dropout off and freezes BatchNorm.
        loss: Of the first output, a mean over the batch: a name such as ``"cross_entropy"``, one of
            :mod:`fedge.losses` with settings, or an ONNX model (path ``*.onnx``, bytes or
            ModelProto; as :class:`fedge.losses.Onnx`).
        optimizer: ``"sgd"``, ``"adamw"``, or one with settings, such as
            ``{"name": "sgd", "momentum": 0.9}``.
        sample: At least one row of input; needed for an nn.Module.
        output: Of an ONNX model: the value that the loss is of and that the bundle puts out, where
            it is not the first output (logits before a Softmax, say). What it does not need is
            dropped.
        dynamic: Of a module: input -> axis -> name of a size that may vary from data set to data
            set, as ``{"x": {1: "T"}}``. An ONNX model says so itself.
        exporter: Of a module: ``torchscript``, ``dynamo``, or ``auto``: the second where the first
            cannot, and where sizes may vary.
        trainable: Glob patterns of the tensors to train; by default all that can be.
        shared: Patterns of tensors training changes (running statistics too) that may leave a
            device; by default all.
        personal: Likewise those that never leave one. Exclusive with ``shared``.
        preprocessing: From a site's raw columns to the model's inputs: None, ``Standardize``,
            ``SiteStandardize`` (or ``"site"``), or an ONNX model.
        train: Local training settings devices use unless a round says otherwise; a
            ``TrainConfig`` or a table of its fields.
        out: Folder to make; None makes a temporary one that lives as long as the bundle object.
        name: Of the model; by default from the file or class.
        signing_key: Ed25519 key to sign with; a fresh one by default.
        recompute: Of the ``ort`` engine: True makes activations again in the backward pass rather
            than keep them all, which takes less memory and more time; a number says in how many
            segments; ``"auto"`` puts both forms into the bundle, and a device that is short of
            memory takes the second.

    Returns:
        The bundle, opened and verified as a device would.

    Raises:
        ConfigError: If an option is wrong or does not fit the model.
        ArtifactError: If the model cannot be used; UnsupportedOperatorError names the operator.
    """
    settings = _train(train)
    _check_types(name=(name, str), out=(out, str | Path))
    key = generate_signing_key() if signing_key is None else signing_key
    source = _read(model, sample, output, ExportOptions(exporter, dynamic or {}))
    params = choose(source, Choice(trainable, shared, personal))
    kind = read_loss(loss)
    how = Differentiation(params, kind, _optimizer(optimizer), _recompute(recompute))
    graphs, lean = how.graphs(source)
    pre = build_preprocessor(preprocessing, graphs.inputs)
    values = _values(source)
    files = _graph_files({**_models(graphs, lean), form.PREPROCESS: pre.model})
    files[form.PARAMS] = tensors.dump(values, {"kind": "params"})
    recorded = _record(files[form.GRAD], graphs, source, values)
    files[form.REFERENCE] = reference.dump(recorded)
    found = _costs(files, graphs, recorded, values)
    request = OrtRequest(source.model, kind, params, _optimizer(optimizer), source.sizes)
    ort = build_ort_files(request, graphs, recorded, values)
    manifest = Manifest(
        name=_name(name or source.name),
        loss=kind.name,
        optimizer=request.optimizer,
        train=settings,
        raw_inputs=pre.raw_inputs,
        inputs=graphs.inputs,
        outputs=graphs.outputs,
        labels=graphs.labels,
        params=params,
        state=graphs.state,
        engines={"ort": "", "ort-training": ort.reason},
        scaling=pre.scaling,
        files={},
        signer="",
        provenance={**source.provenance, **ort.provenance, "fedge": fedge.__version__},
        loss_settings=settings_of_loss(kind),
        extras=graphs.extras,
        noise=graphs.noise,
        costs=found,
    )
    return Bundle.write(manifest, {**files, **ort.files}, key, out)


def _record(grad: bytes, graphs: TrainingGraphs, source: Source, values: Params) -> Reference:
    """The reference step; Dropout drops in it, by recorded numbers."""
    asked = (*graphs.inputs, *graphs.extras)
    drawn = reference.draw_examples(asked, graphs.labels, source.sample, source.sizes)
    noise = reference.draw_noise(graphs.noise, source.sizes)
    examples = Examples({**drawn.inputs, **noise}, drawn.labels)
    return reference.record(grad, examples, graphs.labels.name, values)


def _read(model: Any, sample: Any, output: str | None, options: ExportOptions) -> Source:  # noqa: ANN401
    """An ONNX model or a module, in the builder's form."""
    if isinstance(model, (str, Path, bytes, onnx.ModelProto)):
        if options != ExportOptions():
            raise ConfigError("dynamic and exporter say how to export a module; this is a model")
        read = read_model(model)
        digest = hashlib.sha256(read.SerializeToString(deterministic=True)).hexdigest()
        name = Path(model).stem if isinstance(model, (str, Path)) else read.graph.name
        if output is not None:
            keep_output(read, output)
        inputs = graph_inputs(read)
        rows = _sample_rows(sample, [i.name for i in inputs])
        sizes = _sizes(inputs, rows)
        normal = normalize(read, sizes)
        params = param_names(normal)
        trainable = tuple(n for n in params if n not in untrained_statistics(normal))
        origin = {"model_sha256": digest, "onnx": onnx.__version__}
        return Source(normal, params, trainable, rows, name, origin, sizes)
    if output is not None:
        raise ConfigError("output names a value of an ONNX model; this is a module")
    exported = export_module(model, sample, options)
    sizes = _sizes(exported.model.graph.input, exported.sample)
    digest = hashlib.sha256(exported.model.SerializeToString(deterministic=True)).hexdigest()
    origin = {"model_sha256": digest, "onnx": onnx.__version__, "torch": exported.torch_version}
    origin["exporter"] = exported.exporter
    return Source(
        normalize(exported.model, sizes),
        exported.params,
        exported.trainable,
        exported.sample,
        type(model).__name__,
        origin,
        sizes,
    )


def _sizes(inputs: Iterable[onnx.ValueInfoProto], rows: Params) -> dict[str, int]:
    """What the sample says of sizes that may vary."""
    return (
        {
            dim.dim_param: size
            for info in inputs
            for dim, size in zip(
                info.type.tensor_type.shape.dim, rows[info.name].shape, strict=False
            )
            if dim.dim_param and dim.dim_param != form.BATCH
        }
        if rows
        else {}
    )


def _sample_rows(sample: Any, names: list[str]) -> Params:  # noqa: ANN401
    if sample is None:
        return {}
    if not isinstance(sample, Mapping):
        rows = [sample] if len(names) == 1 else sample
        if isinstance(rows, str) or not isinstance(rows, Sequence):
            raise ConfigError(
                f"sample is {_shown(sample)}; wanted arrays for {', '.join(names)}, in "
                "this order or by name"
            )
        sample = dict(zip(names, rows, strict=False))
    unknown = sorted(set(sample) - set(names), key=str)
    if unknown:
        raise ConfigError(f"sample names {unknown[0]!r}; the model takes {', '.join(names)}")
    return {n: _numbers(n, v) for n, v in sample.items()}


def _numbers(name: str, value: Any) -> Array:  # noqa: ANN401
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"sample for {name} is no array: {exc}") from exc
    if array.dtype.kind not in "biuf" or not array.ndim:
        raise ConfigError(f"sample for {name} is {_shown(value)}; wanted numbers, rows × features")
    return array


def _shown(value: object) -> str:
    """A value in a message: short, and of what type."""
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 60 else text[:60] + '…'} ({type(value).__name__})"


def read_loss(given: LossLike | Path | bytes | onnx.ModelProto) -> Loss:
    """The loss a user names; an ONNX model is admitted like any other.

    Raises:
        ConfigError: If there is no such loss, or a setting is wrong.
        ArtifactError: If a model of a loss cannot be used.
    """
    file = isinstance(given, str) and given.endswith(".onnx")
    found: Loss
    if file or isinstance(given, (Path, bytes, onnx.ModelProto)):
        found = Onnx(given)
    else:
        found = find_loss(given)
    if not isinstance(found, Onnx):
        return found
    if found.model is None:
        raise ConfigError("loss onnx needs its model: a path, bytes or a ModelProto")
    model = read_model(found.model)
    strip(model)
    data = admit_model(model.SerializeToString())
    digest = hashlib.sha256(data).hexdigest()
    return replace(found, model=onnx.load_model_from_string(data), sha256=digest)


@dataclass(frozen=True)
class Differentiation:
    """How a model is differentiated."""

    params: tuple[ParamSpec, ...]
    loss: Loss
    optimizer: Optimizer
    recompute: tuple[bool | int, ...]

    def graphs(self, source: Source) -> tuple[TrainingGraphs, TrainingGraphs | None]:
        """The graphs, and those with recomputation where the bundle carries both.

        Raises:
            ConfigError: If the loss does not depend on a param that is to be trained.
        """
        made = [self._once(source, r) for r in self.recompute]
        trained = [p.name for p in self.params if p.trainable]
        missing = [n for n in trained if not _reached(made[0], n)]
        if missing:
            raise ConfigError(
                f"the loss does not depend on {', '.join(missing)}; do not train them"
            )
        return made[0], made[1] if len(made) > 1 else None

    def _once(self, source: Source, recompute: bool | int) -> TrainingGraphs:
        trained = [p for p in self.params if p.trainable]
        return training_graphs(
            source.model,
            params=source.params,
            trainable=[p.name for p in trained],
            loss=self.loss,
            optimizer=self.optimizer,
            proximal=[p.name for p in trained if p.shared],
            sizes=source.sizes,
            recompute=recompute,
        )


def _recompute(given: bool | int | str) -> tuple[bool | int, ...]:
    """Of each pair of training graphs, whether or in how many segments."""
    if given == "auto":
        return (False, True)
    if not isinstance(given, int) or given < 0:
        raise ConfigError(f"recompute is {given!r}; wanted True, False, 'auto' or segments")
    return (given if isinstance(given, bool) else given > 1 and given,)


def _costs(
    files: Mapping[str, bytes], graphs: TrainingGraphs, recorded: Reference, values: Params
) -> tuple[GraphCost, ...]:
    """What training and evaluation take."""
    rows = {**recorded.examples.inputs, graphs.labels.name: recorded.examples.labels}
    state = {s.name: np.zeros([int(d) for d in s.shape], s.dtype) for s in graphs.state}
    feeds = {**rows, **values, **state, "lr": np.zeros((), np.float32)}
    wanted = (form.STEP, form.EVALUATE, form.RECOMPUTED[form.STEP])
    return tuple(measure({n: files[n] for n in wanted if n in files}, feeds, list(rows)))


def _reached(graphs: TrainingGraphs, param: str) -> bool:
    return any(o.name == f"{param}@grad" for o in graphs.grad.graph.output)


def _models(graphs: TrainingGraphs, lean: TrainingGraphs | None) -> dict[str, onnx.ModelProto]:
    """The graphs by their files' names."""
    models = {
        form.STEP: graphs.step,
        form.GRAD: graphs.grad,
        form.UPDATE: graphs.update,
        form.EVALUATE: graphs.evaluate,
        form.INFER: graphs.infer,
    }
    if lean is not None:
        models |= {form.RECOMPUTED[form.STEP]: lean.step, form.RECOMPUTED[form.GRAD]: lean.grad}
    return models


def _graph_files(models: Mapping[str, onnx.ModelProto]) -> dict[str, bytes]:
    """The graphs as the bytes that devices will admit."""
    for model in models.values():
        strip(model)
    return {name: admit_model(model.SerializeToString()) for name, model in models.items()}


def _values(source: Source) -> Params:
    """Every param's initial value, in order."""
    found = {t.name: t for t in source.model.graph.initializer}
    return {n: np.asarray(numpy_helper.to_array(found[n]), np.float32) for n in source.params}


def _optimizer(given: OptimizerLike) -> Optimizer:
    """With every setting filled in."""
    if isinstance(given, str):
        given = Optimizer(given)
    elif isinstance(given, Mapping):
        settings = {str(k): _setting(k, v) for k, v in given.items() if k != "name"}
        given = Optimizer(str(given.get("name", "sgd")), settings)
    if not isinstance(given, Optimizer):
        raise ConfigError(
            f"optimizer is {_shown(given)}; give 'sgd', 'adamw', or a table such as "
            "{'name': 'sgd', 'momentum': 0.9}; the learning rate is train=TrainConfig(lr=…)"
        )
    return replace(given, settings=settings_of(given))


def _check_types(**options: tuple[object, Any]) -> None:
    for name, (value, wanted) in options.items():
        if value is not None and not isinstance(value, wanted):
            raise ConfigError(f"{name} is {_shown(value)}; wanted text")


def _setting(name: object, value: object) -> float:
    if isinstance(value, numbers.Real):
        return float(value)
    raise ConfigError(f"optimizer: {name} is {_shown(value)}; wanted a number")


def _train(given: TrainConfig | Mapping[str, Any] | None) -> TrainConfig:
    """Settings as they are, or from plain values."""
    if isinstance(given, Mapping):
        return from_mapping(TrainConfig, dict(given), "train")
    if given is not None and not isinstance(given, TrainConfig):
        raise ConfigError(f"train is {_shown(given)}; give TrainConfig(lr=…) or a table")
    return given or TrainConfig()


def _name(text: str) -> str:
    """Letters, digits, ``._-``, at most 64 of them."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:64] or "model"
