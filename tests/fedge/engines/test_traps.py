"""Each way known to kill ONNX Runtime's training library is an error here, and nobody dies of it.

What fedge refuses to build is built all the same by going around the check, as a hostile server
would, to see that it then kills a worker and not the caller.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import fedge
from fedge.artifacts import ort_build
from fedge.artifacts.bundle import Bundle
from fedge.artifacts.manifest import PARAMS
from fedge.artifacts.signing import generate_signing_key
from fedge.config import Schedule, TrainConfig
from fedge.engines import WorkerEngine, find_training_python
from fedge.engines.batches import batch_indices, learning_rates
from fedge.engines.interpreters import interpreter_for
from fedge.errors import ArtifactError, DataError, EngineError, FedgeError, WorkerDiedError
from fedge.types import Examples

CHECKPOINT, TRAINING, OPTIMIZER = "checkpoint", "training_model.onnx", "optimizer_model.onnx"
ORT, ROWS = "ort-training", 4
Open = Callable[[Bundle], WorkerEngine]
SHORT = TrainConfig(lr=0.01, batch_size=2, epochs=1)

pytestmark = pytest.mark.skipif(
    find_training_python() is None,
    reason="no interpreter with onnxruntime-training-cpu is installed",
)


def network(
    pool: str, dims: str, width: int = 3, names: tuple[str, str] = ("k", "w")
) -> onnx.ModelProto:
    """x -> Conv -> pool -> two logits."""
    text = (
        '<ir_version: 8, opset_import: ["" : 17]>'
        f"net (float[N,1,{dims}] x) => (float[N,2] y)"
        f"<float[{width},1,3,3] {names[0]}, float[{width},2] {names[1]}>"
        f"{{c = Conv<pads=[1,1,1,1]>(x, {names[0]}) p = {pool}(c)"
        f" f = ReduceMean<axes=[2,3], keepdims=0>(p) y = MatMul(f, {names[1]})}}"
    )
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    del model.graph.initializer[:]
    for name, shape in zip(names, ((width, 1, 3, 3), (width, 2)), strict=True):
        values = rng.normal(0, 0.5, shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return onnx.shape_inference.infer_shapes(model)


MAX, AVERAGE = "MaxPool<kernel_shape=[2,2]>", ("AveragePool<kernel_shape=[2,2]>", "8,8")


def built(model: onnx.ModelProto, optimizer: str = "sgd") -> Bundle:
    sample = {"x": np.zeros((2, 1, 8, 8), np.float32)}
    return fedge.build(model, loss="cross_entropy", sample=sample, optimizer=optimizer)


@pytest.fixture(scope="module")
def good() -> dict[str, Bundle]:
    """The network with sizes that are fixed, which ONNX Runtime trains, and variants of it."""
    made = {
        "sgd": built(network(MAX, "8,8")),
        "adamw": built(network(MAX, "8,8"), "adamw"),
        "wide": built(network(MAX, "8,8", 5), "adamw"),
        "renamed": built(network(MAX, "8,8", names=("kernel", "last")), "adamw"),
    }
    assert all(not b.manifest.engines[ORT] for b in made.values())
    return made


def rows(count: int = ROWS) -> Examples:
    x = np.random.default_rng(1).normal(size=(count, 1, 8, 8)).astype(np.float32)
    return Examples({"x": x}, np.arange(count) % 2)


def hostile(base: Bundle, files: Mapping[str, bytes]) -> Bundle:
    """``base`` with some files replaced, signed all the same."""
    held = {n: base.read(n) for n in base.manifest.files} | dict(files)
    engines = {**base.manifest.engines, ORT: ""}
    return Bundle.write(replace(base.manifest, engines=engines), held, generate_signing_key())


@pytest.fixture(scope="module")
def kept() -> dict[str, bytes]:
    """What ``average`` put aside: the training files of a deadly network."""
    return {}


@pytest.fixture(scope="module")
def average(kept: dict[str, bytes]) -> Bundle:
    """Built without the check that refuses it."""
    make = ort_build._build

    def keep(*args: Any) -> Any:
        files, version = make(*args)
        kept.update(files)
        return files, version

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort_build, "_without_a_kernel", lambda _: "")
        patch.setattr(ort_build, "_build", keep)
        return built(network(*AVERAGE))


@pytest.fixture
def opened() -> Iterator[Open]:
    engines: list[WorkerEngine] = []

    def open_it(bundle: Bundle) -> WorkerEngine:
        engines.append(WorkerEngine(bundle, ORT, interpreter_for(ORT)))
        return engines[-1]

    yield open_it
    for engine in engines:
        engine.close()


def test_what_kills_when_built_is_refused_by_name() -> None:
    bundle = built(network(*AVERAGE))
    assert "AveragePool with a symbolic batch" in bundle.manifest.engines[ORT]
    assert bundle.engines == ("ort",)
    assert "MaxPool of sizes that may vary" in ort_build._without_a_kernel(network(MAX, "H,W"))
    with pytest.raises(ArtifactError, match="only the first may vary"):
        built(network(MAX, "H,W"))


def test_without_the_check_the_builder_outlives_it(average: Bundle) -> None:
    """``average`` was built so: its recorded step killed the builder's worker."""
    assert "died during step: killed by SIGFPE" in average.manifest.engines[ORT]


