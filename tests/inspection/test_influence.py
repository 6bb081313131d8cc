"""Influence functions against refits without an example, and LiSSA against the dense solve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from tests import helpers as h
from tests import oracles

N, P, DECAY = 8, 3, 0.25


def ridge():
    """Minimum of `mean (x w - y)^2 / 2 + DECAY |w|^2 / 2`, its data and its Hessian."""
    x, y = np.asarray(oracles.normal(0, (N, P))), np.asarray(oracles.normal(1, N))
    hessian = x.T @ x / N + DECAY * np.eye(P)
    w = jnp.asarray(np.linalg.solve(hessian, x.T @ y / N))[:, None]
    return x, y, w, hessian


def predict(w, x):
    return ko.Normal(ko.tap_dense(x @ w, x, w))


def losses(w, x, y):
    return jnp.square((x @ w)[:, 0] - y) / 2


def solver(x, w):
    """What a preconditioner with the weight decay for damping holds, inside a chain."""
    estimator = ko.ggn(predict)
    layers = estimator.layers(w, x)
    tx = ko.kfac(layers, learning_rate=1.0, damping=DECAY)
    update = jax.jit(lambda w: tx.update(w, tx.init(w), w, curvature=estimator.at(w, x)))
    _, state = update(w)
    return functools.partial(ko.inverse_product, layers, (state, ()))


def test_leaving_an_example_out_of_ridge_regression(x64):
    """First order is exact up to `1 - h_b`, by the formula for a downdated inverse."""
    x, y, w, hessian = ridge()
    new = np.asarray(oracles.normal(2, P))
    got = ko.influence(lambda w: new @ w[:, 0], lambda w: losses(w, x, y), w, solver(x, w))
    solved = np.linalg.solve(hessian, x.T)  # [P, N]
    slopes = (x @ w)[:, 0] - y
    np.testing.assert_allclose(got, new @ solved * slopes / N, rtol=1e-9)
    leverage = np.einsum("np,pn->n", x, solved) / N
    for b in range(N):
        rest = np.arange(N) != b
        left = x[rest].T @ x[rest] / N + DECAY * np.eye(P)  # the others keep their weight 1/N
        refit = np.linalg.solve(left, x[rest].T @ y[rest] / N)
        change = new @ refit - new @ w[:, 0]
        np.testing.assert_allclose(got[b] / (1 - leverage[b]), change, rtol=1e-8)


def test_of_a_larger_training_set(x64):
    x, y, w, _ = ridge()
    ask, part = lambda w: w.sum(), lambda w: losses(w, x[:2], y[:2])
    whole = ko.influence(ask, lambda w: losses(w, x, y), w, solver(x, w))
    np.testing.assert_allclose(ko.influence(ask, part, w, solver(x, w), size=N), whole[:2])


def test_self_influence_is_the_dense_one(x64):
    x, y, w, hessian = ridge()
    got = jax.jit(lambda w: ko.self_influence(losses, w, solver(x, w), x, y, batch_size=3))(w)
    gradients = x * ((x @ w)[:, 0] - y)[:, None]
    want = np.einsum("np,pq,nq->n", gradients, np.linalg.inv(hessian), gradients) / N
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_a_posterior_solves_too(x64):
    """Its damping is the prior precision over the number of examples."""
    x, _, w, hessian = ridge()
    posterior = ko.laplace(ko.ggn(predict), w, [(x,)], prior_precision=N * DECAY)
    want = np.linalg.solve(hessian, oracles.normal(3, (P, 1)))
    np.testing.assert_allclose(posterior.inverse_product(oracles.normal(3, (P, 1))), want)


def test_lissa_of_a_network_is_the_dense_solve(x64):
    """With exact products of the whole matrix, couplings between layers included."""
    params, x = oracles.make_params(0, (3, 2, 2)), oracles.normal(1, (6, 3))
    estimator = ko.ggn(oracles.classifier)
    s = jnp.asarray(oracles.softmax_columns(oracles.forward(params, x)[0]))
    fisher = oracles.exact_fisher(*oracles.per_example(params, x, s))
    scale = 0.6 * (np.linalg.eigvalsh(fisher).max() + 0.1)
    product = lambda v: estimator.vector_product(params, v, x)
    solve = jax.jit(ko.lissa(product, scale=scale, damping=0.1, steps=300))
    want = np.linalg.solve(fisher + 0.1 * np.eye(len(fisher)), oracles.flatten(params))
    np.testing.assert_allclose(oracles.flatten(solve(params)), want, rtol=1e-6, atol=1e-9)
    diverged = ko.lissa(product, scale=0.4 * scale, damping=0.1, steps=300)(params)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(diverged))


@pytest.mark.parametrize("factor", [2.0, 0.3])
def test_lissa_from_one_batch_after_another(x64, factor):
    """Near the solve of the mean where the scale is large; NaN where it is too small."""
    x, _, _, hessian = ridge()
    halves = jnp.asarray(x).reshape(2, N // 2, P)

    def product(v, step):
        part = halves[step % 2]
        return part.T @ (part @ v) / len(part)

    top, v = np.linalg.eigvalsh(hessian).max(), jnp.ones(P)
    solve = ko.lissa(product, scale=factor * top, damping=DECAY, steps=200, stochastic=True)
    want = np.linalg.solve(hessian, v)
    if factor < 1:
        assert np.isnan(solve(v)).all()
    else:
        # half a step of the difference between the batches is left
        np.testing.assert_allclose(solve(v), want, atol=0.2 * np.abs(want).max())


def test_errors():
    problem = h.plain_problem()
    loss, same = problem.loss, lambda v: v
    with pytest.raises(
        ValueError, match=r"influence: losses returned an array \[\]; expected \[n\]"
    ):
        ko.influence(loss, loss, problem.params, same)
    with pytest.raises(
        ValueError, match=r"self_influence: losses of one example returned an array"
    ):
        ko.self_influence(lambda p, x: jnp.ones(3), problem.params, same, problem.x)
    with pytest.raises(ValueError, match="got no array with examples on axis 0"):
        ko.self_influence(lambda p: jnp.ones(1), problem.params, same)
    with pytest.raises(ValueError, match="lissa: scale=0; expected scale > 0"):
        ko.lissa(same, scale=0)
    with pytest.raises(ValueError, match="lissa: steps=1; expected steps >= 2"):
        ko.lissa(same, scale=1.0, steps=1)
