"""Command line: finds the ground state of an atom with every optimizer over seeds and rates, then
prints a table and draws a figure.

python -m kfac_optax.experiments.wavefunction --config=configs/helium.py
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

from kfac_optax.experiments import command_line, data, plots, results, tables, vmc
from kfac_optax.experiments.results import interval, write_json, write_rows

BLOCKS = 20  # of the final evaluation; means of them are taken for independent


class Run(NamedTuple):
    """A finished run; energies in hartree."""

    seed: int
    curve: np.ndarray  # [points], mean over each part of the training
    acceptance: np.ndarray  # [points]
    energy: float  # of the final evaluation
    error: float  # its statistical error, one standard deviation
    deviation: float  # standard deviation of local energies; zero for an eigenstate
    seconds: float  # of training, without compilation


Runs = Mapping[tuple[str, float], Sequence[Run]]  # by optimizer and learning rate, one per seed


def experiment(config: ml_collections.ConfigDict, out: Path, console: Console) -> None:
    """Trains with every optimizer at every rate with every seed, then reports."""
    report(config, out, console, compare(config, console))


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises a `ValueError` for settings that no comparison can be made of."""
    positive = ("seeds", "walkers", "steps", "moves", "burn_in", "points", "evaluations", "clip")
    for name in positive:
        if not config[name] > 0:
            raise ValueError(f"config.{name}: got {config[name]}, expected a positive number")
    for name, rates in config.grid.items():
        data.select(vmc.METHODS, name, "config.grid")
        if any(rate <= 0 for rate in rates):
            raise ValueError(f"config.grid.{name}: got {rates}, expected positive learning rates")
    if not any(config.grid.values()):
        raise ValueError("config.grid: got no rates, expected some for at least one optimizer")
    for name, parts in (("steps", config.points), ("evaluations", BLOCKS)):
        if config[name] % parts:
            raise ValueError(
                f"config.{name}: got {config[name]}, expected a multiple of {parts}, the number "
                "of parts it is averaged in"
            )


def compare(config: ml_collections.ConfigDict, console: Console) -> Runs:
    """Trains with every optimizer at every rate of its grid with every seed, one run at a time.

    Raises:
        ValueError: the settings make no comparison.
    """
    validate(config)
    progress = command_line.runs_bar(console)
    count = config.seeds * sum(map(len, config.grid.values()))
    bar = progress.add_task("compiling", total=count)
    runs: dict[tuple[str, float], list[Run]] = {}
    with progress:
        for name, rate, run in _train(config):
            runs.setdefault((name, rate), []).append(run)
            progress.update(bar, advance=1, description=vmc.METHODS[name].label)
            if not console.is_terminal:
                words = f"{vmc.METHODS[name].label}, rate {rate:g}, seed {run.seed}"
                console.print(f"{words}: {run.energy:.6f} ± {run.error:.6f}", highlight=False)
    return runs


def _train(config: ml_collections.ConfigDict) -> Iterator[tuple[str, float, Run]]:
    evaluate = jax.jit(functools.partial(vmc.evaluate, config))
    for name, rates in config.grid.items():
        if not rates:  # left out
            continue
        train = jax.jit(functools.partial(vmc.train, config, vmc.METHODS[name]))
        # one program for all rates and seeds
        train = train.lower(jnp.float32(1), jax.random.key(0)).compile()
        for rate in rates:
            for seed in range(config.seeds):
                key, last_key = jax.random.split(jax.random.key(config.first_seed + seed))
                began = time.perf_counter()
                found = jax.block_until_ready(train(jnp.float32(rate), key))
                seconds = time.perf_counter() - began
                log = evaluate(found.params, found.walkers, last_key)
                yield name, rate, _of_run(config, seed, found.log, log, seconds)


def _of_run(
    config: ml_collections.ConfigDict, seed: int, training: vmc.Log, last: vmc.Log, seconds: float
) -> Run:
    parts = lambda x, count: np.asarray(x, float).reshape(count, -1).mean(1)
    curve, acceptance = (parts(x, config.points) for x in (training.energy, training.acceptance))
    blocks = parts(last.energy, BLOCKS)
    error = float(blocks.std(ddof=1)) / BLOCKS**0.5
    deviation = float(np.sqrt(np.mean(np.square(last.deviation))))
    return Run(seed, curve, acceptance, float(blocks.mean()), error, deviation, seconds)


def best_rates(runs: Runs) -> dict[str, float]:
    """Per optimizer the rate of the lowest final energy, averaged over the seeds."""
    return results.best_rates(
        {key: float(np.mean([run.energy for run in group])) for key, group in runs.items()}
    )


