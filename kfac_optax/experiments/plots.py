"""Figures of a comparison: means over the seeds with 95 % bands."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from kfac_optax.experiments.optimizers import OPTIMIZERS
from kfac_optax.experiments.results import Run, Runs, best_rate, interval, names

# Okabe and Ito's colours, which stay apart under the common colour-vision deficiencies; the dashes
# tell the optimizers apart without any colour.
STYLES = {
    "sgd": ("#E69F00", "-"),
    "adam": ("#009E73", "--"),
    "kfac": ("#0072B2", "-."),
    "two_level": ("#D55E00", "-"),
    "two_level_exact": ("#CC79A7", (0, (4, 1, 1, 1, 1, 1))),
}


def loss(path: Path, runs: Runs, *, rate: float, title: str) -> None:
    """Training loss per epoch at one learning rate (the paper's Figure 1, left)."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    rates = {name: rate for name, _ in runs}
    _losses(axes, runs, rates)
    axes.set_xlabel("epoch")
    axes.set_title(f"{title}\nlearning rate {rate:g}, {_band_words(runs)}", fontsize=11)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def accuracy(path: Path, runs: Runs, *, rate: float, title: str) -> None:
    """Training and test accuracy side by side at one learning rate (the paper's Figure 2)."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    lows = []
    for axes, part in zip(panels, ("train", "test"), strict=True):
        for name in names(runs):
            _curve(axes, runs[name, rate], f"{part}_accuracy", name, factor=100.0)
        axes.set(title=f"{part} accuracy", xlabel="epoch")
        lows.append(100 * _range(list(runs.values()), f"{part}_accuracy")[0])
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="accuracy (%)", ylim=(min(lows) - 1, 101))  # no band beyond 100 %
    _legend_below(figure, panels[0])
    figure.suptitle(f"{title}, learning rate {rate:g}, {_band_words(runs)}", fontsize=11)
    figure.savefig(path, dpi=150)


def tuned_loss(path: Path, runs: Runs, *, title: str) -> None:
    """Training loss of every optimizer at its best rate, against epochs and against seconds."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rates = {name: best_rate(runs, name) for name in names(runs)}
    _losses(left, runs, rates, with_rate=True)
    _losses(right, runs, rates, in_seconds=True)
    left.set_xlabel("epoch")
    right.set_xlabel("training time (s), compilation and evaluation left out")
    right.set_ylabel("")
    _legend_below(figure, left)
    figure.suptitle(f"{title}, best learning rate of each, {_band_words(runs)}", fontsize=11)
    figure.savefig(path, dpi=150)


def _losses(
    axes: Axes,
    runs: Runs,
    rates: dict[str, float],
    *,
    in_seconds: bool = False,
    with_rate: bool = False,
) -> None:
    for name, rate in rates.items():
        note = f", rate {rate:g}" if with_rate else ""
        _curve(axes, runs[name, rate], "train_loss", name, in_seconds=in_seconds, note=note)
    axes.set(yscale="log", ylabel="training loss")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    # By the runs themselves: the band of few seeds may reach below zero, which has no logarithm.
    low, high = _range([runs[key] for key in rates.items()], "train_loss")
    axes.set_ylim(low / 1.15, high * 1.15)
    axes.grid(alpha=0.3)


def _range(groups: Sequence[Sequence[Run]], column: str) -> tuple[float, float]:
    kept = [run.history[column] for group in groups for run in group if not run.diverged]
    return (np.min(kept), np.max(kept)) if kept else (0.1, 1.0)


def _curve(
    axes: Axes,
    group: Sequence[Run],
    column: str,
    name: str,
    *,
    in_seconds: bool = False,
    factor: float = 1.0,
    note: str = "",
) -> None:
    color, dashes = STYLES.get(name, (None, "-"))
    kept = [run for run in group if not run.diverged]
    label = OPTIMIZERS[name].label + note
    if len(kept) < len(group):
        label += f" ({len(group) - len(kept)} of {len(group)} diverged)"
    if not kept:
        axes.plot([], [], color=color, linestyle=dashes, label=label)
        return
    values = factor * np.transpose([run.history[column] for run in kept])
    mean, half = np.transpose([interval(row) for row in values])
    x = kept[0].history["epoch"]
    if in_seconds:
        x = np.mean([run.history["seconds"] for run in kept], axis=0).cumsum()
    (line,) = axes.plot(x, mean, color=color, linestyle=dashes, linewidth=1.8, label=label)
    if len(kept) > 1:
        band = np.maximum(mean - half, 1e-12), mean + half
        axes.fill_between(x, *band, color=line.get_color(), alpha=0.15, linewidth=0)


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def _band_words(runs: Runs) -> str:
    count = len(next(iter(runs.values())))
    return "1 run" if count == 1 else f"mean and 95 % band of {count} runs"
