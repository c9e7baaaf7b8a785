"""What the worker computes: one function per job, over files and plain values.

Each takes a :class:`Context` (bundle, engine, rows; cached between jobs) and returns numbers and
small texts; tensors go to files, or back as bytes where they are small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedge import local, tensors
from fedge.artifacts.bundle import Bundle
from fedge.artifacts.manifest import Manifest
from fedge.data.scaling import MIN_ROWS, moments, site_stats
from fedge.engines.base import TrainingEngine
from fedge.errors import ArtifactError, DataError, PolicyError
from fedge.local import Site
from fedge.metrics import (
    accuracy,
    accuracy_interval,
    auc_interval,
    counted,
    positive_scores,
    predictions,
    score_name,
)
from fedge.platform import atomic_write
from fedge.types import Array, Examples, Metrics, Params
from fedge.update import Update
from fedge_client.sources import SiteData
from fedge_client.state import FEDERATED

NO_DATA = "no data source is configured; set path and label in client.toml [data]"


@dataclass(frozen=True)
class Context:
    """What every job needs.

    Attributes:
        bundle: Verified by the client, admitted by the engine.
        engine: Opened on it in this process.
        rows: The site's own, raw and preprocessed; None where no data source is configured.
    """

    bundle: Bundle
    engine: TrainingEngine
    rows: tuple[SiteData, Site] | None

    @property
    def manifest(self) -> Manifest:
        """The bundle's."""
        return self.bundle.manifest

    @property
    def raw_train(self) -> Examples:
        """The raw training rows.

        Raises:
            DataError: If no data source is configured.
        """
        return self._require_rows()[0].train

    @property
    def site(self) -> Site:
        """The preprocessed rows, without personal params.

        Raises:
            DataError: If no data source is configured.
        """
        return self._require_rows()[1]

    def _require_rows(self) -> tuple[SiteData, Site]:
        if self.rows is None:
            raise DataError(NO_DATA)
        return self.rows

    def with_personal(self, path: str | None) -> Site:
        """The site with the personal params of a file, if there is one yet."""
        if path is None or not Path(path).exists():
            return self.site
        return replace(self.site, personal=read_tensors(path, self.manifest.personal))


def encode_update(update: Update, manifest: Manifest, mode: str) -> bytes:
    """The one door through which anything trained leaves: an update as bytes.

    Raises:
        PolicyError: In personal mode, and if the update holds a tensor that may not leave.
    """
    if mode != FEDERATED:
        raise PolicyError(f"this client is in {mode} mode: no update is encoded")
    foreign = sorted(set(update.delta) - set(manifest.shared))
    if foreign:
        raise PolicyError(f"{', '.join(foreign)} may not leave this device")
    return update.to_bytes()


def train(context: Context, job: Mapping[str, Any]) -> dict[str, Any]:
    """One round's training; writes the update (and personal params) into ``job["out"]``."""
    manifest, out = context.manifest, Path(job["out"])
    config = manifest.train.override(job["config"])
    task = local.TrainTask(int(job["round_num"]), config, int(job["config"].get("seed", 0)))
    shared = read_tensors(job["params"], manifest.shared)
    site = context.with_personal(job.get("personal"))
    initial = context.bundle.initial_params()
    with values_kept_back():
        update, personal = local.train(context.engine, manifest, initial, site, shared, task)
    (out / "update.fedge").write_bytes(encode_update(update, manifest, str(job["mode"])))
    if personal:
        (out / "personal.safetensors").write_bytes(tensors.dump(personal))
    return {"num_examples": update.num_examples, "metrics": finite(update.metrics)}


