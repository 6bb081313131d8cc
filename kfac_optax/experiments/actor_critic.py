"""Command line: trains actor-critics with every optimizer over seeds and rates, then prints a table
and draws a figure.

python -m kfac_optax.experiments.actor_critic --config=configs/cartpole_acktr.py
"""

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from kfac_optax.experiments import a2c, command_line, data, plots, results, tables
from kfac_optax.experiments.results import interval, write_json, write_rows

# the colours of the other figures
_STYLES = {
    "acktr": plots.STYLES["kfac"],
    "adam": plots.STYLES["adam"],
    "rmsprop": plots.STYLES["sgd"],
}


class Run(NamedTuple):
    """A finished run: a curve of `[points]`, and the time of all of it without compilation."""

    seed: int
    returns: np.ndarray  # mean over the episodes that ended in each part of the run
    episodes: np.ndarray
    seconds: float


Runs = Mapping[tuple[str, float], Sequence[Run]]  # by optimizer and learning rate, one per seed


def experiment(config: ml_collections.ConfigDict, out: Path, console: Console) -> None:
    """Trains every optimizer at every rate with every seed, then reports."""
    report(config, out, console, compare(config, console))


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises a `ValueError` for settings that no comparison can be made of."""
    for name in ("seeds", "environments", "rollout", "points", "steps"):
        if not config[name] > 0:
            raise ValueError(f"config.{name}: got {config[name]}, expected a positive number")
    for name, rates in config.grid.items():
        data.select(a2c.METHODS, name, "config.grid")
        if any(rate <= 0 for rate in rates):
            raise ValueError(f"config.grid.{name}: got {rates}, expected positive learning rates")
    if not any(config.grid.values()):
        raise ValueError("config.grid: got no rates, expected some for at least one optimizer")
    # a point is a whole number of updates
    per_point = config.environments * config.rollout * config.points
    if config.steps % per_point:
        raise ValueError(
            f"config.steps: got {config.steps}, expected a multiple of environments * rollout * "
            f"points = {per_point}"
        )


def compare(config: ml_collections.ConfigDict, console: Console) -> Runs:
    """Trains every optimizer at every rate of its grid with every seed, one run at a time.

    Raises:
        ValueError: the settings make no comparison.
    """
    validate(config)
    # runs, not steps: all have the same length
    count = config.seeds * sum(map(len, config.grid.values()))
    progress = command_line.runs_bar(console)
    bar = progress.add_task("compiling", total=count)
    runs: dict[tuple[str, float], list[Run]] = {}
    with progress:
        for name, rate, run in _train(config):
            runs.setdefault((name, rate), []).append(run)
            progress.update(bar, advance=1, description=a2c.METHODS[name].label)
            # a line for all seeds of a rate
            if not console.is_terminal and run.seed == config.seeds - 1:
                mean = tables.mean_and_interval([r.returns[-1] for r in runs[name, rate]], ".0f")
                console.print(
                    f"{a2c.METHODS[name].label}, rate {rate:g}: return {mean} in the end",
                    highlight=False,
                )
    return runs


def _train(config: ml_collections.ConfigDict) -> Iterator[tuple[str, float, Run]]:
    for name, rates in config.grid.items():
        if not rates:  # left out
            continue
        train = jax.jit(functools.partial(a2c.train, config, a2c.METHODS[name]))
        train = train.lower(
            jnp.float32(1), jax.random.key(0)
        ).compile()  # one program for all rates and seeds
        for rate in rates:
            for seed in range(config.seeds):
                arguments = jnp.float32(rate), jax.random.key(config.first_seed + seed)
                began = time.perf_counter()
                log = jax.block_until_ready(train(*arguments))
                seconds = time.perf_counter() - began
                # episodes and their returns, added up over the updates of a point
                total, episodes = (
                    np.asarray(x, float).reshape(config.points, -1).sum(1) for x in log[:2]
                )
                # no episode ended: no return, rather than none
                returns = np.divide(
                    total, episodes, out=np.full_like(total, np.nan), where=episodes > 0
                )
                yield name, rate, Run(seed, returns, episodes, seconds)


def best_rates(runs: Runs) -> dict[str, float]:
    """Per optimizer the rate of the highest return, averaged over the whole run and the seeds."""
    return results.best_rates(
        # the highest return is the lowest cost
        {
            key: -float(np.mean([np.nanmean(run.returns) for run in group]))
            for key, group in runs.items()
        }
    )


def env_steps(config: ml_collections.ConfigDict) -> np.ndarray:
    """Environment steps at the end of every part of a run, `[points]`."""
    # steps of all environments together
    return config.steps // config.points * np.arange(1, config.points + 1)


def report(config: ml_collections.ConfigDict, out: Path, console: Console, runs: Runs) -> None:
    """Prints the table; writes curves.csv, summary.csv, summary.json and returns.png."""
    out.mkdir(parents=True, exist_ok=True)
    rows = _summary(config, runs)
    write_rows(out / "curves.csv", _curves(config, runs))
    write_rows(out / "summary.csv", rows)
    # settings beside results, so that a file explains itself
    settings = {k: v for k, v in config.to_dict().items() if k != "out"}
    device = jax.devices()[0].device_kind
    write_json(
        out / "summary.json",
        {
            "settings": settings,
            "device": device,
            "jax": jax.__version__,
            "summary": results.without_nan(rows),
        },
    )
    draw(out / "returns.png", config, runs)
    console.print(table(config, runs))
    console.print(f"{out}: curves.csv, summary.csv, summary.json, returns.png", soft_wrap=True)


def table(config: ml_collections.ConfigDict, runs: Runs) -> Table:
    """Return of every optimizer at its best rate, at several numbers of environment steps."""
    shown = _shown(config)
    # columns at some parts of the run
    headings = [f"{env_steps(config)[i]:,} steps" for i in shown]
    made = tables.blank(
        f"{config.title}: return of an episode",
        ("rate", *headings, "s/run"),
        f"Mean ± 95 % interval (Student t) over {config.seeds} seeds of the episodes that ended "
        f"in the last {config.steps // config.points:,} steps, at most 500. Best rate: highest "
        "mean return over the whole run. *: an edge of the grid. s/run: without compilation, one "
        "run at a time.",
    )
    for name, rate in best_rates(runs).items():
        group, rates = runs[name, rate], config.grid[name]
        # a better rate may lie beyond the edge
        edge = "*" if len(rates) > 1 and rate in (min(rates), max(rates)) else ""
        cells = [tables.mean_and_interval([run.returns[i] for run in group], ".0f") for i in shown]
        seconds = tables.mean_and_interval([run.seconds for run in group], ".1f")
        made.add_row(a2c.METHODS[name].label, f"{rate:g}{edge}", *cells, seconds)
    return made


def _shown(config: ml_collections.ConfigDict) -> list[int]:
    return [max(0, round(part * config.points) - 1) for part in config.shown]


def draw(path: Path, config: ml_collections.ConfigDict, runs: Runs) -> None:
    """Return against environment steps and against seconds, every optimizer at its best rate."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, rate in best_rates(runs).items():
        group, (color, dashes) = runs[name, rate], _STYLES[name]
        # [points, seeds], and an interval at each point
        curves = np.transpose([run.returns for run in group])
        mean, half = np.transpose([interval(row) for row in curves])
        steps = env_steps(config)
        # runs of one length: seconds in proportion to steps
        seconds = np.mean([run.seconds for run in group]) * steps / config.steps
        for axes, x in ((left, steps), (right, seconds)):
            label = f"{a2c.METHODS[name].label}, rate {rate:g}"
            axes.plot(x, mean, color=color, linestyle=dashes, linewidth=1.8, label=label)
            if len(group) > 1:
                axes.fill_between(
                    x,
                    mean - half,
                    # an episode ends after 500 steps
                    np.minimum(mean + half, 500),
                    color=color,
                    alpha=0.15,
                    linewidth=0,
                )
    for axes, label in (
        (left, "environment steps"),
        (right, "training time (s), compilation left out"),
    ):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    left.set(ylabel="return of an episode", ylim=(0, 510))
    plots.legend_below(figure, left)
    figure.suptitle(
        f"{config.title}, best rate of each, mean and 95 % band of {config.seeds} runs", fontsize=11
    )
    figure.savefig(path, dpi=150)


