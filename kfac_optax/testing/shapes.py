"""What a block owes the engine: finite starts, types that stay, and layers that share a call."""

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._types import PyTree
from kfac_optax.testing.case import Case, measure
from kfac_optax.testing.comparison import close, holds, in_float64, normal


def check_start_and_zeros(case: Case) -> None:
    """Before any statistic, and after one of zeros, everything is finite; zeros leave
    `V / damping`.
    """
    # single precision, as in training
    lam = jnp.float32(1e-3)
    v = jnp.ones(case.shape, jnp.float32)
    start = case.block.init(case.layer, jnp.float32)
    zeros = jax.tree.map(jnp.zeros_like, start)
    for name, statistic in ("init", start), ("zeros", zeros):
        inverse = case.block.factorize(statistic, lam)
        got = case.block.solve(inverse, v, lam)
        made = jax.tree.leaves((inverse, got))
        finite = all(np.isfinite(x).all() for x in made)
        law = f"{name}: all that is made of it is finite"
        holds(case, law, finite, "found NaN or infinity")
    # the last of them: that of zeros
    if case.damped:
        close(case, "zeros leave V / damping", got, v / lam, 1e-4, 0)


def check_types(case: Case) -> None:
    """A statistic of bfloat16 rows has the shapes and dtypes of `init`; what is made of it is
    float32 (or counts), and not of weak type.
    """
    start = jax.eval_shape(lambda: case.block.init(case.layer, jnp.float32))
    # a batch in half precision
    rows = [(_low(a), _low(g)) for a, g in case.rows(0, 3)]
    # shapes alone: nothing is computed
    measured = jax.eval_shape(lambda: measure(case, rows, 3, jnp.float32))
    got = _kinds(measured)
    expected = _kinds(start)
    law = "measure has the shapes and dtypes of init"
    holds(case, law, got == expected, f"got {got}, expected {expected}")
    number = jax.ShapeDtypeStruct((), jnp.float32)
    inverse = jax.eval_shape(case.block.factorize, start, number)
    v = jax.ShapeDtypeStruct(case.shape, jnp.float32)
    solved = jax.eval_shape(case.block.solve, inverse, v, number)
    # weak types would compile every step once more
    for x in jax.tree.leaves((start, inverse, solved)):
        single = x.dtype in (jnp.float32, jnp.int32)
        strong = single and not x.weak_type
        found = f"found {x} (weak: {x.weak_type})"
        holds(case, "float32 in, float32 out", strong, found)
    same = solved.shape == case.shape
    holds(case, "solve keeps the shape", same, f"got {solved.shape}")


@in_float64
def check_mapped(case: Case) -> None:
    """Layers that share a batched call get what they would get alone."""
    # two layers of one bucket
    lam = jnp.asarray(0.1)
    v = normal(5, (2, *case.shape))
    batches = [case.rows(seed, 3) for seed in (0, 1)]
    single = [measure(case, rows, 3) for rows in batches]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *single)
    inverse = jax.vmap(case.block.factorize, (0, None))(stacked, lam)
    solved = jax.vmap(case.block.solve, (0, 0, None))(inverse, v, lam)
    # each of them as if it were alone
    for i, statistic in enumerate(single):
        own = case.block.factorize(statistic, lam)
        alone = case.block.solve(own, v[i], lam)
        close(case, "solve under vmap is solve", solved[i], alone, 1e-8, 1e-10)


def _low(x: jax.Array) -> jax.Array:
    # tokens stay whole numbers
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x
    return x.astype(jnp.bfloat16)


def _kinds(tree: PyTree) -> list[tuple]:
    return [(x.shape, str(x.dtype)) for x in jax.tree.leaves(tree)]
