"""Command line: the runs of several comparisons in one table and one figure.

    python -m kfac_optax.experiments.race results/family_digits results/family_cnn --epochs=10

Trains nothing: it reads what `python -m kfac_optax.experiments.compare` left in these folders,
finished or not, and writes race.csv, race.md and race.png. `--trace` adds the bytes of states to
runs whose records do not have them. `--timing` takes the seconds of a step from other runs of the
same problems, one folder for each: runs that were made one after the other on a quiet machine.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from kfac_optax.experiments import folder, plots, results, standings, stored, tables
from kfac_optax.experiments.compared import OF_OPTAX
from kfac_optax.experiments.optimizers import OPTIMIZERS
from kfac_optax.experiments.standings import Loss, Row, Standing

_COSTS = ("step / SGD", "state / parameters", "compile s")
_NOTE = (
    "Mean training loss over the seeds, each method at its best rate, and its rank in brackets. "
    "*: that rate is an edge of the grid; ~: a run was over by then and counts with its last loss; "
    "!: a seed diverged; -: not there yet, or not recorded. Costs: geometric means over the "
    "problems. Rows by mean rank in the end."
)


def label(name: str) -> str:
    """Name of a method in tables; its key where it is not known any more."""
    return OPTIMIZERS[name].label if name in OPTIMIZERS else name


def headings(found: Sequence[Standing]) -> list[str]:
    """Columns of the table, besides that of the methods."""
    of_problems = [
        f"{one.problem.name} {when}"
        for one in found
        for when in (f"{one.seconds:.3g} s", f"{one.epochs:.3g} ep", "end")
    ]
    return [*of_problems, "mean rank", *_COSTS]


def cells(found: Sequence[Standing]) -> dict[str, list[str]]:
    """Cells of every method, those of the lowest mean rank in the end first."""
    ranks = standings.mean_ranks(found, "end")
    by_problem = [{row.optimizer: row for row in one.rows} for one in found]
    rows = {}
    for name in sorted(ranks, key=lambda name: ranks[name]):
        mine = [rows_of.get(name) for rows_of in by_problem]
        losses = [_loss(row, moment) for row in mine for moment in standings.MOMENTS]
        rows[name] = [*losses, f"{ranks[name]:.1f}", *_costs([row for row in mine if row])]
    return rows


def _loss(row: Row | None, moment: str) -> str:
    if row is None or math.isnan(row.losses[moment].mean):
        return "diverged" if row and row.diverged == len(row.group) else "-"
    loss: Loss = row.losses[moment]
    marks = ("*" if row.edge else "") + ("~" if loss.ended else "") + ("!" if row.diverged else "")
    return f"{loss.mean:.4g}{marks} ({loss.rank})"


def _costs(rows: Sequence[Row]) -> list[str]:
    sizes = [
        row.costs.state_bytes / row.costs.parameter_bytes
        for row in rows
        if row.costs.state_bytes is not None and row.costs.parameter_bytes
    ]
    compiling = [row.costs.compile_seconds for row in rows if row.costs.compile_seconds]
    return [_mean([row.over_sgd for row in rows]), _mean(sizes), _mean(compiling)]


def _mean(values: Sequence[float]) -> str:
    # SGD without momentum has no state
    if not values or not np.all(np.isfinite(values)):
        return "-"
    return f"{np.exp(np.mean(np.log(values))):.3g}" if min(values) > 0 else "0"


def verdicts(found: Standing) -> list[str]:
    """Who is ahead on one problem, and where the best of Optax and the best of two levels stand."""
    places = zip(
        standings.MOMENTS,
        (f"after {found.seconds:.3g} s", f"after {found.epochs:.3g} epochs", "in the end"),
        strict=True,
    )
    lines = []
    for moment, words in places:
        order = standings.leaders(found, moment)
        if not order:
            continue
        baselines = [row for row in order if row.optimizer in OF_OPTAX]
        two_level = [row for row in order if "two_level" in row.optimizer]
        named = [
            f"{found.problem.name} {words}: {_named(order[0], moment)}{_margin(order, moment)}"
        ]
        for what, rows in (("of Optax", baselines), ("with two levels", two_level)):
            if rows and rows[0] is not order[0]:
                rank = rows[0].losses[moment].rank
                named.append(f"best {what} {_named(rows[0], moment)}, rank {rank} of {len(order)}")
        lines.append("; ".join(named))
    return lines


def _named(row: Row, moment: str) -> str:
    return f"{label(row.optimizer)} {row.losses[moment].mean:.4g}"


def _margin(order: Sequence[Row], moment: str) -> str:
    """The second, and whether every seed of the first is below every seed of it."""
    if len(order) < 2:
        return ""
    first, second = (row.losses[moment].seeds for row in order[:2])
    note = ""
    # of a single seed there is nothing to say
    if min(len(first), len(second)) > 1:
        note = ", on every seed" if max(first) < min(second) else ", seeds overlap"
    level = order[0].losses[moment].rank == order[1].losses[moment].rank
    return f", {'level with' if level else 'then'} {_named(order[1], moment)}{note}"


def _details(found: Standing) -> list[dict[str, Any]]:
    rows = []
    for row in found.rows:
        cell: dict[str, Any] = {"problem": found.problem.name, "optimizer": row.optimizer}
        cell |= {"learning_rate": row.rate, "edge_of_grid": row.edge}
        cell |= {"seeds": len(row.group), "diverged": row.diverged}
        at = {"seconds": found.seconds, "epochs": found.epochs}
        for moment, loss in row.losses.items():
            cell |= {f"at_{moment}": at[moment]} if moment in at else {}
            cell |= {f"train_loss_{moment}": loss.mean, f"ci95_{moment}": loss.half}
            cell |= {f"rank_{moment}": loss.rank, f"ended_{moment}": loss.ended}
        cell |= {"worst_seed": results.worst(row.group), "ms_per_step": row.ms_per_step}
        rows.append(cell | {"step_over_sgd": row.over_sgd} | row.costs._asdict())
    return rows


def _markdown(found: Sequence[Standing], rows: Mapping[str, Sequence[str]]) -> str:
    columns = ["method", *headings(found)]
    lines = [columns, ["---"] * len(columns), *([label(name), *rows[name]] for name in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    ahead = "\n".join(f"- {line}" for one in found for line in verdicts(one))
    return f"{table}\n\n{_NOTE}\n\n{ahead}\n"


def _draw(path: Path, found: Sequence[Standing]) -> None:
    """Loss at equal seconds against the bytes of the state, one panel for every problem."""
    figure = Figure(figsize=(6.4 * len(found), 5.2), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, one in zip(panels, found, strict=True):
        for row in one.rows:
            _point(axes, row)
        axes.set(xscale="log", yscale="log", xlabel="bytes of the optimizer's state")
        axes.set_title(f"{one.problem.name}, {one.seconds:.3g} s")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("training loss at equal seconds")
    figure.savefig(path, dpi=150)


def _point(axes: Axes, row: Row) -> None:
    loss, size = row.losses["seconds"].mean, row.costs.state_bytes
    # nothing to show of what is not known; a logarithmic axis has no zero
    if not size or not math.isfinite(loss) or loss <= 0:
        return
    color, _ = plots.style(row.optimizer) if row.optimizer in OPTIMIZERS else ("#000000", "-")
    marker = "s" if row.optimizer in OF_OPTAX else "o"
    axes.plot(size, loss, marker, color=color, markersize=4)
    where = {"xytext": (3, 2), "textcoords": "offset points"}
    axes.annotate(label(row.optimizer), (size, loss), fontsize=6, **where)


def race(found: Sequence[Standing], out: Path, console: Console) -> None:
    """Prints the table and who is ahead; writes race.csv, race.md and race.png to `out`."""
    rows = cells(found)
    table = tables.blank("All methods of the race", headings(found), _NOTE)
    for name, line in rows.items():
        table.add_row(label(name), *line)
    console.print(table)
    for one in found:
        for line in verdicts(one):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    details = [cell for one in found for cell in _details(one)]
    results.write_rows(out / "race.csv", details)
    with folder.replacing(out / "race.md") as file:
        file.write(_markdown(found, rows))
    _draw(out / "race.png", found)
    console.print(f"{out}: race.csv, race.md, race.png", soft_wrap=True)


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("kfac_optax.experiments.race", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", nargs="+", type=Path, help="of results, with runs/ in them")
    parser.add_argument("--seconds", type=float, help="of training to compare at; default: budget")
    parser.add_argument("--epochs", type=float, default=10.0, help="to compare at; default: 10")
    parser.add_argument("--timing", nargs="+", type=Path, default=[], help="folders of timed runs")
    parser.add_argument("--out", type=Path, default=Path("results/race"), help="folder to write to")
    parser.add_argument("--trace", action="store_true", help="find missing bytes by tracing")
    given = parser.parse_args(words)
    for name in ("seconds", "epochs"):
        value = getattr(given, name)
        if value is not None and not value > 0:
            parser.error(f"--{name}: got {value}, expected a positive number")
    if given.timing and len(given.timing) != len(given.folders):
        parser.error(
            f"--timing: got {len(given.timing)} folders, expected one for each of the "
            f"{len(given.folders)} that are compared"
        )
    names = [path.resolve().name for path in given.folders]
    if len(set(names)) < len(names):
        parser.error(f"got the folders {', '.join(names)}, expected names that tell them apart")
    return given


def main(words: Sequence[str] | None = None) -> None:
    """Reads the folders, compares, writes."""
    given, console = _options(words), Console()
    if not console.is_terminal:
        console = Console(width=220)
    found = []
    try:
        timing = given.timing or [None] * len(given.folders)
        for path, timed in zip(given.folders, timing, strict=True):
            problem = stored.read(path)
            problem = stored.with_sizes(problem) if given.trace else problem
            problem = stored.with_times(problem, stored.read(timed)) if timed else problem
            found.append(standings.standing(problem, seconds=given.seconds, epochs=given.epochs))
        race(found, given.out, console)
    except folder.Stopped as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