def _curves(config: ml_collections.ConfigDict, runs: Runs) -> list[dict[str, Any]]:
    rows = []
    for (name, rate), group in runs.items():
        for run in group:
            for i, steps in enumerate(env_steps(config)):
                # the time of a point as a part of the run's
                seconds = run.seconds * steps / config.steps
                row = {
                    "optimizer": name,
                    "learning_rate": rate,
                    "seed": run.seed,
                    "env_steps": int(steps),
                }
                rows.append(
                    row
                    | {
                        "seconds": seconds,
                        "return": run.returns[i],
                        "episodes": int(run.episodes[i]),
                    }
                )
    return rows


def _summary(config: ml_collections.ConfigDict, runs: Runs) -> list[dict[str, Any]]:
    best, rows = best_rates(runs), []
    for (name, rate), group in runs.items():
        row = {
            "optimizer": name,
            "learning_rate": rate,
            "best": best[name] == rate,
            "seeds": len(group),
        }
        for i in _shown(config):
            column = f"return_{env_steps(config)[i]}"
            row[column], row[f"{column}_ci95"] = interval([run.returns[i] for run in group])
        # mean over the run and then over seeds
        row["return_mean"], row["return_mean_ci95"] = interval(
            [float(np.nanmean(run.returns)) for run in group]
        )
        row["seconds"], row["seconds_ci95"] = interval([run.seconds for run in group])
        rows.append(row)
    return rows


if __name__ == "__main__":
    command_line.run(experiment)
