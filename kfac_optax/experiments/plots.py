"""Figures of a comparison: a thin line for every seed, a thick one for their mean."""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from kfac_optax.experiments import clock
from kfac_optax.experiments.optimizers import OPTIMIZERS
from kfac_optax.experiments.results import Run, Runs, best_runs, score

# Okabe and Ito's colours, which stay apart under the common colour-vision deficiencies; the dashes
# tell the optimizers apart without any colour.
# colour and dashes; also on paper and in grey
STYLES = {
    "sgd": ("#E69F00", "-"),
    "adam": ("#009E73", "--"),
    "muon": ("#999999", (0, (1, 1))),
    "shampoo": ("#F0E442", "-"),
    "soap": ("#56B4E9", "--"),
    "kfac": ("#0072B2", "-."),
    "ekfac": ("#CC79A7", "-"),
    "two_level": ("#D55E00", "-"),
    "kfac_bounded": ("#000000", "-."),
    "two_level_bounded": ("#999999", "-"),
    "kfac_adaptive": ("#0072B2", (0, (6, 2))),
    "two_level_adaptive": ("#D55E00", (0, (6, 2))),
    "two_level_exact": ("#CC79A7", (0, (4, 1, 1, 1, 1, 1))),
    "two_level_galerkin": ("#56B4E9", (0, (1, 1))),
}
_COLORS = tuple(dict.fromkeys(color for color, _ in STYLES.values()))
_DASHES = ("--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)), (0, (5, 1)))
_SECONDS = "training time (s), compilation and evaluation left out"


def style(name: str) -> tuple[str, Any]:
    """Colour and dashes of an optimizer: its own, or a pair by its place among those without."""
    # those of the paper always look the same
    if name in STYLES:
        return STYLES[name]
    pairs = ((color, dashes) for dashes, color in itertools.product(_DASHES, _COLORS))
    free = (pair for pair in pairs if pair not in STYLES.values())
    # the order of the table is fixed, and so are their styles
    place = [x for x in OPTIMIZERS if x not in STYLES].index(name)
    return next(itertools.islice(free, place, None))


def loss(path: Path, runs: Runs, *, title: str) -> None:
    """Training loss per epoch, every optimizer at one learning rate (the paper's Figure 1, left)."""
    # the first figure of the paper
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    _losses(axes, runs)
    axes.set_xlabel("epoch")
    axes.set_title(f"{title}\n{_rate_words(runs)}, {_line_words(runs)}", fontsize=11)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def scores(path: Path, runs: Runs, *, title: str) -> None:
    """Training and test accuracy, or error, side by side per epoch (the paper's Figures 2 and 3)."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    # both parts on one scale
    panels = figure.subplots(1, 2, sharey=True)
    for axes, part in zip(panels, ("train", "test"), strict=True):
        _scores(axes, runs, part)
        axes.set(title=f"{part} {score(runs)}", xlabel="epoch")
    _score_limits(panels, runs, ("train", "test"))
    panels[1].set_ylabel("")
    legend_below(figure, panels[0])
    figure.suptitle(f"{title}, {_rate_words(runs)}, {_line_words(runs)}", fontsize=11)
    figure.savefig(path, dpi=150)


def over_seconds(path: Path, runs: Runs, *, title: str) -> None:
    """Training loss and test score against training time, every optimizer at one learning rate."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _losses(left, runs, in_seconds=True)
    # accuracy starts at its lowest value, an error is logarithmic
    _scores(right, runs, "test", in_seconds=True)
    _score_limits((right,), runs, ("test",))
    for axes in (left, right):
        axes.set_xlabel(_SECONDS)
    right.set_ylabel(f"test {right.get_ylabel()}")
    legend_below(figure, left)
    figure.suptitle(f"{title}, {_rate_words(runs)}, {_line_words(runs)}", fontsize=11)
    figure.savefig(path, dpi=150)


def tuned_loss(path: Path, runs: Runs, *, title: str) -> None:
    """Training loss of every optimizer at its best rate, against epochs and against seconds."""
    best = best_runs(runs)
    # against epochs and against seconds, with one scale of losses
    figure, (left, right) = _epochs_and_seconds(best, title)
    _losses(left, best, with_rate=True)
    _losses(right, best, in_seconds=True)
    right.set_ylabel("")
    legend_below(figure, left)
    figure.savefig(path, dpi=150)


def tuned_score(path: Path, runs: Runs, *, title: str) -> None:
    """Test accuracy, or error, of every optimizer at its best rate, against epochs and against
    seconds.
    """
    best = best_runs(runs)
    figure, (left, right) = _epochs_and_seconds(best, title)
    _scores(left, best, "test", with_rate=True)
    _scores(right, best, "test", in_seconds=True)
    _score_limits((left, right), best, ("test",))
    left.set_ylabel(f"test {left.get_ylabel()}")
    right.set_ylabel("")
    legend_below(figure, left)
    figure.savefig(path, dpi=150)


def _epochs_and_seconds(runs: Runs, title: str) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set_xlabel("epoch")
    right.set_xlabel(_SECONDS)
    figure.suptitle(f"{title}, best learning rate of each, {_line_words(runs)}", fontsize=11)
    return figure, (left, right)


def _losses(axes: Axes, runs: Runs, *, in_seconds: bool = False, with_rate: bool = False) -> None:
    _curves(axes, runs, "train_loss", in_seconds=in_seconds, with_rate=with_rate)
    axes.set_ylabel("training loss")
    _logarithmic(axes, runs, ("train_loss",))


def _scores(
    axes: Axes, runs: Runs, part: str, *, in_seconds: bool = False, with_rate: bool = False
) -> None:
    # accuracy in per cent, errors as they are
    percent = score(runs) == "accuracy"
    factor = 100.0 if percent else 1.0
    _curves(
        axes,
        runs,
        f"{part}_{score(runs)}",
        in_seconds=in_seconds,
        with_rate=with_rate,
        factor=factor,
    )
    axes.set_ylabel("accuracy (%)" if percent else "mean squared error")
    axes.grid(alpha=0.3)


def _score_limits(panels: Iterable[Axes], runs: Runs, parts: Sequence[str]) -> None:
    columns = [f"{part}_{score(runs)}" for part in parts]
    for axes in panels:
        if score(runs) == "accuracy":
            # a little room above 100 %
            low = 100 * min(_range(runs, column)[0] for column in columns)
            axes.set_ylim(low - 1, 101)
        else:
            _logarithmic(axes, runs, columns)


def _logarithmic(axes: Axes, runs: Runs, columns: Sequence[str]) -> None:
    lows, highs = zip(*(_range(runs, column) for column in columns), strict=True)
    # less than a decade: labels have to be closer
    narrow = max(highs) < 10 * min(lows)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 7) if narrow else (1, 2, 5))
    )
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(min(lows) / 1.15, max(highs) * 1.15)
    axes.grid(alpha=0.3)


