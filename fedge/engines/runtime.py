"""The one door to onnxruntime: sessions, their settings, and its exceptions as ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from fedge.artifacts.ort_import import prepare_onnxruntime
from fedge.engines.providers import CPU, KNOWN, Provider
from fedge.errors import OUT_OF_MEMORY, EngineError, EngineUnavailableError, FedgeError
from fedge.types import Array, Params

prepare_onnxruntime()

import onnxruntime as ort  # noqa: E402

_NO_MEMORY = ("bad_alloc", "Failed to allocate memory", "Available memory of", "bad allocation")
ERRORS_ONLY = 3  # onnxruntime's severity scale


def session_options(threads: int, small: bool = False) -> Any:  # noqa: ANN401 - onnxruntime has no types
    """Settings shared by all sessions; idle threads sleep, since devices have other work.

    Args:
        threads: Of one operator.
        small: Whether what a run holds is too little to count, so that speed comes first: planning
            memory ahead saves a seventh of a step of 12 µs, and holds every activation twice.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    options.enable_mem_reuse = small  # a buffer that waits for its next use is memory held
    options.enable_mem_pattern = small
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def offered() -> list[str]:
    """The execution providers this onnxruntime was compiled with, by its own names."""
    return list(ort.get_available_providers())


class Session:
    """One admitted model, ready to run.

    Args:
        model: As admission returned it.
        threads: Of one operator.
        provider: Short name of what computes; what it cannot do is left to the CPU.
        small: See :func:`session_options`.
    """

    def __init__(
        self, model: bytes, threads: int = 1, provider: str = CPU, small: bool = False
    ) -> None:
        options = session_options(threads, small)
        with engine_errors("loading a model"):
            if provider == CPU:
                self.raw = ort.InferenceSession(model, options, providers=[KNOWN[CPU].name])
            else:
                self.raw = _accelerated(model, options, KNOWN[provider])
        self.inputs: tuple[str, ...] = tuple(i.name for i in self.raw.get_inputs())
        self.outputs: tuple[str, ...] = tuple(o.name for o in self.raw.get_outputs())

    def run(self, feeds: Params, outputs: Sequence[str] | None = None) -> Params:
        """Outputs by name; feeds that the graph does not take are left out."""
        names = list(outputs or self.outputs)
        fed = {n: feeds[n] for n in self.inputs if n in feeds}
        with engine_errors("running a model"):
            values: list[Array] = self.raw.run(names, fed)
        return dict(zip(names, values, strict=True))


def _accelerated(model: bytes, options: Any, provider: Provider) -> Any:  # noqa: ANN401
    options.use_deterministic_compute = True
    session = ort.InferenceSession(
        model, options, providers=[(provider.name, provider.options), KNOWN[CPU].name]
    )
    session.disable_fallback()  # a failure must be seen, not hidden by another session
    if provider.name not in session.get_providers():
        raise EngineUnavailableError(
            f"onnxruntime could not load {provider.name}; its own messages above say why"
        )
    return session


@contextlib.contextmanager
def engine_errors(doing: str) -> Iterator[None]:
    """Turn what onnxruntime raises (it has no common base class) into EngineError."""
    try:
        yield
    except FedgeError:
        raise
    except Exception as exc:
        text = str(exc).replace("\n", " ")
        if isinstance(exc, MemoryError) or any(sign in text for sign in _NO_MEMORY):
            raise EngineError(f"out of memory {doing}: {OUT_OF_MEMORY}") from exc
        raise EngineError(f"onnxruntime failed {doing}: {type(exc).__name__}: {text}") from exc


def shared(array: Array) -> Any:  # noqa: ANN401 - onnxruntime's OrtValue
    """An OrtValue over the array's own memory (on the CPU nothing is copied)."""
    return ort.OrtValue.ortvalue_from_numpy(array)
