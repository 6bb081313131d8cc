"""The tables of a comparison, for the terminal."""

import math
from collections.abc import Sequence

import numpy as np
from rich import box
from rich.table import Table

from kfac_optax.experiments import clock
from kfac_optax.experiments.optimizers import OPTIMIZERS
from kfac_optax.experiments.results import (
    Run,
    Runs,
    best_rate,
    best_runs,
    cost_of,
    finals,
    has_one_row_per_epoch,
    interval,
    ms_per_step,
    names,
    rises,
    score,
    worst,
)

# what a note says of each kind of score
_SCORES = {"accuracy": "", "error": " Error: mean squared, per pixel."}


_STATISTICS = {
    "fresh": "Test: batch statistics, if any, of training batches under the final weights.",
    "running": "Test: batch statistics, if any, as running averages of training.",
}
_RISES = " Rises: epochs whose train loss was more than half above that of the epoch before, mean of a run (most in a run)."


def fixed_rate(runs: Runs, *, workers: int, evaluate_with: str = "fresh") -> Table:
    """Final losses and scores of all optimizers, each at one learning rate."""
    rates = _rates(runs)
    kind = score(runs)
    heading, factor, digits = _columns(kind)
    # rises are counted from epoch to epoch
    by_epoch = all(has_one_row_per_epoch(run) for group in runs.values() for run in group)
    rising = ("rises",) if by_epoch else ()
    note = _RISES if by_epoch else ""
    # optimizers that find their rate have none to name
    table = blank(
        "Every optimizer at "
        + (f"learning rate {_listed(rates)}" if rates else "the rate it finds"),
        (
            "final train loss",
            "worst seed",
            *rising,
            f"train {heading}",
            f"test {heading}",
            "ms/step",
        ),
        f"Mean ± 95 % interval (Student t) over {_seeds(runs)}. ms/step: compilation and "
        f"evaluation left out, {_together(workers)}. Worst seed: largest final train loss.{note} "
        f"{_STATISTICS[evaluate_with]}" + _SCORES[kind],
    )
    for (name, rate), group in runs.items():
        # rates differ where the configuration gives some
        table.add_row(
            OPTIMIZERS[name].label
            + (f" ({rate:g})" if len(rates) > 1 and OPTIMIZERS[name].tuned else ""),
            _loss(group),
            _worst(group),
            *((_rises(group),) if by_epoch else ()),
            mean_and_interval([factor * value for value in finals(group, f"train_{kind}")], digits),
            mean_and_interval([factor * value for value in finals(group, f"test_{kind}")], digits),
            mean_and_interval(ms_per_step(group), ".2f"),
        )
    return table


def tuned(runs: Runs, *, targets: Sequence[float]) -> Table:
    """Every optimizer at the best rate of the grid, and what it took to reach fixed losses."""
    rates = _rates(runs)
    kind = score(runs)
    heading, factor, digits = _columns(kind)
    # what it took to get to fixed losses
    table = blank(
        "Every optimizer at "
        + (f"its best learning rate of {_listed(rates)}" if rates else "the rate it finds"),
        (
            "rate",
            "final train loss",
            f"test {heading}",
            *(f"to loss {target:g}" for target in targets),
        ),
        "Best: lowest mean final train loss. Epochs and training seconds to a train loss: mean "
        "over the seeds that reached it, and how many did; - when at most half did. *: an edge of "
        "the grid, a better rate may lie beyond.",
    )
    for name in names(runs):
        # the best rate was chosen by the loss, not by the test score
        rate = best_rate(runs, name)
        group = runs[name, rate]
        cells = [_reached(group, target) for target in targets]
        test = mean_and_interval(
            [factor * value for value in finals(group, f"test_{kind}")], digits
        )
        table.add_row(OPTIMIZERS[name].label, _rate(runs, name), _loss(group), test, *cells)
    return table


def every_rate(runs: Runs) -> Table:
    """Mean final training loss and worst seed of every optimizer at every rate."""
    # the largest first, as rates are tried downwards
    rates = sorted({rate for _, rate in runs}, reverse=True)
    table = blank(
        "Every optimizer at every learning rate: final train loss, worst seed below",
        [f"{rate:g}" for rate in rates],
        "Mean over as many seeds as stand beside it, those that diverged left out; - where a rate "
        "was not tried.",
    )
    for name in names(runs):
        # not every optimizer was tried at every rate
        groups = [runs.get((name, rate)) for rate in rates]
        table.add_row(OPTIMIZERS[name].label, *(_mean_and_worst(group) for group in groups))
    return table


def _mean_and_worst(group: Sequence[Run] | None) -> str:
    if group is None:
        return "-"
    kept = finals(group, "train_loss")
    mean = f"{np.mean(kept):.4f}" if kept else "diverged"
    return f"{mean} ({len(group)})\n{_worst(group)}"


