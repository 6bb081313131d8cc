"""All runs of a comparison: several at once, each kept on disk as soon as it is finished."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kfac_optax.experiments import (
    batch_statistics,
    data,
    estimate,
    folder,
    optimizers,
    results,
    settings,
    workers,
)
from kfac_optax.experiments.results import Job, Run

_SILENCE = 60.0  # seconds after which a log gets a line although no run has ended


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises a `ValueError` for settings that no sweep can be made of."""
    for name in ("seeds", "epochs", "batch_size", "workers", "learning_rate"):
        if not config[name] > 0:
            raise ValueError(f"config.{name}: got {config[name]}, expected a positive number")
    if config.batch_size > config.data.train:
        raise ValueError(
            f"config.batch_size: got {config.batch_size}, expected at most the {config.data.train} "
            "training examples"
        )
    # how test batches are normalised
    batch_statistics.check(config.get("evaluate_with") or "fresh")
    if not config.optimizers:
        raise ValueError("config.optimizers: got none, expected at least one")
    for name in config.optimizers:
        data.select(optimizers.OPTIMIZERS, name, "config.optimizers")
    for name in config.get("per_optimizer") or ():
        data.select(optimizers.OPTIMIZERS, name, "config.per_optimizer")
        settings.of(config, name)
    # of the grid, and what single optimizers have instead
    for rate in (
        *config.grid,
        *(rate for name in config.optimizers for rate in _rates(config, name)),
    ):
        if not rate > 0:
            raise ValueError(f"config.grid: got {rate}, expected positive learning rates")
    for name in ("report_every", "evaluate_every", "budget_seconds", "tune_seeds"):
        if (config.get(name) or 0) < 0:
            raise ValueError(
                f"config.{name}: got {config[name]}, expected a positive number, or 0 for none"
            )


def plan(config: ml_collections.ConfigDict) -> list[Job]:
    """The runs of a sweep, those at the rates of the configuration first.

    The rate of the configuration has all seeds. With `config.tune_seeds` the other rates have only
    that many here; `further` adds the others where one of these rates is the best.
    """
    names = dict.fromkeys(config.optimizers)
    # the rate of the configuration first, so that a first table comes early
    rates = {name: _rates(config, name) for name in names}
    pairs = [(name, rates[name][0]) for name in names] + [
        (name, rate) for name in names for rate in rates[name][1:]
    ]
    return [
        Job(name, rate, seed)
        for name, rate in pairs
        for seed in range(_first_seeds(config, name, rate))
    ]


def further(config: ml_collections.ConfigDict, runs: results.Runs) -> list[Job]:
    """The remaining seeds of every optimizer, at the rate that was best with the first ones."""
    # best over the seeds that every rate has
    best = {name: results.best_rate(runs, name) for name in results.names(runs)}
    return [
        Job(name, rate, seed)
        for name, rate in best.items()
        for seed in range(_first_seeds(config, name, rate), config.seeds)
    ]


def _most_further(config: ml_collections.ConfigDict) -> int:
    """How many runs `further` can add: of every optimizer that has several rates."""
    # a single rate needs no choice, hence no more runs
    names = dict.fromkeys(config.optimizers)
    several = [name for name in names if len(_rates(config, name)) > 1]
    return len(several) * (
        config.seeds - min(config.get("tune_seeds") or config.seeds, config.seeds)
    )


def _rates(config: ml_collections.ConfigDict, name: str) -> list[float]:
    return settings.rates(config, name, tuned=optimizers.OPTIMIZERS[name].tuned)


def _first_seeds(config: ml_collections.ConfigDict, name: str, rate: float) -> int:
    # the rate that the configuration gives gets all seeds
    given = rate == _rates(config, name)[0]
    # With fewer seeds than that, every rate has all of them: `--config.seeds=1` needs no second
    # flag.
    return config.seeds if given else min(config.get("tune_seeds") or config.seeds, config.seeds)


def sweep(config: ml_collections.ConfigDict, out: Path, console: Console) -> results.Runs:
    """Trains what is not yet on disk, then reads all runs of the sweep.

    Args:
        config: the experiment.
        out: directory of the results.
        console: shows the progress, as a bar or as one line per run where there is no terminal.

    Returns:
        The runs by optimizer and learning rate.

    Raises:
        ValueError: the settings make no sweep.
        Stopped: another sweep is using the directory, it cannot be written to, or runs failed.
    """
    validate(config)
    # one process at a time writes into a folder
    with folder.claimed(out):
        return _sweep(config, out, console)


