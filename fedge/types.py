"""The few words every module shares. This module imports nothing heavy, numpy included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from fedge.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]
    Indices: TypeAlias = NDArray[np.integer[Any]]
else:
    Array = Any
    Indices = Any

ClientId: TypeAlias = str  # stable name of a participant; replies are reduced in its order
RoundNum: TypeAlias = int  # from 1
Params: TypeAlias = dict[str, Array]  # tensor name -> array, little-endian, C order
Metrics: TypeAlias = dict[str, float]


@dataclass(frozen=True)
class Examples:
    """Rows a model can be trained or tested on.

    Attributes:
        inputs: Model input name -> array whose first axis is the row.
        labels: One label per row; the bundle says dtype and trailing shape.

    Raises:
        DataError: If they are no arrays, or differ in their number of rows.
    """

    inputs: dict[str, Array]
    labels: Array

    def __post_init__(self) -> None:
        arrays = [*self.inputs.values(), self.labels] if isinstance(self.inputs, dict) else []
        if not arrays or any(not getattr(a, "shape", ()) for a in arrays):
            raise DataError("inputs must be {input name: array}, labels an array, rows first")
        rows = {name: int(a.shape[0]) for name, a in self.inputs.items()}
        rows["labels"] = int(self.labels.shape[0])
        if len(set(rows.values())) != 1:
            raise DataError(f"inputs and labels differ in rows: {rows}; give one label per row")

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def take(self, rows: Indices | slice) -> Examples:
        """The chosen rows, in the order given."""
        return Examples({n: a[rows] for n, a in self.inputs.items()}, self.labels[rows])


@dataclass(frozen=True)
class ClientData:
    """One client's local data: what it trains on and what it holds out."""

    client_id: ClientId
    train: Examples
    test: Examples | None = None