def race(runs: Runs, *, targets: Sequence[float]) -> Table:
    """What every optimizer at its best rate reaches in the same training seconds, and when it
    reaches fixed losses.
    """
    # up to the second that all runs have reached
    best = best_runs(runs)
    seconds = clock.common(best)
    table = blank(
        "Every optimizer at its best learning rate, by training seconds",
        (
            "rate",
            "ms/step",
            f"train loss at {seconds:.3g} s",
            *(f"to loss {target:g}" for target in targets),
        ),
        f"Mean ± 95 % interval (Student t) over {_seeds(best)}; compilation and evaluation left "
        "out. Seconds and steps to a train loss: over the seeds that reached it, and how many "
        "did; - when at most half did. *: an edge of the grid.",
    )
    for (name, _), group in best.items():
        # to a loss: seconds and steps
        cells = [_raced(group, target) for target in targets]
        loss = mean_and_interval(clock.at(group, "train_loss", seconds=seconds), ".4f")
        table.add_row(
            OPTIMIZERS[name].label,
            _rate(runs, name),
            mean_and_interval(ms_per_step(group), ".2f"),
            loss,
            *cells,
        )
    return table


def _rates(runs: Runs) -> list[float]:
    """All rates of the optimizers that are tuned, the largest first."""
    return sorted({rate for name, rate in runs if OPTIMIZERS[name].tuned}, reverse=True)


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _rate(runs: Runs, name: str) -> str:
    """The best rate of an optimizer, marked where it is an edge of those that were tried."""
    if not OPTIMIZERS[name].tuned:
        return "own"
    rate, tried = best_rate(runs, name), [rate for other, rate in runs if other == name]
    # marked where a better rate may lie beyond
    return f"{rate:g}" + ("*" if len(tried) > 1 and rate in (min(tried), max(tried)) else "")


def _raced(group: Sequence[Run], target: float) -> str:
    epochs, seconds = cost_of(group, target)
    share = f"({len(epochs)}/{len(group)})"
    # a mean over the few best seeds would flatter
    if 2 * len(epochs) <= len(group):
        return f"- {share}"
    steps = [epoch * group[0].steps for epoch in epochs]
    return f"{mean_and_interval(seconds, '.2f')} s\n{mean_and_interval(steps, '.0f')} steps {share}"


def _columns(kind: str) -> tuple[str, float, str]:
    """Heading, factor and format of a score."""
    return ("acc %", 100.0, ".2f") if kind == "accuracy" else ("error", 1.0, ".5f")


def blank(title: str, headings: Sequence[str], caption: str) -> Table:
    """A table without rows: a column for the optimizers, and one for every heading."""
    table = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    # where a terminal is too narrow cells go over several lines, and nothing is cut off
    table.add_column("optimizer", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def _loss(group: Sequence[Run]) -> str:
    # of runs that diverged there is no final loss
    diverged = sum(run.diverged for run in group)
    if diverged == len(group):
        return "diverged"
    note = f" ({diverged} of {len(group)} diverged)" if diverged else ""
    return mean_and_interval(finals(group, "train_loss"), ".4f") + note


def _worst(group: Sequence[Run]) -> str:
    loss = worst(group)
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def _rises(group: Sequence[Run]) -> str:
    counts = [rises(run) for run in group]
    return f"{np.mean(counts):.1f} ({max(counts)})"


def mean_and_interval(values: Sequence[float], digits: str) -> str:
    """Mean and half width of the 95 % interval, as text."""
    # every run diverged, say
    if not values:
        return "-"
    mean, half = interval(values)
    # a single value has no interval
    return f"{mean:{digits}}" if math.isnan(half) else f"{mean:{digits}} ± {half:{digits}}"


def _reached(group: Sequence[Run], target: float) -> str:
    epochs, seconds = cost_of(group, target)
    share = f"({len(epochs)}/{len(group)})"
    # a mean over the few best seeds would flatter
    if 2 * len(epochs) <= len(group):
        return f"- {share}"
    # one digit is enough above ten seconds
    mean = np.mean(seconds)
    return f"{np.mean(epochs):.1f} ep\n{mean:.{1 if mean >= 10 else 2}f} s {share}"


def _seeds(runs: Runs) -> str:
    counts = sorted({len(group) for group in runs.values()})
    # rates have as many seeds as were trained
    words = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    return "1 seed" if words == "1" else f"{words} seeds"


def _together(workers: int) -> str:
    if workers == 1:
        return "one run at a time"
    return f"up to {workers} runs at once, each with one thread (--config.workers=1: one at a time)"
