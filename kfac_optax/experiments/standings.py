"""Who stands where in a race: losses of all methods at one time, at one epoch and in the end."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kfac_optax.experiments import clock, results
from kfac_optax.experiments.results import Run
from kfac_optax.experiments.stored import Costs, Problem


class Loss(NamedTuple):
    """Training loss of a method at one moment.

    Attributes:
        seeds: of each run that did not diverge; empty where one of these had no row yet.
        mean: over the seeds; NaN without any.
        half: half width of the 95 % interval.
        rank: 1 for the lowest mean; methods of which a seed diverged come behind all others. None
          without a mean.
        ended: whether a run was over before that moment: it counts with its last loss.
    """

    seeds: Sequence[float]
    mean: float
    half: float
    rank: int | None = None
    ended: bool = False


class Row(NamedTuple):
    """One method at its best rate.

    Attributes:
        optimizer: its key in `OPTIMIZERS`.
        rate: the best one, by the final loss.
        edge: whether no rate beyond it was tried on one side, among several.
        group: its runs, one for each seed.
        losses: at each of `MOMENTS`.
        ms_per_step: mean over the seeds.
        over_sgd: step time as a multiple of that of SGD; NaN without SGD.
        costs: compilation and bytes.
    """

    optimizer: str
    rate: float
    edge: bool
    group: Sequence[Run]
    losses: dict[str, Loss]
    ms_per_step: float
    over_sgd: float
    costs: Costs

    @property
    def diverged(self) -> int:
        """How many seeds ended in a loss that is not finite."""
        return sum(run.diverged for run in self.group)


MOMENTS = ("seconds", "epochs", "end")


class Standing(NamedTuple):
    """One problem of a race.

    Attributes:
        problem: what the runs tell of it.
        seconds: of training, at which losses are compared.
        epochs: at which losses are compared as well.
        rows: a row for every method, the lowest final loss first.
    """

    problem: Problem
    seconds: float
    epochs: float
    rows: Sequence[Row]


def standing(problem: Problem, *, seconds: float | None, epochs: float) -> Standing:
    """Compares the methods of a problem, each at the rate of its lowest final loss.

    Args:
        problem: from `stored.read`.
        seconds: of training; None for the budget of its runs or, where they have none, the seconds
          after which half of the methods are through.
        epochs: of training; no more than the runs have.
    """
    best = results.best_runs(problem.runs)
    seconds = _seconds(problem, best) if seconds is None else seconds
    trained = [run.history["epoch"][-1] for group in best.values() for run in group]
    epochs = min(epochs, max(trained))
    sgd = next((_ms(group) for (name, _), group in best.items() if name == "sgd"), math.nan)
    rows = []
    for (name, rate), group in best.items():
        losses = {
            "seconds": _loss(group, clock.elapsed, seconds, goes_on=True),
            # an epoch that a run never had is nothing to compare
            "epochs": _loss(group, _epochs, epochs, goes_on=False),
            "end": _mean(results.finals(group, "train_loss")),
        }
        ms, edge = _ms(group), _is_edge(problem.runs, name, rate)
        rows.append(Row(name, rate, edge, group, losses, ms, ms / sgd, problem.costs[name]))
    rows = sorted(_ranked(rows), key=lambda row: row.losses["end"].rank or len(rows) + 1)
    return Standing(problem, seconds, epochs, rows)


def _seconds(problem: Problem, best: results.Runs) -> float:
    budget = max(own.get("budget_seconds") or 0.0 for own in problem.settings.values())
    totals = [clock.elapsed(run)[-1] for group in best.values() for run in group]
    # methods without a time have NaN
    return budget or float(np.nanmedian(totals))


def _is_edge(runs: results.Runs, optimizer: str, rate: float) -> bool:
    tried = [other for name, other in runs if name == optimizer]
    return len(tried) > 1 and rate in (min(tried), max(tried))


def _epochs(run: Run) -> np.ndarray:
    return run.history["epoch"]


def _ms(group: Sequence[Run]) -> float:
    return float(np.mean(results.ms_per_step(group)))


def _loss(
    group: Sequence[Run], places: Callable[[Run], np.ndarray], place: float, *, goes_on: bool
) -> Loss:
    """The loss where `places`, the seconds or epochs of the rows, reach `place`."""
    kept = [run for run in group if not run.diverged]
    # times are sums of many parts, so rows that are meant to lie there may miss it by rounding
    early = [run for run in kept if places(run)[-1] < place * (1 - 1e-6)]
    reached = all(places(run)[0] <= place for run in kept)
    if not kept or not reached or (early and not goes_on):
        return _mean([])
    # between rows linearly, and beyond the last one constant
    values = [float(np.interp(place, places(run), run.history["train_loss"])) for run in kept]
    return _mean(values)._replace(ended=bool(early))


def _mean(values: Sequence[float]) -> Loss:
    return Loss(values, *results.interval(values))


def _ranked(rows: Sequence[Row]) -> list[Row]:
    places: dict[str, dict[str, int]] = {}
    for moment in MOMENTS:
        there = [row for row in rows if math.isfinite(row.losses[moment].mean)]
        keys = {r.optimizer: (r.diverged > 0, r.losses[moment].mean) for r in there}
        # equal losses share a rank
        order = sorted(keys.values())
        places[moment] = {name: order.index(key) + 1 for name, key in keys.items()}
    ranked = []
    for row in rows:
        losses = {
            moment: loss._replace(rank=places[moment].get(row.optimizer))
            for moment, loss in row.losses.items()
        }
        ranked.append(row._replace(losses=losses))
    return ranked


def leaders(found: Standing, moment: str) -> list[Row]:
    """The methods that have a rank at a moment, the best first."""
    there = [row for row in found.rows if row.losses[moment].rank is not None]
    return sorted(there, key=lambda row: row.losses[moment].rank or 0)


def mean_ranks(found: Sequence[Standing], moment: str) -> Mapping[str, float]:
    """Mean rank over the problems of each method; one without a rank counts as the last."""
    names = dict.fromkeys(row.optimizer for one in found for row in one.rows)
    totals = dict.fromkeys(names, 0.0)
    for one in found:
        ranks = {row.optimizer: row.losses[moment].rank for row in one.rows}
        for name in names:
            totals[name] += ranks.get(name) or len(names)
    return {name: total / len(found) for name, total in totals.items()}
