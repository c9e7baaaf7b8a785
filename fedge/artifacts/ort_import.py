"""Which ONNX Runtime lives in which interpreter, and how its training API is imported.

Imports nothing large. Shared by the builder, which is below the engines, and the engines.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

from fedge.errors import EngineUnavailableError
from fedge.platform import silence_telemetry

TRAINING_PYTHON = "FEDGE_ORT_TRAINING_PYTHON"
TRAINING_VENV = ".venv-ort-training"
_TRAINING_WHEELS = ("onnxruntime-training-cpu", "onnxruntime-training")
_STOCK_WHEELS = (
    "onnxruntime",
    *(f"onnxruntime-{p}" for p in ("gpu", "openvino", "qnn", "directml", "migraphx", "rocm")),
)


def find_training_python(configured: str | Path | None = None) -> Path | None:
    """The interpreter that holds ONNX Runtime's training wheel, or None.

    Looked for in this order: ``configured``, the environment's ``FEDGE_ORT_TRAINING_PYTHON``,
    and a ``.venv-ort-training`` beside this interpreter's environment.

    Raises:
        EngineUnavailableError: If one is configured and is not there.
    """
    named = configured or os.environ.get(TRAINING_PYTHON)
    if named:
        if not os.access(named, os.X_OK):
            raise EngineUnavailableError(
                f"the training interpreter {named} does not exist or cannot be run; correct "
                f"{TRAINING_PYTHON}, or run: fedge-client engines install ort-training"
            )
        return Path(named)
    folder = Path(sys.prefix).parent / TRAINING_VENV
    beside = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    return beside if os.access(beside, os.X_OK) else None


def installed_engine() -> str:
    """The engine this interpreter can run: ``ort`` or ``ort-training``.

    Raises:
        EngineUnavailableError: If no wheel is installed, or both kinds: they own the same folder,
            and which one is imported is then a matter of chance.
    """
    training, stock = _installed(_TRAINING_WHEELS), _installed(_STOCK_WHEELS)
    if training and stock:
        raise EngineUnavailableError(
            f"{training[0]} and {stock[0]} are both installed in {sys.prefix} and overwrite each "
            f"other; run: pip uninstall -y {' '.join(training + stock)} && pip install "
            f"--no-deps --force-reinstall {stock[0]}, and keep the training wheel in an "
            f"environment of its own (fedge-client engines install ort-training)"
        )
    if training:
        return "ort-training"
    if stock:
        return "ort"
    raise EngineUnavailableError(
        f"no onnxruntime is installed in {sys.prefix}; run: pip install onnxruntime"
    )


def stock_versions() -> str:
    """Stock wheels of this interpreter and their versions: ``onnxruntime 1.31.1``."""
    wheels = _installed(_STOCK_WHEELS)
    return ", ".join(f"{w} {importlib.metadata.version(w)}" for w in wheels)


def import_training(module: str = "api") -> Any:  # noqa: ANN401 - onnxruntime has no types
    """Import a part of the training API: ``api``, ``artifacts`` or ``onnxblock``.

    ``onnxruntime.training`` itself imports torch and fails without it; its parts do not need it.
    :func:`prepare_onnxruntime` sees to that.

    Raises:
        EngineUnavailableError: If this interpreter holds no training wheel, a second
            onnxruntime beside it, or the import fails.
    """
    if installed_engine() != "ort-training":
        raise EngineUnavailableError(
            f"{sys.executable} has stock onnxruntime, which cannot train; name the interpreter of "
            f"onnxruntime-training-cpu in {TRAINING_PYTHON}"
        )
    prepare_onnxruntime()
    try:
        return importlib.import_module(f"onnxruntime.training.{module}")
    except ImportError as exc:
        raise EngineUnavailableError(
            f"onnxruntime's training API cannot be imported: {exc}"
        ) from exc


def prepare_onnxruntime() -> None:
    """Call this before ``import onnxruntime``, whichever wheel it is.

    It silences telemetry. In the training wheel it also registers a bare ``onnxruntime.training``,
    through which the package's parts are found; its own ``__init__`` imports torch and onnx, and
    fails without them (onnxruntime issues #18991, #22070). Saves 0.1 s and 30 MB.
    """
    silence_telemetry()
    name = "onnxruntime.training"
    spec = importlib.util.find_spec("onnxruntime")
    if name in sys.modules or spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent / "training"
    if folder.is_dir():
        bare = types.ModuleType(name)
        bare.__path__ = [str(folder)]
        sys.modules[name] = bare


def _installed(wheels: tuple[str, ...]) -> list[str]:
    return [w for w in wheels if _has(w)]


def _has(wheel: str) -> bool:
    try:
        importlib.metadata.distribution(wheel)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
