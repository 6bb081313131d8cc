"""Small leaves as one vector: a sum over it is one kernel, not one for each of their shapes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._layout import replicated

_SMALL = 4096  # entries up to which a copy of a leaf costs less than compiling kernels for it


def join_small(*sides: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], ...]:
    """The leaves of every side, those that are small as one vector `[entries]` for each dtype, by
    the name of the first of them.

    All sides have the same names and shapes. Leaves that are sharded over explicit mesh axes stay
    as they are.

    >>> tree = {"a": jnp.ones(2), "b": jnp.ones((3, 1)), "c": jnp.ones((100, 100))}
    >>> print({name: x.shape for name, x in join_small(tree)[0].items()})
    {'a': (5,), 'c': (100, 100)}
    """
    groups: dict[Any, list[str]] = {}
    for name in sides[0]:
        leaves = [side[name] for side in sides]
        alone = leaves[0].size > _SMALL or any(replicated(x) is not None for x in leaves)
        # a vector of several dtypes would widen the narrow ones
        kind = name if alone else tuple(x.dtype for x in leaves)
        groups.setdefault(kind, []).append(name)
    joined = []
    for side in sides:
        joined.append({names[0]: _vector(side, names) for names in groups.values()})
    return tuple(joined)


def _vector(leaves: Mapping[str, jax.Array], names: list[str]) -> jax.Array:
    if len(names) == 1:
        return leaves[names[0]]
    return jnp.concatenate([leaves[name].reshape(-1) for name in names])