def _curves(
    axes: Axes, runs: Runs, column: str, *, in_seconds: bool, with_rate: bool, factor: float = 1.0
) -> None:
    # a rate in the legend, if curves have different ones
    with_rate = with_rate or _rates_differ(runs)
    for (name, rate), group in runs.items():
        note = f", rate {rate:g}" if with_rate and OPTIMIZERS[name].tuned else ""
        _curve(axes, group, column, name, in_seconds=in_seconds, factor=factor, note=note)


def _rates_differ(runs: Runs) -> bool:
    # optimizers that find their rate say nothing of it
    return len({rate for name, rate in runs if OPTIMIZERS[name].tuned}) > 1


def _rate_words(runs: Runs) -> str:
    rates = {rate for name, rate in runs if OPTIMIZERS[name].tuned}
    return f"learning rate {rates.pop():g}" if len(rates) == 1 else "given learning rates"


def _range(runs: Runs, column: str) -> tuple[float, float]:
    # runs that diverged would stretch the axes
    kept = [run.history[column] for group in runs.values() for run in group if not run.diverged]
    return (min(map(np.min, kept)), max(map(np.max, kept))) if kept else (0.1, 1.0)


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
    color, dashes = style(name)
    # diverged runs are counted in the legend
    kept = [run for run in group if not run.diverged]
    label = OPTIMIZERS[name].label + note
    if len(kept) < len(group):
        label += f" ({len(group) - len(kept)} of {len(group)} diverged)"
    if not kept:
        # an entry of the legend without a curve
        axes.plot([], [], color=color, linestyle=dashes, label=label)
        return
    read = clock.curves if in_seconds else clock.by_epoch
    x, values = read(kept, column)
    values = factor * values
    # the mean thick, every seed thin behind it
    (line,) = axes.plot(
        x, values.mean(0), color=color, linestyle=dashes, linewidth=2.2, label=label, zorder=3
    )
    if len(kept) > 1:
        axes.plot(x, values.T, color=line.get_color(), alpha=0.35, linewidth=0.6, zorder=2)


def legend_below(figure: Figure, axes: Axes) -> None:
    """Puts the legend of some axes under all of the figure, in one row or, where that would be too
    long, in two.
    """
    handles, labels = axes.get_legend_handles_labels()
    # about ten letters in an inch
    long = sum(len(label) + 8 for label in labels) > 10 * figure.get_figwidth()
    columns = math.ceil(len(labels) / 2) if long else len(labels)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _line_words(runs: Runs) -> str:
    counts = sorted({len(group) for group in runs.values()})
    words = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    return "1 run" if words == "1" else f"every run thin, mean of {words} thick"
