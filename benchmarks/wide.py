"""Steps on a wide network, gradients preconditioned as matrices and from their rows:
`python -m benchmarks.wide`.

For each optimizer of `configs/wide_mlp.py`, a plain step, one with statistics, one with inverses
too, and what a step costs on average at the periods of the experiment; all timed in turns within
one run, as ratios to a step of SGD with momentum.
"""

import argparse
import runpy
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import track

from benchmarks.ratios import KINDS, amortised, paired, ratio, table
from kfac_optax.experiments import settings, steps, train

CONFIG = "configs/wide_mlp.py"
PRESETS = ["kfac", "rs_kfac", "b_kfac", "b_r_kfac", "b_kfac_c", "b_r_c"]


def settings_of(small: bool = False) -> Any:
    """The experiment's; narrow layers for a dry run."""
    config = runpy.run_path(CONFIG)["get_config"]()
    if small:
        config.model.widths = (8, 8)
        config.data.train, config.data.test, config.batch_size = 64, 16, 32
        config.low_rank.rank = 4
    return config


def calls(name: str, factored: bool, small: bool = False) -> dict[str, Callable[[], None]]:
    """Compiled steps of one optimizer by kind, each from where the last one ended."""
    config = settings_of(small)
    config.kfac.factored_gradient = factored
    config = settings.of(config, name)
    dataset, key = train.start(config, seed=0)
    problem = steps.problem(config, name, dataset)
    rate = jnp.float32(config.learning_rate)
    state = jax.jit(lambda: steps.init(problem, rate, key, dataset))()
    reports, epoch = (
        steps.no_reports(problem),
        steps.shuffle(problem, state.key, len(dataset.train_x)),
    )
    carried = [state, reports]

    def made(due: dict[str, bool]) -> Callable[[], None]:
        step = jax.jit(lambda *args: steps.train_one(problem, *args, **due), donate_argnums=(1, 2))
        compiled = step.lower(rate, *carried, dataset, epoch, 0).compile()

        def run() -> None:
            carried[:] = jax.block_until_ready(compiled(rate, *carried, dataset, epoch, 0))

        return run

    if problem.method.due is None:
        return {"plain": made({})}
    return {kind: made({"measure": m, "refresh": r}) for kind, (m, r) in KINDS.items()}


def measure(
    sgd: Callable[[], None], name: str, factored: bool, rounds: int, small: bool = False
) -> dict[str, float]:
    """One row of the table: seconds by kind of step, and their average over SGD's."""
    config = settings_of(small)
    every, inverse = config.kfac.curvature_every, config.kfac.inverse_every
    times = paired({"SGD": sgd} | calls(name, factored, small), rounds)
    found = ratio(amortised(times, every, inverse), times["SGD"])
    seconds = {kind: statistics.median(spent) for kind, spent in times.items()}
    return seconds | {"on average / SGD": found.median} | found.quartiles()


def report(names: list[str], rounds: int) -> None:
    """Measures and prints the table."""
    sgd = calls("sgd", False)["plain"]
    pairs = [(name, factored) for name in names for factored in (False, True)]
    rows = {
        f"{name}, from the {'rows' if factored else 'matrix'}": measure(sgd, name, factored, rounds)
        for name, factored in track(pairs, description="presets")
    }
    print("\n".join(table(rows)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "optimizers",
        nargs="*",
        default=PRESETS,
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    report(options.optimizers, options.rounds)
