"""Recurrent blocks against dense inverses of the chain they model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_optax._types import Use
from kfac_optax.blocks.kronecker.kronecker import Factors, kronecker
from kfac_optax.blocks.kronecker.recurrent import OPTIONS, TemporalFactors, eta, recurrent
from kfac_optax.testing import dense_layer
from tests import oracles

P, Q, N = 3, 2, 4
dense = functools.partial(oracles.matrix_of, p=P, q=Q)


def make_use(t, bias=False, weights=None, n=N):
    return Use(dense_layer(P - bias, Q, bias=bias), n, n * t, jnp.float64, weights)


def stationary(seed, n, symmetric, largest):
    """`(C0, C1)` of a stationary chain whose normalised lag has the given norm."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(2 * n + 2, n))
    c0 = rows.T @ rows / len(rows) + 0.2 * np.eye(n)
    lag = rng.normal(size=(n, n))
    lag = lag + lag.T if symmetric else lag
    root = scipy.linalg.sqrtm(c0).real
    return c0, root @ (largest * lag / np.linalg.norm(lag, 2)) @ root


def synthetic(seed, steps, symmetric=True, largest=0.9):
    (a0, a1), (g0, g1) = (
        stationary(seed, P, symmetric, largest),
        stationary(seed + 1, Q, symmetric, largest),
    )
    one = jnp.ones(())
    return TemporalFactors(*map(jnp.asarray, (a0, g0, a1, g1)), steps * one, one)


def damped(factors, lam):
    a, g = np.asarray(factors.inputs), np.asarray(factors.outputs)
    pi, root = np.sqrt((np.trace(a) / P) / (np.trace(g) / Q)), np.sqrt(lam / float(factors.steps))
    return a + pi * root * np.eye(P), g + root / pi * np.eye(Q)


def chain(factors, lam, terms, weight):
    """`sum_{|d| < terms} weight(d) Psi^d V0` with its transposes, one lag after another."""
    a0, g0 = damped(factors, lam)
    a1, g1 = np.asarray(factors.inputs_lag), np.asarray(factors.outputs_lag)
    psi, v = np.kron(a1 @ np.linalg.inv(a0), g1 @ np.linalg.inv(g0)), np.kron(a0, g0)
    total = weight(0) * v
    for d in range(1, terms):
        v = psi @ v
        total += weight(d) * (v + v.T)
    return total


def solve_matrix(block, factors, lam):
    lam = jnp.asarray(lam)
    inverse = jax.jit(block.factorize)(factors, lam)
    return dense(lambda v: block.solve(inverse, v, lam))


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_option1_inverts_the_finite_sum_over_lags(steps, lam, x64):
    block, factors = recurrent("option1"), synthetic(steps, steps)
    expected = np.linalg.inv(chain(factors, lam, steps, lambda d: steps - d))
    np.testing.assert_allclose(solve_matrix(block, factors, lam), expected, rtol=1e-10, atol=1e-11)


