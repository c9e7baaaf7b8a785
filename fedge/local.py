"""One client's work as functions: params and rows in, an update or scores out.

The same functions run in a device's worker, in a simulation and in a Flower ClientApp, so all
three give the same numbers for the same client_id, round and seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedge import params as algebra
from fedge.artifacts.manifest import Manifest
from fedge.config import TrainConfig
from fedge.data.scaling import site_stats
from fedge.engines.base import TrainingEngine
from fedge.engines.checks import without_extras
from fedge.errors import DataError
from fedge.metrics import evaluate_outputs
from fedge.seeds import derive_seed
from fedge.types import ClientData, ClientId, Examples, Metrics, Params, RoundNum
from fedge.update import Update, compute_delta


@dataclass(frozen=True)
class Site:
    """A client's rows, ready for the model, and the params that stay with it.

    Attributes:
        client_id: Who it is.
        train: Preprocessed rows to train on.
        test: Preprocessed rows held out, if any.
        personal: The manifest's personal params as this client has them; empty before its first
            training, when the bundle's initial ones count.
    """

    client_id: ClientId
    train: Examples
    test: Examples | None = None
    personal: Params = field(default_factory=dict)


@dataclass(frozen=True)
class TrainTask:
    """What a client is asked to train.

    Attributes:
        round_num: From 1.
        config: The manifest's settings with the task's overrides; :func:`train` takes the round's
            learning rate from its schedule.
        seed: The run's; the row order is a function of it, the round and the client.
    """

    round_num: RoundNum
    config: TrainConfig
    seed: int


@dataclass(frozen=True)
class Personalized:
    """A personal model and how it compares on the client's held-out rows.

    Attributes:
        params: All params of the personal model.
        local_only: All params of the model trained without the others.
        report: ``"local_only"``, ``"global"`` and ``"personal"`` -> metrics.
        num_examples: Held-out rows behind the report.
    """

    params: Params
    local_only: Params
    report: Mapping[str, Metrics]
    num_examples: int


def prepare(
    engine: TrainingEngine, manifest: Manifest, data: ClientData, personal: Params | None = None
) -> Site:
    """Run the bundle's preprocessing over a client's raw rows, once for all rounds.

    Where scaling is per site, mean and standard deviation come from the training rows. A single
    input is matched to the model's single input whatever it is called.

    Raises:
        DataError: If the rows do not fit the bundle.
    """
    train = _named(manifest, data.train)
    stats = site_stats(train) if manifest.scaling == "site" else None
    held_out = data.test if data.test is not None and len(data.test) else None
    return Site(
        client_id=data.client_id,
        train=engine.preprocess(train, stats),
        test=None if held_out is None else engine.preprocess(_named(manifest, held_out), stats),
        personal=personal or {},
    )


def train(
    engine: TrainingEngine,
    manifest: Manifest,
    initial: Params,
    site: Site,
    shared: Params,
    task: TrainTask,
) -> tuple[Update, Params]:
    """One client's part of one round.

    Args:
        engine: Opened on the bundle; its params are overwritten.
        manifest: The bundle's.
        initial: All of the bundle's initial params.
        site: The client.
        shared: The round's shared params.
        task: Which round, with which settings.

    Returns:
        The update (delta of the shared params alone, weighted by the training rows), and the
        personal params to keep for the next round.

    Raises:
        DataError: If the rows do not fit the bundle.
        EngineError: If training failed.
    """
    engine.set_params({**initial, **site.personal, **shared})
    seed = derive_seed(task.seed, task.round_num, site.client_id, "batches")
    result = engine.train(site.train, task.config.for_round(task.round_num), seed)
    after = engine.get_params()
    update = Update(
        client_id=site.client_id,
        round_num=task.round_num,
        delta=compute_delta(after, {n: shared[n] for n in manifest.shared}),
        num_examples=len(site.train),
        metrics={"train_loss": float(result.loss)},
        provenance={"bundle": manifest.digest, "engine": engine.name},
    )
    return update, algebra.select(after, manifest.personal)


def evaluate(
    engine: TrainingEngine, manifest: Manifest, initial: Params, site: Site, shared: Params
) -> tuple[int, Metrics]:
    """Score the shared params, with the client's personal ones, on its held-out rows.

    Returns:
        Number of held-out rows, and ``loss`` with the scores of
        :func:`~fedge.metrics.evaluate_outputs`.

    Raises:
        DataError: If the client holds out no rows.
        EngineError: If the engine failed.
    """
    return score(engine, manifest, site, {**initial, **site.personal, **shared})


def score(
    engine: TrainingEngine, manifest: Manifest, site: Site, params: Params
) -> tuple[int, Metrics]:
    """Score a full set of params on the client's held-out rows; as :func:`evaluate`."""
    if site.test is None:
        raise DataError(f"{site.client_id} holds out no rows; give it a test split to evaluate")
    engine.set_params(params)
    result = engine.evaluate(site.test)
    metrics = {"loss": float(result.loss)}
    metrics.update(evaluate_outputs(manifest, result.outputs, site.test.labels))
    return len(site.test), metrics


def personalize(
    engine: TrainingEngine,
    manifest: Manifest,
    initial: Params,
    site: Site,
    shared: Params,
    config: TrainConfig,
    seed: int = 0,
) -> Personalized:
    """Fine-tune the shared params on the client's own rows, and compare on the held-out ones.

    ``local_only`` is trained from the bundle's initial params with the same settings and row
    order: what the site would have without the others.

    Raises:
        DataError: If the client holds out no rows, or its rows do not fit.
        EngineError: If the engine failed.
    """
    from_shared = {**initial, **site.personal, **shared}
    order = derive_seed(seed, "personalize", site.client_id, "batches")
    rows, of_global = score(engine, manifest, site, from_shared)
    local_only = _trained(engine, initial, site, config, order)
    personal = _trained(engine, from_shared, site, config, order)
    return Personalized(
        params=personal,
        local_only=local_only,
        report={
            "local_only": score(engine, manifest, site, local_only)[1],
            "global": of_global,
            "personal": score(engine, manifest, site, personal)[1],
        },
        num_examples=rows,
    )


def _trained(
    engine: TrainingEngine, start: Params, site: Site, config: TrainConfig, seed: int
) -> Params:
    engine.set_params(start)
    engine.train(site.train, config, seed)
    return engine.get_params()


def _named(manifest: Manifest, raw: Examples) -> Examples:
    """The single input under the name the model has for it; more than one must be named right."""
    own = without_extras(manifest, raw.inputs)
    if len(own) == 1 == len(manifest.raw_inputs):
        renamed = {next(iter(own)): manifest.raw_inputs[0].name}
        return Examples({renamed.get(n, n): a for n, a in raw.inputs.items()}, raw.labels)
    return raw
