"""Directions of a step: parts of an update, their products, and what is made of them."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from kfac_optax._tree import inner, trains, wide_dtype
from kfac_optax._types import Directions, PyTree
from kfac_optax.linalg.pairs import symmetric_matrix
from kfac_optax.linalg.powers import times_power
from kfac_optax.step_rules._per_layer import exponent_of, largest_of


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
    # NaN and infinity count where the weight is not zero. Chosen entry by entry: compilers make two
    # loops of one with a choice that is the same for all of them
    not_finite = jnp.where(weights == 0, 0, jnp.nan)

    def entry(*xs: jax.Array) -> jax.Array:
        dtype = xs[0].dtype
        if not all(trains(x) for x in xs):
            return xs[0]
        terms = []
        for x, weight, instead in zip(xs, weights, not_finite, strict=True):
            term = weight.astype(dtype) * x.astype(dtype)
            terms.append(jnp.where(jnp.isfinite(x), term, instead.astype(dtype)))
        return sum(terms[1:], terms[0])

    return jax.tree.map(entry, *directions)


def exponent_of_sum(
    directions: Sequence[Mapping[str, jax.Array]],
    weights: jax.Array,
) -> jax.Array:
    """`e` with the largest entry of all `weights_i d_i` in `[2^(e-1), 2^e)`, or as near to it as
    `2^-e` times a weight stays within its range; zero where there is none.

    >>> print(exponent_of_sum(({"a": jnp.ones(2)}, {"a": jnp.ones(2)}), jnp.array([0.0, -3.0])))
    2
    """
    sizes = []
    for leaves, weight in zip(directions, weights, strict=True):
        size = jnp.abs(weight) * largest_of(leaves).astype(weight.dtype)
        sizes.append(jnp.where(weight == 0, 0, size))
    end = 3 * jnp.finfo(weights.dtype).maxexp // 4
    return jnp.clip(exponent_of({"": jnp.stack(sizes)}), -end, end)


def scaled_sum(
    first: Mapping[str, jax.Array],
    second: Mapping[str, jax.Array],
    weights: jax.Array,
    exponent: jax.Array,
) -> dict[str, jax.Array]:
    """`2^-exponent (weights_0 a + weights_1 b)` by name, in no less than float32.

    Where a weight is zero its direction has no part in it: the first may then hold NaN, the second
    is finite.

    >>> a, b = {"w": jnp.ones(2)}, {"w": jnp.array([0.0, 1.0])}
    >>> print(scaled_sum(a, b, jnp.array([3.0, 1.0]), jnp.int32(2))["w"])
    [0.75 1.  ]
    """
    # by a division: compilers repeat what is cheaper in every loop that reads it
    of_first, of_second = weights / times_power(jnp.ones_like(weights), exponent)
    instead = jnp.where(weights[0] == 0, 0, jnp.nan)
    out = {}
    for name, x in first.items():
        wide = wide_dtype(x)
        term = of_first.astype(wide) * x.astype(wide)
        term = jnp.where(jnp.isfinite(x), term, instead.astype(wide))
        out[name] = term + of_second.astype(wide) * second[name].astype(wide)
    return out


def moved_since(before: PyTree, now: PyTree, *, first: jax.Array) -> PyTree:
    """How the parameters have moved, `now - before`; not at all in the first update, or where the
    difference is not finite, or where they do not train (whole numbers, flags).
    """
    # a factor: compilers make two loops of one with a choice that is the same for all entries
    counts = jnp.where(first, 0.0, 1.0)

    def difference(new: jax.Array, old: jax.Array) -> jax.Array:
        if not trains(new):
            return jnp.zeros_like(new)
        return _finite((new - old) * counts.astype(new.dtype))

    return jax.tree.map(difference, now, before)


def kept_finite(now: PyTree, before: PyTree) -> PyTree:
    """A copy of the parameters; entries that are not finite stay as they were."""

    def kept(new: jax.Array, old: jax.Array) -> jax.Array:
        if not trains(new):
            return jnp.array(new)
        # as a sum, which takes compilers half as long as a choice between two arrays: `new` itself
        # where it is near to `old`, and elsewhere less than a rounding of the difference from it
        return old + _finite(new - old)

    return jax.tree.map(kept, now, before)


def _finite(x: jax.Array) -> jax.Array:
    """Zero in place of what is not finite."""
    return jnp.where(jnp.isfinite(x), x, 0)
