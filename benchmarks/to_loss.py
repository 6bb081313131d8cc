"""Steps of `kfac_adaptive` to a training loss, counted in steps of SGD:
`python -m benchmarks.to_loss --data-dir DIR`.

The deep autoencoder of Fashion-MNIST at batch 1000. Every step is timed beside one of SGD with
momentum, from the first on and with what a schedule makes of it, compilation apart, so that a slow
machine slows both. The loss is that of 5,000 training images, without a penalty.
"""

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_optax as ko
from benchmarks.ratios import table
from kfac_optax.experiments import data
from kfac_optax.experiments.nets_dense import Autoencoder

TARGETS = (244.0, 228.0, 220.0, 216.0, 213.6, 211.0)
BATCH, EVALUATED = 1000, 5000
PENALTY = 1e-5  # coefficient of the squared weights
WIDTHS = (1000, 500, 250, 30)
COMPILED_AFTER = 27  # steps in which every kind of step has been due


class Setting(NamedTuple):
    """What a user writes: options of the estimator, of the preset, and of the host's schedule."""

    estimator: dict[str, Any] = {}
    preset: dict[str, Any] = {}
    schedule: dict[str, Any] = {}


PART = {"subsample": "auto"}
SETTINGS = {
    "defaults": Setting(),
    "statistics of a part": Setting(PART),
    "statistics in each of the first 20 steps": Setting(
        PART, {}, {"curvature_every": ko.refresh_period(5, warmup_steps=20)}
    ),
    "inverses of rank 128": Setting(PART, {"block": ko.low_rank_blocks("b_kfac", rank=128)}),
    "damping_min=0.01": Setting(PART, {"damping_min": 0.01}),
    "inverses every 10": Setting(
        PART, {}, {"inverse_every": ko.refresh_period(10, warmup_steps=20, first=5)}
    ),
    "periods 1/5": Setting(PART, {}, {"curvature_every": 1, "inverse_every": 5}),
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
            yield numbers(pixels[order[start : start + batch]])


def numbers(pixels: np.ndarray) -> jax.Array:
    """Bytes to numbers in [0, 1]."""
    return jnp.asarray(pixels, jnp.float32) / 255


class Problem:
    """The network, its loss, and a step of either optimizer, compiled once for all starts."""

    def __init__(self, setting: Setting, pixels: np.ndarray, batch: int, widths: Any):
        model = Autoencoder(widths=widths, outputs=pixels.shape[1])
        x = numbers(pixels[:batch])

        def predict(params: Any, x: jax.Array) -> ko.Bernoulli:
            return ko.Bernoulli(model.apply({"params": params}, x, train=True))

        self.predict = predict
        self._init = jax.jit(lambda key: model.init(key, x, train=True)["params"])
        self.estimator = ko.fisher(predict, **setting.estimator)
        layers = self.estimator.layers(self._init(jax.random.key(0)), x)
        self.adaptive = ko.kfac_adaptive(layers, weight_decay=PENALTY, **setting.preset)
        self.sgd = optax.sgd(1e-3, momentum=0.9)
        schedule = ko.HostSchedule(adapt_every=5, **setting.schedule)
        self.step = ko.compile_step(self._adaptive_step, schedule, donate_argnums=(0, 1))
        self.sgd_step = jax.jit(self._sgd_step, donate_argnums=(0, 1))
        evaluated = numbers(pixels[:EVALUATED])
        self.loss = jax.jit(lambda params: predict(params, evaluated).mean_nll(evaluated))

    def objective(self, params: Any, x: jax.Array) -> jax.Array:
        """The loss with its penalty."""
        square = optax.tree.norm(params, squared=True)
        return self.predict(params, x).mean_nll(x) + PENALTY / 2 * square

    def _adaptive_step(self, params: Any, state: Any, x: jax.Array, key: jax.Array, **due: Any):
        value, grads = jax.value_and_grad(self.objective)(params, x)
        updates, state = self.adaptive.update(
            grads,
            state,
            params,
            curvature=self.estimator.at(params, x, key=key),
            value=value,
            value_fn=lambda params: self.objective(params, x),
            **due,
        )
        return optax.apply_updates(params, updates), state

    def _sgd_step(self, params: Any, state: Any, x: jax.Array):
        grads = jax.grad(self.objective)(params, x)
        updates, state = self.sgd.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def start(self, tx: Any, seed: int) -> tuple[Any, Any]:
        """Parameters of one's own, to be donated, and a first state."""
        params = self._init(jax.random.key(seed))
        return params, jax.jit(tx.init)(params)


def train(
    problem: Problem, pixels: np.ndarray, *, seed: int, steps: int, batch: int = BATCH
) -> Run:
    """One run, with a step of SGD after every step."""

    def repeat(steps: int, run: Run) -> Run:
        """So many steps from the start, of both."""
        ours, theirs = problem.start(problem.adaptive, seed), problem.start(problem.sgd, seed)
        run.losses.append(float(problem.loss(ours[0])))
        drawn = batches(pixels, seed, batch)
        for number in range(steps):
            x, key = next(drawn), jax.random.key(number)
            ours, spent = timed(problem.step, *ours, x, key)
            theirs, of_sgd = timed(problem.sgd_step, *theirs, x)
            run.seconds.append(spent)
            run.sgd.append(of_sgd)
            run.losses.append(float(problem.loss(ours[0])))
        return run

    # all kinds of step are compiled before the clock starts
    repeat(min(steps, COMPILED_AFTER), Run([], [], []))
    return repeat(steps, Run([], [], []))


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """The result, once it is there, and the seconds that it took."""
    start = time.perf_counter()
    result = jax.block_until_ready(call(*arguments))
    return result, time.perf_counter() - start


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
    """For every setting and target the time in steps of SGD, and the steps, of every seed."""
    found: dict[str, dict[str, Any]] = {}
    for name, of_seeds in runs.items():
        steps = [statistics.fmean(run.seconds) / statistics.median(run.sgd) for run in of_seeds]
        row: dict[str, Any] = {"step / SGD": " ".join(f"{ratio:.2f}" for ratio in steps)}
        for target in TARGETS:
            places = [reached(run, target) for run in of_seeds]
            words = [f"{place[1]:.0f} ({place[0]})" if place else "-" for place in places]
            row[f"{target:g}"] = " ".join(words)
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
        problem = Problem(SETTINGS[name], pixels, BATCH, WIDTHS)
        for seed in range(options.seeds):
            run = train(problem, pixels, seed=seed, steps=options.steps)
            runs[name].append(run)
            (row,) = rows({name: [run]}).values()
            print(f"{name}, seed {seed}, at last {run.losses[-1]:.2f}: {row}", flush=True)
    print("\n".join(table(rows(runs))), flush=True)
    return runs


if __name__ == "__main__":
    main()
