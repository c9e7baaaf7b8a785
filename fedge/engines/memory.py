"""What a bundle's training changes, held twice: a step reads one set of arrays, writes the other.

So nothing is copied or allocated between steps, and a step costs little more than its kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fedge.artifacts.bundle import Bundle
from fedge.engines.runtime import shared
from fedge.types import Array, Params

NEXT = "@next"


class Memory:
    """Params and optimizer state of one engine.

    Attributes:
        sets: Name -> array, twice.
        current: Which of the two holds the newest values.
    """

    def __init__(self, bundle: Bundle) -> None:
        specs = bundle.manifest.state
        state = {s.name: np.zeros([int(d) for d in s.shape], s.dtype) for s in specs}
        first = {n: np.array(v) for n, v in {**bundle.initial_params(), **state}.items()}
        self.sets = first, {n: v.copy() for n, v in first.items()}
        self.current = 0

    @property
    def now(self) -> Params:
        """The newest values."""
        return self.sets[self.current]

    def share_all_but(self, outputs: Iterable[str]) -> None:
        """Hold once what no ``X@next`` of these graph outputs writes."""
        first, second = self.sets
        for name in first.keys() - {n.removesuffix(NEXT) for n in outputs if n.endswith(NEXT)}:
            second[name] = first[name]

    def binding(
        self,
        session: Any,  # noqa: ANN401 - onnxruntime's
        source: int,
        values: Mapping[str, Array],
        targets: Mapping[str, Array],
    ) -> Any:  # noqa: ANN401 - onnxruntime's
        """An IOBinding that reads set ``source`` and writes the other.

        Args:
            session: onnxruntime's.
            source: 0 or 1.
            values: Inputs that are in neither set.
            targets: Outputs that are not ``X@next`` of the sets, or go elsewhere.
        """
        read, write = {**self.sets[source], **values}, self.sets[1 - source]
        binding = session.io_binding()
        for graph_input in session.get_inputs():
            binding.bind_ortvalue_input(graph_input.name, shared(read[graph_input.name]))
        for graph_output in session.get_outputs():
            name = graph_output.name
            target = targets[name] if name in targets else write[name.removesuffix(NEXT)]
            binding.bind_ortvalue_output(name, shared(target))
        return binding
