from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_FEDERATED: _ClassVar[Mode]
    MODE_PERSONAL: _ClassVar[Mode]

class TaskKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_KIND_UNSPECIFIED: _ClassVar[TaskKind]
    TASK_KIND_TRAIN: _ClassVar[TaskKind]
    TASK_KIND_EVALUATE: _ClassVar[TaskKind]
    TASK_KIND_STATISTICS: _ClassVar[TaskKind]

class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERDICT_UNSPECIFIED: _ClassVar[Verdict]
    VERDICT_ACCEPTED: _ClassVar[Verdict]
    VERDICT_DUPLICATE: _ClassVar[Verdict]
    VERDICT_LATE: _ClassVar[Verdict]
    VERDICT_REFUSED: _ClassVar[Verdict]
MODE_UNSPECIFIED: Mode
MODE_FEDERATED: Mode
MODE_PERSONAL: Mode
TASK_KIND_UNSPECIFIED: TaskKind
TASK_KIND_TRAIN: TaskKind
TASK_KIND_EVALUATE: TaskKind
TASK_KIND_STATISTICS: TaskKind
VERDICT_UNSPECIFIED: Verdict
VERDICT_ACCEPTED: Verdict
VERDICT_DUPLICATE: Verdict
VERDICT_LATE: Verdict
VERDICT_REFUSED: Verdict

class EnrollRequest(_message.Message):
    __slots__ = ("csr_der", "client_id", "mode", "fedge_version", "update_public_key")
    CSR_DER_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    FEDGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    UPDATE_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    csr_der: bytes
    client_id: str
    mode: Mode
    fedge_version: str
    update_public_key: bytes
    def __init__(self, csr_der: _Optional[bytes] = ..., client_id: _Optional[str] = ..., mode: _Optional[_Union[Mode, str]] = ..., fedge_version: _Optional[str] = ..., update_public_key: _Optional[bytes] = ...) -> None: ...

class EnrollReply(_message.Message):
    __slots__ = ("client_id", "certificate_der", "signer_public_key", "federation_id")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_DER_FIELD_NUMBER: _ClassVar[int]
    SIGNER_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_ID_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    certificate_der: bytes
    signer_public_key: bytes
    federation_id: str
    def __init__(self, client_id: _Optional[str] = ..., certificate_der: _Optional[bytes] = ..., signer_public_key: _Optional[bytes] = ..., federation_id: _Optional[str] = ...) -> None: ...

class DeviceEvent(_message.Message):
    __slots__ = ("hello", "result", "failed", "heartbeat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    result: TaskResult
    failed: TaskFailed
    heartbeat: Heartbeat
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., result: _Optional[_Union[TaskResult, _Mapping]] = ..., failed: _Optional[_Union[TaskFailed, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("fedge_version", "wire_version", "mode", "engine", "has_data", "num_examples", "facts")
    class FactsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    FEDGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    HAS_DATA_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    fedge_version: str
    wire_version: int
    mode: Mode
    engine: str
    has_data: bool
    num_examples: int
    facts: _containers.ScalarMap[str, str]
    def __init__(self, fedge_version: _Optional[str] = ..., wire_version: _Optional[int] = ..., mode: _Optional[_Union[Mode, str]] = ..., engine: _Optional[str] = ..., has_data: bool = ..., num_examples: _Optional[int] = ..., facts: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServerEvent(_message.Message):
    __slots__ = ("welcome", "task", "cancel", "heartbeat", "model")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    task: Task
    cancel: Cancel
    heartbeat: Heartbeat
    model: ModelReady
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., task: _Optional[_Union[Task, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., model: _Optional[_Union[ModelReady, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("client_id", "wire_version", "bundle_digest", "server_time_s", "max_chunk_bytes", "max_update_bytes", "heartbeat_s")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_S_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_UPDATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    wire_version: int
    bundle_digest: str
    server_time_s: float
    max_chunk_bytes: int
    max_update_bytes: int
    heartbeat_s: int
    def __init__(self, client_id: _Optional[str] = ..., wire_version: _Optional[int] = ..., bundle_digest: _Optional[str] = ..., server_time_s: _Optional[float] = ..., max_chunk_bytes: _Optional[int] = ..., max_update_bytes: _Optional[int] = ..., heartbeat_s: _Optional[int] = ...) -> None: ...

class ModelReady(_message.Message):
    __slots__ = ("bundle_digest", "params_digest", "round_num")
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PARAMS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUND_NUM_FIELD_NUMBER: _ClassVar[int]
    bundle_digest: str
    params_digest: str
    round_num: int
    def __init__(self, bundle_digest: _Optional[str] = ..., params_digest: _Optional[str] = ..., round_num: _Optional[int] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("task_id", "run_id", "round_num", "kind", "bundle_digest", "params_digest", "config_json")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_NUM_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PARAMS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    run_id: str
    round_num: int
    kind: TaskKind
    bundle_digest: str
    params_digest: str
    config_json: bytes
    def __init__(self, task_id: _Optional[str] = ..., run_id: _Optional[str] = ..., round_num: _Optional[int] = ..., kind: _Optional[_Union[TaskKind, str]] = ..., bundle_digest: _Optional[str] = ..., params_digest: _Optional[str] = ..., config_json: _Optional[bytes] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("task_id", "reason")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    reason: str
    def __init__(self, task_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class TaskResult(_message.Message):
    __slots__ = ("task_id", "num_examples", "metrics", "tensors")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    num_examples: int
    metrics: _containers.ScalarMap[str, float]
    tensors: bytes
    def __init__(self, task_id: _Optional[str] = ..., num_examples: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., tensors: _Optional[bytes] = ...) -> None: ...

class TaskFailed(_message.Message):
    __slots__ = ("task_id", "error", "message")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    error: str
    message: str
    def __init__(self, task_id: _Optional[str] = ..., error: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("digest", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: str
    offset: int
    def __init__(self, digest: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("offset", "total_bytes", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    total_bytes: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., total_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadPart(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: UploadHeader
    chunk: Chunk
    def __init__(self, header: _Optional[_Union[UploadHeader, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("task_id", "update_id", "digest", "total_bytes", "signature")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    update_id: str
    digest: str
    total_bytes: int
    signature: bytes
    def __init__(self, task_id: _Optional[str] = ..., update_id: _Optional[str] = ..., digest: _Optional[str] = ..., total_bytes: _Optional[int] = ..., signature: _Optional[bytes] = ...) -> None: ...

class UploadReply(_message.Message):
    __slots__ = ("verdict", "message")
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    verdict: Verdict
    message: str
    def __init__(self, verdict: _Optional[_Union[Verdict, str]] = ..., message: _Optional[str] = ...) -> None: ...
