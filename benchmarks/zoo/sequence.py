"""Networks over time series."""

from __future__ import annotations

from torch import Tensor, nn


class Ecg(nn.Module):
    """A 1D convolutional network as used on electrocardiograms."""

    def __init__(self, classes: int = 5, width: int = 16) -> None:
        super().__init__()
        w = width
        self.features = nn.Sequential(
            *(nn.Conv1d(1, w, 7, padding=3), nn.BatchNorm1d(w), nn.ReLU(), nn.MaxPool1d(2)),
            *(nn.Conv1d(w, 2 * w, 5, padding=2), nn.BatchNorm1d(2 * w), nn.ReLU()),
            *(nn.MaxPool1d(2), nn.Conv1d(2 * w, 4 * w, 3, padding=1), nn.BatchNorm1d(4 * w)),
            *(nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
        )
        self.head = nn.Linear(4 * w, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, T] -> [N, classes]."""
        y: Tensor = self.head(self.features(x))
        return y


class Recurrent(nn.Module):
    """LSTM or GRU over [N, T, features], read at the last step (of both directions' outputs)."""

    def __init__(
        self, kind: str = "LSTM", hidden: int = 32, layers: int = 1, both_ways: bool = False
    ) -> None:
        super().__init__()
        self.cells = getattr(nn, kind)(
            12, hidden, num_layers=layers, batch_first=True, bidirectional=both_ways
        )
        self.head = nn.Linear(hidden * (2 if both_ways else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 12] -> [N, 5]."""
        y: Tensor = self.head(self.cells(x)[0][:, -1])
        return y


class Encoder(nn.Module):
    """torch's own TransformerEncoder, averaged over time."""

    def __init__(self, width: int = 32, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(12, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 12] -> [N, 5]."""
        y: Tensor = self.head(self.encoder(self.embed(x)).mean(1))
        return y
