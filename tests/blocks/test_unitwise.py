"""Unit-wise and diagonal blocks against per-example gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfac_optax._types import Use
from kfac_optax.blocks.diagonal.diagonal import diagonal
from kfac_optax.blocks.diagonal.unitwise import unitwise
from kfac_optax.testing import dense_layer
from tests import oracles

C, N = 3, 4
SHAPES = [(), (5,), (2, 3)]


def make_use(bias=True, weights=None, examples=N):
    return Use(dense_layer(1, C, bias=bias), examples, examples, jnp.float64, weights)


def per_example(x, g):
    """`[N, 2, C]`: gradients of scale and shift of every example, by autodiff."""

    def one(x, g):
        return jnp.stack(
            jax.grad(lambda s, b: jnp.vdot(x * s + b, g), (0, 1))(jnp.ones(C), jnp.zeros(C))
        )

    return np.asarray(jax.vmap(one)(x, g))


@pytest.mark.parametrize("positions", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_statistic_is_the_fisher_block_of_each_channel(positions, bias, x64):
    x, g = oracles.normal(0, (N, *positions, C)), oracles.normal(1, (N, *positions, C))
    d = per_example(x, g)[:, : 1 + bias]
    got = unitwise().measure(x, g, make_use(bias))
    np.testing.assert_allclose(got, np.einsum("nic,njc->cij", d, d) / N, rtol=1e-10, atol=1e-12)
    diagonals = unitwise(full=False).measure(x, g, make_use(bias))
    np.testing.assert_allclose(
        diagonals, np.einsum("nic,nic->ci", d, d) / N, rtol=1e-10, atol=1e-12
    )


def test_only_a_shift(x64):
    g = oracles.normal(1, (N, 5, C))
    got = unitwise().measure(jnp.ones_like(g), g, make_use(False))
    np.testing.assert_allclose(got[:, 0, 0], jnp.square(g.sum(1)).mean(0), rtol=1e-12)


def test_one_example_without_axes(x64):
    x, g = oracles.normal(0, (C,)), oracles.normal(1, (C,))
    got = unitwise().measure(x, g, make_use(examples=1))
    np.testing.assert_allclose(got, unitwise().measure(x[None], g[None], make_use(examples=1)))


@pytest.mark.parametrize("lam", [1e-12, 1e-3, 10.0])
@pytest.mark.parametrize("rank", [1, 4])
def test_solve_is_the_dense_solve_of_each_channel(lam, rank, x64):
    x, g = oracles.normal(0, (rank, C)), oracles.normal(1, (rank, C))
    block = unitwise()
    statistic, v = block.measure(x, g, make_use(examples=rank)), oracles.normal(2, (2, C))
    got = block.solve(block.factorize(statistic, None), v, jnp.asarray(lam))
    if rank > 1 or lam > 1e-6:
        expected = [
            np.linalg.solve(f + lam * np.eye(2), w)
            for f, w in zip(np.asarray(statistic), np.asarray(v.T))
        ]
        np.testing.assert_allclose(got.T, expected, rtol=1e-10)
    # along d, the only direction with curvature, the answer hardly depends on tiny damping;
    # rounding of `d d^T` puts a part of it, eps in size, into the other direction, where it grows
    # by 1 / lam
    if rank == 1:
        d = np.stack([x[0] * g[0], g[0]])
        along = block.solve(block.factorize(statistic, None), jnp.asarray(d), jnp.asarray(lam))
        np.testing.assert_allclose(
            along, d / ((d * d).sum(0) + lam), rtol=max(1e-10, 10 * np.finfo(float).eps / lam)
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_rank_one_with_tiny_damping_stays_positive_and_bounded(dtype, x64):
    block, lam = unitwise(), 1e-7
    for seed in range(20):
        d = np.random.default_rng(seed).normal(size=(C, 2)) * 10 ** np.random.default_rng(
            seed + 1
        ).uniform(-3, 3, (C, 2))
        statistic = jnp.asarray(d[:, :, None] * d[:, None, :], dtype)
        inverse = block.factorize(statistic, None)
        v = jnp.asarray(np.random.default_rng(seed + 2).normal(size=(2, C)), dtype)
        got = block.solve(inverse, v, jnp.asarray(lam, dtype))
        assert (jnp.sum(got * v, 0) > 0).all()
        assert (jnp.linalg.norm(got, axis=0) <= 1.001 * jnp.linalg.norm(v, axis=0) / lam).all()


def test_multiply(x64):
    x, g, v = oracles.normal(0, (N, C)), oracles.normal(1, (N, C)), oracles.normal(2, (2, C))
    full, only = unitwise(), unitwise(full=False)
    f = np.asarray(full.measure(x, g, make_use()))
    np.testing.assert_allclose(
        full.multiply(jnp.asarray(f), v), np.einsum("cij,jc->ic", f, v), rtol=1e-12
    )
    s = only.measure(x, g, make_use())
    np.testing.assert_allclose(only.multiply(s, v), np.einsum("cii,ic->ic", f, v), rtol=1e-12)
    np.testing.assert_allclose(
        only.solve(only.factorize(s, None), v, 0.5), v / (np.asarray(s).T + 0.5), rtol=1e-12
    )


def test_weight_zero_drops_an_example_and_root_is_in_g(x64):
    x, g = oracles.normal(0, (N, 5, C)), oracles.normal(1, (N, 5, C))
    w = jnp.asarray([0.0, 1.0, 2.0, 1.0])
    weights = jnp.broadcast_to(w[:, None], (N, 5))
    d = per_example(x, g)
    expected = np.einsum("n,nic,njc->cij", w, d, d) / N
    broken = x.at[0].set(jnp.nan)
    scaled = g * jnp.sqrt(w)[:, None, None]
    for given in (scaled, scaled.at[0].set(1.0)):
        got = unitwise().measure(broken, given, make_use(weights=weights))
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_padded_positions_are_not_read_but_others_of_weight_zero_count(x64):
    """Position 1 has no term of its own but moves the loss of others; position 2 has no gradient at
    all.
    """
    x, g = oracles.normal(0, (N, 3, C)), oracles.normal(1, (N, 3, C)).at[:, 2].set(0)
    weights = jnp.broadcast_to(jnp.asarray([3.0, 0.0, 0.0]), (N, 3))
    got = unitwise().measure(x.at[:, 2].set(jnp.nan), g, make_use(weights=weights))
    d = per_example(x, g)
    np.testing.assert_allclose(got, np.einsum("nic,njc->cij", d, d) / N, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("full", [True, False])
def test_forward_only_counts_positions_independently(full, x64):
    x = oracles.normal(0, (N, 5, C))
    w = jnp.asarray(np.random.default_rng(0).uniform(0, 2, (N, 5))).at[1, 2].set(0)
    rows = np.stack([x, np.ones_like(x)])
    expected = np.einsum("np,inpc,jnpc->cij", w, rows, rows) / N
    expected = expected if full else np.einsum("cii->ci", expected)
    got = unitwise(full).measure(x.at[1, 2].set(jnp.nan), None, make_use(weights=w))
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_errors():
    with pytest.raises(ValueError, match="3 rows of parameters; expected 1 or 2"):
        unitwise().init(dense_layer(3, 2), jnp.float32)
    with pytest.raises(ValueError, match="expected its statistic"):
        diagonal().measure(jnp.ones((2, 3)), None, make_use())


def test_diagonal(x64):
    block, s, v = diagonal(), jnp.asarray([[0.0, 1.0, -1e-9]]), oracles.normal(0, (1, 3))
    np.testing.assert_allclose(
        block.solve(block.factorize(s, None), v, 0.5), v / jnp.asarray([[0.5, 1.5, 0.5]])
    )
    np.testing.assert_allclose(block.multiply(s, v), s * v)
    assert block.init(dense_layer(1, 3), jnp.float32).shape == (1, 3)
