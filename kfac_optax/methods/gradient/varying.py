"""Gradients that differ between the devices of a `shard_map`, and states that do so with them."""

from typing import Any

import jax

from kfac_optax._layout import varying_axes
from kfac_optax._types import PyTree


def varying_as(tree: PyTree, like: Any) -> PyTree:
    """A tree typed as different on every device of the manual axes over which `like` is.

    Both branches of a condition have to be so typed, and a state that begins the same on all
    devices is not. Without such axes, outside of `shard_map` for example, it is the tree itself.
    """
    arrays = [x for x in jax.tree.leaves(like) if isinstance(x, jax.Array)]
    axes = set().union(*(varying_axes(jax.typeof(x)) for x in arrays))
    if not axes:
        return tree

    def cast(x: Any) -> Any:
        # pcast takes axes over which a value does not vary yet
        missing = tuple(sorted(axes - set(varying_axes(jax.typeof(x)))))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)