def test_average_pool_of_a_symbolic_batch_kills_the_worker_alone(
    average: Bundle, kept: dict[str, bytes], opened: Open
) -> None:
    engine = opened(hostile(average, kept))
    for call in (
        lambda: engine.train_step(rows(), 0.1),
        lambda: engine.gradients(rows()),
        lambda: engine.train(rows(), SHORT, 1),
    ):
        with pytest.raises(WorkerDiedError, match="SIGFPE"):
            call()
        engine.reopen()
    assert np.isfinite(engine.evaluate(rows()).loss)


def test_max_pool_of_symbolic_sizes_kills_the_worker_alone(
    good: dict[str, Bundle], opened: Open
) -> None:
    model = onnx.load_from_string(good["sgd"].read(TRAINING))
    for dim, name in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], "HW", strict=True):
        dim.dim_param = name
    del model.graph.value_info[:]
    with pytest.raises(WorkerDiedError, match="SIGSEGV"):
        opened(hostile(good["sgd"], {TRAINING: model.SerializeToString()}))


def test_a_gradient_larger_than_its_param_harms_the_worker_alone(
    good: dict[str, Bundle], opened: Open
) -> None:
    """ONNX Runtime adds it to a buffer of the param's size; found by ``make soak``."""
    model = onnx.load_from_string(good["sgd"].read(TRAINING))
    node = next(n for n in model.graph.node if n.op_type == "InPlaceAccumulatorV2")
    times = onnx.numpy_helper.from_array(np.array([1 << 20, 1, 1, 1][: rank_of(node)]), "times")
    model.graph.initializer.append(times)
    model.graph.node.append(onnx.helper.make_node("Tile", [node.input[1], "times"], ["large"]))
    node.input[1] = "large"
    del model.graph.value_info[:]
    with pytest.raises(FedgeError):
        opened(hostile(good["sgd"], {TRAINING: model.SerializeToString()})).train_step(rows(), 0.1)


def rank_of(accumulator: onnx.NodeProto) -> int:
    return {"k_grad": 4, "w_grad": 2}[accumulator.input[1]]


def test_labels_a_lying_manifest_lets_through_harm_the_worker_alone(
    good: dict[str, Bundle], opened: Open
) -> None:
    base = good["sgd"]
    labels = replace(base.manifest.labels, high=1 << 50)
    engine = opened(hostile(Bundle(base.path, replace(base.manifest, labels=labels)), {}))
    x = rows().inputs
    with pytest.raises(EngineError):
        engine.train_step(Examples(x, np.full(ROWS, 1 << 45)), 0.1)


@pytest.mark.parametrize("labels", [[0, 2], [-1, 0], [-100, 1], [0, 1 << 45]])
def test_labels_out_of_range_never_reach_it(
    good: dict[str, Bundle], opened: Open, labels: list[int]
) -> None:
    engine = opened(good["sgd"])
    before = engine.pid
    for call in (
        lambda bad: engine.train_step(bad, 0.1),
        lambda bad: engine.train(bad, SHORT, 1),
        lambda bad: engine.gradients(bad),
        lambda bad: engine.evaluate(bad),
    ):
        with pytest.raises(DataError, match="labels run from"):
            call(Examples(rows(2).inputs, np.array(labels)))
    assert np.isfinite(engine.train_step(rows(), 0.1))
    assert engine.pid == before


def test_no_rows_never_reach_it(good: dict[str, Bundle], opened: Open) -> None:
    engine = opened(good["sgd"])
    before = engine.pid
    none = Examples({"x": np.zeros((0, 1, 8, 8), np.float32)}, np.zeros(0, np.int64))
    for call in (
        lambda: engine.train_step(none, 0.1),
        lambda: engine.train(none, SHORT, 1),
        lambda: engine.gradients(none),
        lambda: engine.evaluate(none),
        lambda: engine.predict(none.inputs),
    ):
        with pytest.raises(DataError, match="no rows"):
            call()
    assert np.isfinite(engine.train_step(rows(), 0.1))
    assert engine.pid == before


def test_scores_need_no_evaluation_graph_of_onnx_runtimes(
    good: dict[str, Bundle], opened: Open
) -> None:
    """An evaluation step without that graph ends the process; ours asks another graph."""
    base = good["sgd"]
    engine = opened(hostile(base, {"eval_model.onnx": b"nothing"}))
    plain = opened(base)
    assert engine.evaluate(rows()).loss == plain.evaluate(rows()).loss
    engine.train_step(rows(), 0.1)
    assert np.isfinite(engine.evaluate(rows()).loss)


