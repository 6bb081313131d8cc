"""Numbers sent as points of a lattice: how exact they arrive, and when they do not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfac_optax.linalg import lattice
from tests import oracles


@functools.partial(jax.jit, static_argnames="bits")
def sent(x, reference, spacing, bits, key=None):
    """What a receiver with a reference makes of a vector."""
    words = lattice.to_words(lattice.points_of(x, spacing, key), bits)
    return spacing * lattice.from_words(words, reference / spacing, bits)


@pytest.mark.parametrize("bits", [2, 5, 8, 16])
def test_a_round_trip_is_off_by_the_error_asked_for_within_reach_and_by_much_beyond(x64, bits):
    size, error = 257, jnp.float64(0.3)
    spacing = lattice.spacing_of(error, size)
    reach = lattice.reach_of(spacing, bits)
    x = 5 * jnp.asarray(oracles.normal(0, size))
    away = jnp.asarray(oracles.normal(1, size))
    away = away / jnp.abs(away).max()  # one at the very edge
    near = sent(x, x + 0.999 * reach * away, spacing, bits)
    assert np.linalg.norm(near - x) <= error
    # a little more than a spacing further away some are off by K s
    far = sent(x, x + (reach + 1.01 * spacing) * away, spacing, bits)
    assert np.linalg.norm(far - near) >= 2**bits * spacing


@pytest.mark.parametrize("bits", [2, 7, 16])
def test_sums_of_words_are_the_words_of_sums(bits):
    """Modulo `2^32`, with what every lane carries over to the next, negative points included."""
    rng = np.random.default_rng(0)
    points = rng.integers(-(10**6), 10**6, (5, 33)).astype(np.int32)
    near = points.sum(0) + rng.uniform(-1, 1, 33) * (2**bits - 1) / 2.001
    words = functools.reduce(jnp.add, [lattice.to_words(jnp.asarray(p), bits) for p in points])
    assert words.shape == (lattice.words_for(33, bits),)
    found = lattice.from_words(words, jnp.asarray(near, jnp.float32), bits)
    np.testing.assert_array_equal(found, points.sum(0))
    sums = [lattice.checksum(jnp.asarray(p)) for p in points]
    assert functools.reduce(jnp.add, sums) == lattice.checksum(found)


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_a_point_off_by_a_multiple_of_the_modulus_changes_the_checksum(bits):
    """Alone, beside one that is off the other way, and with what it carries over to another."""
    points = jnp.asarray(np.random.default_rng(0).integers(-99, 99, 500), jnp.int32)
    modulus = 2**bits
    pairs = jnp.stack([jnp.arange(499), jnp.arange(1, 500)], 1)

    @jax.jit
    def changed(by):
        wrong = jax.vmap(lambda pair: lattice.checksum(points.at[pair].add(by)))(pairs)
        return wrong != lattice.checksum(points)

    for by in ((modulus, 0), (modulus, -modulus), (modulus, -1)):
        assert changed(jnp.array(by)).all()
    assert not changed(jnp.array((0, 0))).any()


def test_the_triangle_has_the_norm_of_the_matrix_and_gives_it_back(x64):
    for n in (1, 4, 5):
        x = oracles.normal(n, (3, n, n))
        x = jnp.asarray(x + np.swapaxes(x, -1, -2))
        vector = jax.jit(lattice.triangle)(x)
        assert vector.shape == (3, n * (n + 1) // 2)
        norms = np.linalg.norm(x, axis=(-2, -1))
        np.testing.assert_allclose(np.linalg.norm(vector, axis=-1), norms, rtol=1e-12)
        back = jax.jit(lattice.from_triangle, static_argnums=1)(vector, n)
        np.testing.assert_allclose(back, x, rtol=1e-12)


def test_a_matrix_arrives_symmetric_and_positive_where_the_error_is_below_its_spectrum(x64):
    """And a preconditioner with a quarter of the damping as error within a quarter, as an operator."""
    rows = oracles.normal(0, (20, 6))
    matrix, damping = jnp.asarray(rows.T @ rows / 20), 0.05
    smallest = np.linalg.eigvalsh(matrix)[0]
    for error in (0.9 * smallest, damping / 4):
        vector = lattice.triangle(matrix)
        spacing = lattice.spacing_of(jnp.float64(error), vector.size)
        # of a worker of its own, that the receiver has
        near = lattice.triangle(matrix + 0.01)
        got = lattice.from_triangle(sent(vector, near, spacing, 12), 6)
        np.testing.assert_array_equal(got, got.T)
        off = np.linalg.norm(got - matrix)
        assert 0 < np.linalg.norm(got - matrix, 2) <= off <= error
        if error < smallest:
            assert np.linalg.eigvalsh(got)[0] > 0
    damped = matrix + damping * jnp.eye(6)
    ratio = np.linalg.eigvals(np.linalg.solve(damped, got + damping * np.eye(6))).real
    assert ratio.min() >= 1 - 1 / 4
    assert ratio.max() <= 1 + 1 / 4


def test_random_rounding_is_right_on_average_and_never_off_by_more_than_a_spacing(x64):
    x, spacing, draws = jnp.asarray(oracles.normal(0, 50)), jnp.float64(0.5), 4000
    keys = jax.random.split(jax.random.key(0), draws)
    found = jax.vmap(lambda key: sent(x, x, spacing, 4, key))(keys)
    assert np.abs(found - x).max() <= spacing
    # a mean of S draws has a deviation of at most s / (2 sqrt(S)); five of them
    np.testing.assert_allclose(found.mean(0), x, atol=5 * spacing / 2 / np.sqrt(draws))
    nearest = sent(x, x, spacing, 4)
    assert np.abs(nearest - x).max() > 10 * np.abs(found.mean(0) - x).max()


def test_what_has_no_point_is_known_and_becomes_none():
    x = jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf, 1e30])
    np.testing.assert_array_equal(lattice.representable(x, jnp.float32(0.1)), [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(lattice.points_of(x, jnp.float32(0.1)), [10, 0, 0, 0, 0])


WORKERS, ROWS, RIDGE, BITS = 4, 30, 0.05, 8


def loss(x, a, y):
    """Ridge logistic regression."""
    return jnp.mean(jnp.logaddexp(0, -y * (a @ x))) + RIDGE / 2 * x @ x


@jax.jit
def preconditioner(moments):
    """`mean_i M_i / 4 + ridge I`, above every Hessian, from moments that workers sent to one of them
    and it to all.
    """
    vectors = lattice.triangle(moments)
    # together off by at most a quarter of the ridge, after both ways
    spacing = lattice.spacing_of(jnp.float64(RIDGE / 8), vectors.shape[1])
    at_leader = jnp.stack([sent(v, vectors[0], spacing, 16) for v in vectors])
    mean = sent(at_leader.mean(0), at_leader[0], spacing, 16)
    size = moments.shape[-1]
    return lattice.from_triangle(mean, size) / 4 + RIDGE * jnp.eye(size)


def test_descent_with_quantised_preconditioner_and_directions_keeps_its_rate(x64):
    a = jnp.asarray(oracles.normal(0, (WORKERS, ROWS, 6)) * np.array([3, 2, 1, 1, 0.5, 0.2]))
    y = jnp.sign(a @ jnp.ones(6) + jnp.asarray(oracles.normal(1, (WORKERS, ROWS))))
    moments = jnp.einsum("wrp,wrq->wpq", a, a) / ROWS
    exact = moments.mean(0) / 4 + RIDGE * jnp.eye(6)
    rough = preconditioner(moments)
    assert 0 < np.linalg.norm(rough - exact, 2) <= RIDGE / 4
    total = lambda x: jnp.mean(jax.vmap(loss, (None, 0, 0))(x, a, y))

    def plain(x, _):
        return x - jnp.linalg.solve(exact, jax.grad(total)(x)), total(x)

    def directions(x):
        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(x, a, y)
        return jnp.linalg.solve(rough, gradients.T).T

    shrink = 0.9

    def quantised(carry, _):
        # what was decoded last is what both ends have: the next is near
        x, known, known_mean, reach = carry
        spacing = 2 * reach / (2**BITS - 1)
        mine = directions(x)
        known = jax.vmap(lambda v, r: sent(v, r, spacing, BITS))(mine, known)
        known_mean = sent(known.mean(0), known_mean, spacing, BITS)
        right = jnp.abs(known - mine).max() <= spacing
        return (x - known_mean, known, known_mean, shrink * reach), (total(x), right)

    steps, start = 90, jnp.zeros(6)
    first = directions(start)
    start_of_all = (start, 0 * first, 0 * start, 4 * jnp.abs(first).max())
    best, values = jax.jit(lambda: jax.lax.scan(plain, start, length=2 * steps))()
    _, (rough_values, right) = jax.jit(
        lambda: jax.lax.scan(quantised, start_of_all, length=steps)
    )()
    assert right.all()
    until = lambda found: int(np.argmax(np.asarray(found) - total(best) <= 1e-8))
    needed = until(values)
    assert 20 < needed < steps
    assert 0 < until(rough_values) <= 1.1 * needed
