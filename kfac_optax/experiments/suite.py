"""Command line: several experiments in one table, and where two-level K-FAC ends below K-FAC.

    python -m kfac_optax.experiments.suite --config=configs/suite.py

Run it again to continue: finished runs with the same settings, in `results/suite/<problem>/runs`,
are kept.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_collections
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from kfac_optax.experiments import (
    clock,
    command_line,
    data,
    idx_files,
    plots,
    results,
    sweep,
    tables,
)
from kfac_optax.experiments.optimizers import OPTIMIZERS

# The optimizer that each two-level one adds a coarse correction to, so that a difference is that of
# the correction alone.
FINE = {
    "two_level": "kfac",
    "two_level_exact": "kfac",
    "two_level_galerkin": "kfac",
    "two_level_bounded": "kfac_bounded",
    "two_level_adaptive": "kfac_adaptive",
}


class Pair(NamedTuple):
    """A two-level optimizer beside the one it corrects, on one problem.

    Attributes:
        below: seeds on which it ended at a lower training loss.
        above: seeds on which it ended at a higher one.
        seeds: all of them.
        ratio: of the mean final training losses; NaN where a run diverged.
    """

    below: int
    above: int
    seeds: int
    ratio: float


def experiment_of(config: ml_collections.ConfigDict, problem: str) -> ml_collections.ConfigDict:
    """The settings of one problem: its own, with what the suite decides for all.

    Raises:
        ValueError: the problem is unknown.
    """
    # a problem keeps its model and data; optimizers, seeds and grid are those of the suite
    own = data.select(config.experiments.to_dict(), problem, "config.problems")
    own.update(
        {name: config[name] for name in ("optimizers", "seeds", "tune_seeds", "grid", "workers")},
        tune=True,
    )
    # a folder of data is that of this machine
    if "data_dir" in own:
        own["data_dir"] = own["data"]["data_dir"] = config.data_dir
    changes = {name: dict(values) for name, values in own.get("per_optimizer", {}).items()}
    for name in config.optimizers:
        mine = changes.setdefault(name, {})
        # what finds its rate is not tuned
        mine["grid"] = () if name in config.untuned else config.grid
    return ml_collections.ConfigDict(own | {"per_optimizer": changes})


def suite(config: ml_collections.ConfigDict, out: Path, console: Console) -> None:
    """Trains whatever is not finished yet, problem by problem, then reports."""
    chosen = {name: experiment_of(config, name) for name in config.problems}
    # problems whose files are not there
    missing = [name for name, one in chosen.items() if "data_dir" in one and not one.data_dir]
    if missing:
        console.print(
            f"left out, they need the files of Fashion-MNIST: {', '.join(missing)}. Pass "
            "--config.data_dir=DIR with them (Debian package dataset-fashion-mnist)."
        )
    chosen = {name: one for name, one in chosen.items() if name not in missing}
    if not chosen:
        raise ValueError(
            f"config.problems: got {config.problems}, expected at least one that can be trained"
        )
    for one in chosen.values():  # before anything is trained
        sweep.validate(one)
        if "data_dir" in one:
            idx_files.find(Path(one.data_dir), idx_files.FILES[0])
    # an interruption ends in words, as runs are kept
    with command_line.ends_in_words(console, "suite"):
        runs = {name: sweep.sweep(one, out / name, console) for name, one in chosen.items()}
        report(chosen, runs, out, console)


def report(
    experiments: Mapping[str, ml_collections.ConfigDict],
    runs: Mapping[str, results.Runs],
    out: Path,
    console: Console,
) -> None:
    """Prints the tables and the verdict; writes suite.csv and suite.png."""
    # the best rate of each optimizer on each problem
    best = {name: results.best_runs(found) for name, found in runs.items()}
    targets = {name: one.targets[0] for name, one in experiments.items()}
    console.print(_losses(best))
    console.print(_costs(best, targets))
    for name in FINE:
        _print_pairs(name, best, console)
    _write_csv(out / "suite.csv", best, targets)
    _draw(out / "suite.png", best)
    console.print(f"{out}: suite.csv, suite.png", soft_wrap=True)


def pair(best: results.Runs, two_level: str) -> Pair | None:
    """Compares final losses seed by seed; a run that diverged ends above all others. None where
    either is missing.
    """
    groups = {name: group for (name, _), group in best.items()}
    if two_level not in groups or FINE[two_level] not in groups:
        return None
    # a pair has the same seed, hence the same data and start
    ours, theirs = (_finals(groups[name]) for name in (two_level, FINE[two_level]))
    pairs = list(zip(ours, theirs, strict=True))
    # a ratio with a run that diverged is none
    finite = all(map(math.isfinite, ours + theirs))
    return Pair(
        below=sum(a < b for a, b in pairs),
        above=sum(a > b for a, b in pairs),
        seeds=len(pairs),
        ratio=sum(ours) / sum(theirs) if finite else math.nan,
    )


def _finals(group: Sequence[results.Run]) -> list[float]:
    # above all others
    return [math.inf if run.diverged else float(run.history["train_loss"][-1]) for run in group]


def _losses(best: Mapping[str, results.Runs]) -> Table:
    table = tables.blank(
        "Mean final training loss (worst seed)", tuple(best), "Each at its best learning rate."
    )
    _rows(
        table,
        {
            name: {key[0]: _loss(group) for key, group in found.items()}
            for name, found in best.items()
        },
    )
    return table


def _loss(group: Sequence[results.Run]) -> str:
    kept = results.finals(group, "train_loss")
    if not kept:
        return "diverged"
    # the worst seed, or how many diverged
    note = (
        f"{max(kept):.4g}"
        if len(kept) == len(group)
        else f"{len(group) - len(kept)} of {len(group)} diverged"
    )
    return f"{sum(kept) / len(kept):.4g} ({note})"


def _costs(best: Mapping[str, results.Runs], targets: Mapping[str, float]) -> Table:
    headings = tuple(f"{name}\nto {target:g}" for name, target in targets.items())
    caption = "Best rate; mean epochs and training seconds to a training loss, over the seeds that reached it."
    cells = {}
    for name, found in best.items():
        cells[name] = {key[0]: _cost(key, group, targets[name]) for key, group in found.items()}
    table = tables.blank("Best rate, and cost of a training loss", headings, caption)
    _rows(table, cells)
    return table


def _cost(key: tuple[str, float], group: Sequence[results.Run], target: float) -> str:
    # what finds its rate has none to name
    rate = f"{key[1]:g}" if OPTIMIZERS[key[0]].tuned else "own"
    epochs, seconds = results.cost_of(group, target)
    share = f"({len(epochs)}/{len(group)})"
    if not epochs:
        return f"{rate}\n- {share}"
    return f"{rate}\n{sum(epochs) / len(epochs):.1f} ep {sum(seconds) / len(seconds):.2g} s {share}"


def _rows(table: Table, cells: Mapping[str, Mapping[str, str]]) -> None:
    # optimizers in rows, problems in columns
    for name in next(iter(cells.values())):
        table.add_row(OPTIMIZERS[name].label, *(column[name] for column in cells.values()))


def _print_pairs(two_level: str, best: Mapping[str, results.Runs], console: Console) -> None:
    pairs = {
        name: one for name, found in best.items() if (one := pair(found, two_level)) is not None
    }
    if not pairs:
        return
    label, other = OPTIMIZERS[two_level].label, OPTIMIZERS[FINE[two_level]].label
    console.print(f"{label} against {other}, final training loss", highlight=False)
    for name, one in pairs.items():
        words = (
            f"  {name}: below on {one.below} of {one.seeds} seeds, ratio of means {one.ratio:.3g}"
        )
        console.print(words, highlight=False)
    # problems on which every seed agrees
    better = sum(one.below == one.seeds for one in pairs.values())
    worse = sum(one.above == one.seeds for one in pairs.values())
    console.print(
        f"  better on {better} of {len(pairs)} problems, worse on {worse} (better, worse: on every "
        "seed)",
        highlight=False,
    )


def _write_csv(path: Path, best: Mapping[str, results.Runs], targets: Mapping[str, float]) -> None:
    rows = []
    for problem, found in best.items():
        for (name, rate), group in found.items():
            epochs, seconds = results.cost_of(group, targets[problem])
            kept = results.finals(group, "train_loss")
            row = {
                "problem": problem,
                "optimizer": name,
                "learning_rate": rate,
                "seeds": len(group),
            }
            row |= {"diverged": len(group) - len(kept), "train_loss": results.interval(kept)[0]}
            row |= {
                "worst_seed": max(kept, default=math.nan),
                "target": targets[problem],
                "reached": len(epochs),
            }
            row |= {"epochs": results.interval(epochs)[0], "seconds": results.interval(seconds)[0]}
            # empty cells for what is no pair
            one = pair(found, name) if name in FINE else None
            row |= {
                "seeds_below": one.below if one else "",
                "ratio_of_means": one.ratio if one else "",
            }
            rows.append(row)
    results.write_rows(path, rows)


def _draw(path: Path, best: Mapping[str, results.Runs]) -> None:
    figure = Figure(figsize=(4.2 * len(best), 4.4), layout="constrained")
    panels = figure.subplots(1, len(best), squeeze=False)[0]
    for axes, (problem, found) in zip(panels, best.items(), strict=True):
        for (name, _), group in found.items():
            color, dashes = plots.style(name)
            # in the legend also where all seeds diverged
            (line,) = axes.plot([], [], color=color, linestyle=dashes, label=OPTIMIZERS[name].label)
            kept = [run for run in group if not run.diverged]
            if not kept:
                continue
            epochs, values = clock.by_epoch(kept, "train_loss")
            # thin seeds, their mean thick
            axes.plot(epochs, values.T, color=line.get_color(), linewidth=0.5, alpha=0.6)
            axes.plot(epochs, values.mean(0), color=line.get_color(), linestyle=dashes, linewidth=2)
        axes.set(title=problem, xlabel="epoch", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("training loss")
    plots.legend_below(figure, panels[0])
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    command_line.run(suite)
