"""The site's own model: fine-tuned here, kept here, exported and used here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedge.config import TrainConfig
from fedge.errors import ConfigError, StateError
from fedge.platform import exclusive, fsync_dir
from fedge_client import config as settings
from fedge_client.config import ClientConfig, DataConfig
from fedge_client.state import Identity, State
from fedge_client.tasks import Desk

MODEL, REPORT = "model.safetensors", "report.json"


@dataclass(frozen=True)
class GlobalModel:
    """The newest global model on this device."""

    bundle: str
    params: Path
    round_num: int


class PersonalModels:
    """What a site does with the newest model, offline.

    Args:
        state: The client's folder.
        identity: Who it is.
        config: Its settings.
    """

    def __init__(self, state: State, identity: Identity, config: ClientConfig) -> None:
        self._state, self._config = state, config
        self._client_id = identity.client_id
        self._desk = Desk(state, identity, config)

    def newest(self) -> GlobalModel:
        """The newest global model that was downloaded.

        Raises:
            StateError: If there is none yet.
        """
        found = self._state.read_json("model.json")
        path = None if found is None else self._state.blob(found["params"])
        if found is None or path is None or not path.exists():
            raise StateError(
                "no global model is here yet; keep fedge-client run going until a round is done"
            )
        return GlobalModel(found["bundle"], path, int(found["round_num"]))

    async def personalize(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """Fine-tune the newest global model on this site's rows; keep it and report.

        Args:
            overrides: Any of :data:`fedge.config.OVERRIDES` where they should differ from the
                bundle's, and ``seed``.

        Returns:
            Rows, engine and the scores of local-only, global and personal model on held-out rows.

        Raises:
            DataError: If there is no data source, or it holds no rows out.
        """
        self._require_data()
        TrainConfig().override(overrides)
        model = self.newest()
        folder = self._state.personal(model.bundle)
        with exclusive(folder / "lock", f"fedge-client personalize on {self._state.root}"):
            job = {"params": str(model.params), "config": overrides, "out": str(folder / MODEL)}
            engine, answer = await self._call("personalize", model.bundle, job)
            report = {
                "client_id": self._client_id,
                "bundle": model.bundle,
                "round_num": model.round_num,
                "engine": engine,
                **answer,
            }
            self._state.write_json(str((folder / REPORT).relative_to(self._state.root)), report)
            fsync_dir(folder)
        return report

    async def export(self, path: Path, only_global: bool) -> dict[str, Any]:
        """Write an inference-ready ONNX model: the personal one if there, else the global one.

        Raises:
            ConfigError: If ``path`` is in a folder that is not there.
            EngineError: If the written model does not give the engine's own output.
        """
        _require_folder(path)
        model = self.newest()
        job, which = self._model_job(model, only_global)
        _, answer = await self._call("export", model.bundle, {**job, "out": str(path.absolute())})
        return {"path": str(path), "model": which, "round_num": model.round_num, **answer}

    async def predict(self, source: DataConfig, out: Path, only_global: bool) -> dict[str, Any]:
        """Write what the model says of each row of a file.

        Raises:
            DataError: If the file does not fit.
        """
        _require_folder(out)
        source.require_file()
        model = self.newest()
        job, which = self._model_job(model, only_global)
        job |= {"source": settings.as_json(source), "out": str(out.absolute())}
        _, answer = await self._call("predict", model.bundle, job)
        return {"path": str(out), "model": which, "round_num": model.round_num, **answer}

    def source_for(self, path: str, columns: tuple[str, ...]) -> DataConfig:
        """A file of rows to predict, read as the site's own data are unless told otherwise."""
        known = self._config.data or DataConfig(path, label="label", format="csv")
        return dataclasses.replace(
            known,
            path=str(Path(path).absolute()),
            format="npz" if path.lower().endswith(".npz") else "csv",
            columns=columns or known.columns,
        )

    async def close(self) -> None:
        """End the worker."""
        await self._desk.close()

    def _model_job(self, model: GlobalModel, only_global: bool) -> tuple[dict[str, Any], str]:
        own = self._state.personal(model.bundle) / MODEL
        if own.exists() and not only_global:
            return {"params": str(model.params), "model": str(own)}, "personal"
        return {"params": str(model.params)}, "global"

    async def _call(
        self, name: str, bundle: str, job: dict[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        engine, answer, _ = await self._desk.call(name, bundle, job)
        return engine, answer

    def _require_data(self) -> None:
        if self._config.data is not None:
            self._config.data.require_file()


def _require_folder(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"folder {path.absolute().parent} does not exist; make it first")
