"""Singular statistics without damping: finite, bounded, and nothing changes where the statistics
are regular.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfac_optax._types import Use
from kfac_optax.blocks.diagonal.diagonal import diagonal
from kfac_optax.blocks.diagonal.unitwise import unitwise
from kfac_optax.blocks.embedding.embedding import embedding
from kfac_optax.blocks.embedding.tied_embedding import tied_embedding
from kfac_optax.blocks.kronecker.kronecker import kronecker
from kfac_optax.blocks.kronecker.recurrent import recurrent
from kfac_optax.blocks.kronecker.sua import sua
from kfac_optax.blocks.low_rank.low_rank import low_rank
from kfac_optax.couplings.coarse import coarse_factorize, coarse_solve
from kfac_optax.linalg.factorize import damped_quotient
from kfac_optax.testing import dense_layer

ROWS = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)  # one example
A, G = jnp.asarray(ROWS), jnp.asarray(ROWS[..., ::-1].copy())
TOKENS = jnp.array([[0, 1, 1]])
SQUARE = dense_layer(4, 4)
NORM = dense_layer(1, 4, bias=True)
MAP = dense_layer(4, 4, bias=True, kind="conv", channels=4)


def _statistic(block, a, g, layer=SQUARE):
    rows = g.size // g.shape[-1]
    return block.measure(a, g, Use(layer, len(a), rows, jnp.float32))


def _tied(block):
    lookup = block.measure(TOKENS, G, Use(SQUARE, 1, 6, jnp.float32))
    return jax.tree.map(jnp.add, lookup, block.measure(A, G, Use(SQUARE, 1, 6, jnp.float32)))


CASES = {
    "kronecker-eigh": (kronecker(), lambda b: _statistic(b, A[:, 0], G[:, 0])),
    "kronecker-cholesky": (kronecker("cholesky"), lambda b: _statistic(b, A[:, 0], G[:, 0])),
    "embedding-eigh": (embedding(), lambda b: _statistic(b, TOKENS, G)),
    "embedding-cholesky": (embedding("cholesky"), lambda b: _statistic(b, TOKENS, G)),
    "tied": (tied_embedding(), _tied),
    "unitwise": (unitwise(), lambda b: _statistic(b, A[:, 0], G[:, 0].at[:, 0].set(0), NORM)),
    "unitwise-diagonal": (
        unitwise(full=False),
        lambda b: _statistic(b, A[:, 0], G[:, 0].at[:, 0].set(0), NORM),
    ),
    "diagonal": (diagonal(), lambda b: jnp.array([[1.0, 0.0, 2.0, 0.0]])),
    "recurrent-1": (recurrent(), lambda b: _statistic(b, A, G)),
    "recurrent-2": (recurrent("option2"), lambda b: _statistic(b, A, G)),
    "low-rank": (low_rank(2), lambda b: _statistic(b, A[:, 0], G[:, 0])),
    "low-rank-relative": (
        low_rank(2, damping_rule="relative", rest="zero"),
        lambda b: _statistic(b, A[:, 0], G[:, 0]),
    ),
    "sua": (sua(), lambda b: _statistic(b, A, G, MAP)),
}
SHAPES = {"unitwise": (2, 4), "unitwise-diagonal": (2, 4), "diagonal": (1, 4), "sua": (5, 4)}


@pytest.mark.parametrize("damping", [0.0, 1e-30])
@pytest.mark.parametrize("name", CASES)
def test_singular_statistics_have_a_bounded_answer(name, damping):
    block, statistic = CASES[name]
    factors = statistic(block)
    v = jnp.asarray(np.random.default_rng(1).normal(size=SHAPES.get(name, (4, 4))), jnp.float32)
    u = jax.jit(lambda f, d: block.solve(block.factorize(f, d), v, d))(
        factors, jnp.float32(damping)
    )
    eps = float(jnp.finfo(jnp.float32).eps)
    limit = 1 / eps**2
    if name == "kronecker-cholesky":  # each factor is at worst rounding of its trace
        limit = float(
            jnp.linalg.norm(v)
            / ((2 * eps) ** 2 * jnp.trace(factors.inputs) * jnp.trace(factors.outputs))
        )
    assert np.isfinite(u).all() and np.abs(u).max() < limit


@pytest.mark.parametrize(
    "name", ["kronecker-eigh", "embedding-eigh", "unitwise-diagonal", "diagonal"]
)
def test_exact_solves_are_the_pseudo_inverse(name):
    """Nothing moves where nothing is known; of what is known, the solve is the inverse of the
    product.
    """
    block, statistic = CASES[name]
    factors = statistic(block)
    v = jnp.asarray(np.random.default_rng(1).normal(size=SHAPES.get(name, (4, 4))), jnp.float32)
    solve = jax.jit(
        lambda v: block.solve(block.factorize(factors, jnp.float32(0)), v, jnp.float32(0))
    )
    once = block.multiply(factors, v)
    np.testing.assert_allclose(block.multiply(factors, solve(once)), once, rtol=1e-3, atol=1e-4)
    assert np.abs(solve(v)).max() < 1e5


def test_the_coarse_level_too():
    inverse = coarse_factorize(jnp.ones((3, 3)), jnp.ones(3))
    for damping in (0.0, 1e-30):
        x = coarse_solve(inverse, jnp.array([1.0, 2.0, 3.0]), jnp.float32(damping), jnp.ones(3))
        np.testing.assert_allclose(x, np.full(3, 2 / 3), rtol=1e-5)


def test_with_a_damping_above_rounding_nothing_changes():
    values = jnp.array([2.0, 0.5, 0.0])
    for damping in (1e-5, 0.1):
        np.testing.assert_array_equal(
            damped_quotient(values, values, jnp.float32(damping)), values / (values + damping)
        )
