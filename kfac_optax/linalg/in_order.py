"""Order between computations that do not read one another."""

import functools

import jax
import jax.numpy as jnp

from kfac_optax._tree import together
from kfac_optax._types import PyTree

_FEW = 4  # flags that may be computed again wherever they are read


def after(tree: PyTree, previous: PyTree) -> PyTree:
    """`tree` unchanged, but computed only once `previous` is: keeps factorisations one after
    another.

    On the CPU, JAX 0.10 spreads a batched LAPACK call over XLA's thread pool while a thread of the
    pool waits for it. Two such calls at the same time can take all threads of a small machine for
    waiting, and the step never returns. An optimisation barrier would be gone before scheduling,
    hence a dependency that holds at run time: nothing exceeds infinity, NaN included.
    """
    # nothing to wait for: no array, or none with an entry
    arrays = [x for x in jax.tree.leaves(previous) if x.size]
    if not arrays:
        return tree
    # false at run time, which the compiler cannot know: adding it orders without changing
    marks = [jnp.ravel(x)[0] > jnp.inf for x in arrays]
    few = len(marks) <= _FEW
    mark = functools.reduce(jnp.logical_or, marks) if few else together(marks).any()

    def later(x: jax.Array) -> jax.Array:
        return x + mark.astype(x.dtype)

    return jax.tree.map(later, tree)
