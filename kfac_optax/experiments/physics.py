"""Command line: solves a partial differential equation by a physics-informed network with every
optimizer, over seeds and rates, then prints a table and draws a figure.

python -m kfac_optax.experiments.physics --config=configs/poisson.py
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kfac_optax.experiments import command_line, data, equations, estimate, pinn
from kfac_optax.experiments.physics_report import Runs, median_worst, rate_words, report
from kfac_optax.experiments.pinn import METHODS, History


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
    text = f"{METHODS[job.name].label}{rate_words(job.name, job.rate)}: {median_worst(errors)}"
    rest = f", about {estimate.words(left)} left" if left else ""
    console.print(f"{text} after {config.steps[job.name]:,} steps{rest}", highlight=False)


if __name__ == "__main__":
    command_line.run(experiment)
