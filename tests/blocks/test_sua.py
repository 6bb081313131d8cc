"""The block of uncorrelated positions against dense matrices and, where it is exact, against the
patch block.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfac_optax._types import Use
from kfac_optax.blocks.kronecker.kronecker import kronecker
from kfac_optax.blocks.kronecker.sua import sua
from kfac_optax.testing import dense_layer
from tests import oracles

C, Q, N = 2, 3, 4
dense = functools.partial(oracles.matrix_of, q=Q)


def make_layer(offsets, bias=True, channels=C):
    return dense_layer(offsets * channels, Q, bias=bias, kind="conv", channels=channels)


def make_use(offsets, rows, bias=True, weights=None):
    return Use(make_layer(offsets, bias), N, rows, jnp.float64, weights)


def omega(x, offsets, steps, bias):
    """`T (blockdiag(I (x) Sigma, 0) + m m^T)` from rows of the input map."""
    rows = np.reshape(x, (-1, C))
    mu, sigma = rows.mean(0), np.cov(rows.T, bias=True)
    m = np.concatenate([np.tile(mu, offsets), np.ones(int(bias))])
    blocks = np.zeros((len(m), len(m)))
    blocks[: offsets * C, : offsets * C] = np.kron(np.eye(offsets), sigma)
    return steps * (blocks + np.outer(m, m))


@pytest.mark.parametrize("lam", [1e-6, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_solve_is_the_dense_inverse(lam, bias, x64):
    offsets, p = 6, 6 * C + bias
    x, g = oracles.normal(0, (N, 4, 5, C)) + 0.5, oracles.normal(1, (N, 2, 3, Q))
    block = sua()
    factors = block.measure(x, g, make_use(offsets, N * 6, bias))
    big, gamma = omega(x, offsets, 6, bias), np.einsum("nhwi,nhwj->ij", g, g) / (N * 6)
    np.testing.assert_allclose(factors.level, np.trace(big) / p, rtol=1e-12)
    np.testing.assert_allclose(
        dense(lambda v: block.multiply(factors, v), p), np.kron(big, gamma), atol=1e-10
    )
    pi, root = np.sqrt((np.trace(big) / p) / (np.trace(gamma) / Q)), np.sqrt(lam)
    damped = np.kron(
        np.linalg.inv(big + pi * root * np.eye(p)), np.linalg.inv(gamma + root / pi * np.eye(Q))
    )
    inverse = jax.jit(block.factorize)(factors, jnp.asarray(lam))
    np.testing.assert_allclose(
        dense(lambda v: block.solve(inverse, v, None), p), damped, rtol=1e-8, atol=1e-10
    )


def test_tiny_damping_in_single_precision(x64):
    """The bias entry's `1 / shift` must not cancel."""
    x, g = oracles.normal(0, (N, 6, C)), oracles.normal(1, (N, 6, Q))
    v, lam = oracles.normal(2, (3 * C + 1, Q)), 1e-10
    results = []
    for dtype in (jnp.float32, jnp.float64):
        block = sua()
        factors = block.measure(x, g, make_use(3, N * 6)._replace(dtype=dtype))
        inverse = jax.jit(block.factorize)(factors, jnp.asarray(lam, dtype))
        results.append(np.asarray(block.solve(inverse, v.astype(dtype), None)))
    np.testing.assert_allclose(
        results[0], results[1], rtol=1e-3, atol=1e-3 * np.abs(results[1]).max()
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_one_offset_is_the_patch_block(weighted, bias, x64):
    """A 1x1 kernel has no two positions to correlate, so both blocks are the same."""
    x, g = oracles.normal(0, (N, 5, C)), oracles.normal(1, (N, 5, Q))
    w = jnp.asarray([0.0, 1.0, 2.0, 1.0])
    weights = jnp.broadcast_to(w[:, None], (N, 5)) if weighted else None
    use = make_use(1, N * 5, bias, weights)
    block, plain = sua(), kronecker("cholesky")
    reference = plain.measure(x, g, use)
    factors = block.measure(x.at[0].set(jnp.nan) if weighted else x, g, use)
    lam, p = jnp.asarray(0.2), C + bias
    inverse, plain_inverse = jax.jit(block.factorize)(factors, lam), plain.factorize(reference, lam)
    for got, expected in (
        (lambda v: block.multiply(factors, v), lambda v: plain.multiply(reference, v)),
        (lambda v: block.solve(inverse, v, lam), lambda v: plain.solve(plain_inverse, v, lam)),
    ):
        np.testing.assert_allclose(dense(got, p), dense(expected, p), rtol=1e-9, atol=1e-10)


def test_weights_of_another_map_count_per_example(x64):
    x, g = oracles.normal(0, (N, 4, C)), oracles.normal(1, (N, 2, Q))
    w = jnp.asarray([0.5, 1.0, 2.0, 0.5])
    uses = [make_use(2, N * 2, True, jnp.broadcast_to(w[:, None], (N, n))) for n in (2, 4)] + [
        make_use(2, N * 2, True, w)
    ]
    results = [sua().measure(x, g, use) for use in uses]
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), results[0], other)


def test_uses_add_up(x64):
    """Two uses of the same map are one use with all positions."""
    x, g = oracles.normal(0, (N, 6, C)), oracles.normal(1, (N, 4, Q))
    parts = [
        sua().measure(x[:, i : i + 3], g[:, j : j + 2], make_use(2, N * 4))
        for i, j in ((0, 0), (3, 2))
    ]
    whole = sua().measure(x, g, make_use(2, N * 4))
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-11), *parts, whole)


def test_forward_only(x64):
    x = oracles.normal(0, (N, 4, C))
    factors = sua().measure(x, None, make_use(2, N * 3))
    expected = np.kron(omega(x, 2, 3, True), np.eye(Q))
    np.testing.assert_allclose(
        dense(lambda v: sua().multiply(factors, v), 2 * C + 1), expected, atol=1e-10
    )


def test_one_channel_with_bias(x64):
    """Whether the last of `k + 1` rows is a bias cannot be told from their number."""
    x, g = oracles.normal(0, (N, 4, 1)), oracles.normal(1, (N, 2, Q))
    use = Use(make_layer(3, channels=1), N, N * 2, jnp.float64)
    block = sua()
    factors = block.measure(x, g, use)
    inverse = jax.jit(block.factorize)(factors, jnp.asarray(0.1))
    matrix = dense(lambda v: block.solve(inverse, v, None), 4)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-11)


def test_errors():
    for other in (dense_layer(4, 2), make_layer(3)):
        if other.channels:
            other = dataclasses.replace(other, inputs=7)
        with pytest.raises(ValueError, match="expected a plain convolution"):
            sua().init(other, jnp.float32)
    with pytest.raises(ValueError, match=r"expected \[N, \*spatial, 2\]"):
        sua().measure(jnp.ones((4, 5, 3)), jnp.ones((4, 5, Q)), make_use(1, 20))
