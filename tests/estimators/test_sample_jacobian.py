"""The matrix behind a curvature: `F = (1/N) J^T J` in both directions, and gradients at drawn labels."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from tests import oracles

N = 5


def _dense(jacobian, params):
    """`J`, column by column, and its transpose as `vjp` has it, row by row."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    rows = jacobian.jvp(params)
    _, as_rows = jax.flatten_util.ravel_pytree(rows)
    n = sum(x.size for x in rows)
    ravel = lambda tree: jax.flatten_util.ravel_pytree(tree)[0]
    forward = jax.jit(jax.vmap(lambda e: ravel(jacobian.jvp(unravel(e)))))(jnp.eye(flat.size)).T
    backward = jax.jit(jax.vmap(lambda e: ravel(jacobian.vjp(as_rows(e)))))(jnp.eye(n))
    return forward, backward


def _fisher(curvature, params):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    product = lambda e: jax.flatten_util.ravel_pytree(curvature.vector_product(unravel(e)))[0]
    return jax.jit(jax.vmap(product))(jnp.eye(flat.size))


def _net(params, x):
    return oracles.forward(params, x)[0]


def _heads(params, x):
    """Two heads, one with a term for every position, both weighted; padding holds anything."""
    out = _net(params, x)
    weights = jnp.array([1.0, 0.0, 2.0, 0.5, 1.0])
    out = jnp.where(weights[:, None] > 0, out, jnp.nan)
    terms = jnp.stack([out, 2 * out], 1)  # [N, 2, 3]
    per_term = jnp.stack([weights, 3 * weights], 1)
    return {
        "classes": ko.Categorical(terms, weights=per_term),
        "scores": ko.Normal(terms, jnp.exp(terms), weights=per_term, batch_ndim=2),
    }


def _losses(params, x):
    return ko.Categorical(_net(params, x)).nll(jnp.arange(len(x)) % 3)


CURVATURES = {
    "classes": lambda p, x: ko.ggn(lambda p, x: ko.Categorical(_net(p, x))).at(p, x),
    "heads": lambda p, x: ko.ggn(_heads).at(p, x),
    "fisher": lambda p, x: ko.fisher(lambda p, x: ko.Normal(_net(p, x), 0.5)).at(
        p, x, key=jax.random.key(0)
    ),
    "losses": lambda p, x: ko.empirical_fisher(_losses).at(p, x),
    "part": lambda p, x: ko.ggn(lambda p, x: ko.Normal(_net(p, x)), subsample=0.6).at(p, x),
    "shared": lambda p, x: ko.ggn(lambda p, x: ko.Normal(_net(p, x))).value_and_grad(
        lambda prediction, y: prediction.mean_nll(y)
    )(p, x, targets=jnp.ones((N, 3)))[2],
}


@pytest.mark.parametrize("name", CURVATURES)
def test_the_curvature_is_the_square_of_its_jacobian(name, x64):
    params, x = oracles.make_params(0, (4, 3, 3)), oracles.normal(1, (N, 4))
    curvature = CURVATURES[name](params, x)
    jacobian = curvature.linearize()
    forward, backward = _dense(jacobian, params)
    np.testing.assert_allclose(backward, forward, rtol=1e-12, atol=1e-12)
    square = forward.T @ forward / jacobian.examples
    assert np.abs(square).max() > 0.01
    np.testing.assert_allclose(square, _fisher(curvature, params), rtol=1e-10, atol=1e-12)


def test_rows_are_the_examples_own_gradients(x64):
    params, x = oracles.make_params(0, (4, 3, 3)), oracles.normal(1, (N, 4))
    jacobian = ko.empirical_fisher(_losses).at(params, x).linearize()
    expected = jax.jacrev(lambda flat, un: _losses(un(flat), x))(
        *jax.flatten_util.ravel_pytree(params)
    )
    np.testing.assert_allclose(_dense(jacobian, params)[0], expected, rtol=1e-12, atol=1e-12)


def test_rows_of_drawn_labels_have_the_fisher_as_mean(x64):
    """A Bernoulli output has two labels, so the mean over many draws is within three errors."""
    params, x = oracles.make_params(0, (2, 1)), oracles.normal(1, (N, 2))
    predict = lambda p, x: ko.Bernoulli(_net(p, x))

    @jax.jit
    def square(key):
        curvature = ko.fisher(predict, samples=2).at(params, x, key=key)
        jacobian = curvature.linearize(sampled=True)
        assert jacobian.jvp(params)[0].shape == (N, 2)
        forward = jax.vmap(lambda e: jacobian.jvp(jax.flatten_util.ravel_pytree(params)[1](e))[0])
        rows = forward(jnp.eye(3)).reshape(3, -1)
        return rows @ rows.T / jacobian.examples

    draws = np.asarray(jax.lax.map(square, jax.random.split(jax.random.key(3), 400)))
    error = draws.std(0) / np.sqrt(len(draws))
    expected = _fisher(ko.ggn(predict).at(params, x), params)
    assert (np.abs(draws.mean(0) - expected) <= 3 * error + 1e-12).all()


def test_the_sampled_gradient_is_that_at_drawn_labels(x64):
    """With labels that are known, though drawn, it is the gradient of the mean loss at them."""
    params, x = oracles.make_params(0, (4, 3, 3)), oracles.normal(1, (N, 4))
    weights = jnp.array([1.0, 0.0, 2.0, 0.5, 1.0])
    density = lambda y, mean: -jnp.sum((y - mean) ** 2) / 2
    known = lambda key, mean: jnp.ones(3)

    def predict(params, x):
        return ko.from_log_density(density, known, _net(params, x), weights=weights)

    estimator = ko.fisher(predict, samples=3)
    got = estimator.at(params, x, key=jax.random.key(0)).sampled_gradient()
    expected = jax.grad(
        lambda p: ko.Normal(_net(p, x), weights=weights).mean_nll(jnp.ones((N, 3)))
    )(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), got, expected
    )


def test_drawn_labels_need_a_model_and_a_key():
    params, x = oracles.make_params(0, (2, 1)), jnp.ones((N, 2))
    with pytest.raises(ValueError, match="key=None"):
        ko.ggn(lambda p, x: ko.Normal(_net(p, x))).at(params, x).linearize(sampled=True)
    with pytest.raises(ValueError, match="labels of the data"):
        ko.empirical_fisher(_losses).at(params, x).sampled_gradient()
    with pytest.raises(ValueError, match="inputs of layers only"):
        ko.forward_only(lambda p, x: ko.Normal(_net(p, x))).at(params, x).linearize()
