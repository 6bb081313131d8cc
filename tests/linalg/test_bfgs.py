"""BFGS pairs: the secant, both forms, and what damping them twice is for."""

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax.linalg.bfgs import Pairs, add_pair, apply_bfgs, double_damped
from tests import oracles

N = 4


def run(pairs, damp, start=None):
    """All pairs one after another: the least `s^T y / s^T s`, and extreme eigenvalues of `H`."""

    def one(kept, pair):
        s, y = damp(kept, *pair)
        kept = add_pair(kept, s, y)
        values = jnp.linalg.eigvalsh(kept)
        return kept, (jnp.vdot(s, y) / jnp.vdot(s, s), values[0], values[-1])

    start = jnp.eye(N) if start is None else start
    kept, (ratios, least, largest) = jax.jit(lambda p: jax.lax.scan(one, start, p))(pairs)
    return kept, float(ratios.min()), float(least.min()), float(largest.max())


def scaled_pairs(count):
    """Random pairs, half of them of negative curvature, with norms over four decades."""
    s, y = oracles.normal(0, (count, N)), oracles.normal(1, (count, N))
    scales = 10.0 ** np.random.default_rng(2).uniform(-2, 2, (2, count, 1))
    return s * scales[0], y * scales[1]


def test_double_damping_keeps_the_inverse_definite_and_bounded(x64):
    pairs, bound = scaled_pairs(3000), 0.55

    def twice(kept, s, y):
        return double_damped(kept, s, y, inverse_bound=0.2, bound=bound)

    def once(kept, s, y):
        return double_damped(kept, s, y, inverse_bound=0.2, bound=0.0)[0], y

    _, ratio, least, largest = run(pairs, twice)
    np.testing.assert_allclose(ratio, bound, rtol=1e-8)
    assert least > 1e-8 and largest < 50
    _, _, _, unbounded = run(pairs, once)
    assert unbounded > 1e3


def test_a_pair_is_fulfilled_by_both_forms(x64):
    s, y = oracles.normal(0, (6, N)), oracles.normal(1, (6, N))
    y = y * jnp.sign(jnp.sum(s * y, 1, keepdims=True))
    matrix, pairs = jnp.eye(N), Pairs(jnp.zeros((6, N)), jnp.zeros((6, N)))
    for pair in zip(s, y, strict=True):
        matrix, pairs = add_pair(matrix, *pair), add_pair(pairs, *pair)
        for kept in (matrix, pairs):
            got = apply_bfgs(kept, pair[1][None], precision="highest")[0]
            np.testing.assert_allclose(got, pair[0], rtol=1e-10, atol=1e-12)
    v = oracles.normal(2, (3, N))
    want = v @ matrix
    np.testing.assert_allclose(apply_bfgs(pairs, v, precision="highest"), want, rtol=1e-9)
    # the oldest pair makes room
    fewer = Pairs(jnp.zeros((2, N)), jnp.zeros((2, N)))
    for pair in zip(s, y, strict=True):
        fewer = add_pair(fewer, *pair)
    np.testing.assert_array_equal(fewer.steps, s[-2:])


def test_along_random_probes_it_converges_to_the_inverse(x64):
    """As of the input side, which asks its quadratic along `H_A a`."""
    root = oracles.normal(0, (N, 2 * N))
    quadratic = root @ root.T / (2 * N) + 0.1 * jnp.eye(N)
    probes = oracles.normal(1, (60, N))

    def probe(kept, a, _):
        return kept @ a, quadratic @ kept @ a

    kept, *_ = run((probes, probes), probe)
    np.testing.assert_allclose(kept @ quadratic, np.eye(N), atol=1e-6)


def test_pairs_without_a_meaning_are_left_out():
    pairs = Pairs(jnp.ones((1, N)), jnp.ones((1, N)))
    zeros, ones = jnp.zeros(N), jnp.ones(N)
    for s, y in ((zeros, zeros), (ones, -ones), (ones * jnp.nan, ones), (1e30 * ones, 1e30 * ones)):
        for kept in (jnp.eye(N), pairs):
            for x, x_kept in zip(jax.tree.leaves(add_pair(kept, s, y)), jax.tree.leaves(kept)):
                np.testing.assert_array_equal(x, x_kept)
    s, y = double_damped(jnp.eye(N), zeros, zeros, inverse_bound=0.2, bound=0.5)
    assert (s == 0).all() and (y == 0).all()