def _flipped(data: bytes, at: float) -> bytes:
    place = int(len(data) * at)
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


CHECKPOINTS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "garbage": lambda data: bytes(range(256)) * (len(data) // 256 + 1),
    "zeros": lambda data: bytes(len(data)),
    "half": lambda data: data[: len(data) // 2],
    "all but a byte": lambda data: data[:-1],
    "a foreign root": lambda data: b"\xff\xff\xff\x7f" + data[4:],
    **{f"flipped at {k}/8": lambda data, k=k: _flipped(data, k / 8) for k in range(0, 8, 3)},
}


def test_a_damaged_checkpoint_is_an_error_or_the_same_params(good: dict[str, Bundle]) -> None:
    """It has no checksum of its own, and params never come from it."""
    base, ended = good["sgd"], dict[str, str]()
    for name, damage in CHECKPOINTS.items():
        bundle = hostile(base, {CHECKPOINT: damage(base.read(CHECKPOINT))})
        try:
            engine = WorkerEngine(bundle, ORT, interpreter_for(ORT))
        except FedgeError as exc:
            ended[name] = type(exc).__name__
            continue
        try:
            found, wanted = engine.get_params(), base.initial_params()
            assert all(np.array_equal(found[n], wanted[n]) for n in wanted), name
            engine.train_step(rows(), 0.1)
            ended[name] = "the same"
        except FedgeError as exc:
            ended[name] = type(exc).__name__
        finally:
            engine.close()
    assert all(ended[n] != "the same" for n in ("nothing", "garbage", "zeros", "half"))


@pytest.mark.parametrize("file", [TRAINING, PARAMS])
def test_a_graph_or_params_of_another_network_are_an_error(
    good: dict[str, Bundle], opened: Open, file: str
) -> None:
    wide = {file: good["wide"].read(file)}
    with pytest.raises(FedgeError):
        opened(hostile(good["adamw"], wide)).train(rows(), SHORT, 1)


@pytest.mark.parametrize(
    ("file", "network"), [(CHECKPOINT, "wide"), (OPTIMIZER, "wide"), (OPTIMIZER, "renamed")]
)
def test_files_that_tell_nothing_of_the_network_change_nothing(
    good: dict[str, Bundle], opened: Open, file: str, network: str
) -> None:
    own = opened(good["adamw"])
    other = opened(hostile(good["adamw"], {file: good[network].read(file)}))
    assert other.train(rows(), SHORT, 1) == own.train(rows(), SHORT, 1)
    wanted = own.get_params()
    for name, value in other.get_params().items():
        np.testing.assert_array_equal(value, wanted[name])


@pytest.mark.parametrize("file", [CHECKPOINT, TRAINING])
def test_files_of_a_network_with_other_params_are_an_error(
    good: dict[str, Bundle], opened: Open, file: str
) -> None:
    with pytest.raises(FedgeError):
        opened(hostile(good["adamw"], {file: good["renamed"].read(file)})).train(rows(), SHORT, 1)


def test_the_optimizer_of_another_kind_is_an_error_or_trains(
    good: dict[str, Bundle], opened: Open
) -> None:
    files = {OPTIMIZER: good["adamw"].read(OPTIMIZER)}
    with contextlib.suppress(FedgeError):
        assert np.isfinite(opened(hostile(good["sgd"], files)).train(rows(), SHORT, 1).loss)


def test_a_schedule_does_not_pass_through_the_library(
    good: dict[str, Bundle], opened: Open
) -> None:
    """Its LinearLRScheduler swaps its arguments; fedge sets each step's rate itself."""
    config = TrainConfig(lr=0.1, batch_size=1, epochs=1, schedule=Schedule("linear", warmup=2))
    whole, steps = opened(good["sgd"]), opened(good["sgd"])
    whole.train(rows(), config, 3)
    rates = learning_rates(ROWS, config)
    assert rates is not None
    for chosen, rate in zip(batch_indices(ROWS, config, 3), rates, strict=True):
        steps.train_step(rows().take(chosen), rate)
    wanted = steps.get_params()
    for name, value in whole.get_params().items():
        np.testing.assert_array_equal(value, wanted[name])


def test_a_step_that_holds_the_interpreter_lock_holds_up_nobody_here(
    good: dict[str, Bundle], opened: Open
) -> None:
    engine, late = opened(good["sgd"]), list[float]()
    long = TrainConfig(lr=1e-4, batch_size=ROWS, steps=10_000)
    training = threading.Thread(target=engine.train, args=(rows(), long, 1))
    training.start()
    while training.is_alive():
        began = time.monotonic()
        time.sleep(0.01)
        late.append(time.monotonic() - began)
    assert len(late) > 10
    assert max(late) < 1.0  # a client beats every few seconds
