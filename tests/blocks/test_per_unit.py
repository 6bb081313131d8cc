"""Metrics of single units: against dense blocks, the paper's formula, and what leaves them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax import testing
from tests import oracles

P, Q, N = 3, 2, 7


def moments(block, a, g, bias=True):
    layer = testing.dense_layer(a.shape[1], g.shape[1], bias=bias)
    return block.measure(a, g, ko.Use(layer, len(a), len(a), jnp.float64))


def rows(seed=0):
    return oracles.normal(seed, (N, P)) + 0.5, oracles.normal(seed + 1, (N, Q))


def solved(block, a, g, v, damping=0.0, bias=True):
    lam = jnp.asarray(damping)
    return np.asarray(block.solve(block.factorize(moments(block, a, g, bias), lam), v, lam))


@pytest.mark.parametrize("make", [ko.unit_block, ko.quasi_diagonal_block])
def test_blocks_keep_the_laws_with_a_bias(make):
    """Without one they do so for all methods of the catalogue."""
    testing.check_block(testing.dense_case(make(), 3, 2, bias=True, exact=True))


def test_unit_blocks_are_those_of_the_dense_matrix(x64):
    a, g = rows()
    ones = np.concatenate([a, np.ones((N, 1))], 1)
    v = oracles.normal(3, (P + 1, Q))
    got = solved(ko.unit_block(), a, g, v, 0.1)
    for k in range(Q):
        metric = (ones * np.asarray(g[:, k : k + 1]) ** 2).T @ ones / N
        want = np.linalg.solve(metric + 0.1 * np.eye(P + 1), v[:, k])
        np.testing.assert_allclose(got[:, k], want, rtol=1e-10)


def test_quasi_diagonal_is_the_formula_of_the_paper(x64):
    a, g = rows()
    v = oracles.normal(3, (P + 1, Q))
    got = solved(ko.quasi_diagonal_block(), a, g, v)
    squares = np.asarray(g).T[:, None] ** 2  # [Q, 1, N]
    m00 = squares.mean(-1).ravel()
    m0i, mii = ((squares * np.asarray(x).T).mean(-1).T for x in (a, a**2))
    w = (v[:-1] * m00 - v[-1] * m0i) / (mii * m00 - m0i**2)
    np.testing.assert_allclose(got[:-1], w, rtol=1e-10)
    np.testing.assert_allclose(got[-1], v[-1] / m00 - (m0i / m00 * w).sum(0), rtol=1e-10)


def test_quasi_diagonal_without_a_bias_is_the_diagonal(x64):
    a, g = rows()
    v = oracles.normal(3, (P, Q))
    diagonal = np.asarray(a**2).T @ np.asarray(g**2) / N
    got = solved(ko.quasi_diagonal_block(), a, g, v, 0.1, bias=False)
    np.testing.assert_allclose(got, v / (diagonal + 0.1), rtol=1e-12)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_affine_inputs_leave_the_step_of_the_function_alone(x64, damping):
    """`a -> s a + t`: pre-activations move the same, but with damping, or by the diagonal alone."""
    a, g = rows()
    s, t = jnp.array([2.0, 0.3, -5.0]), jnp.array([1.0, -2.0, 0.5])

    def moved(block, a):
        ones = jnp.concatenate([a, jnp.ones((N, 1))], 1)
        return ones @ solved(block, a, g, ones.T @ g / N, damping)

    for block in (ko.quasi_diagonal_block(), ko.unit_block()):
        before, after = moved(block, a), moved(block, s * a + t)
        same = np.allclose(before, after, rtol=1e-9, atol=1e-10)
        assert same == (damping == 0)


def test_the_diagonal_alone_depends_on_shifts(x64):
    """The check above is one that a metric can fail."""
    a, g = rows()

    def moved(a):
        ones = jnp.concatenate([a, jnp.ones((N, 1))], 1)
        diagonal = jnp.square(ones).T @ jnp.square(g) / N
        return ones @ (ones.T @ g / N / diagonal)

    assert np.abs(moved(a) - moved(a + 2)).max() > 0.1


def test_one_unit_alone_is_the_exact_natural_gradient(x64):
    """Logistic regression: no hidden layer and one output."""
    params = {"w": oracles.normal(0, (P, 1)), "b": oracles.normal(1, (1,))}
    x = oracles.normal(2, (N, P))
    estimator = ko.ggn(lambda p, x: ko.Bernoulli((x @ p["w"] + p["b"])[:, 0]))
    grads = {"w": oracles.normal(3, (P, 1)), "b": oracles.normal(4, (1,))}
    layers, curvature = estimator.layers(params, x), estimator.at(params, x)

    @jax.jit
    def of(grads):
        unit = ko.unitwise_natural(layers, damping=0.01)
        exact = ko.smw(damping=0.01)
        return [
            tx.update(grads, tx.init(params), params, curvature=curvature)[0]
            for tx in (unit, exact)
        ]

    got, want = of(grads)
    for name in params:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-8)


def test_a_dead_unit_and_a_dead_input_get_no_step_without_damping(x64):
    a, g = rows()
    a, g = a.at[:, 1].set(0), g.at[:, 0].set(0)
    v = jnp.ones((P + 1, Q))
    for block in (ko.quasi_diagonal_block(), ko.unit_block()):
        got = solved(block, a, g, v)
        assert np.isfinite(got).all() and (got[:, 0] == 0).all() and abs(got[1, 1]) < 1e-12


@pytest.mark.parametrize("preset", [ko.quasi_diagonal, ko.unitwise_natural])
def test_with_defaults_a_net_is_trained(preset):
    """Nothing bounds their steps, so that old metrics would make the loss grow."""
    kernels = np.random.default_rng(0).normal(size=(3, 16, 6))
    x, params = jnp.asarray(kernels[0, :, :4]), {"a": kernels[1, :4] / 2, "b": kernels[2, :6, :2]}
    x, params = jnp.float32(x), jax.tree.map(jnp.float32, params)
    labels = (x[:, 0] * x[:, 1] > 0).astype(int)

    def predict(params, x):
        return ko.Categorical(jnp.tanh(x @ params["a"]) @ params["b"])

    def loss(params):
        return predict(params, x).mean_nll(labels)

    estimator = ko.ggn(predict)
    tx = optax.chain(preset(estimator.layers(params, x)), optax.sgd(0.1))

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            curvature = estimator.at(params, x)
            updates, state = tx.update(grads, state, params, curvature=curvature)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), length=10)[1]

    values = train(params)
    assert (values[1:] < values[:-1]).all()


def test_inputs_alone_are_refused():
    use = ko.Use(testing.dense_layer(3, 1), 2, 2, jnp.float32)
    for make in (ko.unit_block, ko.quasi_diagonal_block):
        with pytest.raises(ValueError, match="_block: measure got no output gradients"):
            make().measure(jnp.ones((2, 3)), None, use)
