"""What a sweep leaves on disk, and the statistics made of it."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import logging
from scipy import stats

from kfac_optax.experiments import folder, optimizers, settings, train


class Job(NamedTuple):
    """One training run of a sweep."""

    optimizer: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        return f"{self.optimizer}-lr{self.rate:g}-seed{self.seed}"


class Run(NamedTuple):
    """A finished run: one array `[rows]` for every column of `metrics.csv`."""

    diverged: bool
    steps: int  # mini-batches of an epoch
    history: dict[str, np.ndarray]


Runs = Mapping[tuple[str, float], Sequence[Run]]  # by optimizer and learning rate, one per seed


def run_settings(config: ml_collections.ConfigDict, job: Job) -> dict[str, Any]:
    """All that decides the outcome of a run, as JSON gives it back."""
    # what has no influence is left out, so that it makes no run again
    kind = optimizers.OPTIMIZERS[job.optimizer]
    common = settings.identity(
        config,
        job.optimizer,
        curvature=kind.curvature,
        adaptive=kind.adaptive,
        section=kind.section,
        momentum=kind.momentum,
    )
    return common | {"optimizer": job.optimizer, "learning_rate": job.rate, "seed": job.seed}


def write_json(path: Path, value: Any) -> None:
    """Writes `path` in one move: it holds all of the new content, or what it held before."""
    with folder.replacing(path) as file:
        file.write(json.dumps(value, indent=2) + "\n")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a CSV file with the columns of the first row, in one move."""
    with folder.replacing(path) as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()})


