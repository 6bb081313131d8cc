"""All leaves as one vector and back, so that a deep net compiles about as fast as a shallow one."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._layout import as_replicated, laid_out
from kfac_optax._places import unknown_places
from kfac_optax._types import PyTree
from kfac_optax.step_rules._per_layer import within

MANY = 8  # slices of one array from which on every kernel that need not be compiled counts


def as_vector(tree: PyTree, dtype: Any) -> Float[Array, " d"]:
    """The entries of all leaves, one leaf after another in tree order.

    >>> print(as_vector({"a": jnp.ones((1, 2)), "b": jnp.float32(3.0)}, jnp.float32))
    [1. 1. 3.]
    """
    # all devices have the whole vector
    parts = [as_replicated(x).ravel().astype(dtype) for x in jax.tree.leaves(tree)]
    # without the barrier the compiler writes all parts out in every loop that reads the vector
    return jax.lax.optimization_barrier(jnp.concatenate(parts))


def as_leaves(vector: Float[Array, " d"], like: PyTree, some: jax.Array) -> PyTree:
    """Inverse of `as_vector`: leaves with the shapes and dtypes of others, within their range, and
    divided over devices as these are.

    Args:
      vector: the entries of all leaves.
      like: the other leaves.
      some: whether the entries matter; where not, they may go to any leaf.

    >>> print(as_leaves(jnp.arange(3.0), {"a": jnp.ones((1, 2)), "b": jnp.ones(1)}, jnp.bool_(True)))
    {'a': Array([[0., 1.]], dtype=float32), 'b': Array([2.], dtype=float32)}
    """
    leaves, treedef = jax.tree.flatten(like)
    dtypes = {x.dtype for x in leaves}
    if len(dtypes) == 1:  # as one: every operation on a leaf of its own has to be compiled
        (dtype,) = dtypes
        vector = jax.lax.optimization_barrier(within(vector, dtype))
    sizes = [x.size for x in leaves]
    starts = list(itertools.accumulate(sizes, initial=0))[:-1]
    known = len(leaves) < MANY
    places = starts if known else unknown_places(starts, some)
    parts = []
    for start, x in zip(places, leaves, strict=True):
        part = jax.lax.dynamic_slice(vector, (start,), (x.size,), allow_negative_indices=False)
        part = part if part.dtype == x.dtype else within(part, x.dtype)
        parts.append(laid_out(part.reshape(x.shape), x))
    return treedef.unflatten(parts)