def test_option1_symmetrizes_lags(x64):
    factors = synthetic(3, 5, symmetric=False)
    sym = factors._replace(
        inputs_lag=(factors.inputs_lag + factors.inputs_lag.T) / 2,
        outputs_lag=(factors.outputs_lag + factors.outputs_lag.T) / 2,
    )
    expected = np.linalg.inv(chain(sym, 0.1, 5, lambda d: 5 - d))
    np.testing.assert_allclose(
        solve_matrix(recurrent(), factors, 0.1), expected, rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_option2_inverts_the_limit_of_long_sequences(symmetric, lam, x64):
    block, factors = recurrent("option2"), synthetic(2, 12, symmetric)
    expected = np.linalg.inv(chain(factors, lam, 3000, lambda d: 12))
    np.testing.assert_allclose(solve_matrix(block, factors, lam), expected, rtol=1e-10, atol=1e-11)


def test_options_approach_each_other_for_long_sequences(x64):
    factors = synthetic(2, 1e7, largest=0.7)
    first, second = (solve_matrix(recurrent(o), factors, 0.1) for o in OPTIONS)
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5 * np.abs(first).max())


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("which", ["inputs_lag", "outputs_lag"])
def test_without_correlation_steps_are_independent(option, which, x64):
    factors = synthetic(2, 6)
    factors = factors._replace(**{which: jnp.zeros_like(getattr(factors, which))})
    a0, g0 = damped(factors, 0.3)
    np.testing.assert_allclose(
        solve_matrix(recurrent(option), factors, 0.3),
        np.linalg.inv(6 * np.kron(a0, g0)),
        atol=1e-10,
    )


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_one_step_is_kfac(option, bias, x64):
    a, g = oracles.normal(0, (N, 1, P - bias)), oracles.normal(1, (N, 1, Q))
    block, plain = recurrent(option), kronecker("cholesky")
    factors, reference = (
        block.measure(a, g, make_use(1, bias)),
        plain.measure(a, g, make_use(1, bias)),
    )
    np.testing.assert_allclose(factors.inputs, reference.inputs, rtol=1e-12)
    np.testing.assert_allclose(
        solve_matrix(block, factors, 0.2),
        solve_matrix(plain, reference, 0.2),
        rtol=1e-10,
        atol=1e-11,
    )
    multiplied = dense(lambda v: block.multiply(factors, v))
    np.testing.assert_allclose(multiplied, np.kron(reference.inputs, reference.outputs), atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_statistics_are_means_over_all_steps(bias, x64):
    t = 5
    a, g = oracles.normal(0, (N, t, P - bias)), oracles.normal(1, (N, t, Q))
    rows = np.concatenate([a, np.ones((N, t, 1))], -1) if bias else np.asarray(a)
    factors = recurrent().measure(a, g, make_use(t, bias))
    for got, x in ((factors.inputs, rows), (factors.outputs, g)):
        np.testing.assert_allclose(
            got, sum(np.outer(x[n, s], x[n, s]) for n in range(N) for s in range(t)) / (N * t)
        )
    for got, x in ((factors.inputs_lag, rows), (factors.outputs_lag, g)):
        pairs = sum(np.outer(x[n, s + 1], x[n, s]) for n in range(N) for s in range(t - 1))
        np.testing.assert_allclose(got, pairs / (N * t))
    assert (float(factors.steps), float(factors.ends)) == (t, 1)
    if not bias:  # equal-time part is the block that treats steps as independent
        plain = kronecker().measure(a, g, make_use(t))
        np.testing.assert_allclose(t * factors.inputs, plain.inputs, rtol=1e-12)
        np.testing.assert_allclose(factors.outputs, plain.outputs, rtol=1e-12)


def test_measured_correlations_are_below_one(x64):
    """Dividing lags by N T makes the covariances those of sequences continued by zeros:
    `|x| <= cos(pi / (T + 1))`.
    """
    t = 3
    a = jnp.broadcast_to(oracles.normal(0, (1, 1, P)), (1, t, P))  # the same input at every step
    factors = recurrent().measure(a, jnp.ones((1, t, Q)), make_use(t, n=1))
    root = np.linalg.pinv(scipy.linalg.sqrtm(np.asarray(factors.inputs)).real, rcond=1e-6)
    assert np.linalg.norm(root @ factors.inputs_lag @ root, 2) <= np.cos(np.pi / (t + 1))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_multiply_is_the_undamped_model(option, steps, x64):
    block, factors = recurrent(option), synthetic(5, steps, symmetric=option == "option1")
    terms, weight = (steps, lambda d: steps - d) if option == "option1" else (2000, lambda d: steps)
    got = dense(lambda v: block.multiply(factors, v))
    np.testing.assert_allclose(got, chain(factors, 0.0, terms, weight), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got @ solve_matrix(block, factors, 0.0), np.eye(P * Q), atol=1e-8)


@pytest.mark.parametrize("option", OPTIONS)
def test_multiply_with_singular_factors(option, x64):
    a, g = oracles.normal(0, (1, 2, P)), oracles.normal(1, (1, 2, Q))
    block = recurrent(option)
    factors = block.measure(a.at[:, :, 2].set(a[:, :, 1]), g, make_use(2, n=1))
    got = dense(lambda v: block.multiply(factors, v))
    assert np.isfinite(got).all() and np.linalg.eigvalsh((got + got.T) / 2).min() > -1e-9
    zeros = jax.tree.map(jnp.zeros_like, factors)
    np.testing.assert_array_equal(block.multiply(zeros, jnp.ones((P, Q))), np.zeros((P, Q)))


@pytest.mark.parametrize("option", OPTIONS)
def test_masked_tails_are_dropped(option, x64):
    """Sequences cut by weights are sequences cut in fact, times the mean-one scale of the weights."""
    t, n = 6, 4
    a, g = oracles.normal(0, (N, t, P)), oracles.normal(1, (N, t, Q))
    weights = jnp.where(jnp.arange(t) < n, t / n, 0.0) * jnp.ones((N, 1))
    block = recurrent(option)
    masked = block.measure(
        jnp.where(weights[..., None] > 0, a, jnp.nan),
        g * jnp.sqrt(weights)[..., None],
        make_use(t, weights=weights),
    )
    cut = block.measure(a[:, :n], g[:, :n], make_use(n))
    for name in ("inputs", "outputs", "inputs_lag", "outputs_lag"):
        np.testing.assert_allclose(getattr(masked, name), getattr(cut, name), rtol=1e-12)
    np.testing.assert_allclose(masked.steps / masked.ends, n, rtol=1e-12)
    got, expected = (dense(lambda v, f=f: block.multiply(f, v)) for f in (masked, cut))
    np.testing.assert_allclose(got, t / n * expected, rtol=1e-9, atol=1e-10)


def test_ragged_lengths_next_to_each_other_are_exact(x64):
    """Option 1 with lengths 3 and 4: the mean of eta over lengths, times the scale of the weights."""
    t, lengths = 6, np.array([3, 4, 4, 4])
    mask = (np.arange(t) < lengths[:, None]).astype(float)
    weights = jnp.asarray(mask / mask.mean())
    use = make_use(t, weights=weights)
    measured = recurrent().measure(oracles.normal(0, (N, t, P)), oracles.normal(1, (N, t, Q)), use)
    factors = synthetic(1, 1)._replace(steps=measured.steps, ends=measured.ends)
    scale = 1 / mask.mean()
    expected = chain(factors, 0.0, 4, lambda d: scale * np.maximum(lengths - d, 0).mean())
    np.testing.assert_allclose(
        dense(lambda v: recurrent().multiply(factors, v)), expected, rtol=1e-9, atol=1e-10
    )


def test_weights_per_example_and_empty_sequences(x64):
    t = 3
    a, g = oracles.normal(0, (N, t, P)), oracles.normal(1, (N, t, Q))
    w = jnp.asarray([0.0, 1.0, 2.0, 1.0])
    weights = jnp.broadcast_to(w[:, None], (N, t))
    block = recurrent()
    got = block.measure(
        a.at[0].set(jnp.nan), g * jnp.sqrt(w)[:, None, None], make_use(t, weights=weights)
    )
    parts = [block.measure(a[n : n + 1], g[n : n + 1], make_use(t, n=1)) for n in range(N)]
    expected = jax.tree.map(lambda *x: sum(wi * xi for wi, xi in zip(w, x)) / N, *parts)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12), got, expected
    )