def _sweep(config: ml_collections.ConfigDict, out: Path, console: Console) -> results.Runs:
    # first a few seeds at every rate, then all of them at the best ones
    runs = _make(config, out, plan(config), console, later=_most_further(config))
    if jobs := further(config, runs):
        console.print("the best rate of each, with the remaining seeds", highlight=False)
        for key, more in _make(config, out, jobs, console).items():
            runs[key] += more
    return runs


def _make(
    config: ml_collections.ConfigDict,
    out: Path,
    jobs: Sequence[Job],
    console: Console,
    later: int = 0,
) -> dict[tuple[str, float], list[Run]]:
    # what is on disk with the same settings is not made again
    pending = [job for job in jobs if _stored(config, out, job) is None]
    console.print(f"{config.name}: {len(jobs)} runs, {len(jobs) - len(pending)} done earlier")
    if pending:
        _train(config, out, pending, console, later)
    runs: dict[tuple[str, float], list[Run]] = {}
    for job in jobs:
        # read from disk also where it was made just now: a report sees what files say
        finished = _stored(config, out, job)
        assert finished is not None, (
            f"{job.name} is not on disk although its training came to an end"
        )
        runs.setdefault((job.optimizer, job.rate), []).append(finished)
    return runs


def _stored(config: ml_collections.ConfigDict, out: Path, job: Job) -> Run | None:
    return results.load(out / "runs" / job.name, results.run_settings(config, job))


def _count(number: int, noun: str = "run") -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _train(
    config: ml_collections.ConfigDict,
    out: Path,
    jobs: Sequence[Job],
    console: Console,
    later: int = 0,
) -> None:
    display = _Display(config, jobs, console, later)
    # workers call back in this process
    with display.progress:
        workers.train_all(config, out, jobs, display.receive)


class _Display:
    """What a terminal or a log is told while runs are made; `later` runs may come after them."""

    def __init__(
        self, config: ml_collections.ConfigDict, jobs: Sequence[Job], console: Console, later: int
    ):
        self.config, self.jobs, self.console, self.later = config, jobs, console, later
        self.total = len(jobs) * config.epochs
        # each is compiled by the process that makes its runs
        self.kinds = len(workers.grouped(jobs, config.workers))
        self.progress = _bar(console)
        self.task = self.progress.add_task("compiling", total=self.total)
        self.pace = estimate.Pace()
        # epochs and runs that are over, and when a log was last told
        self.finished, self.done, self.said = 0.0, 0, time.monotonic()

    def receive(self, event: workers.Event) -> None:
        """Takes notice of an event, and says what is new."""
        # an estimate needs one epoch
        first = not self._left()
        self.progress.update(self.task, advance=event.epochs, description="training")
        self.finished += event.epochs
        self.pace = estimate.observe(
            self.pace,
            epochs=event.epochs,
            seconds=event.seconds,
            preparation=event.preparation,
        )
        if first and self._left():
            many = _count(self.config.workers, "worker")
            plan = f"{_count(len(self.jobs))}, {self._left()} on {many}{self._afterwards()}"
            self.console.print(plan, highlight=False)
        # a log that is silent looks as if the run had stopped
        if time.monotonic() - self.said >= _SILENCE:
            self._log(f"{self.finished:.1f} of {self.total} epochs, {self._left()} left")
        if event.job is not None:
            self.done += 1
            self._log(f"[{self.done}/{len(self.jobs)}] {event.job.name}: {event.outcome}")

    def _log(self, line: str) -> None:
        """A line of a log; a terminal has the bar."""
        if not self.console.is_terminal:
            self.console.print(line, markup=False, highlight=False)
            self.said = time.monotonic()

    def _left(self) -> str:
        """How long these runs will take, nothing before it is known."""
        runs = len(self.jobs) - self.done
        seconds = self._seconds(runs, self.total - self.finished, self.kinds)
        return "" if seconds is None else f"about {estimate.words(seconds)}"

    def _afterwards(self) -> str:
        """What may come after these runs, each optimizer compiled once more."""
        epochs = self.later * self.config.epochs
        seconds = self._seconds(self.later, epochs, self.kinds + self.pace.prepared)
        if not self.later or seconds is None:
            return ""
        words = estimate.words(seconds)
        return f"; then up to {self.later} at the best rates, about {words} more"

    def _seconds(self, runs: int, epochs: float, optimizers: int) -> float | None:
        budget = self.config.get("budget_seconds")
        return estimate.left(
            self.pace,
            epochs=epochs,
            optimizers=optimizers,
            workers=self.config.workers,
            at_most=runs * budget if budget else math.inf,
        )


def _bar(console: Console) -> Progress:
    # on a terminal; a log gets lines instead
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.1f}/{task.total:.0f}"),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
