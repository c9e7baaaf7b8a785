"""Every error fedge raises on purpose.

::

    FedgeError                 exit code 1
    ├── ConfigError            2   a setting, flag or file of settings is wrong
    ├── DataError              3   the site's data do not fit (columns, labels, NaN, empty, missing)
    ├── ArtifactError          4   a bundle, model or params file is broken or refused
    │   ├── AdmissionError     4   ... refused before anything was run
    │   ├── SignatureError     4   ... not signed by the expected key
    │   └── UnsupportedOperatorError  4   ... holds an operator that cannot be differentiated
    ├── EngineError            5   training or inference failed
    │   ├── EngineUnavailableError   5   the engine asked for is not installed here
    │   └── WorkerDiedError    5   the worker process ended without an answer
    ├── LinkError              6   the other side cannot be reached or broke the protocol
    │   └── RefusedError       7   the other side said no: not admitted, revoked, token spent
    ├── UpdateError            8   the gate refused an update (shape, dtype, NaN, norm, weight)
    ├── PolicyError            9   the site's own settings forbid it (personal mode uploads nothing)
    └── StateError            10   the state folder is missing, locked, damaged or too new

A message says what was seen, what was wanted and what to do. The number is the process's
exit code; 130 is Ctrl-C.
"""

from __future__ import annotations


class FedgeError(Exception):
    """Base of all errors fedge raises on purpose."""

    exit_code = 1


class ConfigError(FedgeError):
    """A setting, flag or file of settings is wrong."""

    exit_code = 2


class DataError(FedgeError):
    """The site's data do not fit what the bundle asks for."""

    exit_code = 3


class ArtifactError(FedgeError):
    """A bundle, model or params file is broken or refused."""

    exit_code = 4


class AdmissionError(ArtifactError):
    """A model was refused before anything was run."""


class SignatureError(ArtifactError):
    """Not signed by the expected key."""


class UnsupportedOperatorError(ArtifactError):
    """The model holds an operator that cannot be differentiated."""


class EngineError(FedgeError):
    """Training or inference failed."""

    exit_code = 5


class EngineUnavailableError(EngineError):
    """The engine asked for is not installed here."""


class WorkerDiedError(EngineError):
    """The worker process ended without an answer."""


class LinkError(FedgeError):
    """The other side cannot be reached or broke the protocol."""

    exit_code = 6


class RefusedError(LinkError):
    """The other side said no."""

    exit_code = 7


class UpdateError(FedgeError):
    """An update was refused by the gate."""

    exit_code = 8


class PolicyError(FedgeError):
    """The site's own settings forbid it."""

    exit_code = 9


class StateError(FedgeError):
    """The state folder is missing, locked, damaged or of another version."""

    exit_code = 10


OUT_OF_MEMORY = (
    "this process may use no more; lower batch_size, or give it more with memory_mb in client.toml "
    "[engine]"
)

BY_NAME: dict[str, type[FedgeError]] = {
    cls.__name__: cls
    for cls in (
        FedgeError,
        ConfigError,
        DataError,
        ArtifactError,
        AdmissionError,
        SignatureError,
        UnsupportedOperatorError,
        EngineError,
        EngineUnavailableError,
        WorkerDiedError,
        LinkError,
        RefusedError,
        UpdateError,
        PolicyError,
        StateError,
    )
}
