"""Parts of one array, at places that a compiler need not know."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def unknown_places(starts: Sequence[int], some: jax.Array) -> list[jax.Array]:
    """Where the parts begin, as numbers that the compiler of the CPU does not know.

    It makes a kernel of every slice with all that is done before it, and compiles equal ones once.
    Those of parts at known places are all different; out of a branch no place is known.

    Args:
      starts: index of the first entry of each part.
      some: whether the entries matter, shape=(), dtype=bool; where not, the places may be any.

    >>> print(*jax.jit(lambda some: unknown_places([0, 3], some))(True))
    0 3
    """

    def unknown(some: jax.Array) -> list[jax.Array]:
        def nowhere() -> list[jax.Array]:
            return [jnp.int32(0)] * len(starts)

        return jax.lax.cond(some, lambda: known(some), nowhere)

    def known(some: jax.Array) -> list[jax.Array]:
        return [jnp.int32(start) for start in starts]

    return jax.lax.platform_dependent(some, cpu=unknown, default=known)


def consecutive(
    x: jax.Array,
    counts: Sequence[int],
    some: jax.Array | None = None,
    *,
    many: int,
) -> list[jax.Array]:
    """Parts of an array, one behind another along axis 0.

    Args:
      x: all of them, `[sum(counts), ...]`.
      counts: entries of each part.
      some: see `unknown_places`; `None` where every part matters.
      many: number of parts from which on places are unknown.

    >>> print(*consecutive(jnp.arange(3), [1, 2], many=8))
    [0] [1 2]
    """
    starts = [0, *itertools.accumulate(counts)]
    if some is None or len(counts) < many:
        return [x[a:b] for a, b in itertools.pairwise(starts)]
    # along all other axes from the first entry on
    first = (jnp.int32(0),) * (x.ndim - 1)
    parts = []
    for start, count in zip(unknown_places(starts[:-1], some), counts, strict=True):
        size = (count, *x.shape[1:])
        part = jax.lax.dynamic_slice(x, (start, *first), size, allow_negative_indices=False)
        parts.append(part)
    return parts
