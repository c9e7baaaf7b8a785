"""The models fedge is measured and tested on, with their data.

``ZOO[name]`` makes a model, rows of input and labels, all from a seed; torch is imported only when
a model is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Model:
    """One model of the zoo.

    Attributes:
        module: File of this package, and the function or class in it.
        shapes: Input name -> shape of one row.
        options: Arguments of ``module``.
        classes: Of the labels; 2 with ``bce_with_logits``.
        labels: Shape of one row of labels.
        loss: As for ``fedge.build``.
        tokens: Size of the vocabulary where inputs are token ids; 0 where they are real numbers.
    """

    module: tuple[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: int = 10
    labels: tuple[int, ...] = ()
    loss: str = "cross_entropy"
    tokens: int = 0

    def build(self, seed: int = 0) -> Any:  # noqa: ANN401 - nn.Module
        """The module, in training mode, with torch's initial weights for ``seed``."""
        import torch

        torch.manual_seed(seed)
        file, name = self.module
        made = getattr(import_module(f"{__name__}.{file}"), name)(**self.options)
        return made.train()

    def inputs(self, rows: int, seed: int = 0) -> Arrays:
        """Rows of every input."""
        rng = np.random.default_rng(seed)
        return {n: self._draw(rng, (rows, *shape)) for n, shape in self.shapes.items()}

    def targets(self, rows: int, seed: int = 0) -> np.ndarray[Any, Any]:
        """Labels for them."""
        rng = np.random.default_rng((seed, 1))
        drawn = rng.integers(0, self.classes, (rows, *self.labels))
        return drawn.astype(np.float32) if self.loss == "bce_with_logits" else drawn

    def _draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        if self.tokens:
            return rng.integers(0, self.tokens, shape)
        return rng.standard_normal(shape).astype(np.float32)


def _image(channels: int, size: int) -> dict[str, tuple[int, ...]]:
    return {"x": (channels, size, size)}


def _series(module: str, **options: Any) -> Model:  # noqa: ANN401
    return Model(("sequence", module), {"x": (12, 12)}, options, classes=5)


def _text(module: str, tokens: int = 12, **options: Any) -> Model:  # noqa: ANN401
    options = {"vocabulary": 64, "width": 32, **options}
    vocabulary: int = options["vocabulary"]
    shapes = {"x": (tokens,)}
    return Model(
        ("language", module), shapes, options, vocabulary, labels=(tokens,), tokens=vocabulary
    )


def _unet(up: str) -> Model:
    return Model(
        *(("vision", "UNet"), _image(1, 16), {"up": up, "width": 4}, 2, (1, 16, 16)),
        loss="bce_with_logits",
    )


def _mlp(*widths: int, dropout: float = 0.0) -> Model:
    return Model(("mlp", "mlp"), {"x": widths[:1]}, {"widths": widths, "dropout": dropout})


# As small as they can be without losing anything that makes their kind: for tests.
SMALL: dict[str, Model] = {
    "mlp": _mlp(12, 16, 10),
    "lenet": Model(("vision", "LeNet"), _image(1, 16), {"size": 16}),
    "resnet8": Model(("vision", "ResNet8"), _image(3, 8), {"width": 4}),
    "mobilenetv2": Model(("vision", "MobileNet"), _image(3, 16), {"widths": (4, 6, 8)}),
    "mobilenetv3": Model(
        ("vision", "MobileNet"), _image(3, 16), {"version": 3, "widths": (4, 6, 8)}
    ),
    "ecg": Model(("sequence", "Ecg"), {"x": (1, 32)}, {"width": 4}, classes=5),
    "lstm": _series("Recurrent", kind="LSTM", hidden=8),
    "lstm-2": _series("Recurrent", kind="LSTM", hidden=8, layers=2),
    "lstm-2-both": _series("Recurrent", kind="LSTM", hidden=8, layers=2, both_ways=True),
    "gru": _series("Recurrent", kind="GRU", hidden=8),
    "gru-2-both": _series("Recurrent", kind="GRU", hidden=8, layers=2, both_ways=True),
    "rnn": _series("Recurrent", kind="RNN", hidden=8),
    "gpt": _text("Gpt"),
    "gpt-tied": _text("Gpt", tied=True, tanh=True),
    "gpt-fused": _text("Gpt", fused=True, layers=1),
    "gpt-dropout": _text("Gpt", dropout=0.2, layers=1),
    "llama": _text("Llama"),
    "llama-fused": _text("Llama", fused=True, native_norm=True, layers=1),
    "translator": Model(
        ("language", "EncoderDecoder"),
        {"source": (7,), "target": (5,)},
        *({"vocabulary": 32, "width": 16}, 32, (5,)),
        tokens=32,
    ),
    "lora": Model(("language", "lora_gpt"), {"x": (12,)}, {"layers": 1}, 256, (12,), tokens=256),
    "unet": _unet("convt"),
    "unet-nearest": _unet("nearest"),
    "unet-bilinear": _unet("bilinear"),
    "encoder": _series("Encoder", layers=1),
    "groupnorm": Model(("vision", "ResNet8"), _image(3, 8), {"width": 4, "kind": "group"}),
    "instancenorm": Model(("vision", "ResNet8"), _image(3, 16), {"width": 4, "kind": "instance"}),
    "dropout": _mlp(12, 32, 10, dropout=0.3),
}

# As large as in the benchmarks' tables.
ZOO: dict[str, Model] = {
    "mlp-4.8k": _mlp(64, 64, 10),
    "mlp-1.1m": _mlp(784, 1024, 256, 10),
    "lenet": Model(("vision", "LeNet"), _image(1, 28)),
    "cnn28": Model(("vision", "cnn28"), _image(1, 28)),
    "resnet8": Model(("vision", "ResNet8"), _image(3, 32)),
    "mobilenetv2-96": Model(
        ("vision", "MobileNet"), _image(3, 96), {"widths": (16, 24, 32, 64, 96)}
    ),
    "mobilenetv3-96": Model(
        ("vision", "MobileNet"), _image(3, 96), {"version": 3, "widths": (16, 24, 32, 64, 96)}
    ),
    "ecg": Model(("sequence", "Ecg"), {"x": (1, 256)}, classes=5),
    "lstm": Model(("sequence", "Recurrent"), {"x": (32, 12)}, {"hidden": 64}, classes=5),
    "gru": Model(
        ("sequence", "Recurrent"), {"x": (32, 12)}, {"kind": "GRU", "hidden": 64}, classes=5
    ),
    "gpt-1m": _text("Gpt", 64, vocabulary=256, width=128, layers=5, length=64),
    "llama-1m": _text("Llama", 64, vocabulary=256, width=128, layers=5),
    "unet": Model(*(("vision", "UNet"), _image(1, 32), {}, 2, (1, 32, 32)), loss="bce_with_logits"),
}
