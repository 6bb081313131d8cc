"""PSGD: the group step on dense matrices, and what the Kronecker form comes to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.methods.gradient import psgd_fit
from tests.methods import gradient_cases as c


def draws(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@jax.jit
def step(q, h, v, rate=0.3):
    """One step of a dense factor on a pair of vectors."""
    return psgd_fit.fitted({"0": q[None]}, h[None], v[None], jnp.asarray(rate))["0"][0]


def test_the_step_is_its_formula(x64):
    """`Q - rate / |S + T| triu(a a^T - b b^T) Q`, with `a = Q h` and `b = Q^{-T} v`."""
    q = jnp.triu(draws(0, 3, 3)) + 3 * jnp.eye(3)
    h, v = draws(1, 3), draws(2, 3)
    a, b = q @ h, jnp.linalg.solve(q.T, v)
    total = jnp.outer(a, a) + jnp.outer(b, b)
    bound = jnp.abs(total).sum(1).max()
    assert bound >= jnp.linalg.norm(total, 2)
    expected = q - 0.3 / bound * jnp.triu(jnp.outer(a, a) - jnp.outer(b, b)) @ q
    np.testing.assert_allclose(step(q, h, v), expected, rtol=1e-12)


def test_newton_pairs_give_the_absolute_inverse_of_an_indefinite_hessian(x64):
    """On the mean over `v`, `S = Q H H Q^T` and `T = (Q Q^T)^{-1}`: the sign of no direction is
    lost.
    """
    hessian = jnp.array([[2.0, 1.0, 0.0], [1.0, -3.0, 0.5], [0.0, 0.5, 0.3]])

    def fit(q, _):
        of_h = q @ hessian @ hessian @ q.T
        of_v = jnp.linalg.inv(q @ q.T)
        return psgd_fit.moved(q[None], of_h[None], of_v[None], jnp.float64(0.5))[0], None

    q, _ = jax.lax.scan(fit, jnp.eye(3), length=400)
    values, vectors = np.linalg.eigh(hessian)
    expected = (vectors / np.abs(values)) @ vectors.T
    np.testing.assert_allclose(q.T @ q, expected, rtol=1e-7, atol=1e-8)
    assert (jnp.tril(q, -1) == 0).all()


def test_steps_follow_a_change_of_the_parameters(x64):
    """With `theta = R theta'`, `R` lower triangular: `h' = R^T h`, `v' = R^{-1} v` and
    `Q' = Q R^{-T}` in all steps, as `a` and `b` are the same.
    """
    r = jnp.tril(draws(3, 3, 3)) + 2 * jnp.eye(3)
    inverse = jnp.linalg.inv(r)
    q = jnp.eye(3)
    other = q @ inverse.T
    for seed in range(5):
        h, v = draws(10 + seed, 3), draws(20 + seed, 3)
        q, other = step(q, h, v), step(other, r.T @ h, inverse @ v)
        # one factor alone is balanced with nothing, so it is as it was
        np.testing.assert_allclose(other, q @ inverse.T, rtol=1e-9, atol=1e-12)


def kronecker(factors, name):
    """`P` of the first tensor of a group as a dense matrix."""
    product = np.ones((1, 1))
    for q in factors[name].values():
        q = np.asarray(q[0], np.float64)
        product = np.kron(product, q.T @ q if q.ndim == 2 else np.diag(q**2))
    return product


@pytest.mark.parametrize("shape", [(3, 2), (2, 2, 2)], ids=str)
def test_the_kronecker_step_is_dense(x64, shape):
    """`A = Q h` and `B = Q^{-T} v` with the dense Kronecker product; balancing leaves it as it is."""
    q = {str(i): (jnp.triu(draws(i, 1, n, n)) + 2 * jnp.eye(n)) for i, n in enumerate(shape)}
    dense = np.ones((1, 1))
    for x in q.values():
        dense = np.kron(dense, x[0])
    h, v = draws(8, 1, *shape), draws(9, 1, *shape)
    a = (dense @ np.ravel(h)).reshape(shape)
    b = np.linalg.solve(dense.T, np.ravel(v)).reshape(shape)
    got = jax.jit(psgd_fit.fitted)(q, h, v, jnp.float64(0.2))
    product, expected = np.ones((1, 1)), np.ones((1, 1))
    for i, n in enumerate(shape):
        s, t = (np.moveaxis(x, i, 0).reshape(n, -1) for x in (a, b))
        s, t = s @ s.T, t @ t.T
        move = 0.2 / np.abs(s + t).sum(1).max() * np.triu(s - t)
        expected = np.kron(expected, q[str(i)][0] - move @ q[str(i)][0])
        product = np.kron(product, got[str(i)][0])
    np.testing.assert_allclose(product, expected, rtol=1e-10, atol=1e-12)
    sizes = [jnp.abs(x).max() for x in got.values()]
    np.testing.assert_allclose(sizes, sizes[0], rtol=1e-10)
    preconditioned = jax.jit(psgd_fit.preconditioned)(q, h)
    np.testing.assert_allclose(np.ravel(preconditioned), dense.T @ dense @ np.ravel(h), rtol=1e-10)


def test_it_whitens_gradients():
    """Gradients `L Z R` of a Kronecker covariance get a covariance close to the identity."""
    left, right = np.array([[2.0, 0.0], [1.0, 0.5]]), np.diag([1.0, 4.0, 0.3])
    z = draws(5, 2000, 2, 3)
    gradients = {"w": jnp.einsum("ij,tjk,kl->til", left, z, right), "b": 100 * z[:, 0]}
    tx = ko.psgd_kron(b1=0.0, fit_probability=1.0, fit_rate=lambda t: 0.3 / (1 + t / 100))
    start = tx.init(jax.tree.map(lambda g: g[0], gradients))
    whole = jax.jit(lambda s, g: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], s, g))
    state, updates = whole(start, gradients)
    covariance = np.kron(left @ left.T, right @ right)
    p = kronecker(state.factors, "2x3")
    whitened = p @ covariance @ p
    assert np.linalg.norm(whitened - np.eye(6)) < 0.25 * np.linalg.norm(np.eye(6))
    assert np.linalg.cond(covariance) > 1000
    sizes = np.sqrt((np.asarray(updates["b"])[-1000:] ** 2).mean(0))
    assert (np.abs(sizes - 1) < 0.25).all()


def test_the_first_scale_is_that_of_the_gradient(x64):
    g = {"w": draws(0, 2, 3)}
    (update,), state = c.run(ko.psgd_kron(fit_probability=0.0), [g])
    size = np.sqrt(np.mean(np.square(g["w"])))
    np.testing.assert_allclose(update["w"], g["w"] / size, rtol=1e-10)
    # also where the first gradients are zero
    zero = jax.tree.map(jnp.zeros_like, g)
    updates, _ = c.run(ko.psgd_kron(fit_probability=0.0, b1=0.0), [zero, g])
    np.testing.assert_array_equal(updates[0]["w"], zero["w"])
    np.testing.assert_allclose(updates[1]["w"], g["w"] / size, rtol=1e-10)
    (update,), _ = c.run(ko.psgd_kron(fit_probability=0.0, initial_scale=2.0), [g])
    np.testing.assert_allclose(update["w"], 4 * g["w"], rtol=1e-10)
    assert state.factors["2x3"]["0"].shape == (1, 2, 2)


@pytest.mark.parametrize("preset", [ko.psgd_kron, ko.psgd_lra])
def test_gradients_whose_squares_underflow_are_whitened_too(preset):
    g = {"w": 1e-24 * jnp.array([[1.0, -2.0, 2.0], [1.0, 2.0, 2.0]])}
    (update,), _ = c.run(preset(fit_probability=0.0), [g])
    np.testing.assert_allclose(update["w"], g["w"] / 1e-24 / np.sqrt(3.0), rtol=1e-5)


def test_long_axes_and_vectors_are_diagonal():
    tx = ko.psgd_kron(max_dim=3)
    state = tx.init({"w": jnp.ones((2, 5)), "b": jnp.ones(3)})
    shapes = {name: [q.shape for q in axes.values()] for name, axes in state.factors.items()}
    assert shapes == {"2x5d": [(1, 2, 2), (1, 5)], "3d": [(1, 3)]}
    full = ko.psgd_kron(vectors="full").init({"b": jnp.ones(3)})
    assert full.factors["3"]["0"].shape == (1, 3, 3)


def test_it_fits_as_often_as_it_is_told():
    gradients = [draws(0, 200, 2, 2)[i] for i in range(200)]
    tx = ko.psgd_kron(fit_probability=0.25)
    state, step = tx.init(gradients[0]), jax.jit(tx.update)
    changes = 0
    for number, g in enumerate(gradients):
        _, new = step(g, state)
        moved = any(
            (a != b).any() for a, b in zip(*map(jax.tree.leaves, (new.factors, state.factors)))
        )
        changes += number > 0 and moved
        state = new
    assert abs(changes / 199 - 0.25) < 3 * np.sqrt(0.25 * 0.75 / 199)


def test_an_axis_without_a_gradient_stays_bounded():
    """A row that is never used: its factor grows no further than the damping lets it, as `damping v`
    stands in for it."""
    rng = np.random.default_rng(0)
    gradients = [np.diag([1.0, 0.0]) @ rng.normal(size=(2, 2)) for _ in range(300)]
    tx = ko.psgd_kron(b1=0.0, fit_probability=1.0, fit_rate=0.5, damping=1e-2)
    updates, state = c.run(tx, gradients)
    p = kronecker(state.factors, "2x2")
    assert np.isfinite(p).all()
    assert np.abs(p).max() < 10 / 1e-2
    assert np.isfinite(np.stack(updates)).all()
