"""Twenty steps of K-FAC in single precision here, against double precision on the CPU."""

import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_optax as ko
from benchmarks.parts import Case

WIDTHS = (20, 32, 32, 10)
BATCH = 64


def agreement(small: bool) -> Iterable[Case]:
    """Distance of the parameters to those of double precision, by inverse and precision."""
    steps = 2 if small else 20
    for inverse in ("eigh", "cholesky"):
        expected: list[Any] = []

        def reference(inverse: str = inverse, expected: list = expected) -> dict[str, Any]:
            with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
                expected.append(_trained(inverse, steps, np.float64))
            return {"moved": _norm(expected[0] - _flat(_start()))}

        yield Case(f"{inverse}: double precision on the CPU", reference)
        for level in (None, "highest"):

            def measure(level: Any = level, inverse: str = inverse, expected: list = expected):
                with jax.default_matmul_precision(level):
                    found = _trained(inverse, steps, np.float32)
                gap, moved = _norm(found - expected[0]), _norm(expected[0] - _flat(_start()))
                return {"of parameters": gap / _norm(expected[0]), "of movement": gap / moved}

            yield Case(f"{inverse}: single precision, matmul precision {level}", measure)


def _start() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    pairs = itertools.pairwise(WIDTHS)
    return [{"w": rng.normal(size=(p, q)) / p**0.5, "b": np.zeros(q)} for p, q in pairs]


def _predict(params: list[dict[str, jax.Array]], x: jax.Array) -> ko.Categorical:
    for i, layer in enumerate(params):
        x = jnp.tanh(x) if i else x
        x = ko.tap_dense(x @ layer["w"] + layer["b"], x, layer["w"], layer["b"])
    return ko.Categorical(x)


def _trained(inverse: str, steps: int, dtype: Any) -> np.ndarray:
    """Parameters after so many steps on one batch, as one vector."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(BATCH, WIDTHS[0])), dtype)
    y = jnp.asarray(rng.integers(0, WIDTHS[-1], BATCH))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), _start())
    fisher = ko.ggn(_predict)  # exact: no labels to draw
    options: dict[str, Any] = dict(curvature_every=1, inverse_every=5, inverse=inverse)
    kfac = ko.kfac(fisher.layers(params, x), learning_rate=0.1, damping=1e-3, **options)
    tx = optax.chain(kfac, optax.sgd(0.1, momentum=0.9))

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        grads = jax.grad(lambda p: _predict(p, x).mean_nll(y))(params)
        updates, state = tx.update(grads, state, params, curvature=fisher.at(params, x))
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for _ in range(steps):
        params, state = step(params, state)
    return _flat(params)


def _flat(params: Any) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(params)])


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x))
