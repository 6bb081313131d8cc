"""Directions of a step: parts of an update, their products, and what is made of them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kfac_optax._tree import inner, trains
from kfac_optax._types import Directions, PyTree
from kfac_optax.linalg.pairs import symmetric_matrix


def negative_parts(updates: PyTree) -> tuple[PyTree, ...]:
    """The directions in which a preconditioner would go: one for the fine level, one for all that
    is added to it.
    """
    parts = updates.parts if isinstance(updates, Directions) else (updates,)
    # all that is added to the fine level counts as one direction
    if len(parts) > 2:
        first, *others = parts
        added = jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *others)
        parts = (first, added)
    # a step goes against the update; written once, not in every product that reads it
    negative = tuple(jax.tree.map(jnp.negative, part) for part in parts)
    return jax.lax.optimization_barrier(negative)


def inner_products_of(directions: Sequence[PyTree]) -> jax.Array:
    """`<d_i, d_j>` of all pairs, `[k, k]`."""

    def entry(i: int, j: int) -> jax.Array:
        return inner(directions[i], directions[j])

    return symmetric_matrix(entry, len(directions))


def combine(directions: Sequence[PyTree], weights: jax.Array) -> PyTree:
    """`sum_i weights_i d_i`; where a weight is zero its direction may hold anything, NaN included.

    Of parameters that do not train (whole numbers, flags) the first direction is left as it is.
    """

    def entry(*xs: jax.Array) -> jax.Array:
        dtype = xs[0].dtype
        if not all(trains(x) for x in xs):
            return xs[0]
        terms = []
        for x, weight in zip(xs, weights, strict=True):
            w = weight.astype(dtype)
            term = w * x.astype(dtype)
            terms.append(jnp.where(w == 0, 0, term))
        return sum(terms[1:], terms[0])

    return jax.tree.map(entry, *directions)


def moved_since(before: PyTree, now: PyTree, *, first: jax.Array) -> PyTree:
    """How the parameters have moved, `now - before`; not at all in the first update, or where the
    difference is not finite, or where they do not train (whole numbers, flags).
    """

    def difference(new: jax.Array, old: jax.Array) -> jax.Array:
        if not trains(new):
            return jnp.zeros_like(new)
        moved = new - old
        return jnp.where(first | ~jnp.isfinite(moved), 0, moved)

    return jax.tree.map(difference, now, before)


def kept_finite(now: PyTree, before: PyTree) -> PyTree:
    """A copy of the parameters; entries that are not finite stay as they were."""

    def kept(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(jnp.isfinite(new), new, old) if trains(new) else jnp.array(new)

    return jax.tree.map(kept, now, before)
