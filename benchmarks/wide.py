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

import jax
import jax.numpy as jnp
from rich.progress import track

from benchmarks.ratios import paired, ratio
from kfac_optax.experiments import settings, steps, train

CONFIG = "configs/wide_mlp.py"
KINDS = {
    "plain": {"measure": False, "refresh": False},
    "statistics": {"measure": True, "refresh": False},
    "inverses": {"measure": True, "refresh": True},
}


def calls(name: str, factored: bool) -> dict[str, Callable[[], None]]:
    """Compiled steps of one optimizer by kind, each from where the last one ended."""
    config = runpy.run_path(CONFIG)["get_config"]()
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
    return {kind: made(due) for kind, due in KINDS.items()}


def report(names: list[str], rounds: int) -> None:
    """Measures and prints the table."""
    config = runpy.run_path(CONFIG)["get_config"]()
    every, inverse = config.kfac.curvature_every, config.kfac.inverse_every
    shares = {
        "inverses": 1 / inverse,
        "statistics": 1 / every - 1 / inverse,
        "plain": 1 - 1 / every,
    }
    sgd = calls("sgd", False)["plain"]
    lines = [
        f"| optimizer | gradient as | {' | '.join(KINDS)} | SGD | on average, / SGD (quartiles) |"
    ]
    lines.append("| --- " * (len(KINDS) + 4) + "|")
    pairs = [(name, factored) for name in names for factored in (False, True)]
    for name, factored in track(pairs, description="presets"):
        times = paired({"SGD": sgd} | calls(name, factored), rounds)
        average = [
            sum(share * times[kind][i] for kind, share in shares.items()) for i in range(rounds)
        ]
        found = ratio(average, times["SGD"])
        cells = " | ".join(f"{statistics.median(times[side]):.3f}" for side in (*KINDS, "SGD"))
        label = "rows" if factored else "matrix"
        lines.append(
            f"| {name} | {label} | {cells} | {found.median:.1f} ({found.low:.1f} to "
            f"{found.high:.1f}) |"
        )
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "optimizers",
        nargs="*",
        default=["kfac", "rs_kfac", "b_kfac", "b_r_kfac", "b_kfac_c", "b_r_c"],
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    report(options.optimizers, options.rounds)
