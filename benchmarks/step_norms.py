"""How long the steps of K-FAC are in the exact metric, where training goes well and where it dies:
`python -m benchmarks.step_norms`.

`(1 - m)^2 T^T F T` of every step `T`, momentum and weight decay included, with `F` the exact Fisher
on at most 256 examples of the batch: what `kl_clip` is meant to bound, and what KL-clip estimates
by `learning_rate^2 <U, grad>`. Two experiments with KL-clip, of which one needs long first steps
and the other dies of them.
"""

import argparse
import functools
import runpy
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

from kfac_optax.experiments import steps, train

EXAMPLES = 256
OPTIMIZERS = ("kfac_clipped", "two_level_clipped")
RATES = {"deep_linear": (1e-3, 1e-2), "deep_tanh": (1e-1, 1e-2, 1e-3)}
ENDS = (10, 50)  # parts of a run: before the first, up to the second, the rest


class Watched(NamedTuple):
    """State of an optimizer that is watched, and the norm of its last step."""

    inner: Any
    square: jax.Array  # shape=(): (1 - m)^2 T^T F T


def watch(
    tx: optax.GradientTransformation, *, momentum: float
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, with the squared Fisher norm of its step in the state."""
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> Watched:
        return Watched(tx.init(params), jnp.zeros(()))

    def update(updates: Any, state: Any, params: Any = None, *, curvature: Any, **extra: Any):
        step, inner = tx.update(updates, state.inner, params, curvature=curvature, **extra)
        form = curvature.quadratic_form((step,), subsample=EXAMPLES)
        square = (1 - momentum) ** 2 * form[0, 0]
        return step, Watched(inner, square.astype(jnp.float32))

    return optax.GradientTransformationExtraArgs(init, update)


def settings_of(name: str, small: bool = False) -> Any:
    """The experiment's; a small network and few steps for a dry run."""
    config = runpy.run_path(f"configs/{name}.py")["get_config"]()
    if small:
        config.epochs, config.batch_size = 2, 16
        config.data.train, config.data.test = 64, 16
        if name == "deep_linear":
            config.model.depth, config.model.width = 2, 4
        else:
            config.model.widths = (4, 4)
    return config


def runs(config: Any, name: str, rates: Sequence[float], seeds: int) -> dict[float, list[Any]]:
    """By rate the runs of all seeds, each its loss in the last epoch and the norms `[steps]`."""
    dataset, _ = train.start(config, seed=0)
    problem = steps.problem(config, name, dataset)
    made = problem.method.transform
    watched = problem.method._replace(
        transform=lambda rate: watch(made(rate), momentum=config.momentum)
    )
    problem = problem._replace(method=watched)
    init = jax.jit(functools.partial(steps.init, problem))

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def epoch(rate: Any, state: Any, reports: Any, dataset: Any):
        drawn = steps.shuffle(problem, state.key, len(dataset.train_x))

        def one(carry: Any, i: jax.Array):
            state, reports = steps.train_one(problem, rate, *carry, dataset, drawn, i)
            return (state, reports), state.opt_state.square

        (state, reports), squares = jax.lax.scan(one, (state, reports), jnp.arange(problem.steps))
        return state._replace(key=drawn.next_key), reports, squares

    def run(rate: float, seed: int) -> tuple[float, np.ndarray]:
        dataset, key = train.start(config, seed=seed)
        number, found = jnp.float32(rate), []
        state, reports = init(number, key, dataset), steps.no_reports(problem)
        for _ in range(config.epochs):
            state, reports, squares = epoch(number, state, reports, dataset)
            found.append(np.asarray(squares))
        return float(reports[:, 0].mean()), np.concatenate(found)

    return {rate: [run(rate, seed) for seed in range(seeds)] for rate in rates}


def row(label: str, found: Sequence[tuple[float, np.ndarray]]) -> str:
    """Final losses, then median and largest norm in each part of the runs, over all seeds."""
    cells = [" ".join(f"{loss:.3f}" for loss, _ in found)]
    for part in zip(*(np.split(squares, ENDS) for _, squares in found), strict=True):
        norms = np.concatenate(part)
        cells.append(f"{np.median(norms):.1e}, {norms.max():.1e}" if len(norms) else "-")
    return f"| {label} | " + " | ".join(cells) + " |"


def table(seeds: int, small: bool = False) -> list[str]:
    """The lines of the table, one row for every experiment, optimizer and rate."""
    first, second = ENDS
    parts = f"steps 0-{first} | {first}-{second} | {second}-"
    lines = [f"| | final loss by seed | {parts} |", "| --- " * 5 + "|"]
    pairs = [(experiment, name) for experiment in RATES for name in OPTIMIZERS]
    for experiment, name in track(pairs, description="runs"):
        rates = RATES[experiment]
        found = runs(settings_of(experiment, small), name, rates, seeds)
        lines += [row(f"{experiment}, {name}, {rate:g}", found[rate]) for rate in rates]
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    print("\n".join(table(options.seeds, options.small)), flush=True)
