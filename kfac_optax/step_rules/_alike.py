"""Equal leaves of two trees on one axis, so that a deep net compiles about as fast as a shallow one."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_MANY = 8  # equal leaves from which on compiling each by itself counts


def stacked_alike(
    left: Mapping[str, jax.Array],
    right: Mapping[str, jax.Array],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Leaves of both sides, `[leaves, ...]` by the name of the first: many of one type together.

    >>> many = {name: jnp.ones(2) for name in "abcdefgh"}
    >>> left, right = stacked_alike(many | {"z": jnp.ones(3)}, many | {"z": jnp.ones(3)})
    >>> print({name: x.shape for name, x in left.items()})
    {'a': (8, 2), 'z': (1, 3)}
    """
    members: dict[Any, list[str]] = {}
    for name, x in right.items():
        # of equal shape, dtype and layout over devices
        kind = jax.typeof(left[name]), jax.typeof(x)
        members.setdefault(kind, []).append(name)
    of_left, of_right = {}, {}
    for names in members.values():
        # few are not worth a copy
        parts = [names] if len(names) >= _MANY else [[name] for name in names]
        for some in parts:
            of_left[some[0]] = _in_stack([left[name] for name in some])
            of_right[some[0]] = _in_stack([right[name] for name in some])
    return of_left, of_right


def _in_stack(leaves: Sequence[jax.Array]) -> jax.Array:
    """`[leaves, ...]`, written once and not in every loop that reads it."""
    if len(leaves) == 1:
        return leaves[0][None]
    return jax.lax.optimization_barrier(jnp.stack(leaves))
