"""What the compatibility tests share: tiny problems, a way to run them, type trees and a
compilation counter.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax

import kfac_optax as ko
from kfac_optax.linalg.factorize import Eigen
from tests import oracles

PRESETS = {"kfac": ko.kfac, "kfac_two_level": ko.kfac_two_level}

N, CLASSES = 8, 4


class Problem(NamedTuple):
    """A model with data, its exact curvature and the layers found in it."""

    predict: Callable[..., Any]
    params: Any
    x: jax.Array
    y: jax.Array
    estimator: ko.Estimator
    layers: ko.Layers

    def loss(
        self, params: Any, x: jax.Array | None = None, y: jax.Array | None = None
    ) -> jax.Array:
        return self.predict(params, self.x if x is None else x).mean_nll(self.y if y is None else y)

    def grad(self, params: Any) -> Any:
        return jax.grad(self.loss)(params)

    def at(self, params: Any) -> Any:
        return self.estimator.at(params, self.x)


def make_problem(predict: Callable[..., Any], params: Any, x: jax.Array, y: jax.Array) -> Problem:
    estimator = ko.ggn(predict)
    return Problem(predict, params, x, y, estimator, estimator.layers(params, x))


def data(features: int = 4, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(7), (N, features), jnp.float32)
    return x.astype(dtype), jnp.arange(N) % 3


def dense(x: jax.Array, w: jax.Array, b: jax.Array | None = None) -> jax.Array:
    """A tapped dense layer in plain JAX."""
    s = x @ w if b is None else x @ w + b
    return ko.tap_dense(s, x, w, b)


def plain_predict(params: Any, x: jax.Array) -> ko.Categorical:
    x = jnp.tanh(dense(x, params["first"]["w"], params["first"]["b"]))
    return ko.Categorical(dense(x, params["last"]["w"], params["last"]["b"]))


def plain_params(seed: int = 0, dtype: Any = jnp.float32) -> Any:
    keys = jax.random.split(jax.random.key(seed), 4)

    def draw(key: jax.Array, *shape: int) -> jax.Array:
        return (0.5 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return {
        "first": {"w": draw(keys[0], 4, 4), "b": draw(keys[1], 4)},
        "last": {"w": draw(keys[2], 4, CLASSES), "b": draw(keys[3], CLASSES)},
    }


@functools.cache
def plain_problem() -> Problem:
    """Two dense layers of plain arrays, equal in shape: one bucket compiles fast."""
    return make_problem(plain_predict, plain_params(), *data())


@functools.cache
def classes_problem(
    sizes: tuple[int, ...], labels: tuple[int, ...], dtype: str = "float64"
) -> Problem:
    """`oracles.classifier` of these widths; double precision needs the fixture `x64`."""
    params, x = oracles.make_params(0, sizes), oracles.normal(1, (len(labels), sizes[0]))
    params, x = jax.tree.map(lambda v: v.astype(dtype), (params, x))
    # what is kept here serves tests of both precisions
    assert x.dtype == dtype
    return make_problem(oracles.classifier, params, x, jnp.asarray(labels))


class MLP(nn.Module):
    """Three dense layers; the first two share a bucket."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.tanh(nn.Dense(4)(x))
        return nn.Dense(3)(x)


@functools.cache
def linen_problem() -> Problem:
    model = MLP()
    x, y = data()
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    return make_problem(
        lambda params, x: ko.Categorical(model.apply({"params": params}, x)), params, x, y
    )


