"""Many steps with faults among them, method by method: nothing may break, and nothing may grow.

    python -m kfac_optax.experiments.soak --steps=20000

Faults come at random, from a seed: NaN in a batch, infinite gradients, a batch of zeros, a batch
without weight, equal examples, a damping that makes no sense. After all of them the state has to be
finite, the loss lower than at first, one compiled program all there is, and the memory of the
process and the number of its arrays what they were after the first tenth.
"""

import argparse
import gc
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from rich.console import Console
from rich.progress import track

import kfac_optax as ko

# a classification so small that thousands of steps take seconds
EXAMPLES, BATCH, FEATURES, CLASSES = 256, 32, 8, 4
FAULTS = ("none", "nan", "infinite", "zeros", "weightless", "equal", "damping")
_STEPS_PER_CALL = 20
_GROWTH = 32.0  # MiB that allocators may take between the first tenth and the end


class Report(NamedTuple):
    """What a method came to.

    Attributes:
        method: its name.
        steps: how many.
        faults: how many steps had each of them.
        loss: of all examples, before the first step and after the last.
        memory: MiB of the process after the first tenth of the steps, and after all.
        arrays: alive, at the same times.
        traces: how often the step was traced.
        finite: whether parameters and state are.
        problems: what the state says about the faults.
    """

    method: str
    steps: int
    faults: dict[str, int]
    loss: tuple[float, float]
    memory: tuple[float, float]
    arrays: tuple[int, int]
    traces: int
    finite: bool
    problems: list[str]

    def failures(self) -> list[str]:
        """What is not as it has to be."""
        # at the first tenth, when caches are full, and at the end
        (first, last), (early, late) = self.loss, self.memory
        found = {
            f"the loss went from {first:.4f} to {last:.4f}": not last < 0.8 * first,
            f"the process grew from {early:.0f} to {late:.0f} MiB": late > early + _GROWTH,
            f"arrays alive went from {self.arrays[0]} to {self.arrays[1]}": (
                self.arrays[1] > self.arrays[0]
            ),
            # a second trace means that a fault changed shapes or types
            f"the step was traced {self.traces} times": self.traces != 1,
            "parameters or state are not finite": not self.finite,
            "the state counted none of the faults": any(self.faults.values()) and not self.problems,
        }
        return [words for words, wrong in found.items() if wrong]


def _predict(params: Any, x: jax.Array, weights: jax.Array | None = None) -> ko.Categorical:
    # two hidden layers and a head
    for name in ("first", "second"):
        w, b = params[name]["w"], params[name]["b"]
        x = jnp.tanh(ko.tap_dense(x @ w + b, x, w, b))
    w, b = params["last"]["w"], params["last"]["b"]
    return ko.Categorical(ko.tap_dense(x @ w + b, x, w, b), weights=weights)


ESTIMATOR = ko.ggn(_predict)


def _start() -> tuple[Any, jax.Array, jax.Array]:
    """Parameters, inputs and labels, which a linear teacher gives."""
    keys = jax.random.split(jax.random.key(0), 5)
    # three layers, so that levels have something to couple
    sizes = {"first": (FEATURES, 8), "second": (8, 8), "last": (8, CLASSES)}
    params = {
        name: {"w": jax.random.normal(key, shape) / shape[0] ** 0.5, "b": jnp.zeros(shape[1])}
        for key, (name, shape) in zip(keys[:3], sizes.items(), strict=True)
    }
    x = jax.random.normal(keys[3], (EXAMPLES, FEATURES))
    y = jnp.argmax(x @ jax.random.normal(keys[4], (FEATURES, CLASSES)), axis=1)
    return params, x, y


def _over_sgd(preset: Callable[..., Any], **settings: Any) -> Callable[[ko.Layers], Any]:
    # short periods: every branch is taken often
    periods = {"curvature_every": 2, "inverse_every": 10} | settings

    def make(layers: ko.Layers) -> Any:
        return optax.chain(
            preset(layers, learning_rate=0.05, damping=0.05, **periods),
            optax.sgd(0.05, momentum=0.9),
        )

    return make


METHODS: dict[str, Callable[[ko.Layers], Any]] = {
    "kfac": _over_sgd(ko.kfac, inverse="cholesky"),
    "kfac_two_level": _over_sgd(ko.kfac_two_level),
    "ekfac": _over_sgd(ko.ekfac),
    "shampoo": lambda layers: ko.shampoo(learning_rate=0.02),
    "spring": lambda layers: ko.spring(learning_rate=0.05, damping=0.05),
}


class Batch(NamedTuple):
    """What one step is given, faults included."""

    x: jax.Array
    y: jax.Array
    weights: jax.Array
    gradient: jax.Array  # its factor
    damping: jax.Array


def _batch(x: jax.Array, y: jax.Array, key: jax.Array, fault: jax.Array) -> Batch:
    """A batch of random examples, spoilt as the number of the fault says."""
    # with replacement, as only the faults matter
    index = jax.random.randint(key, (BATCH,), 0, EXAMPLES)
    index = jnp.where(fault == FAULTS.index("equal"), index[0], index)
    x, y = x[index], y[index]
    x = jnp.where(fault == FAULTS.index("zeros"), 0, x)
    # one number is enough
    x = x.at[0, 0].set(jnp.where(fault == FAULTS.index("nan"), jnp.nan, x[0, 0]))
    weights = jnp.where(fault == FAULTS.index("weightless"), jnp.zeros(BATCH), 1)
    gradient = jnp.where(fault == FAULTS.index("infinite"), jnp.inf, 1.0)
    # a damping that is not a number
    damping = jnp.where(fault == FAULTS.index("damping"), jnp.nan, 0.05)
    return Batch(x, y, weights, gradient, damping)


