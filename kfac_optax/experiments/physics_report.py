"""Table, figure and files of a comparison on a partial differential equation."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from kfac_optax.experiments import pinn, plots, results, tables
from kfac_optax.experiments.pinn import METHODS, History
from kfac_optax.experiments.results import write_json, write_rows

# the colours of the other figures
_STYLES = {
    "adam": plots.STYLES["adam"],
    "lbfgs": plots.STYLES["muon"],
    "kfac": plots.STYLES["kfac"],
    "kfac_equations": plots.STYLES["ekfac"],
    "two_level": plots.STYLES["two_level"],
    "kfac_adaptive": plots.STYLES["kfac_adaptive"],
    "kfac_equations_adaptive": ("#CC79A7", (0, (6, 2))),
    "natural_adaptive": ("#000000", "-"),
    "two_level_adaptive": plots.STYLES["two_level_adaptive"],
}


Runs = Mapping[tuple[str, float], Sequence[History]]  # by optimizer and rate, one per seed


def rate_words(name: str, rate: float) -> str:
    """The rate for a legend; nothing of an optimizer that finds its own."""
    return f", rate {rate:g}" if METHODS[name].tuned else ""


def at(run: History, *, steps: float = np.inf, seconds: float = np.inf) -> float:
    """The error of the last row within so many steps and seconds; infinite if it is not finite.

    >>> run = History(np.arange(3), np.array([0.0, 1.0, 2.0]), np.ones(3), np.array([3.0, 2.0, 1.0]))
    >>> at(run, steps=1), at(run, seconds=1.5), at(run)
    (2.0, 2.0, 1.0)
    """
    # the last row within both limits
    error = run.error[(run.steps <= steps) & (run.seconds <= seconds)][-1]
    return float(error) if np.isfinite(error) else np.inf


def median_worst(errors: Sequence[float]) -> str:
    """Median and largest of the seeds' errors.

    >>> median_worst([1e-3, 2e-3, 0.5]), median_worst([1.0, np.inf, np.inf])
    ('2.0e-03 / 5.0e-01', 'diverged')
    """
    # a run that is not finite is worse than any
    values = np.where(np.isfinite(errors), errors, np.inf)
    words = ["diverged" if x == np.inf else f"{x:.1e}" for x in (np.median(values), values.max())]
    return words[0] if words[0] == "diverged" else " / ".join(words)


def best_rates(runs: Runs) -> dict[str, float]:
    """Per optimizer the rate of the lowest median error in the end."""
    # the median of seeds, which one bad seed does not decide
    return results.best_rates(
        {key: float(np.median([at(run) for run in group])) for key, group in runs.items()}
    )


def report(config: ml_collections.ConfigDict, out: Path, console: Console, runs: Runs) -> None:
    """Prints the table; writes curves.csv, summary.json and errors.png."""
    out.mkdir(parents=True, exist_ok=True)
    _write_curves(out / "curves.csv", runs)
    # settings beside results, so that a file explains itself
    settings = {k: v for k, v in config.to_dict().items() if k != "out"}
    device = jax.devices()[0].device_kind
    about = {"settings": settings, "device": device, "jax": jax.__version__}
    write_json(out / "summary.json", about | {"summary": _summary(runs)})
    draw(out / "errors.png", config, runs)
    console.print(table(config, runs))
    console.print(f"{out}: curves.csv, summary.json, errors.png", soft_wrap=True)


def common(runs: Runs) -> tuple[float, float]:
    """Steps and seconds that all runs at their best rates have reached."""
    # where the first of them ends
    kept = [run for key in best_rates(runs).items() for run in runs[key]]
    return min(run.steps[-1] for run in kept), min(run.seconds[-1] for run in kept)


def table(config: ml_collections.ConfigDict, runs: Runs) -> Table:
    """Error of every optimizer at its best rate: at equal steps, at equal seconds, and in the end."""
    steps, seconds = common(runs)
    made = tables.blank(
        f"{config.title}: relative L2 error",
        (
            "rate",
            f"after {steps:,} steps",
            f"after {seconds:.2g} s",
            "in the end",
            "steps",
            "s/run",
            "ms/step",
        ),
        f"Median / worst of {config.seeds} seeds. Best rate: lowest median in the end. *: an edge "
        "of the grid. Seconds without compilation and evaluation, one run at a time; ms/step in "
        "the fastest stretch, which other work on the machine slows least.",
    )
    for name, rate in best_rates(runs).items():
        group, rates = runs[name, rate], config.grid[name]
        # a better rate may lie beyond the edge
        edge = "*" if len(rates) > 1 and rate in (min(rates), max(rates)) else ""
        cells = [
            median_worst([at(run, steps=steps) for run in group]),
            median_worst([at(run, seconds=seconds) for run in group]),
            median_worst([at(run) for run in group]),
        ]
        # of whole runs, where that of steps is of the fastest stretch
        taken = np.mean([run.seconds[-1] for run in group])
        rate_cell = f"{rate:g}{edge}" if METHODS[name].tuned else "own"
        made.add_row(
            METHODS[name].label,
            rate_cell,
            *cells,
            f"{group[0].steps[-1]:,}",
            f"{taken:.1f}",
            f"{pinn.fastest(group):.1f}",
        )
    return made


def draw(path: Path, config: ml_collections.ConfigDict, runs: Runs) -> None:
    """Error against steps and against seconds, every optimizer at its best rate."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, rate in best_rates(runs).items():
        label = METHODS[name].label + rate_words(name, rate)
        # the same curves against both
        _curves(left, name, label, runs[name, rate], lambda run: run.steps)
        _curves(right, name, label, runs[name, rate], lambda run: run.seconds)
    left.set(ylabel="relative L2 error", xlabel="steps", xscale="log")
    right.set(xlabel="training time (s), compilation and evaluation left out", xscale="log")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    plots.legend_below(figure, left)
    words = f"every one of {config.seeds} runs thin, their median thick"
    figure.suptitle(f"{config.title}, {words}", fontsize=11)
    figure.savefig(path, dpi=150)


def _curves(
    axes: Axes,
    name: str,
    label: str,
    group: Sequence[History],
    x: Callable[[History], np.ndarray],
) -> None:
    color, dashes = _STYLES[name]
    for run in group:
        # the first row is that before training, on no logarithmic axis
        axes.plot(x(run)[1:], run.error[1:], color=color, linewidth=0.6, alpha=0.5)
    middle = np.median([run.error for run in group], 0)
    mean_x = np.mean([x(run) for run in group], 0)
    style = {"color": color, "linestyle": dashes, "linewidth": 2}
    axes.plot(mean_x[1:], middle[1:], label=label, **style)


def _write_curves(path: Path, runs: Runs) -> None:
    rows = []
    for (name, rate), group in runs.items():
        for seed, run in enumerate(group):
            about = {"optimizer": name, "learning_rate": rate, "seed": seed}
            for row in zip(*run, strict=True):
                rows.append(about | dict(zip(History._fields, map(float, row), strict=True)))
    write_rows(path, rows)


def _summary(runs: Runs) -> list[dict[str, Any]]:
    best = best_rates(runs)
    return [
        {
            "optimizer": name,
            "learning_rate": rate,
            "best": best[name] == rate,
            # JSON knows no infinity
            "errors": [float(e) if np.isfinite(e := run.error[-1]) else None for run in group],
            "steps": int(group[0].steps[-1]),
            "seconds": [float(run.seconds[-1]) for run in group],
        }
        for (name, rate), group in runs.items()
    ]
