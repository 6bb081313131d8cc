"""What compiled steps hold and compute, by counts that no machine changes."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from benchmarks.compiling import kernels
from kfac_optax._tree import all_finite, gather, make_buckets, scatter, select
from kfac_optax.linalg.in_order import after
from tests import helpers as h

DEPTH, BATCH, WIDTH = 10, 4096, 8


def predict(params, x):
    for name in sorted(params):
        x = jnp.tanh(h.dense(x, params[name]))
    return ko.Categorical(x)


@functools.cache
def problem():
    params = {f"layer{i}": jnp.full((WIDTH, WIDTH), 0.1) for i in range(DEPTH)}
    x, y = jnp.ones((BATCH, WIDTH)), jnp.zeros(BATCH, jnp.int32)
    estimator = ko.fisher(predict)
    return params, x, y, estimator, estimator.layers(params, x)


def loss(params, x, y):
    return predict(params, x).mean_nll(y)


@functools.cache
def gradient_step():
    params, x, y, _, _ = problem()
    return jax.jit(jax.value_and_grad(loss)).lower(params, x, y).compile()


def test_a_flag_of_many_leaves_is_computed_once():
    leaves, others = 24, 20

    def kept(check):
        def function(new, old):
            return check(new), select(all_finite(new), [x + 1 for x in old], old)

        new = [jnp.ones((3, 5))] * leaves
        old = [jnp.ones((2, 3 + i)) for i in range(others)]
        return jax.jit(function).lower(new, old).compile().as_text().count(" and(")

    assert kept(lambda new: 0) < 2 * leaves
    assert kept(lambda new: after([x[0, 0] for x in new], new)) < 4 * leaves


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="kernels of the CPU's compiler")
def test_a_deep_net_has_no_more_kernels_than_a_shallow_one():
    """Kernels that differ in nothing are compiled once, so that depth costs no time to compile."""
    shallow, deep = _kernels(6), _kernels(12)
    assert deep.distinct <= shallow.distinct < deep.all


class Kernels(NamedTuple):
    distinct: int
    all: int


def _kernels(depth):
    """Of a two-level step with statistics and inverses."""
    one = {"w": jnp.full((5, 5), 0.1), "scale": jnp.ones(5)}
    params, x = {f"layer{i:02d}": one for i in range(depth)}, jnp.ones((16, 5))

    def scaled(params, x):
        for layer in params.values():
            x = jnp.tanh(h.dense(x, layer["w"]) * layer["scale"])
        return ko.Categorical(x)

    estimator = ko.fisher(scaled)
    layers = estimator.layers(params, x)
    tx = ko.kfac_two_level(layers, learning_rate=0.1, uncovered="graft", inverse="cholesky")

    def step(params, state, x):
        at = estimator.at(params, x, key=jax.random.key(0))
        return tx.update(params, state, params, curvature=at, refresh=True)

    program = jax.jit(step).lower(params, jax.eval_shape(tx.init, params), x).compile()
    bodies = re.findall(
        r"^%fused_computation\S* \(.*?^}", program.as_text(), re.DOTALL | re.MULTILINE
    )
    # without names, numbers of instructions, where they come from, and the number of layers
    plain = [re.sub(r"%[\w.-]+|metadata=\{.*?\}|param_\d+\S*", "", body) for body in bodies]
    return Kernels(len({body.replace(f"[{depth}", "[n") for body in plain}), len(bodies))


def test_layers_are_cut_out_at_their_places():
    """As numbers that the compiler does not know they are those of static slices."""
    params, *_, layers = problem()
    leaves = {name: i + x for i, (name, x) in enumerate(params.items())}
    (bucket,) = make_buckets(layers)
    matrices = gather(bucket, leaves, jnp.float32)
    cut = jax.jit(lambda matrices, some: scatter(bucket, matrices, params, some))
    found = cut(matrices, True)
    assert found.keys() == leaves.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, leaves[name])


def test_statistics_are_measured_without_keeping_rows():
    """Beyond what the gradient needs, the rows of a few layers: no `g` outlives its layer."""
    params, x, y, estimator, layers = problem()
    tx = ko.kfac_two_level(layers, learning_rate=0.1)

    def step(params, state, x, y):
        grads = jax.grad(loss)(params, x, y)
        at = estimator.at(params, x, key=jax.random.key(0))
        return tx.update(grads, state, params, curvature=at, refresh=False)

    state = jax.eval_shape(tx.init, params)
    with_statistics = jax.jit(step).lower(params, state, x, y).compile()
    extra = _temporary(with_statistics) - _temporary(gradient_step())
    assert extra < DEPTH // 2 * x.nbytes


def _temporary(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


def test_an_adaptive_step_runs_the_model_once_before_and_once_after_the_step():
    """Loss, gradient and exact products share one forward pass, however curvature is given."""
    params, x, y, estimator, layers = problem()
    tx = ko.kfac_adaptive(layers)

    def step(params, state, x, y):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        at = estimator.at(params, x, key=jax.random.key(0))
        value_fn = lambda p: loss(p, x, y)
        updates, state = tx.update(
            grads, state, params, curvature=at, value=value, value_fn=value_fn, refresh=False
        )
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    text = jax.jit(step).lower(params, state, x, y).compile().as_text()
    assert gradient_step().as_text().count(" tanh(") == DEPTH
    assert text.count(" tanh(") == 2 * DEPTH


def test_loss_and_products_of_a_scanned_model_share_one_loop():
    def scanned(w, x):
        def layer(x, w):
            return jnp.tanh(ko.tap_dense(x @ w, x, w)), None

        return ko.Categorical(jax.lax.scan(layer, x, w)[0])

    w, x, y = jnp.full((DEPTH, WIDTH, WIDTH), 0.1), jnp.ones((4, WIDTH)), jnp.zeros(4, jnp.int32)
    estimator = ko.ggn(scanned)

    def step(w, x, y):
        value_and_grad = jax.value_and_grad(lambda w: scanned(w, x).mean_nll(y))
        return value_and_grad(w), estimator.at(w, x).quadratic_form((w, w * w))

    assert jax.jit(step).lower(w, x, y).compile().as_text().count(" tanh(") == 1


def test_no_factorisation_is_compiled_at_a_second_place():
    """One for every bucket, though a refresh is due now and then; a search has one more, for all of
    its candidates.
    """
    *_, layers = problem()
    common = dict(inverse="cholesky", normalization="pass")
    found = {
        "kfac": ko.kfac(layers, kl_clip=None, **common),
        "two-level": ko.kfac_two_level(layers, kl_clip=None, **common),
        "adaptive": ko.kfac_adaptive(layers, **common),
        "search": ko.kfac_adaptive(layers, search_every=20, **common),
    }
    places = {name: _factorisations(tx) for name, tx in found.items()}
    # A and G of the one bucket
    assert places == {
        "kfac": {"cholesky": 2},
        "two-level": {"cholesky": 2, "eigh": 1},
        "adaptive": {"cholesky": 2},
        "search": {"cholesky": 4},
    }


def _factorisations(tx):
    """How often a traced step factorises, branches and loops included."""
    params, x, y, estimator, _ = problem()

    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        return tx.update(
            grads,
            state,
            params,
            curvature=estimator.at(params, x, key=jax.random.key(0)),
            value=value,
            value_fn=lambda p: loss(p, x, y),
        )

    traced = jax.make_jaxpr(step)(params, jax.eval_shape(tx.init, params))
    names = [eqn.primitive.name for eqn in _equations(traced.jaxpr)]
    return {name: names.count(name) for name in ("cholesky", "eigh") if name in names}


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for parameter in eqn.params.values():
            several = parameter if isinstance(parameter, tuple | list) else (parameter,)
            for inner in several:
                # closed jaxprs have one inside
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="kernels of the CPU's compiler")
def test_a_bound_on_the_movement_has_few_kernels_for_another_shape():
    """Sums over small leaves are computed of all of them together."""
    few, many = _kernels_of_a_bound(4), _kernels_of_a_bound(8)
    # of each: how it moved, the movement planned, what is handed on, and what is kept
    assert many - few <= 4 * 4


def _kernels_of_a_bound(shapes):
    params = {f"leaf{i}": jnp.ones(100 + 50 * i) for i in range(shapes)}

    class Curvature:
        """Every product is one."""

        def __init__(self):
            self.params = params

        def quadratic_form(self, directions, **_):
            return jnp.ones((1, 1))

    tx = ko.bound_movement(optax.identity(), learning_rate=0.1)

    def step(grads, state, params):
        return tx.update(grads, state, params, curvature=Curvature())

    program = jax.jit(step).lower(params, jax.eval_shape(tx.init, params), params).compile()
    return kernels(program.as_text())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="memory as the CPU's compiler plans it")
@pytest.mark.parametrize(("bound", "steps"), [("damped", 128), ("movement", 128), ("movement", 64)])
def test_activations_exist_once_in_a_step_with_statistics(bound, steps):
    """One forward pass serves loss and statistics; that of the bound, on a part of the batch, waits
    for its direction, also where there are as many steps as examples.
    """
    examples, width, classes = 64, 32, 32
    tokens = jnp.zeros((examples, steps), jnp.int32)
    names = [f"layer{i}" for i in range(DEPTH)]
    params = {name: jnp.full((width, width), 0.1) for name in names}
    params |= {"table": jnp.ones((classes, width)), "head": jnp.ones((width, classes))}

    def model(params, tokens):
        x = jnp.take(params["table"], tokens, axis=0)
        for name in names:
            x = jnp.tanh(h.dense(x, params[name]))
        return ko.Categorical(h.dense(x, params["head"]))

    estimator = ko.fisher(model)
    layers = estimator.layers(params, tokens)
    tx = ko.kfac_two_level(layers, learning_rate=0.1, bound=bound)

    def gradient(params, tokens):
        return jax.grad(lambda params: model(params, tokens).mean_nll(tokens))(params)

    def step(params, state, tokens):
        at = estimator.at(params, tokens, key=jax.random.key(0))
        grads = gradient(params, tokens)
        return tx.update(grads, state, params, curvature=at, measure=True, refresh=False)

    state = jax.eval_shape(tx.init, params)
    plain = _temporary(jax.jit(gradient).lower(params, tokens).compile())
    measured = _temporary(jax.jit(step).lower(params, state, tokens).compile())
    assert measured < 1.3 * plain