class _Steps:
    """Several steps of a method as one compiled call, and how often it was traced."""

    def __init__(self, name: str, params: Any, x: jax.Array, y: jax.Array):
        layers = ESTIMATOR.layers(params, x, jnp.ones(EXAMPLES))
        self.tx = optax.with_extra_args_support(METHODS[name](layers))
        self.traces, self._data = 0, (x, y)
        # in place, as a training loop does
        self.run = jax.jit(self._run, donate_argnums=(0, 1))

    def _run(self, params: Any, state: Any, key: jax.Array, faults: jax.Array) -> Any:
        self.traces += 1  # runs when it is traced only

        def one(carry: tuple[Any, Any], given: Any) -> tuple[tuple[Any, Any], None]:
            return self._step(*carry, _batch(*self._data, *given)), None

        # a key and a fault for every step
        keys = jax.random.split(key, len(faults))
        return jax.lax.scan(one, (params, state), (keys, faults))[0]

    def _step(self, params: Any, state: Any, batch: Batch) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            return _predict(params, batch.x, batch.weights).mean_nll(batch.y)

        # infinite times zero is NaN, which is a fault too
        grads = jax.tree.map(lambda g: g * batch.gradient, jax.grad(loss)(params))
        updates, state = self.tx.update(
            grads,
            state,
            params,
            curvature=ESTIMATOR.at(params, batch.x, batch.weights),
            damping=batch.damping,
        )
        return optax.apply_updates(params, updates), state


def soak(name: str, *, steps: int, seed: int = 0, fault_rate: float = 0.1) -> Report:
    """Trains with one method.

    Args:
        name: of it, a key of `METHODS`.
        steps: at least so many, rounded up to whole calls.
        seed: of batches and faults.
        fault_rate: part of the steps that has a fault.
    """
    params, x, y = _start()
    full = jax.jit(lambda params: _predict(params, x).mean_nll(y))
    before = float(full(params))
    made = _Steps(name, params, x, y)
    state = jax.jit(made.tx.init)(params)
    # whole calls, at least as many steps
    calls = -(-steps // _STEPS_PER_CALL)
    rng, early = np.random.default_rng(seed), (0.0, 0)
    total = np.zeros(len(FAULTS), int)
    for call in _with_bar(calls, name):
        kinds = rng.integers(1, len(FAULTS), _STEPS_PER_CALL)
        # 0 is no fault
        faults = np.where(rng.random(_STEPS_PER_CALL) < fault_rate, kinds, 0).astype(np.int32)
        total += np.bincount(faults, minlength=len(FAULTS))
        key = jax.random.key(int(rng.integers(2**31)))
        params, state = made.run(params, state, key, faults)
        # compiled, warm, and with all buffers there
        if call == calls // 10:
            early = _footprint((params, state))
    late = _footprint((params, state))
    arrays = jax.tree.leaves((params, state))
    finite = all(np.isfinite(np.asarray(leaf)).all() for leaf in arrays)
    # memory of the process, and arrays of JAX
    memory, alive = (early[0], late[0]), (early[1], late[1])
    after, problems = float(full(params)), ko.problems(state)
    done = calls * _STEPS_PER_CALL
    counted = dict(zip(FAULTS[1:], map(int, total[1:]), strict=True))
    return Report(
        name, done, counted, (before, after), memory, alive, made.traces, finite, problems
    )


def _with_bar(calls: int, name: str) -> Iterable[int]:
    """Numbers of the calls; a terminal shows how far they are."""
    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(range(calls), name, console=console, transient=True, disable=hidden)


def _footprint(tree: Any) -> tuple[float, int]:
    """MiB of this process, and how many arrays are alive, once the tree is there."""
    jax.block_until_ready(tree)
    gc.collect()
    # resident pages
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(jax.live_arrays())


def main(words: Sequence[str] | None = None) -> int:
    """Soaks all methods and says what came of it; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20_000, help="of every method")
    parser.add_argument("--seed", type=int, default=0, help="of batches and faults")
    parser.add_argument("--fault_rate", type=float, default=0.1, help="part of steps with a fault")
    options = parser.parse_args(words)
    logging.set_verbosity(logging.WARNING)  # JAX reports every backend that is not there
    failed = False
    for name in METHODS:
        found = soak(name, steps=options.steps, seed=options.seed, fault_rate=options.fault_rate)
        print(
            f"{name}: {found.steps} steps, {sum(found.faults.values())} with a fault; loss {found.loss[0]:.4f} "
            f"to {found.loss[1]:.4f}; memory {found.memory[0]:.1f} to {found.memory[1]:.1f} MiB; "
            f"arrays {found.arrays[0]} to {found.arrays[1]}; traces {found.traces}",
            *(f"  {sentence}" for sentence in found.problems),
            *(f"  FAILED: {words}" for words in found.failures()),
            sep="\n",
            flush=True,
        )
        failed = failed or bool(found.failures())
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
