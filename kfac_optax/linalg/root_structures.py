"""Matrix groups for square roots of inverses: sets of matrices closed under products, with few
numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

STRUCTURES = ("dense", "diagonal", "block", "triangular", "toeplitz")


class Structure(NamedTuple):
    """How a root is held, and how it moves; matrices are blocks `[m, s, s]` of a diagonal.

    Attributes:
      size: coordinates in a block, at most; `None` for one block.
      expand: `held -> [m, s, s]`.
      compress: `[m, s, s] -> held`, of matrices that have the structure.
      tangent: `X [m, s, s] -> held`, of symmetric `X`: the matrix `m` of the structure whose
        `m + m^T` is nearest to `2 X`, so that `K (I - m)` moves `K K^T` by `-2 K X K^T` as far as
        the structure can.
    """

    size: int | None
    expand: Callable[[Any], Float[Array, "m s s"]]
    compress: Callable[[Float[Array, "m s s"]], Any]
    tangent: Callable[[Float[Array, "m s s"]], Any]

    def width(self, dimension: int) -> int:
        """Coordinates in a block, of so many."""
        return dimension if self.size is None else self.size


def structure_of(name: str, size: int) -> Structure:
    """The structure of a name; `size` is that of the blocks of `"block"`.

    - `"dense"`: any matrix.
    - `"diagonal"`: a diagonal one.
    - `"block"`: zero outside of blocks on the diagonal.
    - `"triangular"`: lower triangular.
    - `"toeplitz"`: lower triangular with equal entries along each diagonal, `d` numbers.

    >>> toeplitz = structure_of("toeplitz", 1)
    >>> print(toeplitz.expand(jnp.array([3.0, 2.0]))[0])
    [[3. 0.]
     [2. 3.]]
    """
    if name == "triangular":
        return Structure(None, _same, _same, _lower_tangent)
    if name == "toeplitz":
        return Structure(None, _toeplitz, _first_column, _toeplitz_tangent)
    sizes = {"dense": None, "diagonal": 1, "block": size}
    return Structure(sizes[name], _same, _same, _same)


def _same(x: jax.Array) -> jax.Array:
    return x


def _lower_tangent(x: jax.Array) -> jax.Array:
    # of m + m^T the diagonal has m twice, what is below it once
    lower = jnp.tril(x)
    below = jnp.tril(x, -1)
    return lower + below


def _toeplitz(column: jax.Array) -> jax.Array:
    index = jnp.arange(len(column))
    # entry (i, j) is that of the diagonal i - j
    distance = index[:, None] - index
    entries = column[jnp.maximum(distance, 0)]
    matrix = jnp.where(distance >= 0, entries, 0)
    return matrix[None]


def _first_column(matrix: jax.Array) -> jax.Array:
    return matrix[0, :, 0]


def _toeplitz_tangent(x: jax.Array) -> jax.Array:
    """Means along the diagonals of what is triangular."""
    dimension = x.shape[-1]
    index = jnp.arange(dimension)
    # above the diagonal the entries are zero, so it does not matter to which sum they go
    distance = (index[:, None] - index) % dimension
    zeros = jnp.zeros(dimension, x.dtype)
    tangent = _lower_tangent(x)[0]
    sums = zeros.at[distance].add(tangent)
    # a diagonal further down is shorter
    lengths = dimension - index
    return sums / lengths
