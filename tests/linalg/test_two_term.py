"""Two-term Kronecker inverses and small eigendecompositions against dense linear algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_optax.linalg.tikhonov import tikhonov_shifts
from kfac_optax.linalg.two_by_two import small_psd_eigh
from kfac_optax.linalg.two_term import inverse_root, pencil, two_term_solve
from kfac_optax.linalg.weighted_rows import keep_rows, weighted_gram
from tests import oracles


def psd(seed, n, rank):
    rows = np.random.default_rng(seed).normal(size=(rank, n))
    return jnp.asarray(rows.T @ rows / rank)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_sum_of_two_products(seed, p, q, rank):
    with jax.enable_x64(True):
        a, b = psd(seed, p, 9) + jnp.eye(p), psd(seed + 1, q, 9) + jnp.eye(q)
        c, d, v = psd(seed + 2, p, rank), psd(seed + 3, q, rank), oracles.normal(seed, (p, q))
        got = two_term_solve(pencil(a, c), pencil(b, d), v)
        dense = np.linalg.solve(np.kron(a, b) + np.kron(c, d), np.ravel(v))
        np.testing.assert_allclose(np.ravel(got), dense, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(a @ got @ b + c @ got @ d, v, rtol=1e-10, atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 4))
def test_difference_of_two_products(seed, p, q):
    """`C <= A` and `D <= B` up to a factor, as covariances of a regression are."""
    with jax.enable_x64(True):
        c, d, v = psd(seed, p, 9), psd(seed + 1, q, 9), oracles.normal(seed, (p, q))
        a, b = (
            c + psd(seed + 2, p, 9) + 0.1 * jnp.eye(p),
            d + psd(seed + 3, q, 9) + 0.1 * jnp.eye(q),
        )
        got = two_term_solve(pencil(a, c), pencil(b, d), v, minus=True)
        dense = np.linalg.solve(np.kron(a, b) - np.kron(c, d), np.ravel(v))
        np.testing.assert_allclose(np.ravel(got), dense, rtol=1e-10, atol=1e-10)


def test_difference_stays_positive_where_it_would_vanish(x64):
    a, b, v = psd(0, 3, 9), psd(1, 2, 9), oracles.normal(2, (3, 2))
    got = two_term_solve(pencil(a, a), pencil(b, 2 * b), v, minus=True)
    assert np.isfinite(got).all() and jnp.vdot(v, got) > 0
    expected = np.linalg.solve(np.kron(a, b), np.ravel(v)) / (1 - (1 - 1e-6) ** 2)
    np.testing.assert_allclose(np.ravel(got), expected, rtol=1e-8)


def test_pencil_diagonalises_both(x64):
    m, n = psd(0, 4, 9), psd(1, 4, 2) - psd(2, 4, 2)
    k, s = pencil(m, n, 0.3)
    np.testing.assert_allclose(k.T @ (m + 0.3 * jnp.eye(4)) @ k, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(k.T @ n @ k, np.diag(s), atol=1e-12)


def test_inverse_root_of_a_singular_matrix_is_the_pseudo_inverse(x64):
    m = psd(0, 4, 2)
    root = inverse_root(m, singular=True)
    np.testing.assert_allclose(root @ root.T, np.linalg.pinv(m), atol=1e-9)
    np.testing.assert_array_equal(inverse_root(jnp.zeros((2, 2)), singular=True), np.zeros((2, 2)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 3), st.floats(-6, 6), st.floats(-6, 6))
def test_eigendecomposition_of_two_rows(seed, rank, log_scale, log_stretch):
    with jax.enable_x64(True):
        stretch = jnp.array([1.0, 10**log_stretch])
        matrix = 10**log_scale * psd(seed, 2, rank) * stretch[:, None] * stretch
        vectors, values = small_psd_eigh(matrix)
        scale = np.abs(matrix).max()
        assert (values >= 0).all()
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(2), atol=1e-14)
        np.testing.assert_allclose((vectors * values) @ vectors.T, matrix, atol=1e-14 * scale)
        np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(matrix), atol=1e-13 * scale)


@pytest.mark.parametrize(
    "matrix",
    [[[0, 0], [0, 0]], [[1, 0], [0, 1]], [[2, 0], [0, 1]], [[1, 1], [1, 1]], [[0, 0], [0, 3]]],
)
def test_eigendecomposition_of_special_matrices(matrix, x64):
    matrix = jnp.asarray(matrix, float)
    vectors, values = small_psd_eigh(matrix)
    np.testing.assert_allclose((vectors * values) @ vectors.T, matrix, atol=1e-15)


def test_eigendecompositions_are_batched_and_small():
    one = small_psd_eigh(jnp.array([[[4.0]], [[-1e-9]]]))
    np.testing.assert_array_equal(one.values, [[4], [0]])
    np.testing.assert_array_equal(one.vectors, np.ones((2, 1, 1)))
    with pytest.raises(ValueError, match="3 rows; expected 1 or 2"):
        small_psd_eigh(jnp.eye(3))


def test_rows_of_weight_zero_are_not_read(x64):
    x, w = oracles.normal(0, (2, 3, 4)), jnp.asarray([[0, 2.0, 1.0], [3.0, 0, 0.5]])
    expected = np.einsum("ab,abi,abj->ij", w, x, x)
    broken = jnp.where(w[..., None] == 0, jnp.nan, x)
    np.testing.assert_allclose(weighted_gram(broken, w), expected, rtol=1e-12)
    np.testing.assert_array_equal(keep_rows(x, None), x)


@pytest.mark.parametrize(
    ("mean_a", "mean_g", "expected"), [(4.0, 1.0, 2.0), (0.0, 1.0, 1.0), (1.0, 0.0, 1.0)]
)
def test_shifts_multiply_to_the_damping(mean_a, mean_g, expected, x64):
    shift, other = tikhonov_shifts(jnp.asarray(mean_a), jnp.asarray(mean_g), jnp.asarray(0.09))
    np.testing.assert_allclose([shift, other], [expected * 0.3, 0.3 / expected], rtol=1e-12)
