"""The two tables of a comparison, for the terminal."""

import math
from collections.abc import Sequence

import numpy as np
from rich import box
from rich.table import Table

from kfac_optax.experiments.optimizers import OPTIMIZERS
from kfac_optax.experiments.results import (
    Run,
    Runs,
    Timing,
    Timings,
    best_rate,
    epochs_to,
    finals,
    interval,
)


def fixed_rate(runs: Runs, timings: Timings, *, rate: float) -> Table:
    """Final losses and accuracies of all optimizers at one learning rate."""
    count = len(next(iter(runs.values())))
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
        title=f"Every optimizer at learning rate {rate:g}",
        caption=f"Mean ± 95 % interval (Student t, {_seeds(count)}). ms/step: timed apart, one "
        f"optimizer at a time with no run beside it ({len(next(iter(timings.values())).ms)} "
        "repeats), evaluation left out.",
    )
    table.add_column("optimizer")
    for heading in ("final train loss", "train acc %", "test acc %", "ms/step"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, timing in timings.items():
        group = runs[name, rate]
        table.add_row(
            OPTIMIZERS[name].label,
            _loss(group),
            _mean([100 * a for a in finals(group, "train_accuracy")], ".2f"),
            _mean([100 * a for a in finals(group, "test_accuracy")], ".2f"),
            _mean(timing.ms, ".2f"),
        )
    return table


def tuned(runs: Runs, timings: Timings, *, targets: Sequence[float]) -> Table:
    """Every optimizer at the best rate of the grid, and what it took to reach fixed losses."""
    rates = sorted({rate for _, rate in runs}, reverse=True)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
        title="Every optimizer at its best learning rate of " + ", ".join(f"{r:g}" for r in rates),
        caption="Best: lowest mean final train loss. Epochs and seconds: mean over the seeds that "
        "reached the train loss, and how many did; - when at most half did. Seconds: epochs times "
        "the ms/step of the first table, compilation and evaluation left out. *: an edge of the "
        "grid, a better rate may lie beyond.",
    )
    table.add_column("optimizer")
    headings = [f"to loss {target:g}" for target in targets]
    for heading in ("rate", "final train loss", *headings):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, timing in timings.items():
        rate = best_rate(runs, name)
        group = runs[name, rate]
        cells = [_reached(group, target, timing) for target in targets]
        edge = "*" if rate in (rates[0], rates[-1]) else ""
        table.add_row(OPTIMIZERS[name].label, f"{rate:g}{edge}", _loss(group), *cells)
    return table


def _loss(group: Sequence[Run]) -> str:
    diverged = sum(run.diverged for run in group)
    if diverged == len(group):
        return "diverged"
    note = f" ({diverged} of {len(group)} diverged)" if diverged else ""
    return _mean(finals(group, "train_loss"), ".4f") + note


def _mean(values: Sequence[float], digits: str) -> str:
    if not values:
        return "-"
    mean, half = interval(values)
    return f"{mean:{digits}}" if math.isnan(half) else f"{mean:{digits}} ± {half:{digits}}"


def _reached(group: Sequence[Run], target: float, timing: Timing) -> str:
    epochs = [e for run in group if (e := epochs_to(run, target)) is not None]
    share = f"({len(epochs)}/{len(group)})"
    if 2 * len(epochs) <= len(group):
        return f"- {share}"
    mean = float(np.mean(epochs))
    seconds = mean * timing.epoch_seconds
    return f"{mean:.1f} ep\n{seconds:.{1 if seconds >= 10 else 2}f} s {share}"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"
