"""Factorisations and Kronecker solves against dense linear algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_optax.linalg.factorize import cholesky_inverse, psd_eigh, psd_inverse
from kfac_optax.linalg.gram import gram, homogeneous
from kfac_optax.linalg.in_order import after
from kfac_optax.linalg.kronecker_products import eigen_solve, trace_ratio
from tests import oracles


def psd(seed, n, rank):
    rows = np.random.default_rng(seed).normal(size=(rank, n))
    return jnp.asarray(rows.T @ rows / rank)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 99), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.floats(1e-3, 10)
)
def test_eigen_solve_is_the_dense_solve(seed, p, q, rank, damping):
    with jax.enable_x64(True):
        a, g, v = psd(seed, p, rank), psd(seed + 1, q, rank), oracles.normal(seed, (p, q))
        got = eigen_solve(psd_eigh(a), psd_eigh(g), v, jnp.asarray(damping))
        dense = np.linalg.solve(np.kron(a, g) + damping * np.eye(p * q), np.ravel(v))
        np.testing.assert_allclose(np.ravel(got), dense, rtol=1e-9, atol=1e-10)


def test_factored_damping_is_not_exact_damping(x64):
    a, g, v = psd(0, 3, 5), psd(1, 2, 5), oracles.normal(2, (3, 2))
    lam = 0.1
    pi = trace_ratio(a, g)
    factored = psd_inverse(a, pi * np.sqrt(lam)) @ v @ psd_inverse(g, np.sqrt(lam) / pi)
    dense = np.kron(a + pi * np.sqrt(lam) * np.eye(3), g + np.sqrt(lam) / pi * np.eye(2))
    np.testing.assert_allclose(np.ravel(factored), np.linalg.solve(dense, np.ravel(v)), rtol=1e-10)
    exact = eigen_solve(psd_eigh(a), psd_eigh(g), v, jnp.asarray(lam))
    assert np.linalg.norm(factored - exact) > 0.05 * np.linalg.norm(exact)


def test_factored_solve_does_not_depend_on_how_scale_is_split(x64):
    """`(cA, G/c)` gives the same step for any c, which is why pi is used."""
    a, g, v = psd(0, 3, 5), psd(1, 2, 5), oracles.normal(2, (3, 2))

    def solve(a, g):
        pi = trace_ratio(a, g)
        return psd_inverse(a, 0.3 * pi) @ v @ psd_inverse(g, 0.3 / pi)

    np.testing.assert_allclose(solve(100 * a, g / 100), solve(a, g), rtol=1e-10)


@pytest.mark.parametrize(("a", "g"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_trace_ratio_is_one_for_a_dead_factor(a, g):
    assert float(trace_ratio(a * jnp.eye(3), g * jnp.eye(2))) == 1.0


# one more than a width that is solved as it is, one below and above the first, and the second split
@pytest.mark.parametrize("n", [256, 257, 1024, 1027])
def test_the_inverse_by_halves_is_the_dense_one(x64, n):
    # eigenvalues from 1e-4 to one
    rotation, _ = np.linalg.qr(np.random.default_rng(n).normal(size=(n, n)))
    values = np.logspace(-4, 0, n)
    matrix = rotation * values @ rotation.T
    dense = rotation / values @ rotation.T
    got = jax.jit(cholesky_inverse)(jnp.asarray(matrix))
    np.testing.assert_allclose(got, dense, rtol=0, atol=1e-10 * np.abs(dense).max())
    # in single precision no worse than the whole triangle at once
    single = jnp.asarray(matrix, jnp.float32)
    whole = jax.scipy.linalg.cho_solve(
        (jnp.linalg.cholesky(single), True), jnp.eye(n, dtype=single.dtype)
    )
    error = np.linalg.norm(np.asarray(jax.jit(cholesky_inverse)(single), np.float64) - dense)
    assert error < 2 * np.linalg.norm(np.asarray(whole, np.float64) - dense)


def test_the_inverse_by_halves_of_several_is_that_of_each():
    rows = np.random.default_rng(0).normal(size=(3, 400, 300)).astype(np.float32)
    matrices = jnp.asarray(np.einsum("kij,kil->kjl", rows, rows) / 400)
    # the last one is not positive definite
    matrices = matrices.at[2].add(-jnp.eye(300))
    got = jax.jit(jax.vmap(cholesky_inverse))(matrices)
    for matrix, inverse in zip(matrices[:2], got, strict=False):
        np.testing.assert_allclose(inverse, jax.jit(cholesky_inverse)(matrix), rtol=1e-3, atol=1e-4)
    assert np.isnan(np.asarray(got[2])).all()


def test_eigenvalues_are_clamped_and_indefinite_cholesky_is_nan():
    assert psd_eigh(jnp.diag(jnp.array([1.0, -1e-3]))).values.min() == 0
    assert np.isnan(psd_inverse(-jnp.eye(2), jnp.float32(0.5))).all()


def test_gram_sums_over_all_leading_axes():
    x, y = oracles.normal(0, (4, 5, 2)), oracles.normal(1, (4, 5, 3))
    np.testing.assert_allclose(gram(x, y), np.einsum("abi,abj->ij", x, y), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(homogeneous(x)[..., -1], np.ones((4, 5)))


def test_factorisations_are_ordered_and_unchanged():
    """`after` changes no value, NaN or not, and its dependency survives compilation (see its
    docstring).
    """
    x = oracles.normal(0, (3, 3))
    for previous in (jnp.ones(2), jnp.full(2, jnp.nan), jnp.full(2, jnp.inf)):
        np.testing.assert_array_equal(jax.jit(after)(x, previous), x)
    chained = jax.jit(
        lambda a, b: (jnp.linalg.eigh(a)[0], jnp.linalg.eigh(after(b, jnp.linalg.eigh(a)[0]))[0])
    )
    text = chained.lower(x, x + 1).compile().as_text()
    assert "inf" in text
