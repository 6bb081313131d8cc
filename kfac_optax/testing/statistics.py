"""What a statistic of a block owes the batch that it was measured on."""

import jax
import jax.numpy as jnp

from kfac_optax.testing.case import Case, measure
from kfac_optax.testing.comparison import close, in_float64


@in_float64
def check_batch_split(case: Case, *, seed: int = 0) -> None:
    """The statistic of a batch is the mean of those of its halves, so a running average is
    exact.
    """
    halves = case.rows(seed, 3), case.rows(seed + 10, 3)
    # use by use, the examples of one half behind those of the other
    joined = jax.tree.map(_joined, *halves)
    got = measure(case, joined, 6)
    # (F_1 + F_2) / 2 = F_12 for halves of equal size
    of_halves = [measure(case, rows, 3) for rows in halves]
    mean = jax.tree.map(lambda x, y: (x + y) / 2, *of_halves)
    law = "measure of a batch is the mean of its halves"
    close(case, law, got, mean, 1e-10, 1e-12)


@in_float64
def check_permutation(case: Case, *, seed: int = 0) -> None:
    """The order of the examples has no influence."""
    # an order that leaves no example where it was
    order = jnp.asarray([2, 0, 3, 1])
    rows = case.rows(seed, 4)
    moved = [(a[order], g[order]) for a, g in rows]
    got = measure(case, moved, 4)
    expected = measure(case, rows, 4)
    law = "measure does not depend on the order of examples"
    close(case, law, got, expected, 1e-10, 1e-12)


@in_float64
def check_masked(case: Case, *, seed: int = 0) -> None:
    """An example of weight zero counts as dropped, though it may hold NaN; weights have mean one,
    and `g` holds their root, or the weights themselves where a block takes first moments.
    """
    weights = jnp.asarray([0.0, 2.0])
    # first moments are means of g, second ones have the root of the weight inside
    inside = weights if case.block.first_moments else jnp.sqrt(weights)
    masked, alone = [], []
    for a, g in case.rows(seed, 2):
        # a weight of zero makes a gradient of zero, at all positions of its example
        positions_and_outputs = (1,) * (g.ndim - 1)
        beside = inside.reshape(-1, *positions_and_outputs)
        masked.append((_broken(a), g * beside))
        alone.append((a[1:], g[1:]))
    got = measure(case, masked, 2, weights=weights)
    expected = measure(case, alone, 1)
    law = "an example of weight zero counts as dropped"
    close(case, law, got, expected, 1e-10, 1e-12)


def _broken(a: jax.Array) -> jax.Array:
    """Inputs whose first example holds NaN."""
    # an integer cannot be NaN
    if jnp.issubdtype(a.dtype, jnp.integer):
        return a
    return a.at[0].set(jnp.nan)


def _joined(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.concatenate([x, y])
