"""Layouts of arrays over explicit mesh axes; nothing changes where there are none."""

from typing import Any

import jax


def replicated(x: jax.Array, ndim: int = 2) -> jax.sharding.NamedSharding | None:
    """Where mesh axes are explicit, a contraction over a sharded batch has to name its result's
    sharding.
    """
    sharding: Any = jax.typeof(x).sharding
    # one device, or mesh axes that the compiler handles itself
    if all(part is None for part in sharding.spec):
        return None
    spec = jax.sharding.PartitionSpec(*[None] * ndim)
    return jax.sharding.NamedSharding(sharding.mesh, spec)


def as_replicated(x: jax.Array) -> jax.Array:
    """`x` on all devices, where mesh axes are explicit; itself everywhere else."""
    sharding = replicated(x, x.ndim)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def whole_features(x: jax.Array) -> jax.Array:
    """Rows `[N, ...]` split over examples alone, where mesh axes are explicit; itself elsewhere.

    A model whose weights are split has rows whose features are.
    """
    sharding: Any = jax.typeof(x).sharding
    if all(part is None for part in sharding.spec[1:]):
        return x
    spec = jax.sharding.PartitionSpec(sharding.spec[0], *[None] * (x.ndim - 1))
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(sharding.mesh, spec))


def laid_out(x: jax.Array, like: Any) -> jax.Array:
    """`x` sharded over explicit mesh axes as another array is."""
    theirs: Any = getattr(jax.typeof(like), "sharding", None)
    mine: Any = jax.typeof(x).sharding
    if theirs is None or theirs.spec == mine.spec:
        return x
    return jax.sharding.reshard(x, theirs)