def evaluate(context: Context, job: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of the shared params, with the personal ones, on held-out rows."""
    manifest = context.manifest
    shared = read_tensors(job["params"], manifest.shared)
    site = context.with_personal(job.get("personal"))
    with values_kept_back():
        rows, metrics = local.evaluate(
            context.engine, manifest, context.bundle.initial_params(), site, shared
        )
    return {"num_examples": rows, "metrics": finite(metrics)}


def statistics(context: Context) -> tuple[dict[str, Any], bytes]:
    """Count, sum and sum of squares per column of the raw training rows.

    Raises:
        DataError: If the site has so few rows that sums would say too much about one.
    """
    rows = len(context.raw_train)
    if rows < MIN_ROWS:
        raise DataError(f"{rows} training rows; statistics are sent for {MIN_ROWS} or more")
    with values_kept_back():
        found = moments(context.raw_train)
    return {"num_examples": found.count, "metrics": {}}, tensors.dump(
        {"sum": found.sum, "sumsq": found.sumsq}
    )


def personalize(context: Context, job: Mapping[str, Any]) -> dict[str, Any]:
    """Fine-tune the global model here; writes it to ``job["out"]`` and reports three models."""
    manifest = context.manifest
    config = manifest.train.override(job["config"])
    shared = read_tensors(job["params"], manifest.shared)
    site = context.with_personal(job.get("personal"))
    initial = context.bundle.initial_params()
    result = local.personalize(
        context.engine, manifest, initial, site, shared, config, int(job["config"].get("seed", 0))
    )
    models = {
        "local_only": result.local_only,
        "global": {**initial, **site.personal, **shared},
        "personal": result.params,
    }
    report = {name: _scores(context, params) for name, params in models.items()}
    majority = _majority(context)
    atomic_write(Path(job["out"]), tensors.dump(result.params))
    return {
        "rows": {"train": len(site.train), "test": result.num_examples},
        "metrics": {**report, **({} if majority is None else {"majority": majority})},
    }


def predict(context: Context, raw: Params, params: Params) -> Array:
    """What the model says of raw rows: probabilities [N, classes] or [N, 1], or values."""
    manifest, engine = context.manifest, context.engine
    rows = len(next(iter(raw.values())))
    unlabelled = Examples(
        raw, np.zeros((rows, *_fixed(manifest.labels.shape)), manifest.labels.dtype)
    )
    ready = engine.preprocess(unlabelled, site_params(context))
    engine.set_params(params)
    output = next(iter(engine.predict(ready.inputs).values()))
    return probabilities(manifest, output)


def site_params(context: Context) -> Params | None:
    """The site's own scale, where the bundle asks for one."""
    return site_stats(context.raw_train) if context.manifest.scaling == "site" else None


def chosen_params(context: Context, job: Mapping[str, Any]) -> Params:
    """The personal model of a file if one is named, else the global one with personal tensors."""
    manifest, initial = context.manifest, context.bundle.initial_params()
    if job.get("model"):
        return read_tensors(job["model"], tuple(p.name for p in manifest.params))
    kept = Path(job["personal"])
    personal = read_tensors(kept, manifest.personal) if kept.exists() else {}
    return {**initial, **personal, **read_tensors(job["params"], manifest.shared)}


def probabilities(manifest: Manifest, output: Array) -> Array:
    """Logits as probabilities, float64 [N, k]; values of other models as they are."""
    values = np.asarray(output, np.float64).reshape(len(output), -1)
    if manifest.scored_as == "bce_with_logits":
        return np.asarray(0.5 * (1.0 + np.tanh(values / 2.0)))
    if manifest.scored_as == "cross_entropy":
        shifted = np.exp(values - values.max(axis=1, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))
    return values


def read_tensors(path: str | Path, names: tuple[str, ...]) -> Params:
    """A tensor file that must hold exactly these names.

    Raises:
        ArtifactError: If it holds others, or cannot be read.
    """
    try:
        found, _ = tensors.load(Path(path).read_bytes())
    except OSError as exc:
        raise ArtifactError(f"cannot read params {path}: {exc.strerror}") from exc
    if set(found) != set(names):
        raise ArtifactError(
            f"params {Path(path).name[:12]}… hold {', '.join(found) or 'nothing'}; "
            f"wanted {', '.join(names)}"
        )
    return found


def finite(metrics: Metrics) -> Metrics:
    """Metrics that are numbers: an AUC of one class is NaN."""
    return {n: float(v) for n, v in metrics.items() if np.isfinite(v)}


@contextmanager
def values_kept_back() -> Iterator[None]:
    """An engine's complaint about rows may quote a value; what the server hears may not."""
    try:
        yield
    except DataError as exc:
        import sys

        print(f"fedge-client: {exc}", file=sys.stderr, flush=True)
        raise DataError("the rows do not fit the model; the client's own log says why") from exc


def _scores(context: Context, params: Params) -> Metrics:
    """Accuracy and AUC with 95 % intervals (or RMSE) on the held-out rows."""
    manifest, test = context.manifest, context.site.test
    if test is None:
        raise DataError("no rows are held out; set split or test_fraction in client.toml [data]")
    _, metrics = local.score(context.engine, manifest, context.site, params)
    found = finite(metrics)
    if score_name(manifest.scored_as) != "accuracy":
        return found
    outputs, labels = counted(manifest, context.engine.evaluate(test).outputs, test.labels)
    share, rows = accuracy(predictions(manifest, outputs), labels), labels.size
    low, high = accuracy_interval(round(share * rows), rows)
    found.update(accuracy_low=low, accuracy_high=high)
    scores = positive_scores(manifest, outputs)
    if scores is not None:
        low, high = auc_interval(scores, labels)
        found.update(finite({"auc_low": low, "auc_high": high}))
    return found


def _majority(context: Context) -> Metrics | None:
    """The score of always saying the training rows' commonest class."""
    test = context.site.test
    if score_name(context.manifest.scored_as) != "accuracy" or test is None:
        return None
    ignore = context.manifest.labels.ignore
    seen, asked = (x.labels[x.labels != ignore] for x in (context.site.train, test))
    values, counts = np.unique(seen, return_counts=True)
    if not len(values) or not len(asked):
        return None
    return {"accuracy": float(np.mean(asked == values[np.argmax(counts)]))}


def _fixed(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else 1 for d in shape[1:])
