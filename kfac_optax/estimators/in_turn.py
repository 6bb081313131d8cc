"""A forward pass of its own begins once another one has freed its activations."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._layout import varying_axes
from kfac_optax._tree import together
from kfac_optax._types import PyTree
from kfac_optax.linalg.in_order import after


def in_turn(args: tuple[PyTree, ...], previous: PyTree) -> tuple[PyTree, ...]:
    """A model's arguments, unchanged, but there only once `previous` is, so that what is computed
    from them waits.

    Two forward passes that the compiler may order as it likes have their activations at the same
    time. Outside of a compiled function the order is that of the program, and nothing is done.

    Args:
      args: of the model; keys, scalars, and arrays that are none of JAX's stay as they are.
      previous: any arrays.

    Returns:
      The same tree.

    >>> x = jnp.arange(3)
    >>> print(jax.jit(lambda x, w: in_turn((x,), w))(x, jnp.ones(2))[0])
    [0 1 2]
    """
    entries = [_first(x) for x in jax.tree.leaves(previous) if _orders(x)]
    if not entries:
        return args
    varies: set[str] = set()
    for entry in entries:
        varies.update(varying_axes(jax.typeof(entry)))

    def waits(x: Any) -> bool:
        numeric = isinstance(x, jax.Array) and not jnp.issubdtype(x.dtype, jax.dtypes.extended)
        # a part of a device's own inside `shard_map` would make what is the same everywhere its own
        return numeric and x.ndim > 0 and varies <= set(varying_axes(jax.typeof(x)))

    # one number for all of them: compared one by one each would be a kernel
    dtype = jnp.result_type(*entries)
    last = together([entry.astype(dtype) for entry in entries]).max()
    leaves, treedef = jax.tree.flatten(args)
    waiting = iter(after(list(filter(waits, leaves)), last))
    return treedef.unflatten([next(waiting) if waits(x) else x for x in leaves])


def is_cut(args: tuple[PyTree, ...], whole: tuple[PyTree, ...]) -> bool:
    """Whether any array is another one than that of the whole batch.

    >>> x, y = jnp.ones(2), jnp.ones(2)
    >>> print(is_cut((x, y), (x, y)), is_cut((x[:1], y), (x, y)))
    False True
    """
    mine, theirs = jax.tree.leaves(args), jax.tree.leaves(whole)
    pairs = zip(mine, theirs, strict=False)
    return len(mine) != len(theirs) or any(one is not other for one, other in pairs)


def _orders(x: Any) -> bool:
    """Whether an array is one that something can wait for, at no cost in messages."""
    if not isinstance(x, jax.core.Tracer):
        return False
    if not (math.prod(x.shape) and jnp.issubdtype(x.dtype, jnp.inexact)):
        return False
    # explicit mesh axes have no first entry that all devices know
    spec = getattr(jax.typeof(x).sharding, "spec", ())
    return all(part is None for part in spec)


def _first(x: jax.Array) -> jax.Array:
    """The first entry, without flattening what may lie on several devices."""
    corner = jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim)
    return jnp.real(corner.reshape(()))
