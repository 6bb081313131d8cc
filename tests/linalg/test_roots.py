"""Inverse p-th roots against dense linear algebra in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfac_optax.linalg.roots import inverse_root, inverse_root_of_values

both = pytest.mark.parametrize("method", ["eigh", "newton"])


def with_values(values, seed=0):
    n = len(values)
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return q, (q * np.asarray(values)) @ q.T


def dense_root(values, p, ridge=0.0, seed=0):
    values = np.asarray(values, np.float64)
    q, _ = with_values(values, seed)
    return (q * (values + ridge * values.max()) ** (-1 / p)) @ q.T


@both
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])
def test_every_root_is_the_dense_one(x64, method, p):
    """Three and six too: products of squarings alone would miss them."""
    values = np.linspace(0.5, 3.0, 5)
    _, matrix = with_values(values)
    got = inverse_root(jnp.asarray(matrix), p, ridge=0.0, method=method)
    np.testing.assert_allclose(got, dense_root(values, p), rtol=0, atol=1e-11)
    power = np.linalg.matrix_power(np.asarray(got), p) @ matrix
    np.testing.assert_allclose(power, np.eye(5), atol=1e-10)


@both
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_scale_goes_through(method, scale):
    values = np.linspace(0.5, 3.0, 4)
    _, matrix = with_values(values)
    got = inverse_root(jnp.asarray(scale * matrix, jnp.float32), 4, ridge=0.0, method=method)
    expected = scale**-0.25 * dense_root(values, 4)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@both
def test_ill_conditioned_in_double_precision(x64, method):
    values = np.logspace(-9, 0, 6)
    _, matrix = with_values(values)
    got = inverse_root(jnp.asarray(matrix), 4, ridge=0.0, method=method)
    expected = dense_root(values, 4)
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error < 1e-6  # rounding of 1e-16 in the least eigenvalue of 1e-9


def test_ill_conditioned_in_single_precision_has_the_ridge():
    values = np.logspace(-12, 0, 6)
    _, matrix = with_values(values)
    got = inverse_root(jnp.asarray(matrix, jnp.float32), 4, ridge=1e-3)
    np.testing.assert_allclose(got, dense_root(values, 4, 1e-3), atol=2e-3)


def test_ridge_of_newton_is_that_of_the_largest_eigenvalue(x64):
    values = np.array([0.0, 0.0, 1.0, 4.0])
    _, matrix = with_values(values)
    got = inverse_root(jnp.asarray(matrix), 2, ridge=1e-2, method="newton")
    low, high = dense_root(values, 2, 1e-2 * 4 ** (1 / 128)), dense_root(values, 2, 1e-2)
    assert np.linalg.norm(low) * (1 - 1e-9) <= np.linalg.norm(got) <= np.linalg.norm(high)


@both
def test_bfloat16_is_widened(method):
    _, matrix = with_values(np.linspace(0.5, 3.0, 4))
    narrow = jnp.asarray(matrix, jnp.bfloat16)
    got = inverse_root(narrow, 4, method=method)
    assert got.dtype == jnp.float32
    wide = inverse_root(narrow.astype(jnp.float32), 4, method=method)
    np.testing.assert_array_equal(got, wide)


@both
def test_zero_has_root_zero_and_nan_stays(method):
    root = inverse_root(jnp.zeros((3, 3)), 4, method=method)
    np.testing.assert_array_equal(root, np.zeros((3, 3)))
    assert np.isnan(inverse_root(jnp.full((3, 3), jnp.nan), 4, method=method)).all()
    assert not np.isfinite(
        inverse_root(jnp.diag(jnp.array([1.0, jnp.inf])), 4, method=method)
    ).all()


def test_singular_without_ridge_is_the_pseudo_inverse(x64):
    q, matrix = with_values([0.0, 0.0, 16.0])
    got = inverse_root(jnp.asarray(matrix), 4, ridge=0.0)
    np.testing.assert_allclose(got, (q * np.array([0, 0, 0.5])) @ q.T, atol=1e-12)


@both
def test_batched_is_one_by_one(x64, method):
    matrices = jnp.stack(
        [jnp.asarray(with_values(np.linspace(1, 2 + i, 4), i)[1]) for i in range(3)]
    )
    together = jax.jit(jax.vmap(lambda m: inverse_root(m, 6, method=method)))(matrices)
    for one, root in zip(matrices, together, strict=True):
        np.testing.assert_allclose(root, inverse_root(one, 6, method=method), atol=1e-12)


def test_diagonal_is_the_root_of_the_diagonal_matrix(x64):
    values = jnp.array([0.1, 2.0, 5.0])
    dense = inverse_root(jnp.diag(values), 4, ridge=1e-2)
    got = inverse_root_of_values(values, 4, ridge=1e-2)
    np.testing.assert_allclose(jnp.diag(got), dense, atol=1e-13)


@pytest.mark.parametrize(
    "arguments", [{"p": 0}, {"p": 2.5}, {"p": 2, "method": "qr"}, {"p": 2, "ridge": -1.0}]
)
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match="inverse_root: "):
        inverse_root(jnp.eye(2), **arguments)
