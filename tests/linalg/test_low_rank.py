"""Truncated eigendecompositions: sketches, online updates and solves against dense linear algebra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_optax.linalg.online import brand_update, correct_directions
from kfac_optax.linalg.randomized import randomized_eigh
from kfac_optax.linalg.truncated_eigen import (
    LowRank,
    captured_energy,
    low_rank_solve,
    to_dense,
    truncate,
    zero,
)

VARIANTS = ("svd", "symmetric")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def with_spectrum(seed, values):
    q, _ = np.linalg.qr(normal(seed, len(values), len(values)))
    return (q * values) @ q.T


def assert_orthonormal(vectors, atol, values=None):
    """With `values`: where they are zero, columns are zero."""
    expected = np.eye(vectors.shape[1]) if values is None else np.diag(np.asarray(values) > 0)
    np.testing.assert_allclose(vectors.T @ vectors, expected, atol=atol)


@settings(max_examples=8, deadline=None)
@given(
    st.integers(0, 99), st.integers(1, 6), st.integers(1, 6), st.floats(1e-3, 10), st.floats(0, 5)
)
def test_a_solve_is_the_dense_solve(seed, d, m, shift, rest):
    with jax.enable_x64(True):
        m = min(d, m)
        vectors, _ = np.linalg.qr(normal(seed, d, m))
        low = LowRank(jnp.asarray(vectors), jnp.asarray(np.sort(normal(seed + 1, m) ** 2)[::-1]))
        v = jnp.asarray(normal(seed + 2, d, 3))
        dense = to_dense(low) - rest * vectors @ vectors.T + (rest + shift) * np.eye(d)
        got = low_rank_solve(low, v, shift, rest=rest)
        np.testing.assert_allclose(got, np.linalg.solve(dense, v), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sketch_of_full_rank_is_the_dense_decomposition(x64, variant):
    matrix = jnp.asarray(with_spectrum(0, 0.5 ** np.arange(8)))
    for rank, oversampling in ((8, 0), (5, 3), (20, 10)):
        low = randomized_eigh(
            matrix, jax.random.key(1), rank=rank, oversampling=oversampling, variant=variant
        )
        assert low.vectors.shape == (8, min(rank, 8))
        np.testing.assert_allclose(
            low.values, np.linalg.eigvalsh(matrix)[::-1][: min(rank, 8)], rtol=1e-10, atol=1e-12
        )
    v = jnp.asarray(normal(2, 8, 2))
    np.testing.assert_allclose(
        low_rank_solve(low, v, 0.1), np.linalg.solve(matrix + 0.1 * np.eye(8), v), rtol=1e-9
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_matrix_of_low_rank_is_found_exactly(x64, variant):
    matrix = jnp.asarray(with_spectrum(0, np.r_[3.0, 2.0, 1.0, 1.0, np.zeros(16)]))
    low = randomized_eigh(
        matrix, jax.random.key(1), rank=5, oversampling=3, power_iterations=0, variant=variant
    )
    np.testing.assert_allclose(to_dense(low), matrix, atol=1e-10)
    assert_orthonormal(low.vectors, 1e-10)


def test_errors_of_sketches_without_power_iterations(x64):
    """The singular vectors on the far side of the sketch are nearly optimal, the symmetric variant
    is not.
    """
    d, rank = 80, 10
    matrix = jnp.asarray(with_spectrum(0, 0.8 ** np.arange(d)))
    optimal = np.linalg.norm(0.8 ** np.arange(rank, d))

    @functools.partial(jax.jit, static_argnames="variant")
    def errors(keys, variant):
        def error(key):
            low = randomized_eigh(
                matrix, key, rank=rank, oversampling=5, power_iterations=0, variant=variant
            )
            return jnp.linalg.norm(matrix - to_dense(low))

        return jax.vmap(error)(keys)

    keys = jax.random.split(jax.random.key(0), 30)
    ratio = {variant: float(errors(keys, variant).mean() / optimal) for variant in VARIANTS}
    assert 1 < ratio["svd"] < 1.08
    assert 1.2 < ratio["symmetric"] < 1.6


def test_power_iterations_bring_both_variants_close_to_the_optimum(x64):
    matrix = jnp.asarray(with_spectrum(0, 0.8 ** np.arange(40)))
    optimal = np.linalg.norm(0.8 ** np.arange(10, 40))
    for variant in VARIANTS:
        low = randomized_eigh(
            matrix, jax.random.key(0), rank=10, oversampling=5, power_iterations=3, variant=variant
        )
        assert np.linalg.norm(matrix - to_dense(low)) < 1.02 * optimal


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_zero_matrix_is_no_trouble(variant):
    low = randomized_eigh(
        jnp.zeros((6, 6)), jax.random.key(0), rank=2, oversampling=1, variant=variant
    )
    np.testing.assert_array_equal(low.values, 0)
    np.testing.assert_allclose(low_rank_solve(low, jnp.ones((6, 1)), 0.5), 2, rtol=1e-5)
    assert captured_energy(low, jnp.float32(0)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 1, "oversampling": -1}, "oversampling"),
        ({"rank": 1, "variant": "lu"}, "variant"),
    ],
)
def test_bad_settings_of_a_sketch_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        randomized_eigh(jnp.eye(3), jax.random.key(0), **options)


def online(seed, d, n, rank, steps, decay=0.9, true_rank=None):
    """Decomposition and dense average after some updates, in double precision."""
    update = jax.jit(functools.partial(brand_update, rank=rank))
    low, dense = zero(d, rank, jnp.float64), np.zeros((d, d))
    span = (
        np.eye(d)
        if true_rank is None
        else normal(seed, d, true_rank) @ normal(seed + 1, true_rank, d)
    )
    for i in range(steps):
        columns = span @ normal(seed + 10 + i, d, n) / np.sqrt(n)
        low = update(low, jnp.asarray(columns), decay)
        dense = decay * dense + (1 - decay) * columns @ columns.T
    return low, dense


@pytest.mark.parametrize(("d", "n", "rank"), [(12, 3, 12), (12, 20, 12), (5, 1, 9)])
def test_online_updates_of_full_rank_are_the_dense_average(x64, d, n, rank):
    low, dense = online(0, d, n, rank, steps=25)
    np.testing.assert_allclose(to_dense(low), dense, atol=1e-10)
    assert_orthonormal(low.vectors, 1e-10)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 99), st.integers(2, 9), st.integers(1, 6), st.integers(1, 9))
def test_online_updates_never_exceed_the_dense_average(seed, d, n, rank):
    with jax.enable_x64(True):
        low, dense = online(seed, d, n, rank, steps=6)
        assert np.linalg.eigvalsh(dense - to_dense(low)).min() > -1e-10 * np.trace(dense)
        assert low.values.shape == (min(d, min(rank, d) + n),)
        assert np.all(np.diff(low.values) <= 0) and np.all(low.values >= 0)
        # six updates may be fewer columns than d
        assert_orthonormal(low.vectors, 1e-10, low.values)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 99), st.integers(1, 5))
def test_online_updates_are_exact_where_the_average_has_the_rank(seed, n):
    with jax.enable_x64(True):
        # deficient columns, every time
        low, dense = online(seed, 10, n, rank=4, steps=8, true_rank=3)
        np.testing.assert_allclose(to_dense(low), dense, atol=1e-10 * np.trace(dense))
        assert_orthonormal(low.vectors, 1e-10, low.values)


def test_one_update_has_the_eigenvalues_of_the_dense_sum(x64):
    low, _ = online(0, 10, 2, rank=4, steps=3)
    columns = jnp.asarray(normal(99, 10, 2))
    dense = 0.9 * to_dense(truncate(low, 4)) + 0.1 * columns @ columns.T
    after = brand_update(low, columns, 0.9, rank=4)
    np.testing.assert_allclose(
        after.values, np.linalg.eigvalsh(dense)[::-1][:6], rtol=1e-10, atol=1e-12
    )


def test_columns_stay_orthonormal_in_single_precision():
    update = jax.jit(functools.partial(brand_update, rank=6))
    low, columns = zero(30, 6), jnp.asarray(normal(0, 300, 30, 2), jnp.float32)
    low, _ = jax.lax.scan(
        lambda low, y: (update(low, y, 0.95), None), update(low, columns[0], 0.95), columns
    )
    assert_orthonormal(np.asarray(low.vectors, float), 1e-5)


@pytest.mark.parametrize("columns", [np.zeros((4, 2)), np.ones((4, 1))])
def test_updates_with_nothing_new_or_a_batch_of_one_are_finite(columns):
    low = brand_update(zero(4, 2), jnp.asarray(columns, jnp.float32), 0.5, rank=2)
    np.testing.assert_allclose(to_dense(low), 0.5 * columns @ columns.T, atol=1e-6)
    assert np.isfinite(low_rank_solve(low, jnp.ones((4, 1)), 1e-3)).all()


def test_updates_are_batched_over_a_bucket(x64):
    columns = jnp.asarray(normal(0, 3, 7, 2))
    start = jax.tree.map(lambda x: jnp.repeat(x[None], 3, 0), zero(7, 3, jnp.float64))
    batched = jax.vmap(lambda low, y: brand_update(low, y, 0.9, rank=3))(start, columns)
    for i in range(3):
        single = brand_update(zero(7, 3, jnp.float64), columns[i], 0.9, rank=3)
        np.testing.assert_allclose(jax.vmap(to_dense)(batched)[i], to_dense(single), atol=1e-12)


def test_nothing_of_the_size_of_the_matrix_is_formed_and_the_work_is_linear():
    def shapes(d):
        low = jax.eval_shape(lambda: zero(d, 4))
        traced = jax.make_jaxpr(functools.partial(brand_update, rank=4))(
            low, jax.ShapeDtypeStruct((d, 3), "float32"), 0.9
        )
        return [v.aval.size for eqn in traced.jaxpr.eqns for v in eqn.outvars]

    assert max(shapes(64)) <= 64 * 7
    assert max(shapes(128)) == 2 * max(shapes(64))


def test_a_correction_of_all_columns_is_the_rayleigh_quotient_and_helps(x64):
    low, _ = online(0, 10, 3, rank=4, steps=5)
    matrix = jnp.asarray(with_spectrum(3, 0.6 ** np.arange(10)))
    corrected = correct_directions(low, matrix, jax.random.key(0), count=7)
    rayleigh = corrected.vectors.T @ matrix @ corrected.vectors
    np.testing.assert_allclose(rayleigh, np.diag(corrected.values), atol=1e-10)
    assert np.linalg.norm(matrix - to_dense(corrected)) <= np.linalg.norm(matrix - to_dense(low))


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 99), st.integers(1, 9))
def test_a_correction_of_some_columns_never_hurts(seed, count):
    with jax.enable_x64(True):
        low, dense = online(seed, 9, 2, rank=3, steps=12)
        corrected = correct_directions(low, jnp.asarray(dense), jax.random.key(seed), count=count)
        before, after = (np.linalg.norm(dense - to_dense(x)) for x in (low, corrected))
        assert after <= before + 1e-10
        assert_orthonormal(corrected.vectors, 1e-10)
        assert np.all(np.diff(corrected.values) <= 0)


def test_bad_ranks_are_named():
    with pytest.raises(ValueError, match="brand_update: rank"):
        brand_update(zero(3, 1), jnp.ones((3, 1)), 0.5, rank=0)
    with pytest.raises(ValueError, match="correct_directions: count"):
        correct_directions(zero(3, 1), jnp.eye(3), jax.random.key(0), count=0)