def without_nan(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with None for NaN, which JSON does not have."""
    return [{k: None if v != v else v for k, v in row.items()} for row in rows]


def best_rates(scores: Mapping[tuple[str, float], float]) -> dict[str, float]:
    """Per optimizer the rate with the lowest score; one that is not finite is worse than any.

    >>> best_rates({("adam", 0.1): math.nan, ("adam", 0.01): 2.0, ("sgd", 0.1): math.inf})
    {'adam': 0.01, 'sgd': 0.1}
    """
    # not finite is worse than any
    ranks = {key: x if math.isfinite(x) else math.inf for key, x in scores.items()}
    best: dict[str, float] = {}
    for name, rate in ranks:
        if name not in best or ranks[name, rate] < ranks[name, best[name]]:
            best[name] = rate
    return best


def record(
    directory: Path,
    settings: Mapping[str, Any],
    metrics: Iterable[train.Metrics | train.ErrorMetrics],
    details: Mapping[str, Any],
) -> Run:
    """Writes `metrics.csv` row by row, then `run.json`, whose presence says that the run is whole.

    Args:
        directory: of this run; what an unfinished or different run left there is overwritten.
        settings: from `run_settings`.
        metrics: the rows, as they come.
        details: further entries of `run.json`: `steps_per_epoch`, the environment.

    Returns:
        The run, as `load` reads it.

    Raises:
        Stopped: a file cannot be written.
    """
    marker, path = directory / "run.json", directory / "metrics.csv"
    # marker last, and gone first: a whole run or none
    with folder.writing(path):
        directory.mkdir(parents=True, exist_ok=True)
        marker.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    for i, row in enumerate(metrics):
        # the first row says which columns there are
        if not i:
            _append(path, row._fields)
        _append(path, [f"{value:.7g}" for value in row])
    # the last row decides
    status = "finished" if math.isfinite(row.train_loss) else "diverged"
    # JSON has no NaN
    final = {k: v if math.isfinite(v) else None for k, v in row._asdict().items()}
    write_json(marker, {"settings": settings, "status": status, "final": final, **details})
    run = load(directory, settings)
    assert run is not None
    return run


def _append(path: Path, cells: Sequence[str]) -> None:
    # opened for every row: on a full disk closing fails too
    with folder.writing(path), open(path, "a", newline="") as file:
        csv.writer(file).writerow(cells)


def load(directory: Path, settings: Mapping[str, Any]) -> Run | None:
    """Reads a finished run; None if there is none, one with other settings, or a damaged one."""
    try:
        return _read(directory, settings)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        logging.warning(
            "%s: damaged, the run is made again: %s: %s", directory, type(error).__name__, error
        )
        return None


def _read(directory: Path, settings: Mapping[str, Any]) -> Run | None:
    stored = json.loads((directory / "run.json").read_text())
    # other settings: another run
    if stored["settings"] != settings:
        return None
    with open(directory / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    final = stored["final"]["epoch"]
    # rows after the end, or too few
    if not rows or float(rows[-1]["epoch"]) != float(f"{final:.7g}"):
        raise ValueError(f"metrics.csv has {len(rows)} rows, which do not end at epoch {final}")
    history = {k: np.array([float(row[k]) for row in rows]) for k in rows[0]}
    return Run(stored["status"] == "diverged", stored["steps_per_epoch"], history)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval by Student's t; NaN width for a single value."""
    array = np.asarray(values, float)
    if len(array) < 2:
        return (float(array[0]) if len(array) else math.nan), math.nan
    # s / sqrt(n), and the quantile of n - 1 degrees of freedom
    error = array.std(ddof=1) / math.sqrt(len(array))
    return float(array.mean()), float(stats.t.ppf(0.975, len(array) - 1) * error)


def score(runs: Runs) -> str:
    """What the runs are scored by besides the loss: `accuracy` or `error`."""
    history = next(iter(runs.values()))[0].history
    return "accuracy" if "train_accuracy" in history else "error"


def outcome(run: Run) -> str:
    """How a run ended, in words."""
    last = {column: values[-1] for column, values in run.history.items()}
    words = "diverged" if run.diverged else f"train loss {last['train_loss']:.4f}"
    if "test_accuracy" in last:
        words += f", test accuracy {100 * last['test_accuracy']:.2f} %"
    else:
        words += f", test error {last['test_error']:.5f}"
    return words + f", {run.history['seconds'].sum():.1f} s"


def base_runs(config: ml_collections.ConfigDict, runs: Runs) -> Runs:
    """The runs of every optimizer at the rate that the configuration gives it."""
    return {
        key: group for key, group in runs.items() if key[1] == settings.base_rate(config, key[0])
    }


def best_runs(runs: Runs) -> Runs:
    """The runs of every optimizer at its best rate."""
    best = [(name, best_rate(runs, name)) for name in names(runs)]
    return {key: runs[key] for key in best}


def names(runs: Runs) -> list[str]:
    """The optimizers, in the order of the configuration."""
    return list(dict.fromkeys(name for name, _ in runs))


def finals(runs: Sequence[Run], column: str) -> list[float]:
    """Last value of a column in each run that did not diverge."""
    return [float(run.history[column][-1]) for run in runs if not run.diverged]


def worst(runs: Sequence[Run]) -> float:
    """The largest final training loss; infinite where a run diverged."""
    losses = [math.inf if run.diverged else float(run.history["train_loss"][-1]) for run in runs]
    return max(losses)


def rises(run: Run) -> int:
    """In how many epochs the training loss rose by more than half over that of the epoch before.

    An end in a loss that is not finite counts as a rise.
    """
    loss = run.history["train_loss"]
    calm = loss[1:] <= 1.5 * loss[:-1]  # False for NaN
    return int(np.sum(~calm))


def has_one_row_per_epoch(run: Run) -> bool:
    """Whether the rows of a run are whole epochs."""
    epoch = run.history["epoch"]
    return bool(np.array_equal(epoch, np.arange(1, len(epoch) + 1)))


def ms_per_step(runs: Sequence[Run]) -> list[float]:
    """Mean milliseconds of a training step in each run."""
    # seconds are those since the row before
    seconds = [run.history["seconds"].sum() / steps_of(run)[-1] for run in runs]
    return [float(1e3 * one) for one in seconds]


def steps_of(run: Run) -> np.ndarray:
    """Training steps up to each row."""
    return np.round(run.history["epoch"] * run.steps).astype(int)


def best_rate(runs: Runs, optimizer: str) -> float:
    """The rate of the lowest mean final training loss; one that diverged for a seed comes last.

    Rates are compared by the seeds that all of them were tried with.
    """
    # all rates with as many seeds as the one that has the fewest
    tried = {rate: group for (name, rate), group in runs.items() if name == optimizer}
    seeds = min(map(len, tried.values()))

    def cost(rate: float) -> tuple[bool, float]:
        group = tried[rate][:seeds]
        # a rate that diverged once comes behind all that did not
        return any(run.diverged for run in group), interval(finals(group, "train_loss"))[0]

    return min(tried, key=cost)


def cost_of(runs: Sequence[Run], target: float) -> tuple[list[float], list[float]]:
    """Epochs and training seconds to a training loss of at most `target`, where it was reached."""
    epochs, seconds = [], []
    for run in runs:
        reached = np.flatnonzero(run.history["train_loss"] <= target)
        # the first row at or below the target
        if len(reached):
            epochs.append(float(run.history["epoch"][reached[0]]))
            seconds.append(float(run.history["seconds"][: reached[0] + 1].sum()))
    return epochs, seconds


def write_summary(path: Path, runs: Runs, *, targets: Sequence[float]) -> None:
    """Writes one row per optimizer and rate: means and 95 % half widths over the seeds."""
    kind = score(runs)
    columns = ("train_loss", f"train_{kind}", "test_loss", f"test_{kind}")
    rows = []
    order = names(runs)
    # in the order of the configuration, large rates first
    for name, rate in sorted(runs, key=lambda key: (order.index(key[0]), -key[1])):
        group = runs[name, rate]
        row: dict[str, Any] = {"optimizer": name, "learning_rate": rate, "seeds": len(group)}
        row["diverged"] = sum(run.diverged for run in group)
        for column in columns:
            row[column], row[f"{column}_ci95"] = interval(finals(group, column))
        row["ms_per_step"], row["ms_per_step_ci95"] = interval(ms_per_step(group))
        for target in targets:
            epochs, seconds = cost_of(group, target)
            row[f"reached_{target:g}"] = len(epochs)
            row[f"epochs_to_{target:g}"] = interval(epochs)[0]
            row[f"steps_to_{target:g}"] = interval([epoch * group[0].steps for epoch in epochs])[0]
            row[f"seconds_to_{target:g}"], row[f"seconds_to_{target:g}_ci95"] = interval(seconds)
        rows.append(row)
    write_rows(path, rows)
