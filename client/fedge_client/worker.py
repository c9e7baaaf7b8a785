"""The numeric half of a client: runs in the engine's own interpreter and holds no keys.

``python -m fedge_client.worker`` behind :mod:`fedge.pipe`. Requests are JSON with paths; the
session starts it when work comes and closes it when it is idle, so that a waiting device keeps
no numbers in memory. It opens no socket and writes only where it is told to.
"""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedge.artifacts.bundle import Bundle
from fedge.artifacts.estimate import Frugal
from fedge.config import from_mapping
from fedge.engines import open_in_process
from fedge.engines.base import TrainingEngine
from fedge.engines.files import reopen_bundle
from fedge.local import Site, prepare
from fedge.pipe import Frame, serve
from fedge.platform import atomic_write
from fedge.types import ClientData
from fedge_client import config as settings
from fedge_client import jobs, sources
from fedge_client.config import DataConfig
from fedge_client.jobs import Context
from fedge_client.sources import SiteData


@dataclass
class _Cache:
    """The engine and the rows of the last job; jobs of one run share them."""

    engine_key: tuple[str, str, int, Frugal] | None = None
    engine: TrainingEngine | None = None
    data_key: tuple[Any, ...] | None = None
    context: Context | None = field(default=None)


class Worker:
    """The job handlers; one instance per process."""

    def __init__(self) -> None:
        self._cache = _Cache()

    def describe(self, job: dict[str, Any], _: list[bytes]) -> Frame:
        """Read the data source: how many rows it gives for training and held-out tests."""
        bundle = reopen_bundle(Path(job["bundle"]), job["digest"])
        data = sources.load(settings.from_json(job["data"]), bundle.manifest)
        return {"train": len(data.train), "test": 0 if data.test is None else len(data.test)}, []

    def train(self, job: dict[str, Any], _: list[bytes]) -> Frame:
        """One round's training."""
        return jobs.train(self._context(job), job), []

    def evaluate(self, job: dict[str, Any], _: list[bytes]) -> Frame:
        """Scores on held-out rows."""
        return jobs.evaluate(self._context(job), job), []

    def statistics(self, job: dict[str, Any], _: list[bytes]) -> Frame:
        """Sums per column."""
        answer, data = jobs.statistics(self._context(job))
        return answer, [data]

    def personalize(self, job: dict[str, Any], _: list[bytes]) -> Frame:
        """Fine-tune for this site."""
        return jobs.personalize(self._context(job), job), []

    def export(self, job: dict[str, Any], _: list[bytes]) -> Frame:
        """Write an inference-ready model."""
        from fedge.exporting import export

        context = self._context(job)
        params = jobs.chosen_params(context, job)
        export(context.bundle, params, Path(job["out"]), site=jobs.site_params(context))
        return {"bytes": Path(job["out"]).stat().st_size}, []

    def predict(self, job: dict[str, Any], _: list[bytes]) -> Frame:
        """Write what the model says of a file's rows, as CSV."""
        context = self._context(job)
        source = settings.from_json(job["source"])
        raw = sources.load_inputs(source, context.manifest)
        values = jobs.predict(context, raw, jobs.chosen_params(context, job))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["row", *_headings(context.manifest.scored_as, values.shape[1])])
        writer.writerows([i + 1, *(f"{v:.9g}" for v in row)] for i, row in enumerate(values))
        atomic_write(Path(job["out"]), text.getvalue().encode(), mode=0o600)
        return {"rows": len(values), "columns": values.shape[1]}, []

    def _context(self, job: dict[str, Any]) -> Context:
        cache = self._cache
        frugal = from_mapping(Frugal, job.get("frugal", {}), "frugal")
        key = (job["digest"], job["engine"], int(job["threads"]), frugal)
        bundle = reopen_bundle(Path(job["bundle"]), job["digest"])
        if cache.engine is None or cache.engine_key != key:
            cache.engine = None  # the old one's memory is free before the new one takes some
            cache.engine = open_in_process(bundle, job["engine"], int(job["threads"]), frugal)
            cache.engine_key, cache.data_key = key, None
        data = settings.from_json(job["data"]) if job["data"] else None
        data_key = (key, job["client_id"], data, None if data is None else _stamp(data.path))
        if cache.context is None or cache.data_key != data_key:
            rows = None if data is None else _rows(job["client_id"], data, bundle, cache.engine)
            cache.context, cache.data_key = Context(bundle, cache.engine, rows), data_key
        return cache.context


def _rows(
    client_id: str, config: DataConfig, bundle: Bundle, engine: TrainingEngine
) -> tuple[SiteData, Site]:
    data = sources.load(config, bundle.manifest)
    with jobs.values_kept_back():
        site = prepare(engine, bundle.manifest, ClientData(client_id, data.train, data.test))
    return data, site


def _stamp(path: str) -> tuple[int, int] | None:
    """Changes when the file does."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _headings(loss: str, columns: int) -> list[str]:
    if loss not in ("bce_with_logits", "cross_entropy"):
        return ["value"] if columns == 1 else [f"value_{i}" for i in range(columns)]
    return ["probability"] if columns == 1 else [f"probability_{i}" for i in range(columns)]


def main() -> int:
    """Serve until the client closes the pipe."""
    worker = Worker()
    return serve(
        {
            name: getattr(worker, name)
            for name in (
                "describe",
                "train",
                "evaluate",
                "statistics",
                "personalize",
                "export",
                "predict",
            )
        }
    )


if __name__ == "__main__":
    sys.exit(main())