def test_forward_only_has_independent_steps(x64):
    a = oracles.normal(0, (N, 4, P))
    factors = recurrent().measure(a, None, make_use(4))
    expected = np.kron(np.einsum("nti,ntj->ij", a, a) / N, np.eye(Q))
    np.testing.assert_allclose(
        dense(lambda v: recurrent().multiply(factors, v)), expected, atol=1e-10
    )


def test_lags_beyond_one_are_clipped(x64):
    """Lags that contradict the equal-time moments are clipped instead of turning the solve
    indefinite.
    """
    eye, one = jnp.eye(2), jnp.ones(())
    for sign in (1, -1):
        factors = TemporalFactors(eye, eye, 1.5 * eye, sign * eye, 4 * one, one)
        for option in OPTIONS:
            block = recurrent(option)
            inverse = block.factorize(factors, jnp.asarray(1e-9))
            matrix = dense(lambda v, b=block, h=inverse: b.solve(h, v, None), p=2, q=2)
            assert np.isfinite(matrix).all() and np.linalg.eigvalsh(matrix).min() > 0
            assert np.isfinite(block.multiply(factors, jnp.ones((2, 2)))).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.floats(-0.999, 1))
def test_eta_is_the_sum_over_lags(length, x):
    with jax.enable_x64(True):
        expected = sum((length - abs(d)) * x ** abs(d) for d in range(1 - length, length))
        np.testing.assert_allclose(eta(jnp.asarray(x), float(length)), expected, rtol=1e-10)


@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-8, 1e-5, 1e-3, 0.0099, 0.0101, 0.05])
def test_eta_near_one(gap, x64):
    x, length = 1 - gap, 10
    expected = sum((length - abs(d)) * x ** abs(d) for d in range(1 - length, length))
    np.testing.assert_allclose(eta(jnp.asarray(x), 10.0), expected, rtol=1e-13)
    np.testing.assert_allclose(eta(jnp.float32(x), jnp.float32(10)), expected, rtol=1e-5)


def test_eta_between_lengths_is_linear(x64):
    x = jnp.linspace(-0.9, 1, 7)
    np.testing.assert_allclose(eta(x, 3.25), 0.75 * eta(x, 3.0) + 0.25 * eta(x, 4.0), rtol=1e-12)


def test_errors():
    with pytest.raises(ValueError, match="expected one of 'option1', 'option2'"):
        recurrent("indep")
    with pytest.raises(ValueError, match=r"expected \[N, T, features\]"):
        recurrent().measure(jnp.ones((2, 3)), jnp.ones((2, 2)), make_use(1))


def test_zero_lags_match_plain_factors_in_single_precision():
    block = recurrent()
    factors = block.init(dense_layer(P, Q), jnp.float32)
    lam, v = jnp.float32(0.5), jnp.ones((P, Q))
    plain = kronecker("cholesky")
    expected = plain.solve(plain.factorize(Factors(jnp.eye(P), jnp.eye(Q)), lam), v, lam)
    np.testing.assert_allclose(
        block.solve(block.factorize(factors, lam), v, lam), expected, rtol=1e-6
    )
