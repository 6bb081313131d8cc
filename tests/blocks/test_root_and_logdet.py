"""Square roots and log determinants of blocks, beyond the law that all of them keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfac_optax import testing
from kfac_optax._types import Use
from kfac_optax.blocks.diagonal.diagonal import diagonal
from kfac_optax.blocks.diagonal.unitwise import unitwise
from kfac_optax.blocks.kronecker.ekfac import ekfac_block
from kfac_optax.blocks.kronecker.foof import foof_block
from kfac_optax.blocks.kronecker.kronecker import Factors, kronecker
from kfac_optax.blocks.kronecker.recurrent import recurrent
from kfac_optax.blocks.kronecker.sua import sua
from kfac_optax.blocks.low_rank.low_rank import low_rank
from kfac_optax.blocks.rank_one.rank_one import Means, rank_one
from kfac_optax.testing.case import matrix
from tests import oracles

pytestmark = pytest.mark.usefixtures("x64")
P, Q = 4, 3


def check(block, inverse, damping, shape=(P, Q), rtol=1e-9):
    """`R R^T` is the dense inverse, and `logdet` that of what it inverts; returns the inverse."""
    damping = jnp.asarray(damping)
    dense = matrix(block.solve, shape, inverse, damping)
    root = matrix(block.root_solve, shape, inverse, damping)
    np.testing.assert_allclose(root @ root.T, dense, rtol=0, atol=rtol * np.abs(dense).max())
    got = block.logdet(inverse, damping, shape)
    np.testing.assert_allclose(got, -np.linalg.slogdet(dense)[1], rtol=rtol, atol=rtol)
    return dense


def psd(seed, n, rank=None):
    x = oracles.normal(seed, (n, rank or n))
    return x @ x.T / n


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_rank_one(outputs, scale):
    means = Means(scale * oracles.normal(0, P), oracles.normal(1, Q) if outputs else None)
    # at the largest scale the block has a condition number of 1e9
    dense = check(rank_one(outputs), means, 0.3, rtol=1e-7)
    sides = np.outer(means.outputs, means.outputs) if outputs else np.eye(Q)
    fisher = np.kron(np.outer(means.inputs, means.inputs), sides)
    np.testing.assert_allclose(dense @ (fisher + 0.3 * np.eye(P * Q)), np.eye(P * Q), atol=1e-6)


@pytest.mark.parametrize("full", [True, False])
def test_diagonals(full):
    statistic = jnp.square(oracles.normal(0, (1, P)))
    check(diagonal(), diagonal().factorize(statistic, 0.1), 0.1, (1, P))
    pairs = oracles.normal(1, (Q, 2, 2))
    moments = pairs @ pairs.swapaxes(1, 2) if full else jnp.square(pairs[..., 0])
    check(unitwise(full), unitwise(full).factorize(moments, 0.1), 0.1, (2, Q))


@pytest.mark.parametrize("rest", ["mean", "smallest", "zero"])
@pytest.mark.parametrize("rank", [2, 3, 9])
def test_low_rank(rest, rank):
    block = low_rank(rank, rest=rest, target_error=0.3 if rank == 3 else None)
    inverse = block.factorize(Factors(psd(0, P), psd(1, Q)), jnp.asarray(0.1))
    check(block, inverse, 0.1)


def test_low_rank_of_a_factor_without_all_of_its_directions():
    """Columns of zeros, which online updates may hold, take nothing from what is left out."""
    block = low_rank(2, rest="mean")
    inverse = block.factorize(Factors(psd(0, P, 1), psd(1, Q)), jnp.asarray(0.1))
    low = inverse.inputs.low
    hole = inverse.inputs._replace(
        low=low._replace(vectors=low.vectors.at[:, 1].set(0)), rest=jnp.asarray(0.05)
    )
    check(block, inverse._replace(inputs=hole), 0.1)


def test_ekfac_measured_moments():
    block = ekfac_block()
    inverse = block.factorize(Factors(psd(0, P), psd(1, Q)), jnp.asarray(0.1))
    inverse = inverse._replace(moments=jnp.square(oracles.normal(2, (P, Q))))
    check(block, inverse, 0.2)


def test_without_damping_singular_directions_are_left_out():
    """A pseudo-inverse has a root too; its determinant is over what is known."""
    block = kronecker("eigh")
    factors = Factors(psd(0, P, 2), psd(1, Q))
    inverse, zero = block.factorize(factors, jnp.asarray(0.0)), jnp.asarray(0.0)
    dense = matrix(block.solve, (P, Q), inverse, zero)
    root = matrix(block.root_solve, (P, Q), inverse, zero)
    np.testing.assert_allclose(root @ root.T, dense, rtol=0, atol=1e-10 * np.abs(dense).max())
    values = np.linalg.eigvalsh(np.kron(factors.inputs, factors.outputs))[-2 * Q :]
    np.testing.assert_allclose(block.logdet(inverse, zero, (P, Q)), np.log(values).sum(), rtol=1e-8)


def test_samples_have_the_covariance_of_the_damped_inverse():
    block, n = kronecker("cholesky"), 20_000
    inverse = block.factorize(Factors(psd(0, 2), psd(1, 2)), jnp.asarray(0.5))
    root = matrix(block.root_solve, (2, 2), inverse, jnp.asarray(0.5))
    draws = np.random.default_rng(0).standard_normal((n, 4)) @ root.T
    dense = matrix(block.solve, (2, 2), inverse, jnp.asarray(0.5))
    got, spread = draws.T @ draws / n, np.sqrt(np.outer(np.diag(dense), np.diag(dense)) / n)
    assert (np.abs(got - dense) < 5 * spread).all()


@pytest.mark.parametrize("inverse", ["eigh", "cholesky"])
def test_ill_conditioned_float32_stays_finite(inverse):
    """The root of an inverse whose small eigenvalues are rounding has no NaN in it."""
    with jax.enable_x64(False):
        block, a = kronecker(inverse), jnp.asarray(psd(0, P, 1), jnp.float32)
        held = block.factorize(Factors(a, 1e6 * a[:Q, :Q]), jnp.float32(1e-9))
        z = jnp.ones((P, Q), jnp.float32)
        assert np.isfinite(block.root_solve(held, z, jnp.float32(1e-9))).all()
        assert np.isfinite(block.logdet(held, jnp.float32(1e-9), (P, Q)))


def test_who_has_them():
    with_both = [
        kronecker(),
        kronecker("cholesky"),
        kronecker("newton"),
        ekfac_block(),
        low_rank(2),
        rank_one(),
    ]
    for block in [*with_both, diagonal(), unitwise(), foof_block(), foof_block("tied_embedding")]:
        assert block.root_solve is not None and block.logdet is not None, block.name
    for block in (recurrent(), sua()):
        assert block.root_solve is None and block.logdet is None, block.name


def test_a_wrong_root_breaks_the_law():
    block = kronecker()
    wrong = block._replace(root_solve=block.solve)
    with pytest.raises(AssertionError, match="root_solve is a root of solve"):
        testing.check_block(testing.dense_case(wrong, exact=True))
    wrong = block._replace(logdet=lambda *args: 1 + block.logdet(*args))
    with pytest.raises(AssertionError, match="logdet is that of the inverse of solve"):
        testing.check_block(testing.dense_case(wrong, exact=True))


def test_measured_statistics_of_one_layer():
    """From rows to a root: the whole path of a block, with a bias."""
    a, g = oracles.normal(0, (6, P - 1)), oracles.normal(1, (6, Q))
    block = kronecker("eigh")
    factors = block.measure(a, g, Use(testing.dense_layer(P - 1, Q, bias=True), 6, 6, jnp.float64))
    rows = np.concatenate([a, np.ones((6, 1))], 1)
    fisher = np.kron(rows.T @ rows / 6, np.asarray(g).T @ g / 6)
    inverse = block.factorize(factors, jnp.asarray(0.1))
    root = matrix(block.root_solve, (P, Q), inverse, jnp.asarray(0.1))
    np.testing.assert_allclose(
        root @ root.T, np.linalg.inv(fisher + 0.1 * np.eye(P * Q)), rtol=1e-9, atol=1e-10
    )
