"""Rows of a batch as blocks keep them that need more than sums over rows."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Use
from kfac_optax.blocks.refusals import INSTEAD, given_outputs
from kfac_optax.blocks.use_rows import input_rows
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.linalg.gram import as_replicated
from kfac_optax.linalg.weighted_rows import keep_rows


class Columns(NamedTuple):
    """Rows of one measurement, scaled so that their sum of products is the factor; `None` for a
    factor that needs none.
    """

    inputs: Float[Array, "k n p"] | None
    outputs: Float[Array, "k n q"] | None


def scaled_rows(
    a: Array,
    g: Array | None,
    use: Use,
    *,
    where: str,
    instead: str = INSTEAD,
) -> list[Array]:
    """Rows `[n, p]` and `[n, q]` whose sums of products are the factors.

    Raises:
      ValueError: there are no output gradients, see `given_outputs`.
    """
    g = given_outputs(where, g, instead).astype(use.dtype)
    a = keep_rows(input_rows(a, use), use.weights)
    if use.weights is not None:  # g has its root inside
        root = jnp.sqrt(use.weights)[..., None]
        a = a * root.astype(use.dtype)
    # A = (1/N) sum a a^T and G = (1/rows) sum g g^T, with the divisors as roots in the rows
    a = a.reshape(-1, a.shape[-1]) / math.sqrt(use.examples)
    g = g.reshape(-1, g.shape[-1]) / math.sqrt(use.rows)
    return [a, g]


def pooled(
    a: Array,
    g: Array | None,
    use: Use,
) -> tuple[Array, Array | None, Use]:
    """One row for every example: inputs `[N, *positions, p]` averaged over positions, output
    gradients added up, and the use whose rows these are.

    >>> from kfac_optax.testing import dense_layer
    >>> use = Use(dense_layer(1, 1), 1, 2, jnp.float32)
    >>> a, g, use = pooled(jnp.array([[[1.0], [3.0]]]), jnp.ones((1, 2, 1)), use)
    >>> print(a, g, use.rows)
    [[2.]] [[2.]] 1
    """
    positions = tuple(range(1, a.ndim - 1))
    a = a.astype(use.dtype)
    # [N, *positions, q] -> [N, q]: gradients of the positions add up to that of the example
    if g is not None:
        g = g.astype(use.dtype).sum(positions)
    if use.weights is None:
        return a.mean(positions), g, use._replace(rows=use.examples)
    # a weighted mean over positions, sum_t w_t a_t / sum_t w_t; what weight an example has as a
    # whole stays in `share`
    share = use.weights.mean(positions)
    beside_positions = (-1, *(1,) * len(positions))
    relative = use.weights / positive_or_one(share).reshape(beside_positions)
    weighted = keep_rows(a, use.weights) * relative[..., None].astype(use.dtype)
    mean = weighted.mean(positions)
    return mean, g, use._replace(rows=use.examples, weights=share)


def of_all_pullbacks(columns: Columns) -> Columns:
    """Rows `[n, p]` and `[k n, q]`: inputs are the same in all pullbacks, output gradients of each
    are a part of the mean.
    """
    # [k, n, p] and [k, n, q] for k pullbacks
    a, g = jax.tree.map(as_replicated, columns)
    if g is not None:
        pullbacks = len(g)
        g = g.reshape(-1, g.shape[-1]) / math.sqrt(pullbacks)
    return Columns(None if a is None else a[0], g)


def fill(
    x: Float[Array, "n d"],
    rows: int,
    where: str,
) -> Float[Array, "rows d"]:
    """Rows of zeros behind the others, which add nothing to any product.

    Raises:
      ValueError: there are more already.

    >>> print(fill(jnp.ones((1, 2)), 2, "here"))
    [[1. 1.]
     [0. 0.]]
    """
    if len(x) > rows:
        raise ValueError(
            f"{where}: a batch has {len(x)} rows (all devices and pullbacks together), but the "
            f"state was made for {rows}. Make `layers` on a batch of the size that is used, or pass "
            f"rows={len(x)}; ggn has a pullback for every column of the output, fisher and "
            "empirical_fisher one."
        )
    missing = rows - len(x)
    return jnp.pad(x, ((0, missing), (0, 0)))
