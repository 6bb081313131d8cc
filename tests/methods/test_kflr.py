"""KFLR and KFRA: exact factors, and a step from an exact model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from tests import oracles

SIZES, N = (3, 4, 2), 5


def setup():
    return oracles.make_params(0, SIZES), oracles.normal(1, (N, 3)), jnp.arange(N) % 2


def rows(params, x):
    """Rows of all layers, for the columns of the softmax Fisher."""
    columns = oracles.softmax_columns(oracles.forward(params, x, tapped=False)[0])
    return oracles.per_example(params, x, columns)


def outputs(estimator, params, x, key=None):
    """`[G of each layer]`."""
    plan = oracles.plan(estimator.layers(params, x))
    measured, _ = estimator.at(params, x, key=key).statistics(plan)
    return [factors.outputs[0] for factors in measured]


def test_factors_are_the_dense_definition(x64):
    params, x, _ = setup()
    a, g = rows(params, x)
    want_a, want_g = oracles.cross_factors(a, g)
    estimator = ko.ggn(oracles.classifier)
    plan = oracles.plan(estimator.layers(params, x))
    measured, _ = jax.jit(lambda p: estimator.at(p, x).statistics(plan))(params)
    for i, factors in enumerate(measured):
        np.testing.assert_allclose(factors.inputs[0], want_a[i][i], rtol=1e-11)
        np.testing.assert_allclose(factors.outputs[0], want_g[i][i], rtol=1e-11)


def test_they_are_what_drawn_labels_give_on_average(x64):
    """Within the standard errors of 500 draws, and no closer than these."""
    params, x, _ = setup()
    exact = jax.jit(lambda p: outputs(ko.ggn(oracles.classifier), p, x))(params)
    keys = jax.random.split(jax.random.key(0), 500)
    drawn = jax.jit(jax.vmap(lambda key: outputs(ko.fisher(oracles.classifier), params, x, key)))(
        keys
    )
    for mine, want in zip(drawn, exact, strict=True):
        error = mine.std(0, ddof=1) / np.sqrt(len(keys))
        deviations = np.abs(mine.mean(0) - want) / error
        assert deviations.max() < 3 and deviations.max() > 0.1


def test_the_step_minimises_the_model_along_the_damped_direction(x64):
    params, x, y = setup()
    lam = 0.1
    estimator = ko.ggn(oracles.classifier)
    tx = ko.kflr(estimator.layers(params, x), damping=lam)
    grads = jax.grad(lambda p: oracles.classifier(p, x).mean_nll(y))(params)
    run = jax.jit(
        lambda g: tx.update(g, tx.init(params), params, curvature=estimator.at(params, x))
    )
    got = oracles.flatten(run(grads)[0])
    a, g = rows(params, x)
    v = oracles.flatten(grads)
    direction = np.linalg.solve(oracles.factored_tikhonov(a, g, lam), v)
    fisher = oracles.exact_fisher(a, g) + lam * np.eye(len(v))
    rate = direction @ v / (direction @ fisher @ direction)
    np.testing.assert_allclose(got, -rate * direction, rtol=1e-8, atol=1e-12)


def test_with_the_recursion_it_trains():
    params, x, y = setup()
    estimator = ko.recursive_ggn(oracles.classifier)
    tx = ko.kflr(estimator.layers(params, x))
    loss = jax.jit(lambda p: oracles.classifier(p, x).mean_nll(y))

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params, curvature=estimator.at(params, x))
        return jax.tree.map(jnp.add, params, updates), state

    state, start = tx.init(params), loss(params)
    for _ in range(8):
        params, state = step(params, state)
    assert loss(params) < 0.25 * start


def test_without_curvature_it_says_what_is_missing():
    params, x, _ = setup()
    tx = ko.kflr(ko.ggn(oracles.classifier).layers(params, x))
    with pytest.raises(ValueError, match="kflr.update got no `curvature`"):
        tx.update(params, tx.init(params), params, curvature=None)
