"""What every block owes its caller, whatever it models."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_optax._types import Block, Use
from kfac_optax.blocks.diagonal import diagonal
from kfac_optax.blocks.embedding import embedding, tied_embedding
from kfac_optax.blocks.foof import foof_block
from kfac_optax.blocks.low_rank import low_rank
from kfac_optax.blocks.low_rank_side import LowRankInverse
from kfac_optax.blocks.recurrent import recurrent
from kfac_optax.blocks.sua import sua
from kfac_optax.blocks.unitwise import unitwise
from tests import oracles


class Case(NamedTuple):
    block: Block
    shape: tuple[int, int]
    exact: bool  # the damping is added to the block as it is
    rows: Any  # (seed, N, rank) -> list of (a, g)
    bias: bool = False
    inputs: int = 0


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


CASES = {
    "embedding-eigh": Case(embedding(), (4, 2), True, lookup, inputs=4),
    "embedding-cholesky": Case(embedding("cholesky"), (4, 2), False, lookup, inputs=4),
    "tied": Case(tied_embedding(), (4, 2), False, tied, inputs=4),
    "unitwise": Case(unitwise(), (2, 3), True, dense_rows(2, p=3, q=3), bias=True, inputs=1),
    "unitwise-scale": Case(unitwise(), (1, 3), True, dense_rows(2, p=3, q=3), inputs=1),
    "unitwise-diagonal": Case(
        unitwise(full=False), (2, 3), True, dense_rows(2, p=3, q=3), bias=True, inputs=1
    ),
    "recurrent-1": Case(recurrent(), (3, 2), False, dense_rows(4, p=2), bias=True, inputs=2),
    "recurrent-2": Case(
        recurrent("option2"), (3, 2), False, dense_rows(4, p=2), bias=True, inputs=2
    ),
    "low-rank": Case(low_rank(2), (5, 4), False, dense_rows(3, p=4, q=4), bias=True, inputs=4),
    "foof": Case(foof_block(), (5, 4), True, dense_rows(3, p=4, q=4), bias=True, inputs=4),
    "foof-embedding": Case(foof_block("embedding"), (4, 2), True, lookup, inputs=4),
    "foof-tied": Case(foof_block("tied_embedding"), (4, 2), True, tied, inputs=4),
    "foof-unitwise": Case(
        foof_block("scale_shift"), (2, 3), True, dense_rows(2, p=3, q=3), bias=True, inputs=1
    ),
    "sua": Case(sua(2), (5, 2), False, dense_rows(3, p=2), bias=True, inputs=4),
}
CASES = {  # compiled once, not operation by operation for every example
    name: case._replace(
        block=case.block._replace(
            factorize=jax.jit(case.block.factorize),
            solve=jax.jit(case.block.solve),
            multiply=jax.jit(case.block.multiply),
        )
    )
    for name, case in CASES.items()
}
every_case = pytest.mark.parametrize("name", CASES)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def measure(case, rows, n, dtype=jnp.float64, weights=None):
    count = sum(g[..., 0].size for _, g in rows)
    use = Use(case.bias, case.shape[1], n, count, dtype, None, case.inputs)
    parts = []
    for a, g in rows:
        lead = a.shape if jnp.issubdtype(a.dtype, jnp.integer) else a.shape[:-1]
        spread = (
            None
            if weights is None
            else jnp.broadcast_to(weights.reshape(-1, *(1,) * (len(lead) - 1)), lead)
        )
        parts.append(case.block.measure(a, g, use._replace(weights=spread)))
    return jax.tree.map(lambda *x: sum(x), *parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def columns(apply, shape, operands, *rest):
    eye = jnp.eye(shape[0] * shape[1]).reshape(-1, *shape)
    return jax.vmap(lambda v: apply(operands, v, *rest))(eye).reshape(len(eye), -1).T


def matrix(apply, shape, *operands):
    """`apply(operands[0], v, *operands[1:])` as a dense matrix."""
    return np.asarray(columns(apply, shape, *operands))


def close(x, y, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), x, y)


@every_case
@settings(max_examples=3, deadline=None)
@given(st.integers(0, 99), st.sampled_from((1, 4)), st.floats(1e-3, 10))
def test_solve_is_linear_symmetric_and_positive(name, seed, n, lam):
    with jax.enable_x64(True):
        case, lam = CASES[name], jnp.asarray(lam)
        factors = measure(case, case.rows(seed, n), n)
        inverse = case.block.factorize(factors, lam)
        dense = matrix(case.block.solve, case.shape, inverse, lam)
        scale = np.abs(dense).max()
        np.testing.assert_allclose(dense, dense.T, atol=1e-10 * scale)
        assert np.linalg.eigvalsh(dense).min() > 0
        v = draw(seed, *case.shape)
        np.testing.assert_allclose(
            np.ravel(case.block.solve(inverse, v, lam)), dense @ np.ravel(v), atol=1e-10 * scale
        )
        curvature = matrix(case.block.multiply, case.shape, factors)
        np.testing.assert_allclose(curvature, curvature.T, atol=1e-8 * np.abs(curvature).max())
        assert (
            np.linalg.eigvalsh((curvature + curvature.T) / 2).min()
            > -1e-8 * np.abs(curvature).max()
        )
        if case.exact:
            damped = curvature + float(lam) * np.eye(len(curvature))
            np.testing.assert_allclose(dense, np.linalg.inv(damped), rtol=1e-9, atol=1e-10 * scale)


@every_case
def test_large_damping_leaves_the_gradient(name, x64):
    """Exact damping is within the curvature over lam of it; factored damping within the root of
    that."""
    case, lam = CASES[name], jnp.asarray(1e12)
    inverse = case.block.factorize(measure(case, case.rows(0, 3), 3), lam)
    v = draw(1, *case.shape)
    got = lam * case.block.solve(inverse, v, lam)
    np.testing.assert_allclose(
        got, v, rtol=1e-10 if case.exact else 1e-4, atol=1e-10 if case.exact else 1e-4
    )


@every_case
@pytest.mark.parametrize("start", ["init", "zero"])
def test_start_and_zero_statistics_are_finite(name, start):
    case, lam = CASES[name], jnp.float32(1e-3)
    factors = case.block.init(*case.shape, jnp.float32)
    factors = jax.tree.map(jnp.zeros_like, factors) if start == "zero" else factors
    inverse = case.block.factorize(factors, lam)
    v = jnp.ones(case.shape)
    got = case.block.solve(inverse, v, lam)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(inverse))
    expected = v / 1e-3 if start == "zero" else v
    np.testing.assert_allclose(got, expected, rtol=0.1 if start == "init" else 1e-4)
    counts = (
        [side.used for side in inverse] if isinstance(inverse, LowRankInverse) else []
    )  # pairs in use: the only integers
    others = [
        x
        for x in jax.tree.leaves((factors, inverse, got))
        if not any(x is count for count in counts)
    ]
    assert all(x.dtype == jnp.float32 for x in others) and all(x.dtype == jnp.int32 for x in counts)


@every_case
def test_statistics_are_linear_in_the_data(name, x64):
    """A batch of two halves has the mean of their statistics, so a running average of them is
    exact."""
    case, n = CASES[name], 3
    first, second = case.rows(0, n), case.rows(10, n)
    joined = [
        tuple(map(jnp.concatenate, zip(x, y, strict=True)))
        for x, y in zip(first, second, strict=True)
    ]
    parts = measure(case, first, n), measure(case, second, n)
    close(
        jax.tree.map(lambda x, y: (x + y) / 2, *parts),
        measure(case, joined, 2 * n),
        rtol=1e-10,
        atol=1e-12,
    )


@every_case
def test_weights_mean_examples_counted_more_often(name, x64):
    """Weights (0, 2) with the root in g are the second example alone; the first may hold NaN."""
    case = CASES[name]
    rows = case.rows(0, 2)
    w = jnp.asarray([0.0, 2.0])
    weighted, alone = [], []
    for a, g in rows:
        broken = a if jnp.issubdtype(a.dtype, jnp.integer) else a.at[0].set(jnp.nan)
        weighted.append((broken, g * jnp.sqrt(w).reshape(-1, *(1,) * (g.ndim - 1))))
        alone.append((a[1:], g[1:]))
    close(measure(case, weighted, 2, weights=w), measure(case, alone, 1), rtol=1e-10, atol=1e-12)


@every_case
def test_blocks_map_over_layers_under_jit(name, x64):
    case, lam = CASES[name], jnp.asarray(0.1)
    single = [measure(case, case.rows(s, 3), 3) for s in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *single)
    v = draw(5, 2, *case.shape)

    @jax.jit
    def run(stacked, v):
        inverse = jax.vmap(case.block.factorize, (0, None))(stacked, lam)
        return jax.vmap(case.block.solve, (0, 0, None))(inverse, v, lam), jax.vmap(
            case.block.multiply
        )(stacked, v)

    solved, multiplied = run(stacked, v)
    for i, factors in enumerate(single):
        inverse = case.block.factorize(factors, lam)
        np.testing.assert_allclose(
            solved[i], case.block.solve(inverse, v[i], lam), rtol=1e-8, atol=1e-10
        )
        np.testing.assert_allclose(
            multiplied[i], case.block.multiply(factors, v[i]), rtol=1e-8, atol=1e-10
        )


@every_case
def test_statistics_have_the_shapes_and_dtype_of_init(name):
    case = CASES[name]
    rows = [
        (
            a if jnp.issubdtype(a.dtype, jnp.integer) else a.astype(jnp.bfloat16),
            g.astype(jnp.bfloat16),
        )
        for a, g in case.rows(0, 3)
    ]
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), measure(case, rows, 3, jnp.float32))
    assert shapes == jax.tree.map(
        lambda x: (x.shape, x.dtype), case.block.init(*case.shape, jnp.float32)
    )


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
        close(jax.device_get(got), expected, rtol=1e-5, atol=1e-6)


DIAGONAL = diagonal()


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 99), st.floats(1e-3, 10))
def test_diagonal_is_the_dense_solve(seed, lam):
    with jax.enable_x64(True):
        s = jnp.square(draw(seed, 1, 4))
        inverse = matrix(DIAGONAL.solve, (1, 4), DIAGONAL.factorize(s, lam), lam)
        np.testing.assert_allclose(inverse, np.diag(1 / (np.ravel(s) + lam)), rtol=1e-12)
