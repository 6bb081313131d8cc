"""Finished runs of a results folder, read without the configuration that made them."""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from kfac_optax._tree import tree_bytes
from kfac_optax.experiments import results, steps, train
from kfac_optax.experiments.folder import Stopped
from kfac_optax.experiments.results import Job, Runs

# What the runs of one folder have in common: the problem, and what they were given for it.
_SAME = ("data", "model", "likelihood", "inputs", "epochs", "budget_seconds")
# What a step does not get longer by: of timed runs a few epochs are enough, at any rate.
_UNTIMED = {"epochs", "budget_seconds", "learning_rate", "schedule", "seed"}


class Costs(NamedTuple):
    """What an optimizer costs besides time; None where its runs do not say.

    Attributes:
        compile_seconds: of its training step.
        state_bytes: of its state.
        parameter_bytes: of the parameters it trains.
    """

    compile_seconds: float | None = None
    state_bytes: int | None = None
    parameter_bytes: int | None = None


class Problem(NamedTuple):
    """The runs of one folder.

    Attributes:
        name: of the folder.
        runs: by optimizer and learning rate, in the order of the seeds.
        settings: of one run of each optimizer.
        costs: of each optimizer.
    """

    name: str
    runs: Runs
    settings: Mapping[str, Mapping[str, Any]]
    costs: Mapping[str, Costs]


def read(folder: Path) -> Problem:
    """Reads `folder/runs`; what is not finished or damaged is left out.

    Raises:
        Stopped: there is no finished run, or the runs are not of one problem.
    """
    found = {path: _record(path) for path in sorted(folder.glob("runs/*/run.json"))}
    _check_same(folder, found)
    runs: dict[tuple[str, float], list[results.Run]] = {}
    settings, costs = {}, {}
    for path, record in sorted(found.items(), key=lambda item: item[1]["settings"]["seed"]):
        own = record["settings"]
        run = results.load(path.parent, own)
        if run is None:
            continue
        name = own["optimizer"]
        _check_alike(folder, settings.get(name, own), own)
        runs.setdefault((name, own["learning_rate"]), []).append(run)
        settings.setdefault(name, own)
        # records of older runs say less
        costs.setdefault(name, Costs(*(record.get(entry) for entry in Costs._fields)))
    if not runs:
        raise Stopped(
            f"{folder}: got no finished run, expected the results folder of a comparison, with "
            "runs/*/run.json in it"
        )
    return Problem(folder.resolve().name, runs, settings, costs)


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        own = record["settings"]
        # what every run is told apart by
        Job(own["optimizer"], own["learning_rate"], own["seed"])
    except (ValueError, KeyError, TypeError) as error:
        raise Stopped(
            f"{path}: got no record of a run ({type(error).__name__}: {error}). Remove its folder, "
            "the sweep makes the run again."
        ) from None
    return record


def _check_same(folder: Path, found: Mapping[Path, Mapping[str, Any]]) -> None:
    """Runs of a trial with other settings would be compared with those of the race."""
    for entry in _SAME:
        kinds = {
            json.dumps(record["settings"].get(entry), sort_keys=True): path.parent.name
            for path, record in found.items()
        }
        if len(kinds) > 1:
            words = ", ".join(f"{value} in {name}" for value, name in kinds.items())
            raise Stopped(
                f"{folder}: runs with different {entry!r} ({words}), expected one problem and one "
                "budget. Take the others out of runs/."
            )


def _check_alike(folder: Path, first: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Means over seeds, and a best rate, are of one method with one setting."""
    # records of older runs say less
    both = first.keys() & own.keys() - {"learning_rate", "seed"}
    other = sorted(entry for entry in both if first[entry] != own[entry])
    if other:
        entry, name = other[0], own["optimizer"]
        raise Stopped(
            f"{folder}: runs of {name} with different {entry!r} ({first[entry]!r} and "
            f"{own[entry]!r}), expected one setting of each method. Take those of the other "
            "settings out of runs/."
        )


def with_sizes(problem: Problem) -> Problem:
    """The problem with the bytes that records leave out, found by tracing: nothing is trained."""
    costs = {
        name: cost if cost.state_bytes is not None else _traced(problem.settings[name], cost)
        for name, cost in problem.costs.items()
    }
    return problem._replace(costs=costs)


def with_times(problem: Problem, quiet: Problem) -> Problem:
    """The problem with the seconds of other runs of it: every step takes as long as it does there.

    Runs of a race share a machine with each other; a few epochs of each method, made one after
    the other, say what a step and its compilation take. Methods that were not timed have no
    seconds (NaN).

    Args:
        problem: of the race.
        quiet: the timed runs, at any learning rate.

    Raises:
        Stopped: the timed runs are of another problem, of other methods alone, or of a method with
          other settings.
    """
    _check_timed(problem, quiet)
    every: dict[str, list[results.Run]] = {}
    for (name, _), group in quiet.runs.items():
        every.setdefault(name, []).extend(group)
    seconds = {
        name: float(np.mean(results.ms_per_step(group))) / 1e3 for name, group in every.items()
    }
    runs = {
        (name, rate): [_retimed(run, seconds.get(name, math.nan)) for run in group]
        for (name, rate), group in problem.runs.items()
    }
    costs = {
        name: cost._replace(compile_seconds=quiet.costs.get(name, Costs()).compile_seconds)
        for name, cost in problem.costs.items()
    }
    return problem._replace(runs=runs, costs=costs)


def _retimed(run: results.Run, seconds_per_step: float) -> results.Run:
    # seconds are those since the row before
    new_steps = np.diff(results.steps_of(run), prepend=0)
    return run._replace(history=run.history | {"seconds": new_steps * seconds_per_step})


def _check_timed(problem: Problem, quiet: Problem) -> None:
    same = [entry for entry in _SAME if entry not in _UNTIMED]
    mine, other = (next(iter(one.settings.values())) for one in (problem, quiet))
    for entry in (*same, "batch_size"):
        if mine.get(entry) != other.get(entry):
            raise Stopped(
                f"{quiet.name}: timed runs with {entry} {other.get(entry)!r}, expected those of "
                f"{problem.name}, {mine.get(entry)!r}. Give the folders of --timing in the order "
                "of the others."
            )
    names = [name for name in problem.settings if name in quiet.settings]
    if not names:
        raise Stopped(
            f"{quiet.name}: timed runs of {', '.join(quiet.settings)}, expected some methods of "
            f"{problem.name}, which has {', '.join(problem.settings)}."
        )
    for name in names:
        _check_method(name, problem, quiet)


def _check_method(name: str, problem: Problem, quiet: Problem) -> None:
    """With other periods, say, a method's step has another length."""
    mine, other = (one.settings[name] for one in (problem, quiet))
    # records of older runs say less
    for entry in sorted((mine.keys() & other.keys()) - _UNTIMED):
        if mine[entry] != other[entry]:
            raise Stopped(
                f"{quiet.name}: timed runs of {name} with {entry} {other[entry]!r}, expected "
                f"{mine[entry]!r}, as in {problem.name}. Time it with the settings of the race."
            )


def _traced(settings: Mapping[str, Any], cost: Costs) -> Costs:
    config = ml_collections.ConfigDict(dict(settings))
    dataset, key = train.start(config, seed=0)
    problem = steps.problem(config, config.optimizer, dataset)
    # shapes alone
    first = functools.partial(steps.init, problem)
    state = jax.eval_shape(first, jnp.float32(config.learning_rate), key, dataset)
    return cost._replace(
        state_bytes=tree_bytes(state.opt_state), parameter_bytes=tree_bytes(state.params)
    )
