"""Second moments of the entries of per-example products `a_b^T g_b`, which are never all formed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Use
from kfac_optax.linalg.batch_parts import count_parts, sum_of_parts
from kfac_optax.linalg.gram import gram, homogeneous
from kfac_optax.linalg.weighted_rows import finite_padding

# Products of a whole batch may be many times its size: above this many entries they are formed for
# a part of the examples at a time.
ENTRIES = 1 << 25


def example_rows(
    a: Array,
    g: Array,
    use: Use,
) -> tuple[Array, Array]:
    """Rows whose products, added up within an example, are its gradient times the root of its
    weight: in the dtype of the statistics, with the bias coordinate.
    """
    a = a.astype(use.dtype)
    g = g.astype(use.dtype)
    if use.weights is not None:
        # g has the root of the weight inside. A row of weight zero can carry the gradient of
        # another row's label, so it is left out only where it holds no number.
        a = finite_padding(a, use.weights[..., None])
    if use.bias:
        a = homogeneous(a)
    return a, g


def example_moments(
    a: Float[Array, "n *rows p"],
    g: Float[Array, "n *rows q"],
    *,
    precision: jax.lax.PrecisionLike = "highest",
    entries: int | None = None,
) -> Float[Array, "p q"]:
    """`sum_b (sum_r a_br g_br^T)^2`, entry by entry: rows of an example are added up before squaring.

    With one row per example the square of the product is the product of squares, one matmul.
    Otherwise the `[p, q]` products of as many examples are formed at a time as stay below `entries`.

    Args:
      a: left rows.
      g: right rows.
      precision: of the matmuls.
      entries: how many entries of products exist at a time; `None` for `ENTRIES`.

    >>> a, g = jnp.array([[[1.0], [2.0]]]), jnp.array([[[3.0], [-1.0]]])
    >>> print(example_moments(a, g), example_moments(a[:, 0], g[:, 0]))
    [[1.]] [[9.]]
    """
    n, p = a.shape[0], a.shape[-1]
    q = g.shape[-1]
    # positions, patches and steps on one axis: [n, rows, p] and [n, rows, q]
    a = a.reshape(n, -1, p)
    g = g.reshape(n, -1, q)
    # (a_i g_j)^2 = a_i^2 g_j^2
    if a.shape[1] == 1:
        return gram(jnp.square(a), jnp.square(g), precision=precision)

    def squares(a: Array, g: Array) -> Array:
        # D_b = sum_r a_br g_br^T for every example b of the part, [m, p, q]
        rows, examples = ((1,), (1,)), ((0,), (0,))
        products = jax.lax.dot_general(a, g, (rows, examples), precision=precision)
        return jnp.sum(jnp.square(products), 0)

    # so many parts that the D_b of one have at most `entries` entries
    least = -(-n * p * q // (entries or ENTRIES))
    parts = count_parts(a, least)
    return sum_of_parts(squares, parts, a, g)
