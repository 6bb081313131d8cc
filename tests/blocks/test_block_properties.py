"""What every block owes its caller, whatever it models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_optax import testing
from kfac_optax.blocks.diagonal.diagonal import diagonal
from kfac_optax.blocks.diagonal.unitwise import unitwise
from kfac_optax.blocks.embedding.embedding import embedding
from kfac_optax.blocks.embedding.tied_embedding import tied_embedding
from kfac_optax.blocks.kronecker.ekfac import ekfac_block
from kfac_optax.blocks.kronecker.foof import foof_block
from kfac_optax.blocks.kronecker.kronecker import kronecker
from kfac_optax.blocks.kronecker.recurrent import recurrent
from kfac_optax.blocks.kronecker.sua import sua
from kfac_optax.blocks.low_rank.low_rank import low_rank
from kfac_optax.blocks.refresh_rules.delayed import delayed
from kfac_optax.blocks.refresh_rules.similarity_gate import similarity_gate
from kfac_optax.blocks.refresh_rules.trace_gate import trace_gate
from kfac_optax.testing import Case, dense_layer
from kfac_optax.testing.blocks import BLOCK_LAWS
from kfac_optax.testing.case import compiled, matrix, measure
from tests import oracles


def draw(seed, *shape):
    return oracles.normal(seed, shape)


def tokens(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 4, shape))


def dense_rows(*inner, p=3, q=2):
    return lambda s, n: [(draw(s, n, *inner, p), draw(s + 1, n, *inner, q))]


def lookup(s, n):
    return [(tokens(s, n, 3), draw(s + 1, n, 3, 2))]


def tied(s, n):
    return lookup(s, n) + [(draw(s + 2, n, 3, 2), draw(s + 3, n, 3, 4))]


def of_channels(*, bias, block):
    return Case(block, dense_layer(1, 3, bias=bias), dense_rows(2, p=3, q=3), exact=True)


def in_time(block):
    return Case(block, dense_layer(2, 2, bias=True), dense_rows(4, p=2))


def of_inputs(kind, layer, rows):
    return Case(foof_block(kind), layer, rows, exact=True, outputs=False)


DENSE = dense_layer(3, 2)
TABLE = dense_layer(4, 2)
WIDE = dense_layer(4, 4, bias=True)
CHANNELS = dense_layer(4, 2, bias=True, kind="conv", channels=2)
CASES = {
    "kronecker-eigh": Case(kronecker(), DENSE, dense_rows(2), exact=True),
    "kronecker-cholesky": Case(kronecker("cholesky"), dense_layer(3, 2, bias=True), dense_rows(2)),
    "kronecker-newton": Case(kronecker("newton"), dense_layer(3, 2, bias=True), dense_rows(2)),
    "embedding-eigh": Case(embedding(), TABLE, lookup, exact=True),
    "embedding-cholesky": Case(embedding("cholesky"), TABLE, lookup),
    "tied": Case(tied_embedding(), TABLE, tied),
    "unitwise": of_channels(bias=True, block=unitwise()),
    "unitwise-scale": of_channels(bias=False, block=unitwise()),
    "unitwise-diagonal": of_channels(bias=True, block=unitwise(full=False)),
    "recurrent-1": in_time(recurrent()),
    "recurrent-2": in_time(recurrent("option2")),
    "low-rank": Case(low_rank(2), WIDE, dense_rows(3, p=4, q=4)),
    "ekfac": Case(ekfac_block(), DENSE, dense_rows(2), averaged=False),
    "foof": of_inputs("linear", WIDE, dense_rows(3, p=4, q=4)),
    "foof-embedding": of_inputs("embedding", TABLE, lookup),
    "foof-tied": of_inputs("tied_embedding", TABLE, tied),
    "foof-unitwise": of_inputs(
        "scale_shift", dense_layer(1, 3, bias=True), dense_rows(2, p=3, q=3)
    ),
    "late": Case(delayed(kronecker(), every=4, steps=2), DENSE, dense_rows(2), exact=True),
    "similarity": Case(similarity_gate(kronecker()), DENSE, dense_rows(2), exact=True),
    "trace": Case(trace_gate(kronecker(), (3, 2)), DENSE, dense_rows(2), exact=True),
    "sua": Case(sua(), CHANNELS, dense_rows(3, p=2)),
}
CASES = {name: compiled(case) for name, case in CASES.items()}
every_case = pytest.mark.parametrize("name", CASES)


@every_case
@pytest.mark.parametrize("law", BLOCK_LAWS, ids=lambda law: law.__name__)
def test_laws(name, law):
    law(CASES[name])


@every_case
@settings(max_examples=3, deadline=None)
@given(st.integers(0, 99), st.sampled_from((1, 4)), st.floats(1e-3, 10))
def test_operators_on_random_rows(name, seed, n, lam):
    testing.check_operator(CASES[name], seed=seed, examples=n, damping=lam)
    testing.check_product(CASES[name], seed=seed, examples=n, damping=lam)


@every_case
def test_before_any_statistic_the_curvature_is_the_identity(name):
    case, lam, v = CASES[name], jnp.float32(1e-3), jnp.ones(CASES[name].shape)
    inverse = case.block.factorize(case.block.init(case.layer, jnp.float32), lam)
    np.testing.assert_allclose(case.block.solve(inverse, v, lam), v, rtol=0.1)


@every_case
@pytest.mark.parametrize("weighted", [False, True])
def test_explicit_mesh_axes(name, weighted):
    """Contractions and scatters over sharded examples name the sharding of their results."""
    case, n = CASES[name], 4
    rows = case.rows(0, n)
    weights = jnp.asarray([0.5, 1.0, 1.5, 1.0]) if weighted else None
    expected = measure(case, rows, n, jnp.float32, weights)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(
            (rows, weights), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        )
        got = jax.jit(lambda rows, weights: measure(case, rows, n, jnp.float32, weights))(*sharded)
        assert all(
            axis is None for x in jax.tree.leaves(got) for axis in jax.typeof(x).sharding.spec
        )
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
            jax.device_get(got),
            expected,
        )


DIAGONAL = diagonal()


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 99), st.floats(1e-3, 10))
def test_diagonal_is_the_dense_solve(seed, lam):
    with jax.enable_x64(True):
        s = jnp.square(draw(seed, 1, 4))
        inverse = matrix(DIAGONAL.solve, (1, 4), DIAGONAL.factorize(s, lam), lam)
        np.testing.assert_allclose(inverse, np.diag(1 / (np.ravel(s) + lam)), rtol=1e-12)
