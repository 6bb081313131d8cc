"""How long an update of Shampoo can be."""

import math

import jax
import jax.numpy as jnp

from kfac_optax.methods.gradient.axes import FULL, Group
from kfac_optax.step_rules._per_layer import norms


def no_longer_than_fresh(
    group: Group,
    u: jax.Array,
    weight: jax.Array,
) -> jax.Array:
    """Updates cut to the length that roots of this step's statistics could give at most.

    `H_i >= w mat_i(G) mat_i(G)^T` bounds `||U||^2` by `(r_1 ... r_k)^(1/k) / w`, `r_i` the largest
    rank of `mat_i(G)`, and `n_i` times that where only the diagonal is kept. A root made before
    knows nothing of directions that came later, and would blow them up by that of the ridge.
    """
    # |U|^2 <= (r_1 ... r_k)^(1/k) / w
    entries, bound = math.prod(group.block), 1.0
    for n, kind in zip(group.block, group.kinds, strict=True):
        # the rank of mat_i(G); a diagonal has as many numbers as it is long
        rank = min(n, entries // n) * (1 if kind == FULL else n)
        bound *= rank ** (1 / len(group.block))
    # w, the weight of this step in its statistic
    return no_longer_than(group, u, bound / weight)


def no_longer_than(
    group: Group,
    u: jax.Array,
    square: jax.Array,
) -> jax.Array:
    """Updates cut to a squared length, every copy by itself."""
    size = norms(u.reshape(group.copies, 1, -1))
    usable = jnp.isfinite(size) & (size > 0)
    share = jnp.sqrt(square) / jnp.where(usable, size, 1)
    scale = jnp.where(usable, jnp.minimum(share, 1), 1)
    return u * scale.reshape(-1, *[1] * len(group.block))
