"""Command line: solves a partial differential equation by a physics-informed network with every
optimizer, over seeds and rates, then prints a table and draws a figure.

python -m kfac_optax.experiments.physics --config=configs/poisson.py
"""

import csv
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kfac_optax.experiments import (
    command_line,
    data,
    equations,
    estimate,
    pinn,
    plots,
    results,
    tables,
)
from kfac_optax.experiments.pinn import METHODS, History
from kfac_optax.experiments.results import write_json

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


class Job(NamedTuple):
    """One run."""

    name: str
    rate: float
    seed: int


def experiment(config: ml_collections.ConfigDict, out: Path, console: Console) -> None:
    """Trains with every optimizer at every rate with every seed, then reports."""
    report(config, out, console, compare(config, console))


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises a `ValueError` for settings that no comparison can be made of."""
    for name in ("seeds", "inside_points", "boundary_points", "test_points", "report_every"):
        if not config[name] > 0:
            # everything is checked before anything is trained
            raise ValueError(f"config.{name}: got {config[name]}, expected a positive number")
    data.select(equations.EQUATIONS, config.equation, "config.equation")
    for name, rates in config.grid.items():
        method = data.select(METHODS, name, "config.grid")
        if any(rate <= 0 for rate in rates):
            raise ValueError(f"config.grid.{name}: got {rates}, expected positive learning rates")
        # rows are at the ends of equal stretches
        if rates and config.steps[name] % config.report_every:
            raise ValueError(
                f"config.steps.{name}: got {config.steps[name]}, expected a multiple of "
                f"report_every = {config.report_every}"
            )
        if rates and method.coupled and config.inside_points != config.boundary_points:
            raise ValueError(
                f"config.grid.{name}: a coupling pairs the examples of both equations; expected as "
                f"many boundary_points ({config.boundary_points}) as inside_points "
                f"({config.inside_points}), or (), which leaves the optimizer out"
            )
    # an empty tuple leaves an optimizer out
    if not any(config.grid.values()):
        raise ValueError("config.grid: got no rates, expected some for at least one optimizer")


def jobs_of(config: ml_collections.ConfigDict) -> list[Job]:
    """All runs, those of one optimizer one after another."""
    return [
        Job(name, rate, seed)
        for name, rates in config.grid.items()
        for rate in rates
        for seed in range(config.seeds)
    ]


def compare(config: ml_collections.ConfigDict, console: Console) -> Runs:
    """Trains with every optimizer at every rate with every seed, one run at a time.

    Raises:
        ValueError: the settings make no comparison.
    """
    validate(config)
    # a bar in steps, since runs are of different lengths
    jobs, began = jobs_of(config), time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    progress = Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    total = sum(config.steps[job.name] for job in jobs)
    bar = progress.add_task("compiling", total=total)
    runs: dict[tuple[str, float], list[History]] = {}
    # second derivatives of the network lose digits in single precision
    with progress, jax.enable_x64(config.float64):
        for done, (job, run) in enumerate(
            _train(config, jobs, lambda steps: progress.update(bar, advance=steps)), start=1
        ):
            group = runs.setdefault((job.name, job.rate), [])
            group.append(run)
            progress.update(bar, description=METHODS[job.name].label)
            # a line for all seeds of a rate
            if not console.is_terminal and job.seed == config.seeds - 1:
                left = (time.perf_counter() - began) / done * (len(jobs) - done)
                _say(console, config, job, group, left)
    return runs


def _train(
    config: ml_collections.ConfigDict, jobs: Sequence[Job], tick: Callable[[int], None]
) -> Iterator[tuple[Job, History]]:
    trainers: dict[str, pinn.Trainer] = {}
    for job in jobs:
        # one program for all rates and seeds of an optimizer
        if job.name not in trainers:
            trainers = {job.name: pinn.prepare(config, job.name)}  # the others are done
        yield job, pinn.train(config, job.name, trainers[job.name], job.rate, job.seed, tick)


def _say(
    console: Console,
    config: ml_collections.ConfigDict,
    job: Job,
    group: Sequence[History],
    left: float,
) -> None:
    errors = [run.error[-1] for run in group]
    text = f"{METHODS[job.name].label}{_rate_words(job.name, job.rate)}: {median_worst(errors)}"
    rest = f", about {estimate.words(left)} left" if left else ""
    console.print(f"{text} after {config.steps[job.name]:,} steps{rest}", highlight=False)


def _rate_words(name: str, rate: float) -> str:
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
        label = METHODS[name].label + _rate_words(name, rate)
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
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("optimizer", "learning_rate", "seed", *History._fields))
        for (name, rate), group in runs.items():
            for seed, run in enumerate(group):
                for row in zip(*run, strict=True):
                    # seven digits, as single precision has
                    writer.writerow((name, rate, seed, *(f"{x:.7g}" for x in row)))


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


if __name__ == "__main__":
    command_line.run(experiment)
