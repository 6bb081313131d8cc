"""Noisy K-FAC: the exact posterior of a linear model, and K-FAC where there is no noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h
from tests import oracles

N, PRECISION = 6, 0.75  # their quotient is exact in single precision


def regression():
    x, y = oracles.normal(0, (N, 2)), oracles.normal(1, (N, 2))
    estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    precision = np.asarray(x.T @ x + PRECISION * jnp.eye(2))
    return x, y, estimator, precision, np.linalg.solve(precision, x.T @ y)


def test_it_finds_the_posterior_of_a_linear_model(x64):
    """Mean and covariance are those of Bayesian linear regression, from drawn parameters: the
    gradients' noise has mean zero, and goes with the rate.
    """
    x, y, estimator, precision, mean = regression()
    start, decay = jnp.zeros((2, 2)), PRECISION / N
    layers = estimator.layers(start, x)
    settings = dict(weight_decay=decay, damping=0.0, kl_clip=None, inverse_every=1)
    tx = optax.chain(
        ko.noisy_kfac(layers, curvature_every=1, **settings),
        optax.sgd(lambda k: 1 / (1 + k)),
    )

    def step(carry, key):
        w, state = carry
        drawn = ko.sample_params(layers, state, w, key, size=N, weight_decay=decay)
        gradient = x.T @ (x @ drawn - y) / N
        updates, state = tx.update(gradient, state, w, curvature=estimator.at(drawn, x))
        return (optax.apply_updates(w, updates), state), None

    count = 2000
    keys = jax.random.split(jax.random.key(0), count)
    (w, state), _ = jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), keys))(start)
    covariance = np.kron(np.linalg.inv(precision), np.eye(2))
    bound = 5 * np.sqrt(np.diag(covariance) / count).reshape(2, 2)
    assert (np.abs(w - mean) < bound).all()

    def sample(key):
        return ko.sample_params(layers, state, w, key, size=N, weight_decay=decay)

    noise = np.asarray(jax.jit(jax.vmap(sample))(keys)).reshape(count, 4) - np.ravel(w)
    spread = np.sqrt(np.diag(covariance))
    error = np.abs(noise.T @ noise / count - covariance)
    assert (error < 5 * np.outer(spread, spread) * np.sqrt(2 / count)).all()


def test_without_noise_it_is_kfac_with_weight_decay(x64):
    """In one Newton step to the maximum of the posterior; at temperature zero nothing is drawn."""
    x, y, estimator, _, mean = regression()
    w, decay = oracles.normal(2, (2, 2)), PRECISION / N
    layers = estimator.layers(w, x)
    tx = ko.noisy_kfac(layers, weight_decay=decay, damping=0.0, kl_clip=None)
    gradient = x.T @ (x @ w - y) / N
    plain = ko.kfac(layers, damping=decay, kl_clip=None)

    @jax.jit
    def both(w):
        curvature = estimator.at(w, x)
        noisy = tx.update(gradient, tx.init(w), w, curvature=curvature)
        return *noisy, plain.update(gradient + decay * w, plain.init(w), w, curvature=curvature)[0]

    updates, state, same = both(w)
    np.testing.assert_allclose(w - updates, mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(updates, same, rtol=1e-12)
    cold = ko.sample_params(
        layers, state, w, jax.random.key(0), size=N, weight_decay=decay, temperature=0.0
    )
    np.testing.assert_array_equal(cold, w)


def test_schedules_of_both_numbers_add_up():
    problem = h.plain_problem()
    tx = ko.noisy_kfac(problem.layers, weight_decay=lambda k: 0.25, damping=0.5, kl_clip=None)
    update = jax.jit(lambda v: tx.update(v, tx.init(v), v, curvature=problem.at(v)))
    _, state = update(problem.params)
    assert float(ko.diagnostics(state)["damping"]) == 0.75


def test_errors():
    problem, state = h.plain_problem(), h.initial_state("kfac")
    with pytest.raises(ValueError, match="noisy_kfac: weight_decay=-1; expected"):
        ko.noisy_kfac(problem.layers, weight_decay=-1, learning_rate=0.1)
    with pytest.raises(TypeError, match="noisy_kfac: got an unknown argument 'coupling'"):
        ko.noisy_kfac(problem.layers, coupling=ko.coarse_correction(), learning_rate=0.1)
    key, v = jax.random.key(0), problem.params
    with pytest.raises(
        ValueError, match="sample_params: weight_decay=0; expected weight_decay > 0"
    ):
        ko.sample_params(problem.layers, state, v, key, size=8, weight_decay=0)
    with pytest.raises(ValueError, match="sample_params: size=0; expected size > 0"):
        ko.sample_params(problem.layers, state, v, key, size=0, weight_decay=0.1)
