"""PSGD of low rank: its steps on dense matrices, and what they come to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.methods.gradient import psgd_lra_fit
from kfac_optax.methods.gradient.psgd_lra_fit import Bounds, LowRank
from tests.methods import gradient_cases as c

NOTHING = Bounds(*np.zeros(3))


def draws(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def dense(q):
    return (jnp.eye(len(q.d)) + q.u @ q.v.T) * q.d


def criterion(q, h, v):
    """Mean of `h^T P h + v^T P^{-1} v` for a dense `Q`."""
    b = jnp.linalg.solve(q.T, v.T)
    return (jnp.sum(jnp.square(q @ h.T)) + jnp.sum(jnp.square(b))) / len(h)


def largest(rows, left, right):
    """Mean of `(max |x| + |left| |diag(x) right|)^2` over rows."""
    norm = jnp.linalg.norm
    each = [jnp.max(jnp.abs(x)) + norm(left) * norm(x[:, None] * right) for x in rows]
    return jnp.mean(jnp.square(jnp.stack(each)))


@pytest.mark.parametrize("of_u", [True, False])
def test_steps_are_those_of_the_criterion(x64, of_u):
    """Its derivatives by automatic differentiation, in the groups that keep the form."""
    n, r, k, rate = 5, 2, 3, 0.3
    q = LowRank(draws(0, n, r), draws(1, n, r), jnp.abs(draws(2, n)) + 0.5)
    h, v = draws(3, k, n), draws(4, k, n)
    full, one = dense(q), jnp.eye(n)
    of_d = jax.grad(lambda e: criterion(full * (1 + e), h, v))(jnp.zeros(n)) / 2
    a, b = h @ full.T, jnp.linalg.solve(full.T, v.T).T
    p = full.T @ full
    # what the second derivative is at most, of `Q = diag(d) + U (V^T diag(d))` and of `Q^{-T}`
    inner = jnp.linalg.inv(jnp.eye(r) + q.u.T @ q.v)
    bound = largest(q.d * h, q.u, q.v) + largest(v / q.d, q.v @ inner, q.u)
    for x, of_x in ((h, full), (v, jnp.linalg.inv(full).T)):
        spectral = jnp.mean(jnp.stack([jnp.linalg.norm(of_x * y, 2) ** 2 for y in x]))
        assert bound >= spectral
    d = 1 - rate * of_d / bound
    side = q.v if of_u else q.u
    moved = (lambda x: one + x @ q.v.T) if of_u else (lambda x: one + q.u @ x.T)
    of_side = jax.grad(lambda x: criterion(moved(x) @ full, h, v))(jnp.zeros((n, r))) / 2
    norms = sum(jnp.linalg.norm(x) * jnp.linalg.norm(side @ side.T @ x) for x in (*a, *b)) / k
    expected = moved(-rate * of_side / norms) @ full * d
    fit = jax.jit(psgd_lra_fit.fitted)
    got, bounds = fit(q, NOTHING, h, v, jnp.float64(rate), jnp.bool_(of_u))
    np.testing.assert_allclose(dense(got), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(jnp.linalg.norm(got.u), jnp.linalg.norm(got.v), rtol=1e-12)
    np.testing.assert_allclose(bounds, (bound, norms * of_u, norms * (not of_u)), rtol=1e-10)
    # bounds of larger gradients before count on
    _, later = fit(q, Bounds(*jnp.full(3, 1e6)), h, v, jnp.float64(rate), jnp.bool_(of_u))
    np.testing.assert_allclose(later.d, 0.95e6 + 0.05 * bound, rtol=1e-10)
    update = psgd_lra_fit.preconditioned(q, h[0])
    np.testing.assert_allclose(update, p @ h[0], rtol=1e-10)


def test_the_fixed_point_whitens(x64):
    """`P = E[h h^T]^{-1/2}`, with as many columns as parameters for any gradients."""
    n = 5
    root = draws(0, n, n)
    p = root @ root.T + jnp.eye(n) / 4
    # probes whose second moments are exact: H = P^{-2} of the gradients, I of the others
    h = jnp.sqrt(n) * jnp.linalg.inv(p)
    v = jnp.sqrt(n) * jnp.eye(n)

    def fit(carry, i):
        q, bounds = psgd_lra_fit.fitted(*carry, h, v, jnp.float64(0.5), i % 2 == 0)
        return (q, bounds), criterion(dense(q), h, v)

    start = LowRank(jnp.zeros((n, n)), draws(3, n, n) / 2, jnp.ones(n))
    train = jax.jit(lambda q: jax.lax.scan(fit, (q, NOTHING), jnp.arange(4000)))
    (q, _), values = train(start)
    np.testing.assert_allclose(dense(q).T @ dense(q), p, rtol=1e-6, atol=1e-7)
    # its minimum, and down all the way as far as a hundred steps tell
    np.testing.assert_allclose(values[-1], 2 * jnp.trace(jnp.linalg.inv(p)), rtol=1e-10)
    assert (jnp.diff(values[::100]) <= 1e-9).all()


def test_it_whitens_correlated_gradients():
    """Two leaves that share a direction a hundred times as large as the rest."""
    common = draws(5, 6)
    common = 10 * common / jnp.linalg.norm(common)
    z, along = draws(6, 3000, 6), draws(7, 3000, 1)
    rows = (z + along * common).astype(jnp.float32)
    gradients = {"w": rows[:, :4].reshape(-1, 2, 2), "b": rows[:, 4:]}
    rate = lambda t: 0.3 / (1 + t / 1000)
    tx = ko.psgd_lra(rank=2, b1=0.0, fit_probability=1.0, fit_rate=rate)
    start = tx.init(jax.tree.map(lambda g: g[0], gradients))
    whole = jax.jit(lambda s, g: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], s, g))
    state, _ = whole(start, gradients)
    q = np.asarray(dense(state.held.q))
    covariance = np.eye(6) + np.outer(common, common)
    # in the order of the flattened tree: b before w
    order = [4, 5, 0, 1, 2, 3]
    whitened = q.T @ q @ covariance[np.ix_(order, order)] @ q.T @ q
    assert np.linalg.norm(whitened - np.eye(6)) < 0.5 * np.linalg.norm(np.eye(6))
    assert np.linalg.cond(covariance) > 100


def test_the_first_scale_is_that_of_the_gradient(x64):
    g = {"w": draws(0, 2, 3)}
    (update,), _ = c.run(ko.psgd_lra(fit_probability=0.0), [g])
    size = np.sqrt(np.mean(np.square(g["w"])))
    np.testing.assert_allclose(update["w"], g["w"] / size, rtol=1e-10)
    # also where the first gradients are zero, of which nothing is learnt
    zero = jax.tree.map(jnp.zeros_like, g)
    updates, state = c.run(ko.psgd_lra(fit_probability=1.0, b1=0.0), [zero, zero])
    np.testing.assert_array_equal(updates[1]["w"], zero["w"])
    assert not state.held.q.d.any()


def test_gradients_of_other_parameters_and_bad_words_are_refused():
    tx = ko.psgd_lra(rank=1)
    with pytest.raises(ValueError, match="the gradient has 3 entries, but the state is that of 2"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="rank"):
        ko.psgd_lra(rank=0)
    with pytest.raises(ValueError, match="initial_scale"):
        ko.psgd_lra(initial_scale=-1.0)


def test_no_scale_changes_its_sign(x64):
    """The change of a scale may be three times the bound of the criterion's second derivative, as
    where a gradient of an unusual size has the signs of `V`.
    """
    fit = jax.jit(psgd_lra_fit.fitted)
    for seed in range(20):
        u, v = draws(seed, 2, 16, 1)
        h, own = draws(seed + 100, 2, 1, 16)
        h = 1e3 * jnp.sign(v.T) * jnp.abs(h)
        q = LowRank(u, v, jnp.ones(16))
        new, _ = fit(q, NOTHING, h, own, jnp.ones(()), True)
        assert (new.d >= 0).all()
