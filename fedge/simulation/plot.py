"""The picture of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_rounds(metrics: pd.DataFrame, title: str) -> Figure:
    """Score per round on the left, bytes up and down so far on the right.

    Args:
        metrics: As :attr:`fedge.simulation.run.Run.metrics`.
        title: Name of the model.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, (scores, traffic) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    _plot_scores(scores, metrics)
    _plot_traffic(traffic, metrics)
    for axes in (scores, traffic):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    plt.close(figure)  # it is the caller's now; a notebook would show it twice
    return figure


def _plot_scores(axes: Axes, metrics: pd.DataFrame) -> None:
    score = next((n for n in ("accuracy", "rmse", "concordance") if n in metrics), None)
    if score is None:
        score = "train_loss"
        axes.plot(metrics["round"], metrics[score], label="mean")
    else:
        axes.plot(metrics["round"], metrics[score], label="mean over all rows")
        axes.plot(metrics["round"], metrics[f"worst_{score}"], "--", label="worst client")
    axes.set(xlabel="round", ylabel=score.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend()


def _plot_traffic(axes: Axes, metrics: pd.DataFrame) -> None:
    for name, label in (("bytes_up", "sent by clients"), ("bytes_down", "sent to clients")):
        axes.plot(metrics["round"], metrics[name].cumsum() / 2**20, label=label)
    axes.set(xlabel="round", ylabel="MiB in all")
    axes.grid(alpha=0.3)
    axes.legend()
