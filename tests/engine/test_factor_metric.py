"""The metric of a preconditioner's own factors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h
from tests import oracles


def once(tx, estimator, params, x, metric):
    """Updates from a gradient of ones, the state after them, and their product."""

    @jax.jit
    def run(params):
        extra = {"curvature": estimator.at(params, x), "refresh": True}
        updates, state = tx.update(
            jax.tree.map(jnp.ones_like, params), tx.init(params), params, **extra
        )
        return updates, state, metric(state, updates)

    return run(params)


@pytest.mark.parametrize(("sizes", "bias"), [((3, 4, 2), True), ((4, 4, 4), False)])
def test_metric_is_the_dense_block_diagonal(x64, sizes, bias):
    params, x = oracles.make_params(0, sizes, bias), oracles.normal(1, (6, sizes[0]))
    estimator = ko.ggn(oracles.classifier)
    layers = estimator.layers(params, x)
    tx = ko.kfac(layers, learning_rate=1.0, damping=0.1, kl_clip=None)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _, product = once(tx, estimator, params, x, ko.factor_metric(layers))
    a, g = oracles.per_example(
        params, x, jnp.asarray(oracles.softmax_columns(oracles.forward(params, x)[0]))
    )
    blocks = oracles.block_diagonal(oracles.kronecker_fisher(a, g), oracles.block_sizes(a, g))
    u = oracles.flatten(updates)
    np.testing.assert_allclose(product, u @ blocks @ u, rtol=1e-10)
    damped = sum(jnp.vdot(p, q) for p, q in zip(jax.tree.leaves(updates), jax.tree.leaves(grads)))
    np.testing.assert_allclose(product + 0.1 * u @ u, damped, rtol=1e-10)


def test_other_blocks_and_parameters_without_a_layer(x64):
    """Normalisation, diagonal leaves: one step from fresh factors,
    `<U, V> = <U, F U> + damping ||U||^2`.
    """
    params = {
        "w": oracles.normal(0, (3, 3)),
        "scale": oracles.normal(1, (3,)),
        "free": oracles.normal(2, (2, 3)),
    }

    def predict(p, x):
        s = x @ p["w"]
        s = ko.tap_dense(s, x, p["w"])
        y = s * p["scale"]
        return ko.Normal(ko.tap_scale_shift(y, s, p["scale"]) + p["free"].sum(0))

    x = oracles.normal(3, (5, 3))
    estimator = ko.ggn(predict)
    layers = estimator.layers(params, x)
    settings = {"normalization": "diagonal", "uncovered": "diagonal"}
    tx = ko.kfac(layers, learning_rate=1.0, damping=0.1, kl_clip=None, **settings)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state, product = once(tx, estimator, params, x, ko.factor_metric(layers, **settings))
    u, v = (jax.flatten_util.ravel_pytree(tree)[0] for tree in (updates, grads))
    np.testing.assert_allclose(product + 0.1 * u @ u, u @ v, rtol=1e-10)
    with pytest.raises(
        ValueError, match="factor_metric: the state holds .*diagonal_1x6.*, expected "
    ):
        ko.factor_metric(layers)(state, updates)


def test_a_state_without_curvature_is_an_error():
    problem = h.plain_problem()
    with pytest.raises(ValueError, match="factor_metric: found 0 CurvatureState"):
        ko.factor_metric(problem.layers)(optax.scale_by_adam().init(problem.params), problem.params)