def report(config: ml_collections.ConfigDict, out: Path, console: Console, runs: Runs) -> None:
    """Prints the table; writes curves.csv, summary.csv, summary.json and energy.png."""
    out.mkdir(parents=True, exist_ok=True)
    rows = _summary(runs)
    write_rows(out / "curves.csv", _curves(config, runs))
    write_rows(out / "summary.csv", rows)
    settings = {k: v for k, v in config.to_dict().items() if k != "out"}
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    write_json(
        out / "summary.json", {"settings": settings, **about, "runs": results.without_nan(rows)}
    )
    draw(out / "energy.png", config, runs)
    console.print(table(config, runs))
    console.print(f"{out}: curves.csv, summary.csv, summary.json, energy.png", soft_wrap=True)


def table(config: ml_collections.ConfigDict, runs: Runs) -> Table:
    """Final energies of every optimizer at every rate."""
    headings = ("rate", "energy", "above exact", "worst", "error of a run", "deviation", "s/run")
    made = tables.blank(
        f"{config.title}: energy after {config.steps:,} steps, exact {config.exact}",
        headings,
        f"Hartree; above exact and errors in millihartree. Mean ± 95 % interval (Student t) over "
        f"{config.seeds} seeds of the final evaluation, {config.evaluations:,} rounds of "
        f"{config.walkers} walkers. Error of a run: one standard deviation, from {BLOCKS} blocks. "
        "Deviation: of local energies, zero for an eigenstate. s/run: training, without "
        "compilation, one run at a time. Best rate of each in bold.",
    )
    best = best_rates(runs)
    for (name, rate), group in runs.items():
        energies = np.array([run.energy for run in group])
        above = 1e3 * (energies - config.exact)
        cells = [
            f"{rate:g}",
            f"{energies.mean():.5f}",
            tables.mean_and_interval(list(above), ".2f"),
            f"{above.max():.2f}",
            f"{1e3 * np.mean([run.error for run in group]):.2f}",
            f"{np.mean([run.deviation for run in group]):.3f}",
            tables.mean_and_interval([run.seconds for run in group], ".1f"),
        ]
        style = "bold" if rate == best[name] else None
        made.add_row(vmc.METHODS[name].label, *cells, style=style)
    return made


def draw(path: Path, config: ml_collections.ConfigDict, runs: Runs) -> None:
    """Energy above the exact one against steps and seconds, every optimizer at its best rate."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    steps = config.steps // config.points * np.arange(1, config.points + 1)
    for name, rate in best_rates(runs).items():
        group, (color, dashes) = runs[name, rate], plots.STYLES[name]
        above = 1e3 * np.abs(np.array([run.curve for run in group]) - config.exact)
        seconds = np.mean([run.seconds for run in group]) * steps / config.steps
        for axes, x in zip(panels, (steps, seconds), strict=True):
            label = f"{vmc.METHODS[name].label}, rate {rate:g}"
            axes.plot(x, above.mean(0), color=color, linestyle=dashes, linewidth=2, label=label)
            axes.plot(x, above.T, color=color, alpha=0.35, linewidth=0.6)
    for axes, label in zip(
        panels, ("steps", "training time (s), compilation left out"), strict=True
    ):
        axes.set(xlabel=label, yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("|energy - exact| (millihartree)")
    plots.legend_below(figure, panels[0])
    figure.suptitle(f"{config.title}, best rate of each, runs thin, mean thick", fontsize=11)
    figure.savefig(path, dpi=150)


def _curves(config: ml_collections.ConfigDict, runs: Runs) -> list[dict[str, Any]]:
    rows = []
    for (name, rate), group in runs.items():
        for run in group:
            for i in range(config.points):
                row = {"optimizer": name, "learning_rate": rate, "seed": run.seed}
                row |= {"step": config.steps // config.points * (i + 1), "energy": run.curve[i]}
                rows.append(row | {"acceptance": run.acceptance[i]})
    return rows


def _summary(runs: Runs) -> list[dict[str, Any]]:
    best, rows = best_rates(runs), []
    for (name, rate), group in runs.items():
        mean, half = interval([run.energy for run in group])
        shared = {"optimizer": name, "learning_rate": rate, "best": best[name] == rate}
        for run in group:
            row = {"seed": run.seed, "energy": run.energy, "error": run.error}
            row |= {"deviation": run.deviation, "seconds": run.seconds}
            rows.append(shared | row | {"energy_mean": mean, "energy_ci95": half})
    return rows


if __name__ == "__main__":
    command_line.run(experiment)
