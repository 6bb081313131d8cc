"""Layouts of arrays over explicit mesh axes, and types inside `shard_map`; nothing changes where
there are none.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def replicated(x: jax.Array, ndim: int = 2) -> jax.sharding.NamedSharding | None:
    """Where mesh axes are explicit, a contraction over a sharded batch has to name its result's
    sharding.
    """
    sharding: Any = jax.typeof(x).sharding
    # one device, or mesh axes that the compiler handles itself
    if all(part is None for part in sharding.spec):
        return None
    nowhere = [None] * ndim
    spec = jax.sharding.PartitionSpec(*nowhere)
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
    examples, *features = sharding.spec or (None,)
    if all(part is None for part in features):
        return x
    nowhere = [None] * (x.ndim - 1)
    spec = jax.sharding.PartitionSpec(examples, *nowhere)
    whole = jax.sharding.NamedSharding(sharding.mesh, spec)
    return jax.sharding.reshard(x, whole)


def laid_out(x: jax.Array, like: Any) -> jax.Array:
    """`x` sharded over explicit mesh axes as another array is."""
    theirs: Any = getattr(jax.typeof(like), "sharding", None)
    mine: Any = jax.typeof(x).sharding
    if theirs is None or theirs.spec == mine.spec:
        return x
    return jax.sharding.reshard(x, theirs)


def varying_axes(aval: Any) -> tuple[str, ...]:
    """Axes of a `shard_map` over which a value differs between devices, where that is tracked."""
    # the attribute has moved between JAX versions
    manual = getattr(aval, "manual_axis_type", None)
    axes = getattr(manual, "varying", None) or getattr(aval, "vma", None)
    return tuple(axes or ())


def varying_over(tree: Any, axes: Iterable[str]) -> Any:
    """A tree typed as different on every device of some axes of a `shard_map`."""
    axes = tuple(axes)

    def cast(x: Any) -> Any:
        known = varying_axes(jax.typeof(x))
        # pcast takes axes over which a value does not vary yet
        missing = tuple(name for name in axes if name not in known)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree) if axes else tree


def varying_as(tree: Any, like: Any) -> Any:
    """A tree typed as different on every device of the manual axes over which `like` is.

    Both branches of a condition have to be so typed, and a state that begins the same on all
    devices is not. Without such axes, outside of `shard_map` for example, it is the tree itself.
    """
    axes: set[str] = set()
    for x in jax.tree.leaves(like):
        if isinstance(x, jax.Array):
            axes.update(varying_axes(jax.typeof(x)))
    return varying_over(tree, sorted(axes))


def zeros_of_type(aval: Any, leading: Sequence[int] = ()) -> jax.Array:
    """Zeros of the type of an abstract array, with more axes in front.

    Where the type says so they are sharded over explicit mesh axes, or vary over the axes of a
    `shard_map`: a probe's cotangent must have the type of its argument, and a scan's carry that of
    its start.
    """
    shape: tuple[int, ...] = (*leading, *aval.shape)
    sharding: Any = getattr(aval, "sharding", None)
    # explicit mesh axes: the new ones in front are not sharded
    spec = getattr(sharding, "spec", ())
    if any(part is not None for part in spec):
        in_front = [None] * len(leading)
        spec = jax.sharding.PartitionSpec(*in_front, *spec)
        sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
        return jnp.zeros(shape, aval.dtype, out_sharding=sharding)
    # inside of `shard_map`: zeros that vary like what they stand for
    zeros = jnp.zeros(shape, aval.dtype)
    return varying_over(zeros, varying_axes(aval))