def make_tx(preset: str, problem: Problem, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """A preset with short periods, so that a few steps see every branch, and KL-clip alone."""
    known = inspect.signature(PRESETS[preset]).parameters
    alone = {"bound": "damped"} if "bound" in known else {}
    settings = (
        alone
        | {
            "learning_rate": 0.1,
            "damping": 0.05,
            "curvature_every": 2,
            "inverse_every": 3,
        }
        | kwargs
    )
    return PRESETS[preset](problem.layers, **settings)


def computed(parameter: jax.Array) -> jax.Array:
    """The parameter with its derivative, behind an operation: the program shows no layer of it."""
    return (2 * parameter) / 2


class counted_jit:
    """`jax.jit`, and how often the function was traced: sizes of JAX's caches are no public number."""

    def __init__(self, function: Callable[..., Any], **options: Any):
        self.traces = 0
        functools.update_wrapper(self, function)

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.traces += 1  # runs when it is traced only
            return function(*args, **kwargs)

        self._compiled = jax.jit(counted, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)


def make_step(
    tx: optax.GradientTransformation, problem: Problem
) -> Callable[..., tuple[Any, Any, Any]]:
    """`(params, state, **extra) -> (params, state, updates)`, a descent step along
    `-0.1 * updates`, not jitted.
    """
    tx = optax.with_extra_args_support(tx)

    def step(params: Any, state: Any, **extra: Any):
        extra = {"curvature": problem.at(params)} | extra
        updates, state = tx.update(problem.grad(params), state, params, **extra)
        return (
            jax.tree.map(lambda p, u: p - (0.1 * u).astype(p.dtype), params, updates),
            state,
            updates,
        )

    return step


def run(tx: optax.GradientTransformation, problem: Problem, steps: int) -> tuple[Any, Any, Any]:
    """Params, state and all updates `[steps, ...]` of a scan over steps."""
    step = make_step(tx, problem)

    @jax.jit
    def scan(params: Any):
        def body(carry: Any, _: Any):
            params, state, updates = step(*carry)
            return (params, state), updates

        (params, state), updates = jax.lax.scan(body, (params, tx.init(params)), length=steps)
        return params, state, updates

    return scan(problem.params)


@functools.cache
def plain_grads() -> Any:
    """Gradient of the plain problem at its parameters."""
    return jax.jit(plain_problem().grad)(plain_problem().params)


@functools.cache
def initial_state(preset: str) -> Any:
    """State of a preset with the default settings on the plain problem, shared by the tests of one
    process.
    """
    return jax.jit(make_tx(preset, plain_problem()).init)(plain_problem().params)


@functools.cache
def reference_run(preset: str, steps: int = 6) -> tuple[Any, Any, Any]:
    """`run` of a preset with the default settings on the plain problem, shared by the tests of one
    process.
    """
    return run(make_tx(preset, plain_problem()), plain_problem(), steps)


def types(tree: Any) -> Any:
    """Shape, dtype, weak type and sharding type of every leaf."""
    return jax.tree.map(jax.typeof, tree)


def assert_same_types(a: Any, b: Any) -> None:
    """Fails unless two trees agree in structure and in all that `lax.cond` or `lax.scan` compares."""
    a, b = types(a), types(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert x == y, (
            f"{jax.tree_util.keystr(path)}: {x} (weak: {x.weak_type}), then {y} (weak: "
            f"{y.weak_type})"
        )


def comparable(tree: Any) -> Any:
    """`tree` with eigendecompositions multiplied out: eigenvectors are free in sign, and in more
    where values repeat.
    """

    def matrix(node: Any) -> Any:
        if not isinstance(node, Eigen):
            return node
        return jnp.einsum("...ij,...j,...kj->...ik", node.vectors, node.values, node.vectors)

    return jax.tree.map(matrix, tree, is_leaf=lambda node: isinstance(node, Eigen))


def assert_close(
    a: Any, b: Any, *, rtol: float = 1e-3, atol: float = 1e-5, structure: bool = True
) -> None:
    """Fails unless two trees agree up to float32 rounding of differently compiled programs.

    With `structure=False` only the leaves have to agree, in order.
    """
    a, b = comparable(a), comparable(b)
    if not structure:
        a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    chex.assert_trees_all_close(a, b, rtol=rtol, atol=atol)


def assert_leaves_close(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Fails unless the leaves of two trees agree in order, eigenvectors as they are."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def assert_equal(a: Any, b: Any) -> None:
    """Fails unless two trees agree bit for bit."""
    chex.assert_trees_all_equal(a, b)


class Compilations(logging.Handler):
    """Context that lists what XLA compiles inside it, from JAX's own log."""

    def __init__(self) -> None:
        super().__init__(level=logging.DEBUG)
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "Finished XLA compilation of" in message:
            self.names.append(message)

    def __enter__(self) -> "Compilations":
        self._logging = jax.log_compiles(True)
        self._logging.__enter__()
        logging.getLogger("jax").addHandler(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        logging.getLogger("jax").removeHandler(self)
        self._logging.__exit__(*exception)


def equations(program: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those of branches, loops and calls included."""
    for equation in program.eqns:
        yield equation
        for inner in jex.jaxprs_in_params(equation.params):
            yield from equations(inner)
