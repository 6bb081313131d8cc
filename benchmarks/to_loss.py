"""Steps of `kfac_adaptive` to a training loss, counted in steps of SGD:
`python -m benchmarks.to_loss --data-dir DIR`.

The deep autoencoder of Fashion-MNIST at batch 1000. Every step is timed beside one of SGD with
momentum, from the first on and with what a schedule makes of it, compilation apart, so that a slow
machine slows both. The loss is that of 5,000 training images, without a penalty.
"""

import argparse
import pathlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_optax as ko
from benchmarks.ratios import seconds, table
from kfac_optax.experiments import data
from kfac_optax.experiments.nets_dense import Autoencoder

TARGETS = (244.0, 228.0, 220.0, 216.0, 213.6, 211.0)
BATCH, EVALUATED = 1000, 5000
PENALTY = 1e-5  # coefficient of the squared weights
FREQUENT = {"curvature_every": 1, "inverse_every": 5}


class Setting(NamedTuple):
    """What a user writes: options of the estimator, of the preset, and of the host's schedule."""

    estimator: dict[str, Any] = {}
    preset: dict[str, Any] = {}
    schedule: dict[str, Any] = {}


PARTS = {"model_subsample": 125}
SETTINGS = {
    "defaults": Setting(),
    "parts of the batch": Setting({"subsample": 250}, PARTS),
    "parts, damping_min=1e-4": Setting({"subsample": 250}, PARTS | {"damping_min": 1e-4}),
    "parts, damping_min=1e-4, 1/5": Setting(
        {"subsample": 250}, PARTS | {"damping_min": 1e-4}, FREQUENT
    ),
}


class Run(NamedTuple):
    """Losses after `0, 1, ...` steps, seconds of every step, and of SGD's beside it."""

    losses: list[float]
    seconds: list[float]
    sgd: list[float]


def batches(pixels: np.ndarray, seed: int, batch: int) -> Iterator[jax.Array]:
    """Epoch after epoch, each in an order of its own."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(pixels))
        for start in range(0, len(pixels) - batch + 1, batch):
            yield jnp.asarray(pixels[order[start : start + batch]], jnp.float32) / 255


def train(
    setting: Setting,
    pixels: np.ndarray,
    *,
    seed: int,
    steps: int,
    batch: int = BATCH,
    widths: tuple[int, ...] = (1000, 500, 250, 30),
) -> Run:
    """One run, with a step of SGD after every step."""
    model = Autoencoder(widths=widths, outputs=pixels.shape[1])

    def predict(params: Any, x: jax.Array) -> ko.Bernoulli:
        return ko.Bernoulli(model.apply({"params": params}, x, train=True))

    def objective(params: Any, x: jax.Array) -> jax.Array:
        return predict(params, x).mean_nll(x) + PENALTY / 2 * optax.tree.norm(params, squared=True)

    drawn = batches(pixels, seed, batch)
    x = next(drawn)
    params = model.init(jax.random.key(seed), x, train=True)["params"]
    evaluated = jnp.asarray(pixels[:EVALUATED], jnp.float32) / 255
    loss_of = jax.jit(lambda params: predict(params, evaluated).mean_nll(evaluated))

    estimator = ko.fisher(predict, **setting.estimator)
    tx = ko.kfac_adaptive(estimator.layers(params, x), weight_decay=PENALTY, **setting.preset)

    def adaptive_step(params: Any, state: Any, x: jax.Array, key: jax.Array, **due: Any) -> Any:
        value, grads = jax.value_and_grad(objective)(params, x)
        curvature = estimator.at(params, x, key=key)
        updates, state = tx.update(
            grads,
            state,
            params,
            curvature=curvature,
            value=value,
            value_fn=lambda p: objective(p, x),
            **due,
        )
        return optax.apply_updates(params, updates), state

    sgd = optax.sgd(1e-3, momentum=0.9)

    def sgd_step(params: Any, state: Any, x: jax.Array) -> Any:
        grads = jax.grad(objective)(params, x)
        updates, state = sgd.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    schedule = ko.HostSchedule(adapt_every=5, **setting.schedule)
    step = ko.compile_step(adaptive_step, schedule, donate_argnums=(0, 1))
    plain = jax.jit(sgd_step, donate_argnums=(0, 1))

    def repeat(steps: int, timed: Run | None = None) -> Any:
        """So many steps from the start, of both."""
        ours = jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)
        theirs = jax.tree.map(jnp.copy, params), sgd.init(params)

        def one(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
            kept: list[Any] = []
            spent = seconds(lambda: kept.append(jax.block_until_ready(call(*arguments))))
            return kept[0], spent

        drawn = batches(pixels, seed, batch)
        for number in range(steps):
            x, key = next(drawn), jax.random.key(number)
            ours, spent = one(step, *ours, x, key)
            theirs, of_sgd = one(plain, *theirs, x)
            if timed is not None:
                timed.seconds.append(spent)
                timed.sgd.append(of_sgd)
                timed.losses.append(float(loss_of(ours[0])))

    # all kinds of step are compiled before the clock starts
    repeat(min(steps, 27))
    run = Run([float(loss_of(params))], [], [])
    repeat(steps, run)
    return run


def reached(run: Run, target: float) -> tuple[int, float] | None:
    """Number of the first step after which the loss is at the target, and its time in steps of SGD;
    `None`: never.

    >>> run = Run([9.0, 5.0, 3.0], [2.0, 3.0], [1.0, 1.0])
    >>> reached(run, 4.0), reached(run, 9.5), reached(run, 1.0)
    ((2, 5.0), (0, 0.0), None)
    """
    unit = statistics.median(run.sgd)
    for number, loss in enumerate(run.losses):
        if loss <= target:
            return number, sum(run.seconds[:number]) / unit
    return None


def rows(runs: dict[str, list[Run]]) -> dict[str, dict[str, Any]]:
    """For every setting and target the steps, and the time in steps of SGD, of every seed."""
    found: dict[str, dict[str, Any]] = {}
    for name, of_seeds in runs.items():
        unit = [statistics.median(run.sgd) for run in of_seeds]
        spent = [statistics.fmean(run.seconds) / u for run, u in zip(of_seeds, unit, strict=True)]
        row: dict[str, Any] = {"step / SGD": " ".join(f"{value:.2f}" for value in spent)}
        for target in TARGETS:
            places = [reached(run, target) for run in of_seeds]
            text = [f"{place[1]:.0f} ({place[0]})" if place else "-" for place in places]
            row[f"{target:g}"] = " ".join(text)
        found[name] = row
    return found


def main(arguments: list[str] | None = None) -> dict[str, list[Run]]:
    """Runs from the command line, and prints the table: steps of SGD (and of its own)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    images = data.idx_files.read_images(options.data_dir).train_x
    pixels = images.reshape(len(images), -1)
    runs: dict[str, list[Run]] = {}
    for name in options.settings:
        runs[name] = []
        for seed in range(options.seeds):
            runs[name].append(train(SETTINGS[name], pixels, seed=seed, steps=options.steps))
            print(f"{name}, seed {seed}: {runs[name][-1].losses[-1]:.2f}", flush=True)
    print("\n".join(table(rows(runs))), flush=True)
    return runs


if __name__ == "__main__":
    main()
