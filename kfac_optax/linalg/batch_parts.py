"""A batch in parts, where what is computed of all examples at once would not fit."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._layout import zeros_of_type
from kfac_optax._types import PyTree


def count_parts(x: Float[Array, "n ..."], least: int) -> int:
    """In how many equal parts examples on axis 0 are taken: at least `least` where there are as
    many.

    Where that axis is sharded over explicit mesh axes, every part has examples of every device.

    >>> print(count_parts(jnp.ones((6, 2)), 1), count_parts(jnp.ones((6, 2)), 4))
    1 6
    """
    # examples of one device; the fewest parts, but no fewer than `least`, that divide them evenly
    n = x.shape[0] // shards(x)
    parts = max(1, min(least, n))
    while n % parts:
        parts += 1
    return parts


def parts_first(x: Float[Array, "n ..."], parts: int) -> Float[Array, "parts m ..."]:
    """Every `parts`-th example in a part: a batch sharded over devices stays balanced.

    >>> print(parts_first(jnp.arange(4), 2))
    [[0 2]
     [1 3]]
    """
    # [n, ...] -> [m, parts, ...] -> [parts, m, ...]: part k has the examples k, k + parts, ...
    split = x.reshape(-1, parts, *x.shape[1:])
    return jnp.moveaxis(split, 1, 0)


def sum_of_parts(
    function: Callable[..., PyTree],
    parts: int,
    *rows: PyTree,
) -> PyTree:
    """`function(*rows)`, sums over examples, as the sum of what it gives of parts of them.

    Args:
      function: of trees of arrays `[n, ...]`.
      parts: how many, a divisor of `n`.
      *rows: its arguments.

    >>> print(sum_of_parts(jnp.sum, 2, jnp.arange(4.0)))
    6.0
    """
    if parts == 1:
        return function(*rows)
    # all rows `[parts, m, ...]`: the scan below takes one part at a time
    split = jax.tree.map(lambda x: parts_first(x, parts), rows)
    # types of the sums, of which nothing is computed: where the scan starts
    first = jax.tree.map(lambda x: x[0], split)
    shapes = jax.eval_shape(function, *first)

    def add(total: PyTree, part: tuple[PyTree, ...]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, function(*part)), None

    total, _ = jax.lax.scan(add, jax.tree.map(zeros_of_type, shapes), split)
    return total


def shards(x: Array) -> int:
    """Over how many devices axis 0 is divided, as far as the type says so."""
    sharding = jax.typeof(x).sharding
    # names of the mesh axes that divide axis 0; a tuple where there are several
    names = sharding.spec[0] if len(sharding.spec) else None
    if names is None:
        return 1
    if not isinstance(names, tuple):
        names = (names,)
    sizes = sharding.mesh.shape
    return math.prod(sizes[name] for name in names)
